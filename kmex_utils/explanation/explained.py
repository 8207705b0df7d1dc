"""What explaining a network gives: prototypes, what they say of any image, and a folder that keeps them.

:func:`kmex_utils.explanation.fit.explain` makes it from a folder of images, notebooks 3 and 4 from a run.
"""

import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm.auto import tqdm

from .. import data, networks, paths
from ..data import Dataset, reading
from ..hardware import exact
from ..method.attribution import attribution, carried, chance, contributions
from ..method.composite import Normalisation
from ..method.explainers import EncoderKMeans, KMEx, block_name
from ..method.measures import accuracy
from ..method.products import double_device
from ..method.prototypes import Prototypes
from ..networks import Network
from ..networks.network import Target
from ..store import holds, load_json, load_tensors, replacing, save_json, save_tensors, writable
from . import gallery
from .edits import BATCH, Edited, Edits, left_of
from .interpretation import Interpretation, Patch, segment_patch
from .nearest import Nearest
from .passed import SPLITS
from .refits import Refits, refit

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .arrays import Labels
    from .captum import BlockAttribution
    from .explorer import Explorer
    from .margin import Margin

SMALL_PATCH = 96  # pixels of a patch saved small: as the explorer shows it
KEPT_SEEN = 32  # images from outside the data set whose maps stay in memory
T = TypeVar("T")


@dataclass(frozen=True)
class Picture:
    """One image: ``pixels`` uint8 [3, H, W], a ``name``, and where it lies in the data set, if it does."""

    pixels: np.ndarray
    name: str
    split: str = ""
    index: int = -1

    @property
    def rgb(self) -> np.ndarray:
        """For display, uint8 [H, W, 3]."""
        return np.broadcast_to(self.pixels.transpose(1, 2, 0), (*self.pixels.shape[1:], 3))


AnyImage = int | str | Path | np.ndarray | torch.Tensor | Image.Image | Picture


class Seen(NamedTuple):
    """What network and prototypes make of images: y [n, C], h [n, D, H, W], q_s by start block [n, H_b, W_b].

    ``inputs`` are the images as they enter the network, [n, 1 or 3, H, W].
    """

    y: torch.Tensor
    h: torch.Tensor
    maps: dict[int, torch.Tensor]
    inputs: torch.Tensor


class Attributed(NamedTuple):
    """Attributions of images to a class, or to one minus another: ``target``, [1, n] or [2, n].

    By start block: ``maps`` att(b:) [n, H_b, W_b], ``contributions`` of each prototype's segment to the score [n, K_b],
    and of each map's colour scale its ``centre``, the map's mean, and its ``half`` width: as far as the map goes from
    there, at least what columns of random directions would reach, [n] each.
    """

    target: torch.Tensor
    maps: dict[int, torch.Tensor]
    contributions: dict[int, torch.Tensor]
    centre: dict[int, torch.Tensor]
    half: dict[int, torch.Tensor]


