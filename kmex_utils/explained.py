"""What explaining a network on a folder gives: prototypes, maps of every image, and views of them.

:func:`kmex_utils.posthoc.explain` makes it.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from . import images
from .attribution import attribution, carried
from .datasets import Dataset
from .explainers import EncoderKMeans, KMEx, block_name
from .interpretation import Interpretation, Patch, segment_patch
from .networks import Network
from .store import replacing, save_json

KEPT_PATCHES = 1024  # patches drawn; the oldest go first


class Picture(NamedTuple):
    """One image: ``pixels`` uint8 [3, S, S], a ``name``, and where it lies in the data set, if it does."""

    pixels: np.ndarray
    name: str
    split: str = ""
    index: int = -1

    @property
    def rgb(self) -> np.ndarray:
        """For display, uint8 [S, S, 3]."""
        return np.broadcast_to(self.pixels.transpose(1, 2, 0), (*self.pixels.shape[1:], 3))


class Seen(NamedTuple):
    """What network and prototypes make of one image: y [C], h [1, D, H, W], q_s by start block [1, H_b, W_b]."""

    y: torch.Tensor
    h: torch.Tensor
    maps: dict[int, torch.Tensor]


class Explained:
    """A network, a folder and its prototypes: what :func:`explain` returns.

    Attributes
    ----------
    network, dataset
        ``dataset.train`` made the prototypes, ``dataset.test`` was held out. Its ``classes`` are the folder's, or the
        network's where predictions stand in for labels.
    explainers
        :class:`~kmex_utils.explainers.EncoderKMeans` by start block.
    kmex
        :class:`~kmex_utils.explainers.KMEx` by K/C.
    maps
        q_s of every image by (start block, split), int32 [N, H_b, W_b].
    y
        The network's scores by split, [N, C].
    table
        Cosines (Table 1) and accuracy (Table 2) by model.
    predictions_as_labels
        Whether the network's predictions stand in for labels.
    settings
        Everything that fixes the result.
    """

    def __init__(self, network: Network, dataset: Dataset, settings: dict[str, Any]) -> None:
        self.network, self.dataset, self.settings = network, dataset, settings
        self.predictions_as_labels = False
        self.explainers: dict[int, EncoderKMeans] = {}
        self.kmex: dict[int, KMEx] = {}
        self.maps: dict[tuple[int, str], torch.Tensor] = {}
        self.y: dict[str, torch.Tensor] = {}
        self.h: dict[str, torch.Tensor] = {}
        self.nearest: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.shared: dict[int, torch.Tensor] = {}
        self.table = None
        self._patches: dict[tuple[int, int, int], Patch] = {}
        self._seen: dict[bytes, Seen] = {}

    def __repr__(self) -> str:
        names = ", ".join(self.name(b) for b in self.explainers)
        return (
            f"Explained({self.network.name}: {names} on {len(self.dataset.train)} + {len(self.dataset.test)} images of "
            f"{self.dataset.name}, {len(self.dataset.classes)} classes)"
        )

    def name(self, start_block: int) -> str:
        """``B4``, ``B234`` …"""
        return block_name(start_block, len(self.network.blocks))

    @property
    def start_blocks(self) -> list[int]:
        """From the last to the shallowest."""
        return sorted(self.explainers, reverse=True)

    # one image

    def picture(self, image: int | str | Path | np.ndarray | Image.Image) -> Picture:
        """An image by its index or name in the folder, from a file, or as uint8 array [H, W, 3] or a Pillow image.

        An index counts held-out images first, then those that made the prototypes.

        Raises
        ------
        ValueError, IndexError
            There is no such image, or it cannot be read.
        """
        test, train = self.dataset.test, self.dataset.train
        if isinstance(image, Picture):
            return image
        if isinstance(image, int | np.integer):
            if not 0 <= image < len(test) + len(train):
                raise IndexError(f"image must be an index of the {len(test) + len(train)} images, got {image}")
            split, part, i = ("test", test, int(image)) if image < len(test) else ("train", train, image - len(test))
            return Picture(np.asarray(part.pixels[i]), self.names[image], split, int(i))
        if isinstance(image, str | Path):
            names = self.names
            inside = Path(image).expanduser()
            if str(image) in names:
                return self.picture(names.index(str(image)))
            if not inside.is_file():
                raise ValueError(f"{image} is neither a file nor an image of {self.dataset.name} such as {names[0]}")
            root = Path(self.settings["folder"]) if self.settings.get("folder") else None
            if root and inside.absolute().is_relative_to(root):
                name = str(inside.absolute().relative_to(root))
                if name in names:
                    return self.picture(names.index(name))
            pixels, _ = images.read(inside, self.network.image_size, self.network.fit)
            return Picture(pixels, inside.name)
        if isinstance(image, np.ndarray):
            if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,), (4,)):
                raise ValueError(
                    f"an array must be uint8 [H, W, 3] with values 0 … 255, got {image.dtype} {list(image.shape)}"
                )
            image = Image.fromarray(image)
        return Picture(images.fitted(image, self.network.image_size, self.network.fit)[0], "image")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all images, held-out ones first; with their split where both splits use a name."""
        test, train = self.dataset.test.names, self.dataset.train.names
        if set(test) & set(train):
            test, train = (tuple(f"{split}/{n}" for n in part) for split, part in (("test", test), ("train", train)))
        return (*test, *train)

    def seen(self, picture: Picture) -> Seen:
        """What the network and the prototypes make of an image; the folder's own are not computed again."""
        if picture.split in self.h:
            i = slice(picture.index, picture.index + 1)
            maps = {b: self.maps[b, picture.split][i].long() for b in self.start_blocks}
            return Seen(self.y[picture.split][picture.index], self.h[picture.split][i], maps)
        key = picture.pixels.tobytes()
        if key not in self._seen:
            x, y = self.network.outputs(self.dataset.normalise(picture.pixels[None]))
            maps = {b: explainer.sim(explainer.h(x)) for b, explainer in self.explainers.items()}
            while len(self._seen) >= 32:
                self._seen.pop(next(iter(self._seen)))
            self._seen[key] = Seen(y[0], x[-1], maps)
        return self._seen[key]

    def target(self, name: str, seen: Seen) -> int:
        """Index of a class of the network; empty: the predicted one."""
        if not name:
            return int(seen.y.argmax())
        return self.network.output(name)

    def interpretations(
        self, image, start_blocks: Sequence[int] = (), target: str = "", max_patches: int = 10
    ) -> list[Interpretation]:
        """Figure 1's parts for an image, one for each start block (empty: the last and the shallowest)."""
        blocks = list(start_blocks) or sorted({self.start_blocks[0], self.start_blocks[-1]}, reverse=True)
        for b in blocks:
            if b not in self.explainers:
                raise ValueError(f"start blocks run from {self.start_blocks[-1]} to {self.start_blocks[0]}, got {b}")
        picture = self.picture(image)
        seen = self.seen(picture)
        att = self.attributions(seen, target)
        found = []
        for b in blocks:
            q_s = seen.maps[b]
            predicted = self.dataset.classes[int(self.explainers[b].proj(q_s)[0].argmax())]
            used, counts = q_s.unique(return_counts=True)
            order = counts.argsort(descending=True, stable=True)[:max_patches]
            patches = [
                replace(self.patch(b, k), share=n / q_s.numel())
                for k, n in zip(used[order].tolist(), counts[order].tolist(), strict=True)
            ]
            attributed = att[b][0].numpy() if att else None
            found.append(Interpretation(self.name(b), q_s[0].numpy(), attributed, tuple(patches), predicted))
        return found

    def attributions(self, seen: Seen, target: str = "") -> dict[int, torch.Tensor] | None:
        """att(b:) by start block, [1, H_b, W_b]; None where eq. 11 does not hold."""
        if not self.network.pooled_linear:
            return None
        c_j = self.network.c[[self.target(target, seen)]]
        align_corners = self.settings["align_corners"]
        return carried(attribution(seen.h, c_j), seen.maps, align_corners)

    def panel(self, image, start_blocks: Sequence[int] = (), target: str = ""):
        """Figure 1 of an image: maps, attributions and nearest patches.

        Parameters
        ----------
        image
            As in :meth:`picture`.
        start_blocks
            From left to right; empty: the last and the shallowest.
        target
            Class of the network to attribute to; empty: the predicted one.
        """
        from .figures import figure1

        picture = self.picture(image)
        seen = self.seen(picture)
        title = f"{Path(picture.name).name}: {self.network.name} says {self.network.classes[int(seen.y.argmax())]}"
        return figure1(picture.rgb, self.interpretations(picture, start_blocks, target), title)

    # prototypes

    def patch(self, start_block: int, prototype: int, rank: int = 0) -> Patch:
        """The training patch nearest to a prototype, or the next ones of other images (``rank`` 1, 2 …)."""
        key = (start_block, prototype, rank)
        if key not in self._patches:
            image, position = (int(found[prototype, rank]) for found in self.nearest[start_block])
            labels = self.explainers[start_block].prototypes.labels
            segments = self.maps[start_block, "train"][image].numpy()
            pixels = segment_patch(self.dataset.train.rgb(image), segments, position)
            while len(self._patches) >= KEPT_PATCHES:
                self._patches.pop(next(iter(self._patches)))
            self._patches[key] = Patch(prototype, self.dataset.classes[int(labels[prototype])], 0.0, pixels, image)
        return self._patches[key]

    def patches(self, start_block: int, prototype: int) -> list[Patch]:
        """The nearest training patches of a prototype, each of another image."""
        found = self.nearest[start_block][0][prototype]
        return [self.patch(start_block, prototype, rank) for rank in range(int((found >= 0).sum()))]

    def sharing(self, start_block: int, prototype: int) -> tuple[int, int]:
        """In how many training images of its class a prototype appears, and how many there are."""
        c = int(self.explainers[start_block].prototypes.labels[prototype])
        return int(self.shared[start_block][prototype]), int((self.dataset.train.labels == c).sum())

    # to look at, send and read on

    def explorer(self, image: int | str = 0, start_block: int = 0):
        """An interactive view for the notebook (ipywidgets); a still one where widgets cannot run."""
        from .explorer import Explorer

        return Explorer(self, image, start_block)

    def report(self, path: str | Path, panels: Sequence = (), **options) -> Path:
        """One HTML file to send; see :func:`kmex_utils.report.write`."""
        from . import report

        return report.write(self, Path(path), panels, **options)

    def export(self, folder: str | Path, images: str | Path = "", **options) -> Path:
        """Maps, attributions, predictions for a whole folder; see :func:`kmex_utils.export.export`."""
        from .export import export

        images = images or self.settings["folder"]
        if not images:
            raise ValueError("give the folder of images to export: the prototypes are of a data set, not of a folder")
        return export(self, Path(folder), images, **options)

    def save(self, folder: str | Path) -> Path:
        """Prototypes (safetensors), table (CSV) and settings (JSON) in a folder; those saved there before go."""
        folder = Path(folder)
        if (folder / "settings.json").exists():  # this method's, not a run's
            for stale in (*folder.glob("B[0-9]*.safetensors"), *folder.glob("KMEx-*.safetensors")):
                stale.unlink()
        for b, explainer in self.explainers.items():
            explainer.prototypes.save(folder / f"{self.name(b)}.safetensors", {**self.settings, "start_block": b})
        for k, explainer in self.kmex.items():
            explainer.prototypes.save(folder / f"KMEx-{k}.safetensors", {**self.settings, "per_class": k})
        with replacing(folder / "table.csv") as temporary:
            self.table.to_csv(temporary, float_format="%.6g")
        save_json(folder / "settings.json", self.settings)
        return folder
