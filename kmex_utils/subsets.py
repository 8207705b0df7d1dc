"""Prototypes from a fraction of the training images, and how much that changes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import adjusted_rand_score

from .activations import Activations, keep
from .backbones import Backbone, avg_pool
from .composite import Normalisation
from .datasets import Dataset
from .explainers import EncoderKMeans, KMEx, block_name
from .hardware import float64_device
from .kmeans import DenseRows, Prototypes, Rows, check_enough, classwise, inertia
from .measures import accuracy


def check(fractions: Sequence[float], draws: int, start_blocks: Sequence[int]) -> None:
    """Refuse a study that cannot be made."""
    if not fractions or not all(0 < fraction <= 1 for fraction in fractions):
        raise ValueError(f"fractions must lie in (0, 1], got {list(fractions)}")
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    for b in start_blocks:
        block_name(b)


def draw(labels: torch.Tensor, classes: int, fraction: float, at_least: int, seed: int) -> torch.Tensor:
    """A random ``fraction`` of the images of each class, at least so many, ascending index [n]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for c in range(classes):
        index = (labels == c).nonzero().flatten()
        count = min(len(index), max(at_least, round(fraction * len(index))))
        parts.append(index[torch.randperm(len(index), generator=generator)[:count]])
    return torch.cat(parts).sort().values


def study(
    backbone: Backbone,
    dataset: Dataset,
    fractions: Sequence[float],
    draws: int = 3,
    start_blocks: Sequence[int] = (4, 2),
    *,
    seed: int = 0,
    prototypes_per_class: int = 0,
    restarts: int = 10,
    device: torch.device | str = "cpu",
) -> list[dict[str, Any]]:
    """Fit KMEx and the explainers of some start blocks on fractions of the training images.

    Returns
    -------
    list of dict
        One for each model, fraction and draw: ``images`` used, ``accuracy`` on the test images in %, ``inertia`` of
        all training rows relative to the fit on all of them, ``agreement`` with that fit (adjusted Rand index of the
        training rows' prototypes), ``seconds`` of clustering.
    """
    per_class = prototypes_per_class or dataset.recipe.prototypes_per_class
    last, classes = len(backbone.blocks), len(dataset.classes)
    x = {s: keep(backbone, dataset, s, min([*start_blocks, last]), device=device) for s in ("train", "test")}
    ways = [_kmex(x, last, classes)]
    ways += [_encoder(x, b, last, classes, float64_device(torch.device(device))) for b in sorted(start_blocks)[::-1]]
    records: list[dict[str, Any]] = []
    for way in ways:
        records += _study(way, dataset, fractions, draws, per_class, seed, restarts)
    return records


@dataclass(frozen=True)
class _Way:
    """A model of the study: the rows it clusters, and what its prototypes say of a split (partition, scores)."""

    name: str
    rows_of: Callable[[torch.Tensor], Rows]
    explain: Callable[[Prototypes, str], tuple[torch.Tensor, torch.Tensor]]


def _kmex(x: dict[str, Activations], last: int, classes: int) -> _Way:
    z = {split: avg_pool(part.read(torch.arange(len(part)), last)[-1]) for split, part in x.items()}

    def explain(prototypes: Prototypes, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        explainer = KMEx(prototypes, classes)
        similarity = explainer.sim(z[split])
        return similarity.argmax(1), explainer.proj(similarity)

    return _Way("KMEx", lambda index: DenseRows(z["train"][index]), explain)


def _encoder(x: dict[str, Activations], b: int, last: int, classes: int, device: torch.device) -> _Way:
    def explain(prototypes: Prototypes, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        explainer = EncoderKMeans(prototypes, classes, b, Normalisation())
        everything = torch.arange(len(x[split]))
        maps = explainer.sim(x[split].rows(everything, b, Normalisation(), device=device, keep=False)).cpu()
        return maps.flatten(), explainer.proj(maps)

    return _Way(block_name(b, last), lambda index: x["train"].rows(index, b, Normalisation(), device=device), explain)


def _study(
    way: _Way,
    dataset: Dataset,
    fractions: Sequence[float],
    draws: int,
    per_class: int,
    seed: int,
    restarts: int,
) -> Iterator[dict[str, Any]]:
    labels, classes = dataset.train.labels, dataset.classes
    members = [(labels == c).nonzero().flatten() for c in range(len(classes))]
    check_enough(members, classes, per_class, way.rows_of)

    def fit(index: torch.Tensor, seed: int) -> Prototypes:
        options = {"seed": seed, "restarts": restarts, "progress": f"{way.name}, {len(index)} images"}
        return classwise(lambda some: way.rows_of(index[some]), labels[index], classes, per_class, **options)

    def spread(prototypes: Prototypes) -> float:
        own = prototypes.vectors.unflatten(0, (len(classes), -1))
        return sum(inertia(way.rows_of(index), own[c]) for c, index in enumerate(members))

    whole = fit(torch.arange(len(labels)), seed)
    whole_inertia, whole_partition = spread(whole), way.explain(whole, "train")[0]
    for fraction in fractions:
        for i in range(draws):
            index = draw(labels, len(classes), fraction, per_class, seed=1000 * seed + i)
            start = time.perf_counter()
            prototypes = fit(index, seed=seed + 101 * (i + 1))
            seconds = time.perf_counter() - start
            partition, _ = way.explain(prototypes, "train")
            _, y = way.explain(prototypes, "test")
            yield {
                "model": way.name,
                "fraction": fraction,
                "seed": seed,
                "draw": i,
                "images": len(index),
                "accuracy": accuracy(y.argmax(1), dataset.test.labels),
                "inertia": spread(prototypes) / whole_inertia,
                "agreement": adjusted_rand_score(whole_partition, partition),
                "seconds": seconds,
            }
