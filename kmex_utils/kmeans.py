"""Class-wise k-means: k-means++, restarts side by side, Lloyd; on embeddings z or on the rows of q(b:).

The algorithm only ever asks its data for inner products, weighted sums and a few rows (:class:`Rows`), so one
implementation serves the dense z (:class:`DenseRows`) and the never-built composite
(:class:`~kmex_utils.composite.CompositeRows`). A faster engine goes behind :func:`kmeans`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch

from .store import load_tensors, save_tensors


class Chunk(Protocol):
    """Some rows, with ``squared`` lengths ||q_r||² [rows]."""

    squared: torch.Tensor

    def dots(self, p: torch.Tensor) -> torch.Tensor:
        """q_r · p_k, [rows, K], for p [K, D]."""

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_r weights_rk q_r, [K, D], for weights [rows, K]."""


class Rows(Protocol):
    """n points of dimension D, read in chunks; what k-means needs to know of them."""

    dim: int
    device: torch.device

    def __len__(self) -> int:
        """The number of rows n."""

    def chunks(self) -> Iterator[tuple[slice, Chunk]]:
        """One pass over all rows."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows of an index, [n, D]."""

    def locate(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and position on its grid of the rows of an index."""


class _DenseChunk:
    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.squared = matrix.square().sum(1)

    def dots(self, p: torch.Tensor) -> torch.Tensor:
        return self.matrix @ p.T

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.T @ self.matrix


class DenseRows:
    """The rows of a matrix [n, D], one for each image."""

    def __init__(self, matrix: torch.Tensor, rows_per_chunk: int = 8192) -> None:
        if not torch.isfinite(matrix).all():
            raise ValueError("the embeddings hold NaN or infinite values: check the images and the weights")
        self.matrix = matrix
        self.dim = matrix.shape[1]
        self.device = matrix.device
        self._chunks = [_DenseChunk(part) for part in matrix.split(rows_per_chunk)]

    def __len__(self) -> int:
        return len(self.matrix)

    def chunks(self) -> Iterator[tuple[slice, Chunk]]:
        """One pass over all rows."""
        start = 0
        for chunk in self._chunks:
            yield slice(start, start + len(chunk.matrix)), chunk
            start += len(chunk.matrix)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows, [n, D]."""
        return self.matrix[index]

    def locate(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Row i is image i, at its only position."""
        return index, torch.zeros_like(index)


@dataclass(frozen=True)
class Clusters:
    """Result of :func:`kmeans`: ``centroids`` [K, D], rows in each ``sizes`` [K], the ``nearest`` row to each [K],
    ``inertia`` (sum of squared distances) and the iterations of the restart that was kept.
    """

    centroids: torch.Tensor
    sizes: torch.Tensor
    nearest: torch.Tensor
    inertia: float
    iterations: int


def kmeans(
    rows: Rows,
    k: int,
    *,
    restarts: int = 10,
    max_iterations: int = 300,
    tolerance: float = 1e-4,
    seed: int = 0,
    start: torch.Tensor | None = None,
) -> Clusters:
    """Lloyd's k-means from greedy k-means++, the best of several restarts, all run in one product per step.

    A restart ends when no assignment changes, or when its centroids move by less than ``tolerance`` times the mean
    variance of a coordinate (squared, summed; scikit-learn's rule, so it follows the data's scale). An empty
    cluster moves to the row farthest from its centroid. Ties go to the lowest index. Sums are kept in float64.

    Parameters
    ----------
    start
        Centroids [K, D] to start from instead; then there is one restart.

    Raises
    ------
    ValueError
        ``k`` is not between 1 and the number of rows.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"k must be between 1 and the {len(rows)} rows, got {k}")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    generator = torch.Generator().manual_seed(seed)
    if start is None:
        centroids = _plus_plus(rows, k, restarts, generator)
    else:
        centroids = start[None].to(rows.device, copy=True)
    threshold = tolerance * _mean_variance(rows)
    return _lloyd(rows, centroids, max_iterations, threshold)


def _lloyd(rows: Rows, centroids: torch.Tensor, max_iterations: int, threshold: float) -> Clusters:
    restarts = len(centroids)
    labels = torch.full((len(rows), restarts), -1, dtype=torch.int32, device=rows.device)
    iterations = torch.zeros(restarts, dtype=torch.int64)
    active = torch.arange(restarts, device=rows.device)
    for _ in range(max_iterations):
        moved = centroids[active].clone()
        sums, sizes, changed, farthest = _step(rows, moved, labels, active)
        filled = sizes > 0
        moved[filled] = (sums[filled] / sizes[filled, None]).float()
        _reseed(moved, filled, farthest)
        shift = (moved - centroids[active]).double().square().sum((1, 2))
        centroids[active] = moved
        iterations[active.cpu()] += 1
        active = active[(changed & (shift > threshold))]
        if not len(active):
            break
    inertia = torch.stack([_distances(rows, p)[0] for p in centroids])
    best = int(inertia.argmin())
    _, sizes, nearest = _distances(rows, centroids[best])
    return Clusters(centroids[best], sizes, nearest, float(inertia[best]), int(iterations[best]))


def _step(rows: Rows, p: torch.Tensor, labels: torch.Tensor, active: torch.Tensor):
    """One assignment and the sums of the update, for all active restarts p [R, K, D] at once.

    Writes the new ``labels``; returns sums [R, K, D] and sizes [R, K] in float64, whether any label changed [R],
    and the K rows farthest from their centroid with their squared distance.
    """
    restarts, k, dim = p.shape
    flat = p.flatten(0, 1)
    half = flat.square().sum(1) / 2
    sums = torch.zeros(restarts * k, dim, dtype=torch.float64, device=p.device)
    sizes = torch.zeros(restarts * k, dtype=torch.float64, device=p.device)
    changed = torch.zeros(restarts, dtype=torch.bool, device=p.device)
    far_value = torch.full((k, restarts), -torch.inf, device=p.device)
    far_index = torch.zeros((k, restarts), dtype=torch.int64, device=p.device)
    for span, chunk in rows.chunks():
        closeness = chunk.dots(flat).sub_(half).view(-1, restarts, k)
        best, label = closeness.max(2)
        one_hot = closeness.zero_().scatter_(2, label[:, :, None], 1).flatten(1)
        sums += chunk.sums(one_hot)
        sizes += one_hot.sum(0)
        label = label.int()
        changed |= (labels[span, active] != label).any(0)
        labels[span.start : span.stop, active] = label
        distance = chunk.squared[:, None] - 2 * best
        value, index = distance.topk(min(k, len(distance)), 0)
        far_value, order = torch.cat([far_value, value]).topk(k, 0)
        far_index = torch.cat([far_index, index + span.start]).gather(0, order)
    far = (far_value.T, [rows.rows(index) for index in far_index.T] if (sizes == 0).any() else [])
    return sums.view(restarts, k, dim), sizes.view(restarts, k), changed, far


def _reseed(p: torch.Tensor, filled: torch.Tensor, farthest) -> None:
    value, candidates = farthest
    for restart, cluster in (~filled).nonzero().tolist():
        rank = int((~filled[restart, :cluster]).sum())
        if value[restart, rank] > 0:
            p[restart, cluster] = candidates[restart][rank]


def _plus_plus(rows: Rows, k: int, restarts: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007, with scikit-learn's 2 + log k trials), [restarts, k, D]."""
    trials = 2 + int(torch.log(torch.tensor(float(k))))
    first = torch.randint(len(rows), (restarts,), generator=generator).to(rows.device)
    centroids = torch.empty(restarts, k, rows.dim, device=rows.device)
    centroids[:, 0] = rows.rows(first)
    closest = torch.full((len(rows), restarts), torch.inf, device=rows.device)
    _shrink(rows, centroids[:, 0], closest)
    for c in range(1, k):
        index = _draw(closest, torch.rand(trials, restarts, generator=generator, dtype=torch.float64))
        candidates = rows.rows(index.flatten())
        potential = torch.zeros(trials, restarts, dtype=torch.float64, device=rows.device)
        for span, distance in _squared_distances(rows, candidates):
            distance = distance.view(-1, trials, restarts)
            potential += torch.minimum(distance, closest[span, None]).sum(0, dtype=torch.float64)
        chosen = potential.argmin(0)
        centroids[:, c] = candidates.view(trials, restarts, -1)[chosen, torch.arange(restarts, device=rows.device)]
        _shrink(rows, centroids[:, c], closest)
    return centroids


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Row indices [trials, restarts] drawn in proportion to weights [n, restarts]."""
    cumulated = weights.double().cumsum(0).T.contiguous()
    target = uniform.to(weights.device).T * cumulated[:, -1:]
    return torch.searchsorted(cumulated, target.contiguous(), right=True).clamp_max(len(weights) - 1).T


def _shrink(rows: Rows, centroids: torch.Tensor, closest: torch.Tensor) -> None:
    for span, distance in _squared_distances(rows, centroids):
        closest[span] = torch.minimum(closest[span], distance)


def _squared_distances(rows: Rows, p: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """||q_r - p_k||² chunk by chunk, [chunk, K]."""
    squared = p.square().sum(1)
    for span, chunk in rows.chunks():
        scale = chunk.squared[:, None] + squared
        distance = scale - 2 * chunk.dots(p)
        # below the rounding of its terms a distance is zero: a centroid is not drawn twice
        yield span, torch.where(distance > 4e-7 * scale, distance, 0)


def _distances(rows: Rows, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inertia [] (float64), cluster sizes [K], and the nearest row to each centroid [K]."""
    inertia = torch.zeros((), dtype=torch.float64, device=rows.device)
    sizes = torch.zeros(len(p), dtype=torch.int64, device=rows.device)
    best = torch.full((len(p),), torch.inf, device=rows.device)
    nearest = torch.zeros(len(p), dtype=torch.int64, device=rows.device)
    for span, distance in _squared_distances(rows, p):
        least, label = distance.min(1)
        inertia += least.sum(dtype=torch.float64)
        sizes += torch.bincount(label, minlength=len(p))
        value, index = distance.min(0)
        nearest = torch.where(value < best, index + span.start, nearest)
        best = torch.minimum(value, best)
    return inertia, sizes, nearest


def _mean_variance(rows: Rows) -> float:
    """The variance of a coordinate, averaged over coordinates."""
    total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    squared = 0.0
    for _, chunk in rows.chunks():
        squared += float(chunk.squared.sum(dtype=torch.float64))
        total += chunk.sums(torch.ones_like(chunk.squared)[:, None])[0]
    n = len(rows)
    return max(0.0, squared / n - float((total / n).square().sum())) / rows.dim


# --- prototypes of all classes --------------------------------------------------------------------------------


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

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """To one safetensors file with its settings."""
        save_tensors(path, {field.name: getattr(self, field.name) for field in fields(self)}, settings)

    @classmethod
    def load(cls, path: Path) -> tuple["Prototypes", dict[str, Any]]:
        """Prototypes and settings from :meth:`save`."""
        tensors, settings = load_tensors(path)
        names = {field.name for field in fields(cls)}
        if set(tensors) != names:
            raise ValueError(f"{path} does not hold prototypes (found {', '.join(sorted(tensors))})")
        return cls(**tensors), settings


def classwise(
    rows_of: Callable[[torch.Tensor], Rows],
    labels: torch.Tensor,
    classes: Sequence[str],
    per_class: int,
    *,
    seed: int = 0,
    progress: str = "k-means",
    **options,
) -> Prototypes:
    """K/C prototypes for each class by k-means on its own rows (section 3.2, step 1).

    Parameters
    ----------
    rows_of
        Gives the rows of some images (an index [n] into the training split), whole images in that order.
    labels
        Class of every training image, [N].
    options
        Of :func:`kmeans`.

    Raises
    ------
    ValueError
        Before any clustering, when a class has fewer rows than ``per_class``.
    """
    from tqdm.auto import tqdm

    members = [torch.nonzero(labels == c).flatten() for c in range(len(classes))]
    check_enough(members, classes, per_class, rows_of)
    parts = []
    for c, index in enumerate(tqdm(members, progress, leave=False)):
        rows = rows_of(index)
        found = kmeans(rows, per_class, seed=seed + 7919 * c, **options)
        image, position = rows.locate(found.nearest)
        parts.append(
            Prototypes(
                found.centroids.cpu(),
                torch.full((per_class,), c),
                found.sizes.cpu(),
                index[image.cpu()],
                position.cpu(),
                torch.tensor([found.inertia], dtype=torch.float64),
            )
        )
    return Prototypes(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(Prototypes)))


def check_enough(members, classes, per_class: int, rows_of) -> None:
    """Refuse a K/C that some class cannot fill."""
    if per_class < 1:
        raise ValueError(f"prototypes per class (K/C) must be at least 1, got {per_class}")
    for index, name in zip(members, classes, strict=True):
        if len(index) == 0:
            raise ValueError(f"class {name!r} has no training images")
        if len(index) < per_class and len(rows_of(index)) < per_class:
            raise ValueError(
                f"class {name!r} has {len(rows_of(index))} training rows ({len(index)} images), fewer than "
                f"K/C = {per_class}: lower prototypes_per_class or add images"
            )
