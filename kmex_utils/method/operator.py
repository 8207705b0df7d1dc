"""The composite of eq. 7 and 8, never built: whatever is asked of its rows is answered from the activations.

Upsampling acts on positions, the dot product on channels, so the two commute, as average pool and classifier do in
Theorem 1:

    q_r · p_k = Σ_b s(b)_r [A_b (x(b) p_k(b))]_r

with A_b the interpolation to the shared grid (eq. 7) and s(b)_r the normalisation of eq. 8. k-means and the explainers
see :class:`CompositeRows`, which equals :func:`~kmex_utils.method.composite.composite` row by row.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial

import torch
import torch.nn.functional as F

from . import products
from .composite import PRINTED, Normalisation

Grid = tuple[int, int]  # height, width
Read = Callable[[int, int], Sequence[torch.Tensor]]  # x(b) of images start … stop


class _Upsampling:
    """Eq. 7: A = A_h ⊗ A_w [R', R_b], bilinear from the R_b positions of a block to the R' of the shared grid."""

    def __init__(self, out: Grid, size: Grid, align_corners: bool, dtype: torch.dtype, device: torch.device) -> None:
        one_hot = [torch.eye(n, dtype=dtype)[None] for n in size]
        linear = partial(F.interpolate, mode="linear", align_corners=align_corners)
        a_h, a_w = (linear(e, n)[0].T.contiguous() for e, n in zip(one_hot, out, strict=True))
        self.size, self.same_grid = size, out == size
        self.interpolate = partial(F.interpolate, size=out, mode="bilinear", align_corners=align_corners)
        self.a_h, self.a_w = a_h.to(device, dtype), a_w.to(device, dtype)
        # A row of u is made of at most four positions: these, [R', 4], and their shares in it.
        (share_h, tap_h), (share_w, tap_w) = (a.topk(min(2, a.shape[1]), 1) for a in (a_h, a_w))
        self.shares = _both(torch.mul, share_h, share_w).to(device, dtype)
        self.taps = _both(torch.add, tap_h * size[1], tap_w).to(device)

    def up(self, maps: torch.Tensor) -> torch.Tensor:
        """A maps: [n R_b, K] -> [n R', K]."""
        if self.same_grid:
            return maps
        k = maps.shape[1]
        wide = self.interpolate(maps.view(-1, *self.size, k).permute(0, 3, 1, 2))  # channels last: 4 times as fast
        return wide.permute(0, 2, 3, 1).reshape(-1, k)

    def down(self, maps: torch.Tensor) -> torch.Tensor:
        """Aᵀ maps: [n R', K] -> [n R_b, K]."""
        if self.same_grid:
            return maps
        k, (height, width) = maps.shape[1], (len(self.a_h), len(self.a_w))
        narrow = self.a_h.T @ maps.view(-1, height, width * k)
        return (self.a_w.T @ narrow.view(-1, width, k)).view(-1, k)

    def squared_channels(self, x: torch.Tensor) -> torch.Tensor:
        """||u_c||² over positions, as x_cᵀ (AᵀA) x_c, for x [n, D, H, W]: [n, D]."""
        return (x * ((self.a_h.T @ self.a_h) @ x @ (self.a_w.T @ self.a_w))).sum((2, 3)).clamp_min(0)

    def squared_rows(self, x: torch.Tensor) -> torch.Tensor:
        """||u_r||² of every upsampled row, without u, for x [n, H, W, D]: [n, R'].

        A row of u is a weighted sum of at most four neighbouring rows of x, so its squared length needs only the
        inner products of neighbours: with itself, right, below, and along both diagonals.
        """
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


_upsampling = lru_cache(maxsize=64)(_Upsampling)


def _both(combine: Callable[..., torch.Tensor], along_h: torch.Tensor, along_w: torch.Tensor) -> torch.Tensor:
    """Every row of [H', m] combined with every row of [W', n], entry by entry: [H' W', m n]."""
    return combine(along_h[:, None, :, None], along_w[:, None]).reshape(len(along_h) * len(along_w), -1)


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Inner products over channels, [n, H, W, D] each -> [n, H, W]."""
    return (a * b).sum(3)


def _inverse_root(squared: torch.Tensor) -> torch.Tensor:
    return torch.where(squared > 0, squared.rsqrt(), 0)


class _Block:
    """Eq. 8: x(b) of some images at its own resolution, [n R_b, D_b]; u = A x is never formed.

    ``s`` [n R', 1] is the scale of each row of u, ``squared`` [n R'] the squared length of each scaled row.
    """

    def __init__(self, x: torch.Tensor, out: Grid, normalisation: Normalisation, factor: float) -> None:
        n, self.channels, height, width = x.shape
        self.a = _upsampling(out, (height, width), normalisation.align_corners, x.dtype, x.device)
        if normalisation.norm == "channel":
            x = x * _inverse_root(self.a.squared_channels(x))[:, :, None, None]
        self.x = x.permute(0, 2, 3, 1).reshape(-1, self.channels)  # no copy of channels-last activations
        squared = self.a.squared_rows(self.x.view(n, height, width, -1))
        match normalisation.norm:
            case "position":
                s = factor * _inverse_root(squared)
            case "image":
                s = factor * _inverse_root(squared.sum(1, keepdim=True)).expand_as(squared)
            case _:  # channel: already divided
                s = torch.full_like(squared, factor)
        self.s = s.reshape(-1, 1)
        self.squared = (s * squared.sqrt()).flatten() ** 2

    def dots(self, p: torch.Tensor) -> torch.Tensor:
        """u_r · p_k before the rows of u are scaled, [n R', K]."""
        return self.a.up(products.dots(self.x, p))

    def bags(self, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        weights = weights * self.s[index, 0]
        if not self.a.same_grid:
            positions, taps = self.a.taps.shape
            image, position = index // positions, index % positions
            index = image[:, None] * (len(self.x) * positions // len(self.s)) + self.a.taps[position]
            weights = weights[:, None] * self.a.shares[position]
            starts = starts * taps
        return F.embedding_bag(index.flatten(), self.x, starts, mode="sum", per_sample_weights=weights.flatten())


class _Chunk:
    """The rows of q of some images: row i R' + r is position r of image i."""

    def __init__(self, x: Sequence[torch.Tensor], normalisation: Normalisation) -> None:
        grid = normalisation.shared_grid(x)
        factors = normalisation.factors([x_b.shape[1] for x_b in x])
        self.blocks = [_Block(x_b, grid, normalisation, factor) for x_b, factor in zip(x, factors, strict=True)]
        first, *deeper = (block.squared for block in self.blocks)
        self.squared = sum(deeper, first)
        if not torch.isfinite(self.squared.sum()):
            raise ValueError("the activations hold NaN or infinite values: check the images and the weights")

    def closeness(self, p: torch.Tensor | Sequence[torch.Tensor], half: torch.Tensor) -> torch.Tensor:
        """p_k · q_r less half_k, [rows, K], for p [K, Σ D_b], or its columns by block."""
        columns = p.split([block.channels for block in self.blocks], 1) if isinstance(p, torch.Tensor) else p
        first, *deeper = zip(self.blocks, columns, strict=True)
        total = torch.addcmul(-half, first[0].dots(first[1]), first[0].s)
        for block, p_b in deeper:
            total.addcmul_(block.dots(p_b), block.s)
        return total

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        return torch.cat([block.a.down(weights * block.s).T @ block.x for block in self.blocks], 1)

    def bags(self, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        return torch.cat([block.bags(index, weights, starts) for block in self.blocks], 1)


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
        self.device = first[0].device
        self._channels = [x.shape[1] for x in first]
        self.dim = sum(self._channels)
        self.rows_per_image = self.grid[0] * self.grid[1]
        rows_per_chunk = rows_per_chunk or products.rows_per_chunk(self.device)
        self._images_per_chunk = max(1, rows_per_chunk // self.rows_per_image)
        self._images_per_reading = -(-images_per_reading // self._images_per_chunk) * self._images_per_chunk
        self._kept = list(self._chunks()) if keep else None

    def __len__(self) -> int:
        return self.images * self.rows_per_image

    def _chunks(self) -> Iterator[tuple[slice, _Chunk]]:
        for start in range(0, self.images, self._images_per_reading):
            stop = min(start + self._images_per_reading, self.images)
            reading = self._read(start, stop)
            for first in range(0, stop - start, self._images_per_chunk):
                x = _images(reading, first, first + self._images_per_chunk)
                begin = (start + first) * self.rows_per_image
                yield slice(begin, begin + len(x[0]) * self.rows_per_image), _Chunk(x, self.normalisation)

    def chunks(self) -> Iterator[tuple[slice, _Chunk]]:
        """Row ranges, whole images each, with what answers for them."""
        return iter(self._kept) if self._kept is not None else self._chunks()

    def columns(self, p: torch.Tensor) -> list[torch.Tensor]:
        """The columns of p [K, Σ D_b] by block, for repeated use in ``closeness``."""
        return [part.contiguous() for part in p.split(self._channels, 1)]

    def nearest(self, p: torch.Tensor, among: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each image the row nearest to each p_k [K, Σ D_b]: ||q_r||² - 2 q_r · p_k, its position; [K, N] each.

        Of all rows, or of those ``among`` bool [K, N R']: of an image without any the distance is infinite.
        """
        p, least = p.to(self.device), []
        for span, chunk in self.chunks():  # chunks are whole images
            distance = chunk.closeness(p, p.new_zeros(len(p))).mul_(-2).add_(chunk.squared[:, None])
            if among is not None:
                distance.masked_fill_(~among[:, span].T.to(self.device), torch.inf)
            least.append(distance.view(-1, self.rows_per_image, len(p)).min(1))
        distance, position = (torch.cat(part).T.cpu() for part in zip(*least, strict=True))
        return distance, position

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of q themselves, [n, Σ D_b]."""
        q = self.origin.new_empty(len(index), self.dim)
        image = index // self.rows_per_image
        for i in image.unique().tolist():
            if self._kept is None:
                start, chunk = i * self.rows_per_image, _Chunk(self._read(i, i + 1), self.normalisation)
            else:
                span, chunk = self._kept[i // self._images_per_chunk]
                start = span.start
            rows = index[image == i] - start
            q[image == i] = chunk.bags(rows, q.new_ones(len(rows)), torch.arange(len(rows), device=q.device))
        return q


def _images(blocks: Sequence[torch.Tensor], start: int, stop: int) -> list[torch.Tensor]:
    return [x[start:stop] for x in blocks]
