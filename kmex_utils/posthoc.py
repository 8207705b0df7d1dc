"""Explain your own CNN on your own images, in a few lines:

    from kmex_utils import posthoc

    network = posthoc.network("resnet50", weights="imagenet")
    explained = posthoc.explain(network, "photos")
    explained.panel("photos/IMG_0012.jpg")

The same from the shell: ``python -m kmex_utils.posthoc photos --model resnet50 --panel photos/IMG_0012.jpg``.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from . import hardware, images
from .activations import Activations, activations, keep
from .attribution import attribution, carried
from .backbones import avg_pool
from .composite import Normalisation
from .datasets import Dataset, Images
from .explainers import EncoderKMeans, KMEx, block_name
from .export import require_pyarrow
from .interpretation import Interpretation, Patch, segment_patch
from .kmeans import DenseRows, Prototypes, classwise
from .measures import accuracy, cosine_alignment
from .networks import Network, network
from .store import replacing, save_json

__all__ = ["Explained", "explain", "network"]

IN_MEMORY = 2 * 2**30  # bytes of activations; more go to a temporary folder
KEPT_H = 2**29  # bytes of encoder outputs kept for attributions of the folder's own images
KEPT_PATCHES = 1024  # patches drawn; the oldest go first
NEAREST = 5  # patches of each prototype, of as many images


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


class _Passed(NamedTuple):
    """x(first) … x(B) of the images that make prototypes, and what holding them takes, in bytes by image."""

    x: Activations
    in_memory: bool
    bytes_of: dict[int, int]  # by start block
    h_bytes: int


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


def _some(names: Sequence[str], limit: int = 8) -> str:
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")


def explain(
    network: Network,
    folder: str | Path | Dataset,
    *,
    start_block: int = 0,
    prototypes_per_class: int = 5,
    held_out: float = 0.2,
    norm: str = "position",
    scale: str = "1/D",
    align_corners: bool = False,
    restarts: int = 3,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 32,
    scratch: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> Explained:
    """Prototypes of a frozen network from a folder of images; nothing is trained.

    Parameters
    ----------
    network
        From :func:`network`.
    folder
        ``<class>/*``, or ``train/<class>/*`` with ``test/<class>/*`` (or ``val/``), or images without labels: then the
        network's predictions stand in for labels in the class-wise clustering. Or a data set of
        :func:`kmex_utils.datasets.load`.
    start_block
        The shallowest block to explain from, 1 … B; 0: the last three blocks (B234 of four).
    prototypes_per_class
        K/C.
    held_out
        Share of each class kept from the prototypes, to measure accuracy on, where the folder has no ``test/``.
    norm, scale, align_corners
        Of eq. 7 and 8, as in :class:`~kmex_utils.composite.Normalisation`.
    restarts, seed
        Of k-means; the seed also draws the held-out images.
    scratch
        Folder for the temporary files of what does not fit in memory; None: the system's. Activations that do not fit
        there either are computed anew whenever they are read, and the output says so.
    report
        Gets one line for each thing worth saying.

    Raises
    ------
    ValueError, FileNotFoundError
        One line that says what to change.
    """
    blocks = len(network.blocks)
    first = start_block or max(1, blocks - 2)
    block_name(first, blocks)  # refuses a block that is not there
    normalisation = Normalisation(norm, scale, align_corners)
    if prototypes_per_class < 1:
        raise ValueError(f"prototypes_per_class (K/C) must be at least 1, got {prototypes_per_class}")
    chosen = hardware.pick_device(device)
    if scratch and not Path(scratch).expanduser().is_dir():
        raise FileNotFoundError(f"scratch must be a folder that exists, got {scratch}")
    scratch = str(Path(scratch).expanduser()) if scratch else None
    if network.assumed:
        report(f"images enter {network.name} as {network.preprocessing()}")
    if isinstance(folder, Dataset):
        dataset, root = folder, ""
        wanted = (network.image_size, network.mean, network.std)
        if (dataset.recipe.image_size, dataset.recipe.mean, dataset.recipe.std) != wanted:
            raise ValueError("the data set's image size and normalisation are not the network's: load it with the same")
    else:
        dataset = images.load(
            folder,
            network.image_size,
            mean=network.mean,
            std=network.std,
            fit=network.fit,
            prototypes_per_class=prototypes_per_class,
            held_out=held_out,
            seed=seed,
            scratch=scratch,
            report=report,
        )
        root = str(Path(folder).expanduser().absolute())
    settings = {
        **network.settings(),
        "dataset": dataset.name,
        "folder": root,
        "start_block": first,
        "per_class": prototypes_per_class,
        "held_out": held_out,
        "norm": norm,
        "scale": scale,
        "align_corners": align_corners,
        "restarts": restarts,
        "seed": seed,
    }
    if dataset.classes:
        _enough(dataset, prototypes_per_class)
    if not network.pooled_linear:
        report(f"no attributions: Theorem 1 and eq. 11 do not hold for {network.name}: {network.between}")
    explained = Explained(network, dataset, settings)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary:
        try:
            _fill(explained, first, normalisation, chosen, batch_size, Path(temporary), report)
        finally:
            network.to("cpu")
    return explained


def _enough(dataset: Dataset, per_class: int) -> None:
    for c, name in enumerate(dataset.classes):
        count = int((dataset.train.labels == c).sum())
        if count < per_class:
            raise ValueError(
                f"class {name!r} has {count} images to make prototypes from, fewer than K/C = {per_class}: lower "
                "prototypes_per_class or held_out, or add images"
            )


@torch.no_grad()
def _fill(explained: Explained, first: int, normalisation, device, batch_size: int, scratch: Path, report) -> None:
    """The passes over the folder and the clusterings."""
    start_blocks = range(len(explained.network.blocks), first - 1, -1)
    passed = _first_pass(explained, first, device, batch_size, scratch, report)
    if not explained.dataset.classes:
        explained.dataset = _stand_in(explained, explained.settings["per_class"], report)
    _cluster(explained, passed, start_blocks, normalisation, device)
    z = _second_pass(explained, passed, start_blocks, device, batch_size)
    if explained.predictions_as_labels:
        explained.dataset = _stand_in_test(explained)
    dataset, per_class = explained.dataset, explained.settings["per_class"]
    options = {key: explained.settings[key] for key in ("seed", "restarts")}
    for k in sorted({1, per_class}):
        rows = lambda index: DenseRows(z["train"][index])  # noqa: E731
        found = classwise(rows, dataset.train.labels, dataset.classes, k, progress=f"KMEx-{k}", **options)
        explained.kmex[k] = KMEx(found, len(dataset.classes))
    for b in start_blocks:
        prototypes = explained.explainers[b].prototypes
        explained.shared[b] = _shared(explained.maps[b, "train"], dataset.train.labels, prototypes)
    explained.table = _table(explained, z, report)


@contextmanager
def _scores(network: Network) -> Iterator[list[torch.Tensor]]:
    """y of every batch that passes through the network."""
    scores: list[torch.Tensor] = []
    hook = network.classifier.register_forward_hook(lambda module, z, y: scores.append(y.cpu()))
    try:
        yield scores
    finally:
        hook.remove()


def _first_pass(explained: Explained, first: int, device, batch_size: int, scratch: Path, report) -> _Passed:
    """Activations of the images that make prototypes, where they fit, and the scores."""
    network, dataset = explained.network, explained.dataset
    network.to(device)
    probe = network.activations(dataset.normalise(dataset.train.pixels[:1], device))
    blocks = len(network.blocks)
    bytes_of = {b: 4 * sum(x.numel() for x in probe[b - 1 :]) for b in range(first, blocks + 1)}
    needed, free = bytes_of[first] * len(dataset.train), shutil.disk_usage(scratch).free
    where = "memory" if needed <= IN_MEMORY else "disk" if needed <= 0.9 * free else "nowhere"
    if where == "nowhere":
        report(
            f"the activations take {needed / 2**30:.1f} GiB and {scratch.parent} has {free / 2**30:.1f} free: they are "
            "computed anew whenever they are read, which is slow; scratch= names a folder with room"
        )
    options = {"device": device, "batch_size": batch_size}
    with _scores(network) as scores:
        x = keep(network, dataset, "train", first, where, folder=scratch, **options)
        if where == "nowhere":
            for _ in activations(network, dataset, "train", [blocks], **options):
                pass
        explained.y["train"] = torch.cat(scores)
    return _Passed(x, where == "memory", bytes_of, 4 * probe[-1].numel())


def _cluster(explained: Explained, passed: _Passed, start_blocks: range, normalisation, device) -> None:
    """The encoder's prototypes from each start block, and the images nearest to them."""
    dataset = explained.dataset
    options = {key: explained.settings[key] for key in ("seed", "restarts")}
    for b in start_blocks:

        def rows_of(index: torch.Tensor, b: int = b):
            fits = passed.in_memory or len(index) * passed.bytes_of[b] <= IN_MEMORY
            return passed.x.rows(index, b, normalisation, keep=fits, device=hardware.float64_device(device))

        labels, per_class, name = dataset.train.labels, explained.settings["per_class"], explained.name(b)
        found = classwise(rows_of, labels, dataset.classes, per_class, progress=name, **options)
        explained.explainers[b] = EncoderKMeans(found, len(dataset.classes), b, normalisation)
        explained.nearest[b] = _nearest(rows_of, labels, found, NEAREST)


def _second_pass(
    explained: Explained, passed: _Passed, start_blocks: range, device, batch_size: int
) -> dict[str, torch.Tensor]:
    """Maps of all images, scores and h of those held out; returns z by split."""
    network, dataset = explained.network, explained.dataset
    first, blocks = start_blocks[-1], start_blocks[0]
    where = hardware.float64_device(device)
    keep_h = passed.h_bytes * (len(dataset.train) + len(dataset.test)) <= KEPT_H
    z: dict[str, list[torch.Tensor]] = {"train": [], "test": []}
    hs: dict[str, list[torch.Tensor]] = {"train": [], "test": []}
    maps: dict[tuple[int, str], list[torch.Tensor]] = {(b, s): [] for b in start_blocks for s in z}

    def note(split: str, outputs: list[torch.Tensor]) -> None:
        padded = [None] * (first - 1) + [u.to(where) for u in outputs]
        for b in start_blocks:
            explainer = explained.explainers[b]
            maps[b, split].append(explainer.sim(explainer.h(padded)).int().cpu())
        h = padded[-1].cpu()
        z[split].append(avg_pool(h))
        if keep_h:
            hs[split].append(h)

    for index in torch.arange(len(dataset.train)).split(batch_size):
        note("train", passed.x.read(index, first))
    held_out = range(first, blocks + 1)
    with _scores(network) as scores:
        for outputs in activations(network, dataset, "test", held_out, batch_size=batch_size, device=device):
            note("test", outputs)
    explained.y["test"] = torch.cat(scores) if scores else explained.y["train"][:0]
    for (b, split), parts in maps.items():
        explained.maps[b, split] = torch.cat(parts) if parts else explained.maps[b, "train"][:0]
    if keep_h:
        explained.h = {split: torch.cat(parts) for split, parts in hs.items() if parts}
    return {split: torch.cat(parts) for split, parts in z.items() if parts}


def _stand_in(explained: Explained, per_class: int, report) -> Dataset:
    """Predictions as labels; predicted classes with fewer than K/C images are set aside (label -1)."""
    predicted = explained.y["train"].argmax(1)
    found, counts = predicted.unique(return_counts=True)
    kept = found[counts >= per_class]
    if len(kept) < 2:
        most = explained.network.classes[int(found[counts.argmax()])]
        raise ValueError(
            f"the network puts {int(counts.max())} of {len(predicted)} images into one class ({most}) and no second "
            f"class has K/C = {per_class} images: lower prototypes_per_class, add images, or give labels as <class>/*"
        )
    left = int(counts[counts < per_class].sum())
    classes = tuple(explained.network.classes[j] for j in kept.tolist())
    report(
        f"no labels in the folder: the predictions of {explained.network.name} stand in for them ({_some(classes, 5)})"
    )
    if left:
        fewer = int((counts < per_class).sum())
        report(
            f"{left} images of {fewer} predicted classes with fewer than K/C = {per_class} images make no prototypes"
        )
    explained.predictions_as_labels = explained.settings["predictions_as_labels"] = True
    explained.settings["stand_in_classes"] = kept.tolist()
    dataset = explained.dataset
    return Dataset(dataset.name, classes, _relabelled(dataset.train, predicted, kept), dataset.test, dataset.recipe)


def _stand_in_test(explained: Explained) -> Dataset:
    kept = torch.tensor(explained.settings["stand_in_classes"])
    test = _relabelled(explained.dataset.test, explained.y["test"].argmax(1), kept)
    dataset = explained.dataset
    return Dataset(dataset.name, dataset.classes, dataset.train, test, dataset.recipe)


def _relabelled(part: Images, predicted: torch.Tensor, kept: torch.Tensor) -> Images:
    same = predicted[:, None] == kept
    return Images(part.pixels, torch.where(same.any(1), same.int().argmax(1), -1), part.names)


def _nearest(rows_of, labels: torch.Tensor, prototypes: Prototypes, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``count`` images of its class nearest to each prototype, and the position in each: [K, count] twice.

    An image counts by its nearest row. Where there are fewer images the rest is -1.
    """
    images = torch.full((len(prototypes), count), -1)
    positions = torch.full((len(prototypes), count), -1)
    for c in prototypes.labels.unique().tolist():
        own = torch.nonzero(prototypes.labels == c).flatten()
        index = torch.nonzero(labels == c).flatten()
        rows = rows_of(index)
        p = prototypes.vectors[own].to(rows.device)
        by_image = (len(own), -1, rows.rows_per_image)  # chunks are whole images
        least = [(chunk.squared - 2 * chunk.dots(p)).view(by_image).min(2) for _, chunk in rows.chunks()]
        best, where = (torch.cat(part, 1) for part in zip(*least, strict=True))
        some = min(count, len(index))
        order = best.topk(some, 1, largest=False).indices
        images[own, :some] = index[order.cpu()]
        positions[own, :some] = where.gather(1, order).cpu()
    return images, positions


def _shared(maps: torch.Tensor, labels: torch.Tensor, prototypes: Prototypes) -> torch.Tensor:
    """In how many training images of its class each prototype appears, [K]."""
    counts = torch.zeros(len(prototypes), dtype=torch.int64)
    for q_s, label in zip(maps, labels.tolist(), strict=True):
        used = q_s.unique().long()
        counts[used[prototypes.labels[used] == label]] += 1
    return counts


def _table(explained: Explained, z: dict[str, torch.Tensor], report):
    """Tables 1 and 2 for this network and folder as a DataFrame; one row for each model."""
    import pandas as pd

    dataset, network = explained.dataset, explained.network
    word = "agreement" if explained.predictions_as_labels else "accuracy"
    labels = {split: dataset.split(split).labels for split in z}
    ours = {split: label >= 0 for split, label in labels.items()}
    rows: dict[str, dict[str, float]] = {}

    def score(name: str, split: str, predicted: torch.Tensor) -> None:
        if ours[split].any():
            value = accuracy(predicted[ours[split]], labels[split][ours[split]])
            rows.setdefault(name, {})[f"{word}, {_split_name(split)} (%)"] = value

    def align(name: str, vectors: torch.Tensor, of: torch.Tensor) -> None:
        keep = ours["train"]
        inside, outside = cosine_alignment(z["train"][keep], labels["train"][keep], vectors, of)
        rows.setdefault(name, {}).update({"cosine, class": inside, "cosine, out": outside})

    own = network_classes(explained)
    if own is None:
        report(
            f"accuracy of the network itself: not known, its classes ({_some(network.classes, 3)}) do not name the "
            f"folder's ({_some(dataset.classes, 3)}): give classes="
        )
    else:
        if network.pooled_linear:
            align("CNN", network.c[own].cpu(), torch.arange(len(own)))
        if not explained.predictions_as_labels:
            back = torch.full((len(network.classes),), -1)
            back[own] = torch.arange(len(own))
            for split in z:
                score("CNN", split, back[explained.y[split].argmax(1)])
    for k, kmex in explained.kmex.items():
        name = f"KMEx (K/C={k})"
        align(name, kmex.prototypes.vectors, kmex.prototypes.labels)
        for split in z:
            score(name, split, kmex.predict(z[split]))
    for b, explainer in explained.explainers.items():
        for split in z:
            score(explained.name(b), split, explainer.proj(explained.maps[b, split].long()).argmax(1))
    order = ["cosine, class", "cosine, out", *(f"{word}, {_split_name(s)} (%)" for s in z)]
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.index.name = "model"
    return table.reindex(columns=[name for name in order if name in table])


def _split_name(split: str) -> str:
    return {"train": "images of the prototypes", "test": "held out"}[split]


def network_classes(explained: Explained) -> torch.Tensor | None:
    """For each class of the folder the network's output of that name, [groups]; None if a class has not exactly one.

    Numbers that stand in for unknown names name nothing.
    """
    if explained.predictions_as_labels:
        return torch.tensor(explained.settings["stand_in_classes"])
    plain = lambda name: name.lower().replace("_", " ").replace("-", " ").strip()  # noqa: E731
    theirs = [plain(name) for name in explained.network.classes]
    ours = [plain(name) for name in explained.dataset.classes]
    if not explained.network.named or len(set(ours)) < len(ours) or any(theirs.count(name) != 1 for name in ours):
        return None
    return torch.tensor([theirs.index(name) for name in ours])


# --- from the shell -----------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Explain a network on a folder of images: prototypes, a table of cosines and accuracy, panels, a report."""
    parser = argparse.ArgumentParser(prog="python -m kmex_utils.posthoc", description=main.__doc__)
    add = parser.add_argument
    add("folder", help="<class>/*, or train/<class>/* and test/<class>/* (or val/), or images without labels")
    add("--model", default="resnet50", help="a name of torchvision, timm/<name>, or notebook 1's backbone.safetensors")
    add("--weights", default="", help="imagenet (default), random, or a file with a state dict")
    add("--classes", default="", help="text file with the names of the network's classes, one a line")
    add("--blocks", nargs="*", default=[], help="names of the modules that end the blocks (default: by resolution)")
    add("--head", default="", help="name of the linear layer (default: the last)")
    add("--image-size", type=int, default=0, help="pixels (default: the weights' own)")
    three = {"nargs": 3, "type": float, "default": [], "metavar": ("R", "G", "B")}
    add(
        "--mean",
        **three,
        help="of RGB values in [0, 1], for normalisation (default: the weights' own, else ImageNet's)",
    )
    add("--std", **three, help="the same")
    add("--fit", default="", help="crop (default: the centre square) or stretch")
    add("--start-block", type=int, default=0, help="shallowest block to explain from (default: the last three blocks)")
    add("--per-class", type=int, default=5, help="prototypes per class, K/C (default: 5)")
    add("--held-out", type=float, default=0.2, help="share of each class to measure accuracy on (default: 0.2)")
    add("--restarts", type=int, default=3, help="of k-means (default: 3)")
    add("--seed", type=int, default=0, help="of k-means and of the held-out images (default: 0)")
    add("--device", default="auto", help="auto (default), cpu, cuda or mps")
    add("--scratch", default="", help="folder for temporary files (default: the system's)")
    add("--out", default="explained", help="new folder for the results (default: explained)")
    add("--panel", nargs="*", default=[], metavar="IMAGE", help="images to draw Figure 1 of")
    add("--target", default="", help="class of attribution in the panels (default: the predicted one)")
    add("--report", action="store_true", help="write report.html, one file to send")
    add("--export", action="store_true", help="write maps and tables of every image of the folder to <out>/export")
    add("--resume", action="store_true", help="go on in an --out folder that exists (an interrupted export continues)")
    options = parser.parse_args(arguments)
    try:
        _run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    out = Path(options.out)
    if out.exists() and not options.resume:
        raise FileExistsError(f"{out} exists: choose another --out, or give --resume to go on in it")
    model = network(
        options.model,
        options.weights,
        classes=options.classes,
        blocks=options.blocks,
        head=options.head,
        image_size=options.image_size,
        mean=options.mean,
        std=options.std,
        fit=options.fit,
    )
    _check(options, model)
    explained = explain(
        model,
        options.folder,
        start_block=options.start_block,
        prototypes_per_class=options.per_class,
        held_out=options.held_out,
        restarts=options.restarts,
        seed=options.seed,
        device=options.device,
        scratch=options.scratch,
    )
    explained.save(out)
    rounded = explained.table.round(2).astype(object)
    print(rounded.where(rounded.notna(), "–").to_markdown())
    from . import figures

    pictures = [explained.picture(image) for image in options.panel]
    names = ["-".join(Path(picture.name).with_suffix("").parts) for picture in pictures]
    for i, picture in enumerate(pictures):
        figure = explained.panel(picture, target=options.target)
        stem = out / f"panel-{names[i]}{f'-{i + 1}' if names.count(names[i]) > 1 else ''}"
        figures.save(figure, stem)
        print(f"{stem}.png")
    if options.report:
        print(explained.report(out / "report.html", pictures, overwrite=True))
    if options.export:
        print(explained.export(out / "export", resume=options.resume))


def _check(options: argparse.Namespace, model: Network) -> None:
    """Refuse before the computation what would fail after it."""
    if options.target:
        model.output(options.target)
    for image in options.panel:
        inside = Path(options.folder).expanduser() / image
        file = inside if inside.is_file() else Path(image).expanduser()
        if not file.is_file():
            raise ValueError(f"--panel {image} is neither a file nor in {options.folder}")
        try:
            images.read(file, model.image_size, model.fit)
        except ValueError as error:
            raise ValueError(f"--panel {image} cannot be read: {error}") from None
    if options.export:
        require_pyarrow()


if __name__ == "__main__":
    sys.exit(main())
