"""From a frozen network and a folder of images to an explanation: one pass, class-wise k-means, a table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import paths
from ..data import Dataset
from ..hardware import exact, pick_device
from ..method.composite import Normalisation
from ..method.explainers import block_name
from ..method.measures import accuracy, cosine_alignment
from ..networks import Network
from ..networks.network import network as to_explain
from ..parameters import whole
from ..store import writable
from .explained import Explained, opened
from .gallery import network_classes, relabelled
from .passed import SPLITS, Passed

if TYPE_CHECKING:
    import pandas as pd

KEPT_H = 2**29  # bytes of encoder outputs kept for attributions of the folder's own images


def explain(
    network: Network | nn.Module,
    images: str | Path | Dataset | Any,
    *,
    start_block: int = 0,
    prototypes_per_class: int = 5,
    held_out: float = 0.2,
    fit_on: int = 0,
    norm: str = "position",
    scale: str = "1",
    align_corners: bool = False,
    grid: str = "shallowest",
    restarts: int = 3,
    seed: int = 0,
    device: str = "auto",
    batch_size: int = 32,
    scratch: str | Path | None = None,
    log: Callable[[str], None] = print,
    check: Callable[[dict[str, Any]], None] | None = None,
    **taken_in: Any,
) -> Explained:
    """Prototypes of a frozen network from a folder of images; nothing is trained.

    Parameters
    ----------
    network
        From :func:`kmex_utils.network`, or a module of your own, which is taken in by it with the further options
        (``classes``, ``image_size``, ``mean``, ``std``, ``window``, ``transform`` …).
    images
        ``<class>/*``, or ``train/<class>/*`` with ``test/<class>/*`` (or ``val/``), or images without labels: then the
        network's predictions stand in for labels in the class-wise clustering. Or a data set of
        :func:`kmex_utils.data.load`, or what it takes: a ``torch`` data set, its ``DataLoader``, or a pair of them.
    start_block
        The shallowest block to explain from, 1 … B; 0: the last three blocks (B234 of four).
    prototypes_per_class
        K/C.
    held_out
        Share of each class kept from the prototypes, to measure accuracy on, where the folder has no ``test/``.
    fit_on
        Prototypes from so many images of each class, drawn by the seed; 0: from all, which takes longer. A tenth of the
        images leaves accuracy within a point (notebook 10), but other prototypes come out: B234's maps agree with
        those from all images by an adjusted Rand index of 0.43 to 0.64, refits on all images by 0.68 to 0.95.
        :meth:`Explained.certainty` says what it costs here: each refit draws its own images.
    norm, scale, align_corners, grid
        Of eq. 7 and 8, as in :class:`~kmex_utils.method.composite.Normalisation`. Blocks weigh the same by default; the
        paper prints ``1/D``, with which the last block hardly counts.
    restarts, seed
        Of k-means; the seed also draws the held-out images.
    scratch
        Folder for the temporary files of what does not fit in memory; None: the system's. Activations that do not fit
        there either are computed anew whenever they are read, and the output says so.
    log
        Gets one line for each thing worth saying.
    check
        Gets the settings before the computation, which an error it raises prevents.

    Raises
    ------
    ValueError, FileNotFoundError
        One line that says what to change.
    """
    if not isinstance(network, Network):
        network = to_explain(network, **taken_in)
    elif taken_in:
        raise ValueError(f"{', '.join(taken_in)}: options of kmex_utils.network(), give them there")
    whole(start_block=start_block, fit_on=fit_on, seed=seed)
    whole(1, prototypes_per_class=prototypes_per_class, batch_size=batch_size)
    whole(1, 1000, restarts=restarts)
    blocks = len(network.blocks)
    first = start_block or max(1, blocks - 2)
    block_name(first, blocks)  # refuses a block that is not there
    normalisation = Normalisation(norm, scale, align_corners, grid)
    chosen = pick_device(device)
    scratch = paths.scratch(scratch)
    writable(scratch)
    if network.assumed:
        log(f"images enter {network.name} as {network.preprocessing()}")
    dataset = opened(images, network, held_out=held_out, seed=seed, scratch=scratch, log=log)
    settings = {
        **network.settings(),
        "dataset": dataset.name,
        "data": dataset.settings,
        "folder": str(paths.expanded(images).absolute()) if isinstance(images, str | Path) else "",
        "start_block": first,
        "prototypes_per_class": prototypes_per_class,
        "held_out": dataset.settings.get("held_out", 0.0),
        "fit_on": fit_on,
        **asdict(normalisation),
        "restarts": restarts,
        "seed": seed,
    }
    for c, name in enumerate(dataset.classes):
        count = int((dataset.train.labels == c).sum())
        if 0 < fit_on < prototypes_per_class or fit_on < 0:
            raise ValueError(f"fit_on must be 0 or at least K/C = {prototypes_per_class}, got {fit_on}")
        if count < prototypes_per_class:
            raise ValueError(
                f"class {name!r} has {count} images to make prototypes from, fewer than K/C = {prototypes_per_class}: "
                "lower prototypes_per_class or held_out, or add images"
            )
    if check:
        check(settings)
    if network.note:
        log(f"{network.name}: {network.note}")
    if network.form == "gated":
        log(f"the columns of {network.name} are each image's own (gated): no row in Table 1")
    if not network.form:
        log(f"no attributions: Theorem 1 and eq. 11 do not hold for {network.name}: {network.between}")
    explained = Explained(network, dataset, settings)
    with exact(), torch.no_grad():
        try:
            options: dict[str, Any] = {"device": chosen, "batch_size": batch_size, "log": log}
            passed = Passed.of(network, dataset, first, store="auto", folder=scratch, **options)
            if not dataset.classes:
                passed = _stand_in(explained, passed, log)
            _fit(explained, passed, normalisation)
            z = {split: passed.z(split) for split in SPLITS if len(passed.x[split])}
        finally:
            network.to("cpu")
        explained.table = _table(explained, z, log)
    assert explained.dataset is not None
    settings["held_out_images"] = int((explained.dataset.test.labels >= 0).sum())
    for line in explained.cautions().values():
        log(line)
    return explained


def _fit(explained: Explained, passed: Passed, normalisation: Normalisation) -> None:
    """The clusterings, and what is kept to answer quickly for the folder's own images."""
    settings = explained.settings
    prototypes_per_class, options = settings["prototypes_per_class"], {k: settings[k] for k in ("seed", "restarts")}
    how = {**options, "fit_on": settings["fit_on"]}
    index = passed.some_of_each_class(settings["fit_on"], settings["seed"])
    for b in range(passed.blocks, settings["start_block"] - 1, -1):
        explainer = passed.fit_encoder(b, normalisation, prototypes_per_class, index=index, **options)
        maps = passed.map(explainer, "train")
        explained.add_encoder(explainer, passed.nearest(explainer, maps), maps, **how)
        explained.maps[b, "test"] = passed.map(explainer, "test").int()
    for count in sorted({1, prototypes_per_class}):
        explained.add_kmex(passed.fit_kmex(count, index=index, **options), **how)
    explained.y, last = passed.y, passed.blocks
    if passed.x["train"].bytes_of(last) * sum(map(len, passed.x.values())) <= KEPT_H:
        explained.h = {split: x.read(torch.arange(len(x)), last)[-1].cpu() for split, x in passed.x.items() if len(x)}


# --- predictions as labels ----------------------------------------------------------------------------------------


def _stand_in(explained: Explained, passed: Passed, log: Callable[[str], None]) -> Passed:
    """Predictions as labels; predicted classes with fewer than K/C images are set aside (label -1)."""
    network, count = explained.network, explained.settings["prototypes_per_class"]
    predicted = passed.y["train"].argmax(1)
    outputs, images = predicted.unique(return_counts=True)
    kept = outputs[images >= count]
    if len(kept) < 2:
        most = network.classes[int(outputs[images.argmax()])]
        raise ValueError(
            f"the network puts {int(images.max())} of {len(predicted)} images into one class ({most}) and no second "
            f"class has K/C = {count} images: lower prototypes_per_class, add images, or give labels as <class>/*"
        )
    classes = tuple(network.classes[j] for j in kept.tolist())
    log(f"no labels in the folder: the predictions of {network.name} stand in for them ({_some(classes, 5)})")
    left_out = images[images < count]
    if len(left_out):
        log(
            f"{int(left_out.sum())} images of {len(left_out)} predicted classes with fewer than K/C = {count} images "
            "make no prototypes"
        )
    labels = {split: relabelled(y.argmax(1), kept) for split, y in passed.y.items()}
    dataset = explained.dataset
    assert dataset is not None
    train, test = (replace(dataset.split(split), labels=labels[split]) for split in SPLITS)
    explained.dataset = replace(dataset, classes=classes, train=train, test=test)
    explained.classes = classes
    explained.settings["stand_in_classes"] = kept.tolist()
    return replace(passed, labels=labels, classes=classes)


# --- Tables 1 and 2 -----------------------------------------------------------------------------------------------


def _table(explained: Explained, z: dict[str, torch.Tensor], log: Callable[[str], None]) -> "pd.DataFrame":
    """Tables 1 and 2 for this network and folder; one row for each model."""
    import pandas as pd

    dataset, network = explained.dataset, explained.network
    assert dataset is not None
    vectors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}  # and their classes, by model
    predicted: dict[str, dict[str, torch.Tensor]] = {}  # by model and split
    outputs = network_classes(explained)
    if outputs is None:
        log(
            f"accuracy of the network itself: not known, its classes ({_some(network.classes, 3)}) do not name the "
            f"folder's ({_some(explained.classes, 3)}): give classes="
        )
    else:
        if network.form in ("linear", "scaled"):
            vectors["CNN"] = network.c[outputs].cpu(), torch.arange(len(outputs))
        if not explained.predictions_as_labels:
            class_of = relabelled(torch.arange(len(network.classes)), outputs)
            predicted["CNN"] = {split: class_of[explained.y[split].argmax(1)] for split in z}
    for count, kmex in explained.kmex.items():
        name = f"KMEx (K/C={count})"
        vectors[name] = kmex.prototypes.vectors, kmex.prototypes.labels
        predicted[name] = {split: kmex.predict(z[split]) for split in z}
    for b, encoder in explained.explainers.items():
        maps = {split: explained.maps[b, split].long() for split in z}
        predicted[explained.name(b)] = {split: encoder.proj(maps[split]).argmax(1) for split in z}

    word = "agreement" if explained.predictions_as_labels else "accuracy"
    labels = {split: dataset.split(split).labels for split in z}
    table = pd.DataFrame(index=pd.Index(dict.fromkeys([*vectors, *predicted]), name="model"), dtype=float)
    train = labels["train"] >= 0
    for name, (columns, classes) in vectors.items():
        cosines = cosine_alignment(z["train"][train], labels["train"][train], columns, classes)
        table.loc[name, ["cosine, class", "cosine, out"]] = cosines
    for split in z:
        labelled = labels[split] >= 0
        if labelled.any():
            column = f"{word}, {SPLITS[split]} (%)"
            for name, of_split in predicted.items():
                table.loc[name, column] = accuracy(of_split[split][labelled], labels[split][labelled])
    return table


def _some(names: Sequence[str], limit: int) -> str:
    return ", ".join(names[:limit]) + (" …" if len(names) > limit else "")
