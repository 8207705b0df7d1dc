"""The composite of eq. 7 and 8, never built: whatever is asked of its rows is answered from the activations.

Upsampling acts on positions, the dot product on channels, so the two commute, as average pool and classifier do in
Theorem 1:

    q_r · p_k = Σ_b s(b)_r [A_b (x(b) p_k(b))]_r

with A_b the interpolation to the shared grid (eq. 7) and s(b)_r the normalisation of eq. 8. k-means and the explainers
see :class:`CompositeRows`, which equals :func:`~kmex_utils.method.composite.composite` row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache, partial

import torch
import torch.nn.functional as F

from . import products
from .composite import PRINTED, Normalisation

Grid = tuple[int, int]  # height, width
Read = Callable[[int, int], Sequence[torch.Tensor]]  # x(b) of images start … stop


@lru_cache(maxsize=64)
def interpolation(out: Grid, size: Grid, align_corners: bool) -> list[torch.Tensor]:
    """Linear interpolation in height and in width, A_h [H', H_b] and A_w [W', W_b]; the bilinear A is A_h ⊗ A_w."""
    one_hot = [torch.eye(n)[None] for n in size]
    axes = [F.interpolate(e, n, mode="linear", align_corners=align_corners) for e, n in zip(one_hot, out, strict=True)]
    return [a[0].T.contiguous() for a in axes]


@lru_cache(maxsize=64)
def _both_axes(out: Grid, size: Grid, align_corners: bool) -> torch.Tensor | None:
    """A = A_h ⊗ A_w [R', R_b] where that is small."""
    a_h, a_w = interpolation(out, size, align_corners)
    if a_h.numel() * a_w.numel() > products.SMALL_DOWN:
        return None
    return (a_h[:, None, :, None] * a_w[None, :, None, :]).reshape(out[0] * out[1], -1)


@lru_cache(maxsize=64)
def _taps(out: Grid, size: Grid, align_corners: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The at most four positions each row of u is made of, [R', 4], and their shares in it."""
    (share_h, tap_h), (share_w, tap_w) = (
        a.topk(min(2, a.shape[1]), 1) for a in interpolation(out, size, align_corners)
    )
    taps = tap_h[:, None, :, None] * size[1] + tap_w[None, :, None, :]
    shares = share_h[:, None, :, None] * share_w[None, :, None, :]
    return taps.reshape(out[0] * out[1], -1), shares.reshape(out[0] * out[1], -1)


class _Block:
    """x(b) of some images at its own resolution, [n R_b, D_b]; u = A x, with A = A_h ⊗ A_w, is never formed.

    ``s`` [n R'] is the scale of each row of u, ``squared`` [n R'] the squared length of each scaled row.
    """

    def __init__(self, x: torch.Tensor, out: Grid, normalisation: Normalisation) -> None:
        self.n, self.channels, self.height, self.width = x.shape
        self.geometry = out, (self.height, self.width), normalisation.align_corners
        self.same_grid = out == (self.height, self.width)
        self.a_h, self.a_w = (a.to(x) for a in interpolation(*self.geometry))
        a = _both_axes(*self.geometry)
        self.a = None if a is None else a.to(x)
        factor = normalisation.factor(self.channels)
        if normalisation.norm == "channel":
            x = x * _inverse_root(self._squared_lengths_of_channels(x))[:, :, None, None]
        self.x = x.permute(0, 2, 3, 1).reshape(-1, self.channels)  # no copy of channels-last activations
        squared = self._squared_lengths_of_rows()
        match normalisation.norm:
            case "position":
                s = factor * _inverse_root(squared)
            case "image":
                s = factor * _inverse_root(squared.sum(1, keepdim=True)).expand_as(squared)
            case _:  # channel: already divided
                s = torch.full_like(squared, factor)
        self.s = s.flatten()
        self.squared = (self.s * squared.flatten().sqrt()) ** 2

    def _squared_lengths_of_channels(self, x: torch.Tensor) -> torch.Tensor:
        """||u_c||² over positions, [n, D], as x_cᵀ (AᵀA) x_c."""
        return (x * ((self.a_h.T @ self.a_h) @ x @ (self.a_w.T @ self.a_w))).sum((2, 3)).clamp_min(0)

    def _squared_lengths_of_rows(self) -> torch.Tensor:
        """||u_r||² of every upsampled row, [n, R'], without u.

        A row of u is a weighted sum of at most four neighbouring rows of x, so its squared length needs only the
        inner products of neighbours: with itself, right, below, and along both diagonals.
        """
        x = self.x.view(self.n, self.height, self.width, self.channels)
        if self.same_grid:
            return _dot(x, x).flatten(1)
        a_h, a_w = self.a_h, self.a_w
        square_h, square_w = a_h**2, a_w**2
        cross_h, cross_w = 2 * a_h[:, :-1] * a_h[:, 1:], 2 * a_w[:, :-1] * a_w[:, 1:]
        total = square_h @ _dot(x, x) @ square_w.T
        total += square_h @ _dot(x[:, :, :-1], x[:, :, 1:]) @ cross_w.T
        total += cross_h @ _dot(x[:, :-1], x[:, 1:]) @ square_w.T
        diagonals = _dot(x[:, :-1, :-1], x[:, 1:, 1:]) + _dot(x[:, :-1, 1:], x[:, 1:, :-1])
        total += cross_h @ (diagonals / 2) @ cross_w.T
        return total.clamp_min(0).flatten(1)

    def up(self, maps: torch.Tensor) -> torch.Tensor:
        """A maps: [K, n R_b] -> [K, n R']."""
        if self.same_grid:
            return maps
        if self.a is not None and self.a.numel() <= products.SMALL_UP:
            return products.dots(maps.view(-1, self.a.shape[1]), self.a).view(len(maps), -1)
        return _axis_by_axis(maps, self.a_h, self.a_w)

    def down(self, maps: torch.Tensor) -> torch.Tensor:
        """Aᵀ maps: [K, n R'] -> [K, n R_b]."""
        if self.same_grid:
            return maps
        if self.a is not None:
            return (maps.view(-1, len(self.a)) @ self.a).view(len(maps), -1)
        return _axis_by_axis(maps, self.a_h.T, self.a_w.T)

    def dots(self, p: torch.Tensor) -> torch.Tensor:
        """p_k · s_r u_r for p [K, D_b]: [K, n R']."""
        if self.same_grid:
            return products.dots(p, self.x * self.s[:, None])
        return self.up(products.dots(p, self.x)) * self.s

    def bags(self, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Σ weights_m s u_index_m over bags of consecutive m that begin at ``starts``, [bags, D_b]."""
        weights = weights * self.s[index]
        if not self.same_grid:
            taps, shares = _taps(*self.geometry)
            image, position = index // len(taps), index % len(taps)
            index = image[:, None] * (self.height * self.width) + taps.to(index.device)[position]
            weights = weights[:, None] * shares.to(weights)[position]
            starts = starts * taps.shape[1]
        return F.embedding_bag(index.flatten(), self.x, starts, mode="sum", per_sample_weights=weights.flatten())


def _inverse_root(squared: torch.Tensor) -> torch.Tensor:
    return torch.where(squared > 0, squared.rsqrt(), 0)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products over channels, [n, H, W, D] each -> [n, H, W]."""
    return (a * b).sum(3)


def _axis_by_axis(maps: torch.Tensor, a_h: torch.Tensor, a_w: torch.Tensor) -> torch.Tensor:
    """(a_h ⊗ a_w) maps, along the width, then along the height."""
    wide = maps.view(-1, a_w.shape[1]) @ a_w.T
    return (a_h @ wide.view(-1, a_h.shape[1], len(a_w))).view(len(maps), -1)


class CompositeChunk:
    """The rows of q of some images: row i R' + r is position r of image i."""

    def __init__(self, x: Sequence[torch.Tensor], normalisation: Normalisation) -> None:
        self._x = x
        self._normalisation = normalisation

    @cached_property
    def blocks(self) -> list[_Block]:
        """The blocks with their scales, computed on first use."""
        out = self._normalisation.shared_grid(self._x)
        blocks = [_Block(x, out, self._normalisation) for x in self._x]
        if not all(torch.isfinite(block.squared.sum()) for block in blocks):
            raise ValueError("the activations hold NaN or infinite values: check the images and the weights")
        return blocks

    @cached_property
    def squared(self) -> torch.Tensor:
        """||q_r||², [rows]."""
        first, *rest = (block.squared for block in self.blocks)
        return sum(rest, first)

    def dots(self, p: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """p_k · q_r for p [K, Σ D_b], or its columns by block: [K, rows]."""
        if isinstance(p, torch.Tensor):
            p = p.split([block.channels for block in self.blocks], 1)
        total = self.blocks[0].dots(p[0])
        for block, p_b in zip(self.blocks[1:], p[1:], strict=True):
            total.addcmul_(block.up(products.dots(p_b, block.x)), block.s)
        return total

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_r weights_kr q_r for weights [K, rows]: [K, Σ D_b]."""
        return torch.cat([block.down(weights * block.s) @ block.x for block in self.blocks], 1)

    def bags(self, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Σ weights_m q_index_m over bags of consecutive m that begin at ``starts``: [bags, Σ D_b]."""
        return torch.cat([block.bags(index, weights, starts) for block in self.blocks], 1)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of q themselves, [n, Σ D_b]."""
        return self.bags(index, torch.ones_like(self.squared[index]), torch.arange(len(index), device=index.device))


class CompositeRows:
    """The rows of q(b:) for k-means and the explainers, exact, at the blocks' own resolutions.

    Rows run image by image and, within an image, along the shared grid, row-major.

    Parameters
    ----------
    read
        Gives x(b) of images start … stop as [n, D_b, H_b, W_b] each, shallowest block first; or these tensors of
        all images, which are then counted here.
    keep
        Read once and hold the activations in memory. Without it every pass reads ``images_per_reading`` at a time,
        and single images where k-means++ draws a row, so memory does not grow with ``images``.
    rows_per_chunk
        About how many rows are worked on at a time; by default what suits the chip.
    """

    def __init__(
        self,
        read: Sequence[torch.Tensor] | Read,
        normalisation: Normalisation = PRINTED,
        *,
        images: int = 0,
        keep: bool = True,
        images_per_reading: int = 64,
        rows_per_chunk: int = 0,
    ) -> None:
        self._read: Read = read if callable(read) else partial(_images, read)
        self.images = images if callable(read) else len(read[0])
        self.normalisation = normalisation
        first = self._read(0, 1)
        self.grid = normalisation.shared_grid(first)
        self.origin = first[0].new_zeros(())
        self._channels = [x.shape[1] for x in first]
        self.dim = sum(self._channels)
        self.device = first[0].device
        self.rows_per_image = self.grid[0] * self.grid[1]
        rows_per_chunk = rows_per_chunk or products.rows_per_chunk(self.device)
        self._images_per_chunk = max(1, rows_per_chunk // self.rows_per_image)
        self._images_per_reading = -(-images_per_reading // self._images_per_chunk) * self._images_per_chunk
        self._kept = list(self._chunks()) if keep else None

    def _chunks(self) -> Iterator[tuple[slice, CompositeChunk]]:
        for start in range(0, self.images, self._images_per_reading):
            stop = min(start + self._images_per_reading, self.images)
            reading = self._read(start, stop)
            for first in range(0, stop - start, self._images_per_chunk):
                x = _images(reading, first, first + self._images_per_chunk)
                begin = (start + first) * self.rows_per_image
                yield slice(begin, begin + len(x[0]) * self.rows_per_image), CompositeChunk(x, self.normalisation)

    def __len__(self) -> int:
        return self.images * self.rows_per_image

    def chunks(self) -> Iterator[tuple[slice, CompositeChunk]]:
        """Row ranges, whole images each, with what answers for them."""
        return iter(self._kept) if self._kept is not None else self._chunks()

    def columns(self, p: torch.Tensor) -> list[torch.Tensor]:
        """The columns of p [K, Σ D_b] by block, for repeated use in ``dots``."""
        return [part.contiguous() for part in p.split(self._channels, 1)]

    def locate(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and position (row-major on the grid) of rows."""
        return index // self.rows_per_image, index % self.rows_per_image

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of q themselves, [n, Σ D_b]."""
        q = self.origin.new_empty(len(index), self.dim)
        image, position = self.locate(index)
        for i in image.unique().tolist():
            asked = image == i
            if self._kept is None:
                q[asked] = CompositeChunk(self._read(i, i + 1), self.normalisation).rows(position[asked])
            else:
                span, chunk = self._kept[i // self._images_per_chunk]
                q[asked] = chunk.rows(index[asked] - span.start)
        return q


def _images(blocks: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    return [x[start:stop] for x in blocks]
