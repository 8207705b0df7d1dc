"""Prototypes from a fraction of the training images, and how much that changes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.metrics import adjusted_rand_score

from .backbones import Backbone
from .composite import Normalisation
from .datasets import Dataset
from .explainers import EncoderKMeans, KMEx, block_name
from .kmeans import DenseRows, Prototypes, Rows, check_enough, classwise, inertia
from .measures import accuracy
from .studies import Kept


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
    kept = Kept.of(backbone, dataset, min([*start_blocks, len(backbone.blocks)]), device=device)
    ways = [_kmex(kept), *(_encoder(kept, b) for b in sorted(start_blocks, reverse=True))]
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


def _kmex(kept: Kept) -> _Way:
    z = {split: kept.z(split) for split in kept.x}

    def explain(prototypes: Prototypes, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        explainer = KMEx(prototypes, len(kept.classes))
        similarity = explainer.sim(z[split])
        return similarity.argmax(1), explainer.proj(similarity)

    return _Way("KMEx", lambda index: DenseRows(z["train"][index]), explain)


def _encoder(kept: Kept, b: int) -> _Way:
    def explain(prototypes: Prototypes, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        explainer = EncoderKMeans(prototypes, len(kept.classes), b, Normalisation())
        maps = kept.map(explainer, split)
        return maps.flatten(), explainer.proj(maps)

    def rows_of(index: torch.Tensor) -> Rows:
        return kept.x["train"].rows(index, b, Normalisation(), device=kept.device)

    return _Way(block_name(b, kept.blocks), rows_of, explain)


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
