"""k-means on the rows of one class: greedy k-means++, restarts in one product, Lloyd; on embeddings z or on q(b:).

The algorithm only ever asks its data for inner products, weighted sums and a few rows (:class:`Rows`), so one
implementation serves the dense z (:class:`DenseRows`) and the never-built composite
(:class:`~kmex_utils.method.operator.CompositeRows`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F

from . import products


class Chunk(Protocol):
    """Some rows q_r of dimension D, with ``squared`` ||q_r||², [rows]."""

    squared: torch.Tensor

    def closeness(self, p: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        """p_k · q_r less half_k, [rows, K], for p [K, D] and half [K]; the caller may write into it.

        With half = ||p||²/2 the closest p_k of a row is that of the largest.
        """

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_r weights_rk q_r, [K, D], for weights [rows, K]."""

    def bags(self, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Σ weights_m q_index_m over bags of consecutive m that begin at ``starts``, for few rows: [bags, D]."""


class Rows(Protocol):
    """n points of dimension D, read in chunks; what k-means needs to know of them.

    Everything is measured from ``origin`` ([D] or []): rows far from zero and close together keep their distances.
    Row i R' + r, with R' = ``rows_per_image``, is position r of image i.
    """

    dim: int
    device: torch.device
    origin: torch.Tensor
    rows_per_image: int

    def __len__(self) -> int:
        """The number of rows n."""

    def chunks(self) -> Iterator[tuple[slice, Chunk]]:
        """One pass over all rows."""

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The rows of an index, [n, D], from the origin."""


class _DenseChunk:
    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix
        self.squared = matrix.square().sum(1)

    def closeness(self, p: torch.Tensor, half: torch.Tensor) -> torch.Tensor:
        return torch.addmm(-half, self.matrix, p.T)

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        return weights.T @ self.matrix

    def bags(self, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(index, self.matrix, starts, mode="sum", per_sample_weights=weights)


class DenseRows:
    """The rows of a matrix [n, D], one for each image, measured from their mean."""

    rows_per_image = 1

    def __init__(self, matrix: torch.Tensor) -> None:
        self.dim = matrix.shape[1]
        self.device = matrix.device
        self.origin = matrix.mean(0)
        self.matrix = matrix - self.origin
        size = products.rows_per_chunk(self.device)
        spans = [slice(start, min(start + size, len(matrix))) for start in range(0, len(matrix), size)]
        self._chunks = [(span, _DenseChunk(self.matrix[span])) for span in spans]
        if not all(torch.isfinite(4 * chunk.squared).all() for _, chunk in self._chunks):  # no distance² is larger
            what = "the embeddings hold NaN or infinite values, or too large ones to square in float32"
            raise ValueError(f"{what}: check the images and the weights, or scale the embeddings")

    def __len__(self) -> int:
        return len(self.matrix)

    def chunks(self) -> Iterator[tuple[slice, _DenseChunk]]:
        """One pass over all rows."""
        return iter(self._chunks)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows, [n, D], from the origin."""
        return self.matrix[index]


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
    start: str | torch.Tensor = "k-means++",
) -> Clusters:
    """Lloyd's k-means from greedy k-means++, the best of several restarts.

    A restart ends when no assignment changes, or when its centroids move by less than ``tolerance`` times the mean
    variance of a coordinate (squared, summed; scikit-learn's rule, so it follows the data's scale; iterations,
    restarts and tolerance are its defaults, too). Ties go to the lowest index. Sums are kept in float64.

    ``start`` may also be ``random`` rows (the centroids themselves where ``max_iterations`` is 0), or centroids [K, D]:
    then there is one restart, from them.
    """
    if not 1 <= k <= len(rows):
        raise ValueError(f"k must be between 1 and the {len(rows)} rows, got {k}")
    if restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(start, torch.Tensor):
        centroids = start[None].to(rows.device) - rows.origin
    elif start == "random":
        drawn = [torch.randperm(len(rows), generator=generator)[:k] for _ in range(restarts)]
        centroids = torch.stack([rows.rows(index.to(rows.device)) for index in drawn])
    elif start == "k-means++":
        centroids = _plus_plus(rows, k, restarts, generator)
    else:
        raise ValueError(f"start must be 'k-means++', 'random' or centroids, got {start!r}")
    restarts = len(centroids)
    threshold = tolerance * _mean_variance(rows)
    labels = torch.full((len(rows), restarts), -1, dtype=products.index_type(k), device=rows.device)  # -1: none yet
    sums = torch.zeros_like(centroids, dtype=torch.float64)  # of each cluster's rows
    sizes = torch.zeros(restarts, k, dtype=torch.float64, device=rows.device)
    iterations = torch.zeros(restarts, dtype=torch.int64)
    active = torch.arange(restarts, device=rows.device)
    for _ in range(max_iterations):
        moved = centroids[active]
        # every row goes to its closest centroid
        changed = _assign(rows, moved, labels, sums, sizes)
        # every centroid moves to the mean of its rows, an empty one to the row farthest from its centroid
        filled = sizes > 0
        if not filled.all():
            _reseed(rows, moved, filled)
        moved[filled] = (sums[filled] / sizes[filled][:, None]).float()
        shift = (moved - centroids[active]).double().square().sum((1, 2))
        centroids[active] = moved
        iterations[active.cpu()] += 1
        # a restart ends where no row changed its cluster or the centroids hardly moved
        goes_on = changed & (shift > threshold)
        if not goes_on.any():
            break
        if not goes_on.all():
            active, labels, sums, sizes = active[goes_on], labels[:, goes_on], sums[goes_on], sizes[goes_on]
    total, counts, nearest = _assess(rows, centroids)
    best = int(total.argmin())
    centroid = centroids[best] + rows.origin
    return Clusters(centroid, counts[best], nearest[best], float(total[best]), int(iterations[best]))


def inertia(rows: Rows, centroids: torch.Tensor) -> float:
    """The sum of squared distances of all rows to the closest of some centroids [K, D]."""
    return float(_assess(rows, (centroids.to(rows.device) - rows.origin)[None])[0])


def _assign(rows: Rows, p: torch.Tensor, labels: torch.Tensor, sums: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Give every row to its closest centroid in each restart p [R, K, D]; returns whether any row changed, [R].

    A row that changes its ``labels`` [n, R] leaves the sum of its old cluster and enters that of its new one: ``sums``
    [R, K, D] and ``sizes`` [R, K], both float64, follow.
    """
    restarts, k, dim = p.shape
    flat = p.flatten(0, 1)
    half = flat.square().sum(1) / 2
    flat_sums, flat_sizes = sums.view(-1, dim), sizes.view(-1)
    changed = torch.zeros(restarts, dtype=torch.bool, device=p.device)
    for span, chunk in rows.chunks():
        closeness = chunk.closeness(flat, half)
        new = closeness.view(-1, restarts, k).max(2).indices
        old = labels[span].long()
        labels[span] = new.to(labels.dtype)
        row, restart = (new != old).nonzero(as_tuple=True)
        left, entered = old[row, restart], new[row, restart]
        known = left >= 0
        cluster = torch.cat([restart * k + entered, (restart * k + left)[known]])
        row = torch.cat([row, row[known]])
        sign = torch.ones(len(row), device=p.device)
        sign[len(restart) :] = -1
        if len(restart) < products.FEW * new.numel():
            target, order = cluster.sort(stable=True)
            starts = torch.searchsorted(target, torch.arange(restarts * k, device=p.device))
            flat_sums += chunk.bags(row[order], sign[order], starts)
        else:
            weights = closeness.zero_()
            weights[row, cluster] = sign
            flat_sums += chunk.sums(weights)
        flat_sizes += torch.bincount(cluster, sign, restarts * k)
        changed[restart] = True
    return changed


def _reseed(rows: Rows, p: torch.Tensor, filled: torch.Tensor) -> None:
    """Move the clusters of p [R, K, D] that are not ``filled`` [R, K] to the rows farthest from their own centroid."""
    restarts, k, _ = p.shape
    closest = torch.empty(len(rows), restarts, device=p.device)
    for span, distance in _squared_distances(rows, p.flatten(0, 1)):
        closest[span] = distance.view(-1, restarts, k).amin(2)
    value, index = closest.T.topk(k, 1)
    for restart, cluster in (~filled).nonzero().tolist():
        rank = int((~filled[restart, :cluster]).sum())
        if value[restart, rank] > 0:
            p[restart, cluster] = rows.rows(index[restart, rank : rank + 1])[0]


def _plus_plus(rows: Rows, k: int, restarts: int, generator: torch.Generator) -> torch.Tensor:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007, with scikit-learn's 2 + log k trials), [restarts, k, D].

    Each next centroid is a row drawn in proportion to its squared distance to the closest centroid so far: of the
    trials the one that leaves the least sum of them.
    """
    trials = 2 + int(math.log(k))
    first = torch.randint(len(rows), (restarts,), generator=generator).to(rows.device)
    centroids = torch.empty(restarts, k, rows.dim, device=rows.device)
    centroids[:, 0] = rows.rows(first)
    closest = torch.full((len(rows), restarts), torch.inf, device=rows.device)
    _shrink(rows, centroids[:, 0], closest)
    for c in range(1, k):
        index = _draw(closest, torch.rand(restarts, trials, generator=generator, dtype=torch.float64))
        candidates = rows.rows(index.flatten())
        potential = torch.zeros(restarts, trials, dtype=torch.float64, device=rows.device)
        for span, distance in _squared_distances(rows, candidates):
            reached = torch.minimum(distance.view(-1, restarts, trials), closest[span, :, None])
            potential += reached.sum(0, dtype=torch.float64)
        best = potential.argmin(1)
        centroids[:, c] = candidates.view(restarts, trials, -1)[torch.arange(restarts, device=rows.device), best]
        _shrink(rows, centroids[:, c], closest)
    return centroids


def _draw(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Row indices [restarts, trials] drawn in proportion to weights [n, restarts], by uniform numbers in [0, 1)."""
    each = ((row.double().cumsum(0), draws) for row, draws in zip(weights.T, uniform.to(weights.device), strict=True))
    index = [torch.searchsorted(cumulated, draws * cumulated[-1], right=True) for cumulated, draws in each]
    return torch.stack(index).clamp_max(len(weights) - 1)


def _shrink(rows: Rows, centroids: torch.Tensor, closest: torch.Tensor) -> None:
    """Lower ``closest`` [n, R] to the squared distance to one more centroid of each restart, [R, D]."""
    # float32 rounds by 1.2e-7 of a term; within about three of these a row is the centroid itself and not drawn again
    for span, distance in _squared_distances(rows, centroids, rounding=4e-7):
        closest[span] = torch.minimum(closest[span], distance)


def _squared_distances(rows: Rows, p: torch.Tensor, rounding: float = 0) -> Iterator[tuple[slice, torch.Tensor]]:
    """||p_k - q_r||² chunk by chunk, [chunk, K]; zero where it is no more than ``rounding`` times its terms."""
    squared = p.square().sum(1)
    for span, chunk in rows.chunks():
        of_row = chunk.squared[:, None]
        distance = chunk.closeness(p, squared / 2).mul_(-2).add_(of_row)
        yield span, distance.masked_fill_(distance <= rounding * (of_row + squared), 0)


def _assess(rows: Rows, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each restart p [R, K, D]: inertia [R] (float64), cluster sizes [R, K], nearest row to each centroid [R, K]."""
    restarts, k, _ = p.shape
    inertia = torch.zeros(restarts, dtype=torch.float64, device=p.device)
    sizes = torch.zeros(restarts, k, dtype=torch.int64, device=p.device)
    best = torch.full((restarts * k,), torch.inf, device=p.device)
    nearest = torch.zeros(restarts * k, dtype=torch.int64, device=p.device)
    for span, distance in _squared_distances(rows, p.flatten(0, 1)):
        least, label = distance.view(-1, restarts, k).min(2)
        inertia += least.sum(0, dtype=torch.float64)
        sizes.scatter_add_(1, label.T, torch.ones_like(label.T))
        value, index = distance.min(0)
        nearest = torch.where(value < best, index + span.start, nearest)
        best = torch.minimum(value, best)
    return inertia, sizes, nearest.view(restarts, k)


def _mean_variance(rows: Rows) -> float:
    """Of a coordinate, averaged over coordinates."""
    total = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    squared = 0.0
    for _, chunk in rows.chunks():
        squared += float(chunk.squared.sum(dtype=torch.float64))
        total += chunk.sums(torch.ones_like(chunk.squared)[:, None])[0]
    n = len(rows)
    return max(0.0, squared / n - float((total / n).square().sum())) / rows.dim
