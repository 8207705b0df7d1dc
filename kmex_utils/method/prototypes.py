"""Prototypes of all classes: class-wise k-means (section 3.2, step 1) and what is kept of it."""

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, fields
from typing import Any

import torch
from tqdm.auto import tqdm

from .kmeans import Rows, kmeans

_SEEDS_APART = 7919  # between two classes of a run: runs of seeds 0, 1, 2 … share no class's random draws


@dataclass(frozen=True)
class Prototypes:
    """Centroids of every class, class after class: p_k of eq. 3 and what is known of each.

    ``vectors`` [K, D], class ``labels`` [K], ``sizes`` (training rows in the cluster) [K], and the nearest training
    row of its class as ``image`` (index into the training split) and ``position`` (row-major on the grid), [K] each.
    """

    vectors: torch.Tensor
    labels: torch.Tensor
    sizes: torch.Tensor
    image: torch.Tensor
    position: torch.Tensor
    inertia: torch.Tensor  # of each class's clustering, [C]

    def __len__(self) -> int:
        return len(self.vectors)


def classwise(
    rows_of: Callable[[torch.Tensor], Rows],
    labels: torch.Tensor,
    classes: Sequence[str],
    prototypes_per_class: int,
    *,
    seed: int = 0,
    among: Sequence[int] | None = None,
    progress: str = "k-means",
    **options: Any,
) -> Prototypes:
    """K/C prototypes for each class by k-means on its own rows.

    ``rows_of`` gives the rows of some images (an index [n] into the training split), whole images in that order;
    ``labels`` [N] are the training images' classes, ``options`` those of :func:`~kmex_utils.method.kmeans.kmeans`.
    A class with fewer rows than ``prototypes_per_class`` is refused before any clustering. With ``among`` only those
    classes are clustered, each as it would be among all.
    """
    among = range(len(classes)) if among is None else among
    members = [torch.nonzero(labels == c).flatten() for c in among]
    check_enough(members, [classes[c] for c in among], prototypes_per_class, rows_of)
    parts = []
    for c, index in zip(among, tqdm(members, progress, leave=False, delay=1), strict=True):
        rows = rows_of(index)
        clusters = kmeans(rows, prototypes_per_class, seed=seed + _SEEDS_APART * c, **options)
        nearest = clusters.nearest.cpu()
        parts.append(
            Prototypes(
                vectors=clusters.centroids.cpu(),
                labels=torch.full((prototypes_per_class,), c),
                sizes=clusters.sizes.cpu(),
                image=index[nearest // rows.rows_per_image],
                position=nearest % rows.rows_per_image,
                inertia=torch.tensor([clusters.inertia], dtype=torch.float64),
            )
        )
    return Prototypes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Prototypes)))


def check_enough(
    members: Sequence[torch.Tensor],
    classes: Sequence[str],
    prototypes_per_class: int,
    rows_of: Callable[[torch.Tensor], Sized],
) -> None:
    """Refuse a K/C that some class cannot fill; ``members`` are the indices of each class's images."""
    if prototypes_per_class < 1:
        raise ValueError(f"prototypes per class (K/C) must be at least 1, got {prototypes_per_class}")
    for index, name in zip(members, classes, strict=True):
        if len(index) == 0:
            raise ValueError(f"class {name!r} has no training images")
        if len(index) < prototypes_per_class and len(rows_of(index)) < prototypes_per_class:
            raise ValueError(
                f"class {name!r} has {len(rows_of(index))} training rows ({len(index)} images), fewer than "
                f"K/C = {prototypes_per_class}: lower prototypes_per_class or add images"
            )
