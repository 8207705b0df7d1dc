"""Class-wise k-means: k-means++, restarts side by side, Lloyd; on embeddings z or on the rows of q(b:).

The algorithm only ever asks its data for inner products, weighted sums and a few rows (:class:`Rows`), so one
implementation serves the dense z (:class:`DenseRows`) and the never-built composite
(:class:`~kmex_utils.composite.CompositeRows`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from .hardware import rows_at_once
from .store import load_tensors, save_tensors


class Chunk(Protocol):
    """Some rows, with ``squared`` lengths ||q_r||² [rows]."""

    @property
    def squared(self) -> torch.Tensor:
        """||q_r||², [rows]."""

    def dots(self, p: torch.Tensor) -> torch.Tensor:
        """p_k · q_r, [K, rows], for p [K, D]; the caller may write into it."""

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_r weights_kr q_r, [K, D], for weights [K, rows]."""

    def sums_of(self, index: torch.Tensor, weights: torch.Tensor, target: torch.Tensor, count: int) -> torch.Tensor:
        """Σ weights_m q_index_m over the m with target_m = k, for few rows: [count, D]; ``target`` ascending."""


class Rows(Protocol):
    """n points of dimension D, read in chunks; what k-means needs to know of them.

    Everything is measured from ``origin`` ([D] or []): rows far from zero and close together keep their distances.
    """

    dim: int
    device: torch.device
    origin: torch.Tensor

    def __len__(self) -> int:
        """The number of rows n."""

    def chunks(self) -> Iterator[tuple[slice, Chunk]]:
        """One pass over all rows."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows of an index, [n, D], from the origin."""

    def locate(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and position on its grid of the rows of an index."""


class _DenseChunk:
    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.squared = matrix.square().sum(1)

    def dots(self, p: torch.Tensor) -> torch.Tensor:
        return p @ self.matrix.T

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        return weights @ self.matrix

    def sums_of(self, index: torch.Tensor, weights: torch.Tensor, target: torch.Tensor, count: int) -> torch.Tensor:
        starts = torch.searchsorted(target, torch.arange(count, device=target.device))
        return F.embedding_bag(index, self.matrix, starts, mode="sum", per_sample_weights=weights)


class DenseRows:
    """The rows of a matrix [n, D], one for each image, measured from their mean."""

    def __init__(self, matrix: torch.Tensor, rows_per_chunk: int = 0) -> None:
        if not torch.isfinite(matrix).all():
            raise ValueError("the embeddings hold NaN or infinite values: check the images and the weights")
        self.dim = matrix.shape[1]
        self.device = matrix.device
        self.origin = matrix.mean(0) if len(matrix) else matrix.new_zeros(())
        self.matrix = matrix - self.origin
        self._chunks = [_DenseChunk(part) for part in self.matrix.split(rows_per_chunk or rows_at_once(self.device))]

    def __len__(self) -> int:
        return len(self.matrix)

    def chunks(self) -> Iterator[tuple[slice, Chunk]]:
        """One pass over all rows."""
        start = 0
        for chunk in self._chunks:
            yield slice(start, start + len(chunk.matrix)), chunk
            start += len(chunk.matrix)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows, [n, D], from the origin."""
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
        centroids = start[None].to(rows.device) - rows.origin
    threshold = tolerance * _mean_variance(rows)
    found = _lloyd(rows, centroids, max_iterations, threshold)
    return replace(found, centroids=found.centroids + rows.origin)


def inertia(rows: Rows, centroids: torch.Tensor) -> float:
    """The sum of squared distances of all rows to the closest of some centroids [K, D]."""
    return float(_assess(rows, (centroids.to(rows.device) - rows.origin)[None])[0])


def _lloyd(rows: Rows, centroids: torch.Tensor, max_iterations: int, threshold: float) -> Clusters:
    restarts, k, dim = centroids.shape
    state = _State(
        torch.full((restarts, len(rows)), -1, dtype=torch.int16 if k < 2**15 else torch.int32, device=rows.device),
        torch.zeros(restarts, k, dim, dtype=torch.float64, device=rows.device),
        torch.zeros(restarts, k, dtype=torch.float64, device=rows.device),
    )
    iterations = torch.zeros(restarts, dtype=torch.int64)
    active = torch.arange(restarts, device=rows.device)
    for _ in range(max_iterations):
        moved = centroids[active]
        changed = _assign(rows, moved, state, active)
        sizes = state.sizes[active]
        filled = sizes > 0
        if not filled.all():
            _reseed(rows, moved, filled)
        moved[filled] = (state.sums[active][filled] / sizes[filled, None]).float()
        shift = (moved - centroids[active]).double().square().sum((1, 2))
        centroids[active] = moved
        iterations[active.cpu()] += 1
        active = active[(changed & (shift > threshold))]
        if not len(active):
            break
    inertia, sizes, nearest = _assess(rows, centroids)
    best = int(inertia.argmin())
    return Clusters(centroids[best], sizes[best], nearest[best], float(inertia[best]), int(iterations[best]))


@dataclass
class _State:
    """Of all restarts: ``labels`` [R, n], and ``sums`` [R, K, D] and ``sizes`` [R, K] of their rows in float64."""

    labels: torch.Tensor
    sums: torch.Tensor
    sizes: torch.Tensor


def _assign(rows: Rows, p: torch.Tensor, state: _State, active: torch.Tensor) -> torch.Tensor:
    """Give every row to its closest centroid in the active restarts p [R, K, D], all in one product per chunk.

    Sums and sizes follow by what changed, row by row once that is little. Returns whether any label did, [R].
    """
    restarts, k, dim = p.shape
    flat = p.flatten(0, 1)
    half = flat.square().sum(1, keepdim=True) / 2
    sums = torch.zeros(restarts * k, dim, dtype=torch.float64, device=p.device)
    sizes = torch.zeros(restarts * k, dtype=torch.float64, device=p.device)
    changed = torch.zeros(restarts, dtype=torch.bool, device=p.device)
    for span, chunk in rows.chunks():
        closeness = chunk.dots(flat).sub_(half).view(restarts, k, -1)
        new = argmax(closeness)
        old = state.labels[active, span].long()
        state.labels[active, span] = new.to(state.labels.dtype)
        restart, row = (new != old).nonzero(as_tuple=True)
        left, entered = old[restart, row], new[restart, row]
        known = left >= 0
        cluster = torch.cat([restart * k + entered, (restart * k + left)[known]])
        row = torch.cat([row, row[known]])
        sign = torch.ones(len(row), device=p.device)
        sign[len(restart) :] = -1
        if len(restart) < _FEW * new.numel():
            target, order = cluster.sort(stable=True)
            sums += chunk.sums_of(row[order], sign[order], target, restarts * k)
        else:
            weights = closeness.zero_().flatten(0, 1)
            weights[cluster, row] = sign
            sums += chunk.sums(weights)
        sizes += torch.bincount(cluster, sign, restarts * k)
        changed[restart] = True
    state.sums[active] += sums.view(restarts, k, dim)
    state.sizes[active] += sizes.view(restarts, k)
    return changed


_FEW = 0.25  # share of changed labels below which single rows are faster than a product (measured)


def argmax(values: torch.Tensor) -> torch.Tensor:
    """Index of the largest along dimension 1, [n, K, m] -> [n, m], ties to the lowest.

    Maximum, comparison and maximum again run several times faster on CPUs than PyTorch's own search.
    """
    k = values.shape[1]
    code = torch.arange(k, 0, -1, dtype=torch.int16 if k < 2**15 else torch.int32, device=values.device)
    hit = values == values.amax(1, keepdim=True)
    return k - (hit * code[:, None]).amax(1).long()


def _reseed(rows: Rows, p: torch.Tensor, filled: torch.Tensor) -> None:
    """Move the empty clusters of p [R, K, D] to the rows farthest from their own centroid.

    ``filled`` [R, K] says which clusters have rows.
    """
    restarts, k, _ = p.shape
    value = torch.full((restarts, k), -torch.inf, device=p.device)
    index = torch.zeros((restarts, k), dtype=torch.int64, device=p.device)
    for span, distance in _squared_distances(rows, p.flatten(0, 1)):
        closest = distance.view(restarts, k, -1).amin(1)
        far, where = closest.topk(min(k, closest.shape[1]), 1)
        value, order = torch.cat([value, far], 1).topk(k, 1)
        index = torch.cat([index, where + span.start], 1).gather(1, order)
    for restart, cluster in (~filled).nonzero().tolist():
        rank = int((~filled[restart, :cluster]).sum())
        if value[restart, rank] > 0:
            p[restart, cluster] = rows.rows(index[restart, rank : rank + 1])[0]


def _plus_plus(rows: Rows, k: int, restarts: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007, with scikit-learn's 2 + log k trials), [restarts, k, D]."""
    trials = 2 + int(math.log(k))
    first = torch.randint(len(rows), (restarts,), generator=generator).to(rows.device)
    centroids = torch.empty(restarts, k, rows.dim, device=rows.device)
    centroids[:, 0] = rows.rows(first)
    closest = torch.full((restarts, len(rows)), torch.inf, device=rows.device)
    _shrink(rows, centroids[:, 0], closest)
    for c in range(1, k):
        index = _draw(closest, torch.rand(restarts, trials, generator=generator, dtype=torch.float64))
        candidates = rows.rows(index.flatten())
        potential = torch.zeros(restarts, trials, dtype=torch.float64, device=rows.device)
        for span, distance in _squared_distances(rows, candidates):
            reached = torch.minimum(distance.view(restarts, trials, -1), closest[:, None, span])
            potential += reached.sum(2, dtype=torch.float64)
        chosen = potential.argmin(1)
        centroids[:, c] = candidates.view(restarts, trials, -1)[torch.arange(restarts, device=rows.device), chosen]
        _shrink(rows, centroids[:, c], closest)
    return centroids


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Row indices [restarts, trials] drawn in proportion to weights [restarts, n]."""
    drawn = []
    for some, draws in zip(weights, uniform.to(weights.device), strict=True):
        cumulated = some.double().cumsum(0)
        drawn.append(torch.searchsorted(cumulated, draws * cumulated[-1], right=True))
    return torch.stack(drawn).clamp_max(weights.shape[1] - 1)


def _shrink(rows: Rows, centroids: torch.Tensor, closest: torch.Tensor) -> None:
    """Lower ``closest`` [R, n] to the squared distance to one more centroid of each restart, [R, D]."""
    for span, distance in _squared_distances(rows, centroids, rounding=4e-7):  # so that no row is drawn twice
        closest[:, span] = torch.minimum(closest[:, span], distance)


def _squared_distances(rows: Rows, p: torch.Tensor, rounding: float = 0) -> Iterator[tuple[slice, torch.Tensor]]:
    """||p_k - q_r||² chunk by chunk, [K, chunk]; zero where it is no more than ``rounding`` times its terms."""
    squared = p.square().sum(1, keepdim=True)
    for span, chunk in rows.chunks():
        scale = chunk.squared + squared
        distance = chunk.dots(p).mul_(-2).add_(scale)
        yield span, distance.masked_fill_(distance <= rounding * scale, 0)


def _assess(rows: Rows, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each restart p [R, K, D]: inertia [R] (float64), cluster sizes [R, K], nearest row to each centroid [R, K]."""
    restarts, k, _ = p.shape
    inertia = torch.zeros(restarts, dtype=torch.float64, device=p.device)
    sizes = torch.zeros(restarts, k, dtype=torch.int64, device=p.device)
    best = torch.full((restarts * k,), torch.inf, device=p.device)
    nearest = torch.zeros(restarts * k, dtype=torch.int64, device=p.device)
    for span, distance in _squared_distances(rows, p.flatten(0, 1)):
        least, label = distance.view(restarts, k, -1).min(1)
        inertia += least.sum(1, dtype=torch.float64)
        sizes.scatter_add_(1, label, torch.ones_like(label))
        value, index = distance.min(1)
        nearest = torch.where(value < best, index + span.start, nearest)
        best = torch.minimum(value, best)
    return inertia, sizes, nearest.view(restarts, k)


def _mean_variance(rows: Rows) -> float:
    """The variance of a coordinate, averaged over coordinates."""
    total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    squared = 0.0
    for _, chunk in rows.chunks():
        squared += float(chunk.squared.sum(dtype=torch.float64))
        total += chunk.sums(torch.ones_like(chunk.squared)[None])[0]
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