class Explained:
    """A network and its prototypes.

    Attributes
    ----------
    network, classes
        The classes of the prototypes: the folder's, or the network's where predictions stand in for labels.
    explainers
        :class:`~kmex_utils.method.explainers.EncoderKMeans` by start block.
    kmex
        :class:`~kmex_utils.method.explainers.KMEx` by K/C.
    dataset
        ``dataset.train`` made the prototypes, ``dataset.test`` was held out; None where only prototypes were loaded.
    settings
        Everything that fixes the result.
    table
        Cosines (Table 1) and accuracy (Table 2) by model, or None.
    maps, y, h
        By (start block, split) q_s of every image, int32 [N, H_b, W_b]; by split the network's scores [N, C] and, where
        they fit, the encoder's outputs. Filled by :func:`~kmex_utils.explanation.fit.explain`, maps and y also by
        :meth:`fill`.
    edits
        :class:`~kmex_utils.explanation.edits.Edits`: prototypes disabled, merged, renamed.
    refits
        :class:`~kmex_utils.explanation.refits.Refits` by start block, once :meth:`certainty` was asked for.
    """

    def __init__(self, network: Network, dataset: Dataset | None, settings: dict[str, Any]) -> None:
        self.network, self.dataset, self.settings = network, dataset, settings
        self.classes: tuple[str, ...] = tuple(settings.get("classes", dataset.classes if dataset else ()))
        self.explainers: dict[int, EncoderKMeans] = {}
        self.kmex: dict[int, KMEx] = {}
        self.nearest: dict[int, Nearest] = {}
        self.maps: dict[tuple[int, str], torch.Tensor] = {}
        self.y: dict[str, torch.Tensor] = {}
        self.h: dict[str, torch.Tensor] = {}
        self.table: pd.DataFrame | None = None
        self._made: dict[str, dict[str, Any]] = {}  # settings of each explainer
        # patches as saved, by start block, prototype and rank
        self._drawn: dict[tuple[int, int, int | str], bytes] = {}
        self._seen = lru_cache(KEPT_SEEN)(self._see)
        self._kept = lru_cache(KEPT_SEEN)(self._keep)
        self.edits = Edits(self)
        self.refits: dict[int, Refits] = {}

    def __repr__(self) -> str:
        names = ", ".join([*(f"KMEx (K/C={k})" for k in self.kmex), *(self.name(b) for b in self.explainers)])
        of = f"{len(self.dataset.train)} + {len(self.dataset.test)} images of " if self.dataset else ""
        what = names or "no prototypes yet"
        return f"Explained({self.network.name}: {what} on {of}{self.settings['dataset']}, {len(self.classes)} classes)"

    @property
    def predictions_as_labels(self) -> bool:
        """Whether the network's predictions stand in for labels."""
        return bool(self.settings.get("stand_in_classes"))

    def name(self, start_block: int) -> str:
        """``B4``, ``B234`` …"""
        return block_name(start_block, len(self.network.blocks))

    @property
    def start_blocks(self) -> list[int]:
        """From the last to the shallowest; a ValueError if there are none."""
        if not self.explainers:
            raise ValueError("there are no prototypes of the encoder: run notebook 04_encoder, or explain() a folder")
        return sorted(self.explainers, reverse=True)

    # prototypes

    def add_kmex(self, kmex: KMEx, **settings: Any) -> str:
        """Take KMEx in; ``settings`` say how it was fitted. Returns its name, ``KMEx-5``."""
        count = len(kmex.prototypes) // len(self.classes)
        self.kmex[count] = kmex
        self._made[f"KMEx-{count}"] = {"prototypes_per_class": count, **settings}
        return f"KMEx-{count}"

    def add_encoder(self, explainer: EncoderKMeans, nearest: Nearest, maps: torch.Tensor, **settings: Any) -> str:
        """Take B4, B34 … in with what is near its prototypes; returns its name.

        ``maps`` are q_s of the training images, [N, H', W']; ``settings`` say how it was fitted.
        """
        b = explainer.start_block
        if any(edit["start_block"] == b for edit in self.edits.done):
            raise ValueError(f"{self.name(b)} was edited, and another fit has other prototypes: edits.undo() first")
        self.explainers[b], self.maps[b, "train"] = explainer, maps.int()
        self.refits.pop(b, None)
        self.nearest[b] = nearest
        self._drawn = {key: pixels for key, pixels in self._drawn.items() if key[0] != b}  # of prototypes before
        count = len(explainer.prototypes) // len(self.classes)
        how = {"start_block": b, "prototypes_per_class": count, **asdict(explainer.normalisation)}
        self._made[self.name(b)] = {**how, **settings}
        return self.name(b)

    def patch(self, start_block: int, prototype: int, rank: int | str = 0) -> Patch:
        """The training patch nearest to a prototype, or the next ones of other images (``rank`` 1, 2 …).

        ``rank`` ``typical`` and ``weakest``: of the training images of its class in which it has cells, ordered by the
        nearest of these, the median and the last.
        """
        key = (start_block, prototype, rank)
        index, position = self.nearest[start_block].place(prototype, rank)
        if key in self._drawn:
            try:
                with Image.open(io.BytesIO(self._drawn[key]), formats=["WEBP"]) as image:
                    pixels = np.asarray(image)
            except Exception as error:  # whatever Pillow raises for bytes that are no picture
                of = f"the patch of prototype {prototype} saved with {self.name(start_block)}"
                raise ValueError(f"{of} cannot be read ({reading.reason(error)}): save the explanation again") from None
        else:
            maps = self.edits.fitted(start_block)[2]
            assert self.dataset is not None and maps is not None
            segments = maps[index].numpy()
            pixels = segment_patch(self.dataset.train.rgb(index), segments, position)
        name = self.classes[int(self.explainers[start_block].prototypes.labels[prototype])]
        own = self.edits.names(start_block).get(prototype, "")
        return Patch(prototype, name, 0.0, pixels, index, name=own)

    def patches(self, start_block: int, prototype: int) -> list[Patch]:
        """The nearest training patches of a prototype, each of another image; of all that are merged with it."""
        members = (self.edits.segment(start_block) == prototype).nonzero().flatten().tolist()
        index = self.nearest[start_block].index
        ranks = [(rank, k) for rank in range(index.shape[1]) for k in members if index[k, rank] >= 0]
        return [self.patch(start_block, k, rank) for rank, k in ranks]

    def sharing(self, start_block: int, prototype: int) -> tuple[int, int]:
        """In how many training images of its class a prototype appears, and how many there are."""
        nearest = self.nearest[start_block]
        return int(nearest.shared[prototype]), int(nearest.images[prototype])

    def fitted_with(self, start_block: int) -> dict[str, Any]:
        """Seed and restarts of an explainer's k-means, and of how many images of each class it is, if not of all."""
        made = self._made[self.name(start_block)]
        return {"seed": made.get("seed", 0), "restarts": made.get("restarts", 1), "fit_on": made.get("fit_on", 0)}

    predictions, by_class = gallery.predictions, gallery.by_class
    cautions, gallery = gallery.cautions, gallery.gallery  # the module's functions, as methods

    def certainty(self, refits: int = 5, **options: Any) -> "pd.DataFrame":
        """How sure the prototypes are: k-means again from the next seeds, and whether they come out of it, too.

        From then on panels show in what share of the refits each position keeps its prototype, and the report in how
        many each prototype exists: its cells in the training images and those of its partner, by centroids within the
        class, have more than half in common. ``options``: ``device``, ``scratch`` and ``log``, as in :func:`explain`.

        Returns
        -------
        DataFrame
            A row for each explainer and prototype: in how many refits it ``exists``; the ``overlap`` of the cells
            (Jaccard, mean) with its ``spread`` over refits, and that of independent maps (``chance``).
        """
        import pandas as pd

        self.refits = refit(self, refits, **options)
        self._kept.cache_clear()
        rows = []
        for b, of_block in self.refits.items():
            for k in left_of(self.edits.segment(b)).tolist():
                name = self.classes[int(self.explainers[b].prototypes.labels[k])]
                row = {"explainer": self.name(b), "prototype": k, "class": name, "exists": int(of_block.exists[k])}
                overlap = of_block.overlap[:, k]
                row |= {"overlap": float(overlap.mean()), "spread": float(overlap.std(correction=int(refits > 1)))}
                rows.append({**row, "chance": float(of_block.chance[:, k].mean())})
        return pd.DataFrame(rows)

    # all images

    def fill(self) -> None:
        """Maps and scores of the data set's images, where they are not known yet: one pass through the network."""
        for split in SPLITS if self.dataset else ():
            assert self.dataset is not None
            images = self.dataset.split(split)
            missing = [b for b in self.explainers if (b, split) not in self.maps]
            if not len(images) or (not missing and split in self.y):
                continue
            y: list[torch.Tensor] = []
            maps: dict[int, list[torch.Tensor]] = {b: [] for b in missing}
            for i in tqdm(range(0, len(images), BATCH), f"maps of {split}", leave=False, delay=1):
                seen = self.see(images.pixels[i : i + BATCH])
                y.append(seen.y)
                for b in missing:
                    maps[b].append(seen.maps[b].int())
            self.y[split] = torch.cat(y)
            self.maps |= {(b, split): torch.cat(parts) for b, parts in maps.items()}

    def labels_of(self, split: str) -> torch.Tensor:
        """Classes of a split's images as :attr:`classes` counts them, [N]; -1: none of them."""
        assert self.dataset is not None
        if self.predictions_as_labels:
            return gallery.relabelled(self.y[split].argmax(1), torch.tensor(self.settings["stand_in_classes"]))
        ours = [gallery.plain(name) for name in self.classes]
        theirs = [gallery.plain(name) for name in self.dataset.classes]
        index = torch.tensor([*(ours.index(name) if name in ours else -1 for name in theirs), -1])
        return index[self.dataset.split(split).labels]

    def needs_its_images(self) -> None:
        """A ValueError unless the data set has as many images of each class as the prototypes were made from."""
        if self.dataset is None:
            raise ValueError("the images are not here, only the prototypes: load(…, images=folder)")
        if self.predictions_as_labels:
            return
        b, made = self.start_blocks[0], torch.zeros(len(self.classes), dtype=torch.int64)
        made[self.explainers[b].prototypes.labels] = self.nearest[b].images
        labels = self.labels_of("train")
        count = labels[labels >= 0].bincount(minlength=len(self.classes))
        if not torch.equal(made, count):
            raise ValueError(
                f"these are not the images that the prototypes were made from, {int(made.sum())} of "
                f"{len(self.classes)} classes, but {int(count.sum())} of them: give the whole folder"
            )

    def accuracies(self, start_block: int) -> dict[str, float]:
        """Accuracy of an explainer in %, by the table's columns; the images' maps must be known."""
        found = {}
        for split, name in SPLITS.items():
            if (start_block, split) in self.maps and len(self.maps[start_block, split]):
                labels = self.labels_of(split)
                y = self.explainers[start_block].proj(self.maps[start_block, split].long())
                right = accuracy(y.argmax(1)[labels >= 0], labels[labels >= 0])
                found[f"{'agreement' if self.predictions_as_labels else 'accuracy'}, {name} (%)"] = right
        return found

    # one image

    def picture(self, image: AnyImage) -> Picture:
        """An image by its index or name in the data set, from a file, or a Pillow image, an array or a tensor.

        An index counts held-out images first, then those that made the prototypes. Arrays and tensors are uint8
        [H, W, 3] or [3, H, W], or floats in [0, 1], or normalised as the network takes them: those are told by values
        that leave [0, 1], and undone by mean and std.

        Raises ValueError, TypeError or IndexError if there is no such image, or it cannot be read.
        """
        if isinstance(image, Picture):
            return image
        if isinstance(image, str | Path):
            file, folder = paths.expanded(image), self.settings.get("folder")
            inside = [str(image), *([os.path.relpath(file.absolute(), folder)] if folder else [])]
            inside += [reading.readable(name) for name in inside]
            name = next((name for name in inside if name in self.names), "")
            if not name and not file.is_file():
                of = (
                    f"an image of {self.settings['dataset']} such as {self.names[0]}" if self.names else "an image here"
                )
                raise ValueError(f"{image} is neither a file nor {of}")
            if not name:
                try:
                    return Picture(reading.read(file, self.network.input).pixels, reading.readable(file.name))
                except ValueError as error:
                    raise ValueError(f"{image} cannot be read: {error}") from None
            image = self.names.index(name)
        if isinstance(image, int | np.integer):
            return self._picture(int(image))
        if image is None:
            raise TypeError("image is an index, a name, a file or pixels, got None")
        return Picture(reading.taken(image, self.network.input).pixels, "image")

    def _picture(self, index: int) -> Picture:
        """An image of the data set."""
        if self.dataset is None:
            raise ValueError("the images are not here, only the prototypes: give a file, or load(…, images=folder)")
        if not 0 <= index < len(self.names):
            raise IndexError(f"image must be an index of the {len(self.names)} images, got {index}")
        held_out = len(self.dataset.test)
        split, i = ("test", index) if index < held_out else ("train", index - held_out)
        return Picture(np.asarray(self.dataset.split(split).pixels[i]), self.names[index], split, i)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of all images, held-out ones first, with their split where both splits use a name; empty without images."""
        if self.dataset is None:
            return ()
        test, train = self.dataset.test.names, self.dataset.train.names
        if set(test) & set(train):
            return (*(f"test/{name}" for name in test), *(f"train/{name}" for name in train))
        return (*test, *train)

    def seen(self, picture: Picture) -> Seen:
        """What the network and the prototypes make of an image; the data set's own are not computed again."""
        if picture.split in self.h:
            i = slice(picture.index, picture.index + 1)
            maps = {b: self.maps[b, picture.split][i].long() for b in self.explainers}
            x = self.network.input(picture.pixels[None])
            return Seen(self.y[picture.split][i], self.h[picture.split][i], maps, x)
        return self._seen(picture.pixels.tobytes(), picture.pixels.shape)

    def _see(self, pixels: bytes, shape: tuple[int, ...]) -> Seen:
        return self.see(np.frombuffer(pixels, np.uint8).reshape(1, *shape))

    def see(self, pixels: np.ndarray, device: torch.device | str = "cpu") -> Seen:
        """What the network and the prototypes make of images, uint8 [n, 1 or 3, H, W]."""
        return self.see_inputs(self.network.input(pixels, device))

    @torch.no_grad()
    @exact()
    def see_inputs(self, inputs: torch.Tensor) -> Seen:
        """The same of what enters the network, float32 [n, 1 or 3, H, W], where the network is."""
        x, y = self.network.eval().outputs(inputs)
        double = [u.to(double_device(u.device)) for u in x]
        maps = {b: explainer.sim(explainer.h(double)).cpu() for b, explainer in self.explainers.items()}
        return Seen(y.cpu(), x[-1].cpu(), maps, inputs)

    def _keep(self, pixels: bytes, shape: tuple[int, ...]) -> dict[int, np.ndarray]:
        """By start block in what share of the refits each position of an image keeps its prototype, [H_b, W_b]."""
        x, shares = self.activations(np.frombuffer(pixels, np.uint8).reshape(1, *shape)), {}
        for b, refits in self.refits.items():
            explainer = self.explainers[b]
            h = explainer.h(x)
            q_s = explainer.sim(h)
            if kept := [refit.sim(h) == q_s for refit in refits.explainers(explainer)]:
                shares[b] = torch.cat(kept).float().mean(0).cpu().numpy()
        return shares

    @torch.no_grad()
    @exact()
    def activations(self, pixels: np.ndarray) -> list[torch.Tensor]:
        """x(1) … x(B) of images, uint8 [n, 1 or 3, H, W], where k-means runs."""
        x = self.network.eval().activations(self.network.input(pixels))
        return [u.to(double_device(u.device)) for u in x]

    def target(self, target: Target, seen: Seen) -> torch.Tensor:
        """Classes of the network that images are attributed to, by name or index, [1, n]; two to contrast, [2, n].

        Empty or None is the class predicted for each image.
        """
        predicted = seen.y.argmax(1)
        classes = self.network.targets(target)
        return torch.stack([predicted if j is None else torch.full_like(predicted, j) for j in classes])

    def attributions(self, seen: Seen, target: Target = "", start: str = "segments") -> dict[int, torch.Tensor] | None:
        """att(b:) by start block, [n, H_b, W_b]; None where eq. 11 does not hold. ``start`` as in ``carried``."""
        attributed = self.attributed(seen, target, start)
        return attributed.maps if attributed else None

    def attributed(self, seen: Seen, target: Target = "", start: str = "segments") -> Attributed | None:
        """The same with its scale and the segments' contributions; of two classes, the first minus the second."""
        if not self.network.form:
            return None
        align_corners = self.explainers[self.start_blocks[0]].normalisation.align_corners
        x, h = seen.inputs if self.network.form == "gated" else seen.h, seen.h
        classes = self.target(target, seen)
        with exact():
            columns = [self.network.columns(x, j).detach().cpu() for j in classes]
            att = _contrast([attribution(h, c) for c in columns])
            dots = _contrast([torch.einsum("ndhw,nd->nhw", h, c) for c in columns])
        maps = carried(att, seen.maps, align_corners, start=start)
        floor = torch.stack([chance(h, c) for c in columns]).square().sum(0).sqrt()  # two random columns: in squares
        floor = floor.clamp_min(torch.finfo(att.dtype).tiny)
        centre = {b: a.mean((1, 2)) for b, a in maps.items()}
        half = {b: (a - centre[b][:, None, None]).abs().amax((1, 2)).maximum(floor) for b, a in maps.items()}
        points = {
            b: contributions(dots, q_s, len(self.explainers[b].prototypes), align_corners)
            for b, q_s in seen.maps.items()
        }
        return Attributed(classes, maps, points, centre, half)

    def interpretations(
        self,
        image: AnyImage,
        start_blocks: Sequence[int] = (),
        target: Target = "",
        max_patches: int = 10,
        attribution_start: str = "segments",
    ) -> list[Interpretation]:
        """Figure 1's parts for an image, one for each start block (empty: the last and the shallowest)."""
        last, shallowest = self.start_blocks[0], self.start_blocks[-1]
        blocks = list(start_blocks) or sorted({last, shallowest}, reverse=True)
        for b in blocks:
            if b not in self.explainers:
                raise ValueError(f"start blocks run from {shallowest} to {last}, got {b}")
        picture = self.picture(image)
        seen = self.seen(picture)
        kept = self._kept(picture.pixels.tobytes(), picture.pixels.shape) if self.refits else {}
        attributed = self.attributed(seen, target, attribution_start)
        parts = []
        for b in blocks:
            q_s = seen.maps[b]
            used, counts = q_s.unique(return_counts=True)
            largest = counts.argsort(descending=True, stable=True)[:max_patches]
            segments = zip(used[largest].tolist(), counts[largest].tolist(), strict=True)
            patches = tuple(replace(self.patch(b, k), share=count / q_s.numel()) for k, count in segments)
            predicted = self.classes[int(self.explainers[b].proj(q_s)[0].argmax())]
            edited = ", edited" if isinstance(self.explainers[b], Edited) else ""
            name = self.name(b) + edited
            part = Interpretation(name, q_s[0].numpy(), None, patches, predicted, certainty=kept.get(b))
            if attributed:
                points = attributed.contributions[b][0]
                part = replace(
                    part,
                    attribution=attributed.maps[b][0].numpy(),
                    patches=tuple(replace(p, contribution=float(points[p.prototype])) for p in patches),
                    target=tuple(self.network.classes[j] for j in attributed.target[:, 0]),
                    centre=float(attributed.centre[b]),
                    half=float(attributed.half[b]),
                    total=float(points.sum()),
                )
            parts.append(part)
        return parts

    # to look at, send and read on

    def panel(
        self,
        image: AnyImage,
        start_blocks: Sequence[int] = (),
        target: Target = "",
        *,
        title: str = "",
        attribution_start: str = "segments",
    ) -> "Figure":
        """Figure 1 of an image: maps, attributions and nearest patches.

        Parameters
        ----------
        image
            As in :meth:`picture`.
        start_blocks
            From left to right; empty: the last and the shallowest.
        target
            Class of the network to attribute to, by name or index; empty: the predicted one. Of two, as in
            ``("cat", "dog")``, the attribution to the first minus that to the second.
        title
            Empty: the image's name, the network's prediction and the target.
        attribution_start
            Of att(B:), as in :func:`~kmex_utils.method.attribution.carried`.
        """
        from .figure1 import figure1

        picture = self.picture(image)
        parts = self.interpretations(picture, start_blocks, target, attribution_start=attribution_start)
        predicted = self.network.classes[int(self.seen(picture).y.argmax())]
        to = " − ".join(parts[0].target)
        of = f", attribution to {to}" if to not in ("", predicted) else ""
        words = f"{Path(picture.name).name}: {self.network.name} says {predicted}{of}"
        shown = start_blocks or {self.start_blocks[0], self.start_blocks[-1]}
        notes = [line for b, line in self.cautions().items() if b in shown]
        notes += [refits.line(self.name(b)) for b, refits in self.refits.items() if b in shown and not refits.repeats]
        return figure1(picture.rgb, parts, title or words, notes)

    def overlay(self, image: AnyImage, start_block: int = 0, target: Target = "", **options: Any) -> Image.Image:
        """Map or attribution over the picture at its own resolution, from a start block (0: the shallowest).

        What the network does not see, beside a centre crop, is lighter. A cell has seen far more than its square: give
        one to see how much. An image that is no file and no Pillow image is shown as it enters the network.

        Parameters
        ----------
        of
            ``map`` (the panel's colours) or ``attribution`` (to the ``target``).
        opacity
            Of the layer, 0 to 1.
        outline
            Whether each segment has an edge of its own colour.
        cell
            Row and column on the map's grid: its square is framed, and the receptive field, all pixels that can
            influence it (see :func:`kmex_utils.explanation.overlay.receptive_field`).
        attribution_start
            As in :meth:`panel`.
        """
        from .overlay import overlay

        return overlay(self, image, start_block, target, **options)

    def margin(self, image: AnyImage, start_block: int = 0, prototype: int = -1, against: str = "") -> "Margin":
        """Why a segment of an image is of its prototype a and not of b: their margin, by block and channel.

        b is the nearest prototype of the runner-up: of the classes other than a's the one with the highest score of
        eq. 10, or the class ``against``. The result has a ``table()`` and a ``figure()``.

        Parameters
        ----------
        start_block
            0: the shallowest.
        prototype
            The segment's; -1: that of the largest.
        """
        from .margin import margin

        return margin(self, image, start_block, prototype, against)

    def explorer(self, image: AnyImage = 0, start_block: int = 0) -> "Explorer":
        """An interactive view for the notebook; a still one where widgets cannot run."""
        from .explorer import Explorer

        return Explorer(self, image, start_block)

    def page(
        self,
        path: str | Path,
        images: int | Sequence[AnyImage] = 100,
        target: Target = "",
        *,
        title: str = "",
        max_bytes: int = 20_000_000,
        overwrite: bool = False,
    ) -> Path:
        """The explorer as one HTML file to send: it opens from disk, without a kernel or a network.

        Parameters
        ----------
        images
            As in :meth:`picture`, or how many, spread evenly over the held-out ones (over all if none are held out).
        target
            Of the attributions, as in :meth:`panel`.
        max_bytes
            Bound on the file. Images and patches become smaller first, then images are left out, and the page says so.
        overwrite
            Replace a file that exists; else it is a FileExistsError.
        """
        from .page import write

        how: dict[str, Any] = {"title": title, "max_bytes": max_bytes, "overwrite": overwrite}
        return write(self, paths.expanded(path), images, target=target, **how)

    def report(self, path: str | Path, panels: Sequence[AnyImage] = (), **options: Any) -> Path:
        """One HTML file to send; see :func:`kmex_utils.explanation.report.write`."""
        from . import report

        return report.write(self, paths.expanded(path), panels, **options)

    def export(self, folder: str | Path, images: str | Path = "", **options: Any) -> Path:
        """Maps, attributions, predictions for a whole folder; see :func:`kmex_utils.explanation.export.export`."""
        from .export import export

        images = images or self.settings.get("folder", "")
        if not images:
            raise ValueError("give the folder of images to export: the prototypes are of a data set, not of a folder")
        return export(self, Path(folder), images, **options)

    def labels(self, image: AnyImage, start_block: int = 0, **options: Any) -> "Labels":
        """Map and attribution of an image as arrays of its size, from a start block (0: the shallowest).

        ``options``: ``target`` and ``attribution_start`` as in :meth:`panel`.
        """
        from .arrays import labels

        return labels(self, image, start_block, **options)

    def captum(self, start_block: int = 0, attribution_start: str = "segments") -> "BlockAttribution":
        """att(b:) as an ``Attribution`` of captum, from a start block (0: the shallowest)."""
        from .captum import BlockAttribution

        return BlockAttribution(self, start_block, attribution_start)

    def explain_func(self, model: nn.Module, inputs: np.ndarray, targets: np.ndarray, **options: Any) -> np.ndarray:
        """att(b:) of network inputs [N, 3, S, S], [N, 1, S, S], in the form that Quantus calls.

        ``options``: ``start_block`` (0: the shallowest) and ``attribution_start``. A ValueError for a ``model`` that is
        not the network explained.
        """
        from .arrays import explain_func

        return explain_func(self, model, inputs, targets, **options)

    # to keep

    def save(self, folder: str | Path, only: Iterable[str] = (), *, small: bool = False) -> Path:
        """Everything into a folder that :meth:`load` reads, if it was written to the end; explainers there before go.

        ``only`` names explainers (``KMEx-5``, ``B234``) to write beside what is there, as notebooks 3 and 4 do.
        ``small``: a few MB to send or commit. The encoder's weights stay out, so loading needs their file; prototypes
        are float16, and each keeps its nearest patch alone, of at most 96 pixels.
        """
        folder, only = paths.expanded(folder), list(only)
        writable(folder)
        settings, weights = folder / "explained.json", self.network.fingerprint
        if weights != self.settings["network"]["weights"]:
            raise ValueError(f"the weights of {self.network.name} are no longer those explained: explain it again")
        of = {"classes": list(self.classes), "weights": weights}
        described = {**self.settings, "classes": list(self.classes)}
        edited_alone = not only and self._is_in(folder, described, of, small)
        if not only:
            saved_before = settings.exists()  # else the files of those names are not ours
            stale = [*_explainer_files(folder), folder / "table.csv"] if saved_before else []
            self.network.save(folder, head_only=small)
            if not edited_alone:
                save_json(settings, {"unfinished": True})
            for path in stale if not edited_alone else ():
                path.unlink(missing_ok=True)
            if self.table is not None:
                with replacing(folder / "table.csv") as temporary:
                    self.table.to_csv(temporary, float_format="%.6g")
        for name in (only or self._made) if not edited_alone else ():
            save_tensors(folder / f"{name}.safetensors", self._tensors(name, small), {**self._made[name], **of})
        if not only:
            edits = {"edits": self.edits.done} if self.edits.done else {}
            save_json(settings, {**described, **edits})  # last: what is there is whole
        return folder

    def _is_in(self, folder: Path, described: dict[str, Any], of: dict[str, Any], small: bool) -> bool:
        """Whether all of this but its edits is in a folder, which then never is without it."""
        path, files = folder / "explained.json", {folder / f"{name}.safetensors": name for name in self._made}
        if not path.is_file() or {*_explainer_files(folder)} != {*files}:
            return False
        saved = load_json(path)
        saved.pop("edits", None)
        return saved == json.loads(json.dumps(described)) and all(
            holds(path, self._tensors(name, small), {**self._made[name], **of}) for path, name in files.items()
        )

    def _tensors(self, name: str, small: bool) -> dict[str, torch.Tensor]:
        """What is saved of an explainer as fitted."""
        made = self._made[name]
        b = made.get("start_block")
        explainer = self.kmex[made["prototypes_per_class"]] if b is None else self.edits.fitted(b)[0]
        tensors = dict(vars(explainer.prototypes))
        if small:  # rows of q are near float16's smallest numbers; their largest becomes 1
            tensors["unit"] = tensors["vectors"].abs().max()
            tensors["vectors"] = (tensors["vectors"] / tensors["unit"]).half()
        if b in self.refits:
            refits = replace(self.refits[b], vectors=self.refits[b].vectors[: 0 if small else None])
            tensors |= {f"refits_{key}": value for key, value in vars(refits).items()}
        if b is not None:
            nearest = self.edits.fitted(b)[1]
            nearest = nearest.first() if small else nearest
            tensors |= {f"nearest_{key}": value for key, value in vars(nearest).items()}
            encoded = [self._encoded(b, k, rank, small) for k, rank in nearest.ranks()]
            tensors["patches"] = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
            tensors["patch_sizes"] = torch.tensor([len(part) for part in encoded])
        return tensors

    def _encoded(self, b: int, k: int, rank: int | str, small: bool) -> bytes:
        """A patch as WebP, as it was loaded where it was: what was saved small does not get worse."""
        drawn = self._drawn.get((b, k, rank), b"")
        lossless = drawn[12:16] == b"VP8L"
        return drawn if drawn and not (small and lossless) else _webp(self.patch(b, k, rank).pixels, small)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        module: nn.Module | None = None,
        images: str | Path | Dataset | Any | None = None,
        *,
        weights: str | Path | Mapping[str, Any] = "",
        transform: Callable[[Any], torch.Tensor] | None = None,
    ) -> "Explained":
        """What :meth:`save` left: explains images it has never seen, and fits nothing again.

        Parameters
        ----------
        module
            Your own network, where it is not one of torchvision or timm; refused where its weights or scores differ.
        images
            As :func:`explain` takes them, for what needs the data set: indices, names, the explorer's list.
        weights
            The file (or state dict, or ``imagenet``) that the network was made of, where it was saved ``small``; others
            are refused.
        transform
            Your own, where images entered by one: only its name is saved.

        Raises
        ------
        FileNotFoundError, ValueError
            One line: nothing was saved there, a part is damaged or of another network.
        """
        folder = paths.located(folder)
        path = folder / "explained.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no saved explanation: give a folder that explained.save() wrote")
        settings = load_json(path)
        parts = {"classes": list, "network": dict, "dataset": str}
        whole = isinstance(settings, dict) and all(isinstance(settings.get(key), of) for key, of in parts.items())
        edits = settings.pop("edits", []) if whole else []
        if not whole or not isinstance(edits, list) or not all(isinstance(name, str) for name in settings["classes"]):
            raise ValueError(f"{path} is not of a whole saved explanation: save it again")
        network = networks.load(folder, module, transform, weights)
        if not set(settings.get("stand_in_classes", ())) <= set(range(len(network.classes))):
            raise ValueError(
                f"{path} is not of a whole saved explanation ({network.name} has other outputs): save it again"
            )
        how = {key: settings[key] for key in ("held_out", "seed") if key in settings}
        dataset = None if images is None else opened(images, network, **how)
        explained, fingerprint = cls(network, dataset, settings), network.fingerprint
        theirs = [] if dataset is None or explained.predictions_as_labels else list(dataset.classes)
        if theirs and not {gallery.plain(name) for name in theirs} & {gallery.plain(c) for c in explained.classes}:
            raise ValueError(
                f"none of the classes of these images ({', '.join(theirs[:3])} …) is one of the explanation's "
                f"({', '.join(explained.classes[:3])} …): give the folder it was made from"
            )
        for path in _explainer_files(folder):
            explained._load_explainer(path, fingerprint)
        if (folder / "table.csv").is_file():
            explained._load_table(folder / "table.csv")
        explained.edits.replay(edits)
        return explained

    def _load_table(self, path: Path) -> None:
        import pandas as pd

        try:
            content = path.read_text(encoding="utf-8")
            table = pd.read_csv(io.StringIO(content), index_col="model")
            missing = {self.name(b) for b in self.explainers} - {*table.index}
            if missing or not content.endswith("\n"):
                raise ValueError("it is cut short")
        except (KeyError, ValueError) as error:  # pandas' own are of these
            raise ValueError(f"{path} is no table of a saved explanation ({error}): save it again") from None
        self.table = table[~table.index.astype(str).str.endswith(", edited")]  # the edits bring theirs

    def _load_explainer(self, path: Path, weights: str) -> None:
        tensors, made = load_tensors(path)
        if made.pop("weights", None) != weights:
            raise ValueError(f"{path} was made from another network: fit it again (notebook 03_kmex or 04_encoder)")
        if made.pop("classes", None) != list(self.classes):
            raise ValueError(f"{path} is of other classes than {path.parent / 'explained.json'}: fit it again")
        self._made[path.stem] = made
        classes, b = len(self.classes), made.get("start_block")
        try:
            if "unit" in tensors:
                tensors["vectors"] = tensors["vectors"].float() * tensors["unit"]
            prototypes, count = _of(Prototypes, tensors), int(made["prototypes_per_class"])
            expected = torch.arange(classes).repeat_interleave(count)
            if path.stem != (f"KMEx-{count}" if b is None else self.name(b)):
                raise ValueError("its name is of another explainer")
            if not torch.equal(prototypes.labels, expected) or len(prototypes) != len(expected):
                raise ValueError(f"not {count} prototypes for each of {classes} classes")
            channels = sum(self._channels[-1 if b is None else b - 1 :])
            if not torch.isfinite(prototypes.vectors).all():
                raise ValueError("prototypes hold NaN or infinite values")
            if prototypes.vectors.shape[1:] != (channels,):
                raise ValueError(f"prototypes of {list(prototypes.vectors.shape[1:])} channels, not {channels}")
            if b is None:
                self.kmex[count] = KMEx(prototypes, classes)
                return
            self.explainers[b] = EncoderKMeans(prototypes, classes, b, _of(Normalisation, made))
            tensors.setdefault("nearest_examples", torch.empty(len(prototypes), 0, 2, dtype=torch.int64))  # as of old
            self.nearest[b] = _of(Nearest, tensors, "nearest_")
            self.nearest[b].check(len(prototypes))
            if "refits_kept" in tensors:
                self.refits[b] = _of(Refits, tensors, "refits_")
                if self.refits[b].vectors.shape[1:] != prototypes.vectors.shape:
                    raise ValueError("its refits are of other prototypes")
            patches = tensors["patches"].split(tensors["patch_sizes"].tolist())
            drawn = zip(self.nearest[b].ranks(), patches, strict=True)
            self._drawn |= {(b, k, rank): patch.numpy().tobytes() for (k, rank), patch in drawn}
        except KeyError as missing:
            raise ValueError(f"{path} does not hold prototypes: it lacks {missing}") from None
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not hold prototypes of this network: {error}") from None

    @cached_property
    @torch.no_grad()
    def _channels(self) -> list[int]:
        """D_1 … D_B."""
        x = self.network.input(np.zeros((1, 1, *self.network.input.size), np.uint8))
        return [u.shape[1] for u in self.network.eval().activations(x)]


