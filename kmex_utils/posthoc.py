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
from pathlib import Path
from typing import NamedTuple

import torch

from . import hardware, images
from .activations import Activations, activations, keep
from .backbones import avg_pool
from .composite import Normalisation
from .datasets import Dataset, Images
from .explained import Explained
from .explainers import EncoderKMeans, KMEx, block_name
from .export import require_pyarrow
from .kmeans import DenseRows, Prototypes, classwise
from .measures import accuracy, cosine_alignment
from .networks import Network, network

__all__ = ["Explained", "explain", "network"]

IN_MEMORY = 2 * 2**30  # bytes of activations; more go to a temporary folder
KEPT_H = 2**29  # bytes of encoder outputs kept for attributions of the folder's own images
NEAREST = 5  # patches of each prototype, of as many images


class _Passed(NamedTuple):
    """x(first) … x(B) of the images that make prototypes, and what holding them takes, in bytes by image."""

    x: Activations
    in_memory: bool
    bytes_of: dict[int, int]  # by start block
    h_bytes: int


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