def opened(images: str | Path | Dataset | Any, network: Network, **how: Any) -> Dataset:
    """The data set of images as :func:`~kmex_utils.explanation.fit.explain` takes them; ``how`` as in ``data.load``."""
    if not isinstance(images, Dataset):
        source = Path(images) if isinstance(images, str) else images  # a folder, though a data set bears its name
        return data.load(source, network.input, strict=False, needs_labels=False, data=None, **how)
    if replace(images.input, fit=network.input.fit) != network.input:
        raise ValueError("the data set's image size and normalisation are not the network's: load it with the same")
    return images


def _contrast(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The one part, or the first minus the second."""
    return parts[0] if len(parts) == 1 else parts[0] - parts[1]


def _of(kind: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """A dataclass from those of the values that bear its fields' names."""
    return kind(**{field.name: values[prefix + field.name] for field in fields(kind)})  # type: ignore[arg-type]


def _explainer_files(folder: Path) -> list[Path]:
    """KMEx by K/C, then B4, B34, B234: from the last block to the shallowest."""
    files = [*folder.glob("KMEx-[0-9]*.safetensors"), *folder.glob("B[0-9]*.safetensors")]
    return sorted(files, key=lambda path: (path.stem[0] == "B", len(path.stem), path.stem))


def _webp(pixels: np.ndarray, small: bool = False) -> bytes:
    """Lossless, so that a saved patch is the patch; method 0 is quick and costs a few per cent of size."""
    image, how = Image.fromarray(np.ascontiguousarray(pixels)), {"lossless": True, "method": 0}
    if small:
        image.thumbnail((SMALL_PATCH, SMALL_PATCH))
        how = {"quality": 75, "method": 4}
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", **how)
    return buffer.getvalue()
