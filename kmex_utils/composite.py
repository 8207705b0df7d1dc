"""The composite q(b:) of several depths (eq. 7, 8): as a matrix, and as an operator that never builds it.

:func:`composite` writes the paper's definition down. :class:`CompositeRows` answers every question k-means and the
explainers ask of that matrix from the activations at their own resolution: upsampling acts on positions, the dot
product on channels, so the two commute, as average pool and classifier do in Theorem 1:

    q_r · p_k = Σ_b s(b)_r [A_b (x(b) p_k(b))]_r

with A_b the interpolation to the shared grid (the shallowest block's) and s(b)_r the normalisation of eq. 8.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
import torch.nn.functional as F

from .hardware import rows_at_once

NORMS = ("position", "channel", "image")
SCALES = ("1/D", "1/sqrt(D)", "1")
GRIDS = ("shallowest", "deepest", "double")


@dataclass(frozen=True)
class Normalisation:
    """How eq. 7 and 8 are read where the paper leaves them open.

    Parameters
    ----------
    norm
        What ||u(b)|| runs over: ``position`` (each row of u to unit length, the default), ``channel`` (each
        channel over the positions of an image) or ``image`` (Frobenius norm of the image's u).
    scale
        The factor beside it: ``1/D`` (as printed), ``1/sqrt(D)`` or ``1``.
    align_corners
        Of the bilinear interpolation, as in PyTorch.
    grid
        The shared resolution R': that of the ``shallowest`` block used (the default) or of the ``deepest``, or the
        ``double`` of the shallowest along each side.
    """

    norm: str = "position"
    scale: str = "1/D"
    align_corners: bool = False
    grid: str = "shallowest"

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")
        if self.grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {self.grid!r}")

    def factor(self, channels: int) -> float:
        """The scale of a block of D_b channels."""
        return {"1/D": 1 / channels, "1/sqrt(D)": channels**-0.5, "1": 1.0}[self.scale]

    def shared_grid(self, blocks: Sequence[torch.Tensor]) -> tuple[int, int]:
        """(H', W') for block outputs [N, D_b, H_b, W_b], shallowest first."""
        height, width = blocks[-1 if self.grid == "deepest" else 0].shape[2:]
        return (2 * height, 2 * width) if self.grid == "double" else (height, width)


def composite(blocks: Sequence[torch.Tensor], normalisation: Normalisation = Normalisation()) -> torch.Tensor:
    """q of eq. 8, written down: [N, R', Σ D_b] from block outputs x(b) [N, D_b, H_b, W_b], shallowest first.

    All-zero rows (or channels, or images) stay zero. Memory grows with R' Σ D_b; see :class:`CompositeRows`.
    """
    size = normalisation.shared_grid(blocks)
    axes = {"position": 1, "channel": (2, 3), "image": (1, 2, 3)}[normalisation.norm]
    parts = []
    for x in blocks:
        u = F.interpolate(x, size, mode="bilinear", align_corners=normalisation.align_corners)
        length = torch.linalg.vector_norm(u, dim=axes, keepdim=True)
        parts.append(torch.where(length > 0, u / length, 0) * normalisation.factor(x.shape[1]))
    return torch.cat(parts, 1).flatten(2).transpose(1, 2)


@lru_cache(maxsize=64)
def interpolation(out: int, size: int, align_corners: bool) -> torch.Tensor:
    """The one-dimensional linear interpolation A [out, size]; the bilinear one is its product over both axes."""
    return F.interpolate(torch.eye(size)[None], out, mode="linear", align_corners=align_corners)[0].T.contiguous()


# entries of A_h ⊗ A_w up to which it beats one axis after the other, upwards and downwards (measured)
_SMALL_UP, _SMALL_DOWN = 10_000, 40_000


@lru_cache(maxsize=64)
def _both_axes(out: tuple[int, int], size: tuple[int, int], align_corners: bool) -> torch.Tensor | None:
    """A_h ⊗ A_w [R', R_b] where that is small."""
    a_h, a_w = (interpolation(o, i, align_corners) for o, i in zip(out, size, strict=True))
    if a_h.numel() * a_w.numel() > _SMALL_DOWN:
        return None
    return (a_h[:, None, :, None] * a_w[None, :, None, :]).reshape(out[0] * out[1], -1)


@lru_cache(maxsize=64)
def _taps(out: tuple[int, int], size: tuple[int, int], align_corners: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The at most four positions each row of u is made of, [R', 4], and their shares in it."""
    (low_h, share_h), (low_w, share_w) = (
        interpolation(o, i, align_corners).topk(min(2, i), 1)[::-1] for o, i in zip(out, size, strict=True)
    )
    taps = low_h[:, None, :, None] * size[1] + low_w[None, :, None, :]
    shares = share_h[:, None, :, None] * share_w[None, :, None, :]
    return taps.reshape(out[0] * out[1], -1), shares.reshape(out[0] * out[1], -1)


class _Block:
    """One block of some images: x at its own resolution, [n R_b, D_b], with u = A x implied, A = A_h ⊗ A_w.

    ``s`` [n R'] is the scale of each row of u, ``squared`` [n R'] the squared length of each scaled row.
    """

    def __init__(self, x: torch.Tensor, out: tuple[int, int], normalisation: Normalisation) -> None:
        self.n, self.channels, self.height, self.width = x.shape
        self.out = out
        self.align_corners = normalisation.align_corners
        sizes = list(zip(out, (self.height, self.width), strict=True))
        self.axes = [interpolation(*size, normalisation.align_corners).to(x) for size in sizes]  # A_h, A_w
        both = _both_axes(out, (self.height, self.width), normalisation.align_corners)
        self.both_axes = None if both is None else both.to(x)
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
            case "channel":
                s = torch.full_like(squared, factor)
        self.s = s.flatten()
        self.squared = (self.s * squared.flatten().sqrt()) ** 2

    def _squared_lengths_of_channels(self, x: torch.Tensor) -> torch.Tensor:
        """||u_c||² over positions, [n, D], as x_cᵀ (AᵀA) x_c."""
        a_h, a_w = self.axes
        return (x * ((a_h.T @ a_h) @ x @ (a_w.T @ a_w))).sum((2, 3)).clamp_min(0)

    def _squared_lengths_of_rows(self) -> torch.Tensor:
        """||u_r||² of every upsampled row, [n, R'], without u.

        A row of u is a weighted sum of at most four neighbouring rows of x, so its squared length needs only the
        inner products of neighbours: with itself, right, below, and along both diagonals.
        """
        x = self.x.view(self.n, self.height, self.width, self.channels)
        dot = lambda a, b: (a * b).sum(3)  # noqa: E731
        if self.same_grid:
            return dot(x, x).flatten(1)
        a_h, a_w = self.axes
        own_h, own_w = a_h**2, a_w**2
        next_h, next_w = 2 * a_h[:, :-1] * a_h[:, 1:], 2 * a_w[:, :-1] * a_w[:, 1:]
        total = own_h @ dot(x, x) @ own_w.T
        if self.width > 1:
            total += own_h @ dot(x[:, :, :-1], x[:, :, 1:]) @ next_w.T
        if self.height > 1:
            total += next_h @ dot(x[:, :-1], x[:, 1:]) @ own_w.T
        if self.width > 1 and self.height > 1:
            diagonals = dot(x[:, :-1, :-1], x[:, 1:, 1:]) + dot(x[:, :-1, 1:], x[:, 1:, :-1])
            total += next_h @ (diagonals / 2) @ next_w.T
        return total.clamp_min(0).flatten(1)

    @property
    def same_grid(self) -> bool:
        return self.out == (self.height, self.width)

    def up(self, maps: torch.Tensor) -> torch.Tensor:
        """A maps: [K, n R_b] -> [K, n R']."""
        if self.same_grid:
            return maps
        if (a := self.both_axes) is not None and a.numel() <= _SMALL_UP:
            return _dots(maps.view(-1, a.shape[1]), a).view(len(maps), -1)
        a_h, a_w = self.axes
        wide = maps.view(-1, self.width) @ a_w.T
        return (a_h @ wide.view(-1, self.height, len(a_w))).view(len(maps), -1)

    def down(self, maps: torch.Tensor) -> torch.Tensor:
        """Aᵀ maps: [K, n R'] -> [K, n R_b]."""
        if self.same_grid:
            return maps
        if (a := self.both_axes) is not None:
            return (maps.view(-1, len(a)) @ a).view(len(maps), -1)
        a_h, a_w = self.axes
        narrow = maps.view(-1, len(a_w)) @ a_w
        return (a_h.T @ narrow.view(-1, len(a_h), self.width)).view(len(maps), -1)

    def bags(self, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """Σ weights_m u_index_m over bags of consecutive m that begin at ``starts``, [bags, D_b]."""
        if not self.same_grid:
            taps, shares = _taps(self.out, (self.height, self.width), self.align_corners)
            positions = self.out[0] * self.out[1]
            image, position = index // positions, index % positions
            index = image[:, None] * (self.height * self.width) + taps.to(index.device)[position]
            weights = weights[:, None] * shares.to(weights)[position]
            starts = starts * taps.shape[1]
        return F.embedding_bag(index.flatten(), self.x, starts, mode="sum", per_sample_weights=weights.flatten())


def _inverse_root(squared: torch.Tensor) -> torch.Tensor:
    return torch.where(squared > 0, squared.rsqrt(), 0)


def _dots(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """P xᵀ, [K, rows].

    Many prototypes on a CPU go to oneDNN, as pixels of images under a 1 x 1 convolution whose filters are the rows:
    PyTorch's matrix product is MKL's, which leaves half of an AMD chip's vector units idle.
    """
    few = len(p) < 128 or p.dtype != torch.float32
    if few or p.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return p @ x.T
    images = 16 if len(p) % 16 == 0 else 1  # from 16 on PyTorch takes oneDNN with one thread, too
    pixels = p.reshape(images, 1, -1, p.shape[1]).permute(0, 3, 1, 2)
    return F.conv2d(pixels, x[:, :, None, None]).permute(0, 2, 3, 1).reshape(len(p), -1)


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
        return sum(block.squared for block in self.blocks)

    def dots(self, p: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """p_k · q_r for p [K, Σ D_b], or its columns by block: [K, rows]."""
        if isinstance(p, torch.Tensor):
            p = p.split([block.channels for block in self.blocks], 1)
        total = None
        for block, p_b in zip(self.blocks, p, strict=True):
            if total is not None:
                total.addcmul_(block.up(_dots(p_b, block.x)), block.s)
            elif block.same_grid:
                total = _dots(p_b, block.x * block.s[:, None])
            else:
                total = block.up(_dots(p_b, block.x)) * block.s
        return total

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_r weights_kr q_r for weights [K, rows]: [K, Σ D_b]."""
        return torch.cat([block.down(weights * block.s) @ block.x for block in self.blocks], 1)

    def sums_of(self, index: torch.Tensor, weights: torch.Tensor, target: torch.Tensor, count: int) -> torch.Tensor:
        """Σ weights_m q_index_m over the m with target_m = k, for few rows: [count, Σ D_b]; ``target`` ascending."""
        starts = torch.searchsorted(target, torch.arange(count, device=target.device))
        return torch.cat([block.bags(index, weights * block.s[index], starts) for block in self.blocks], 1)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of q themselves, [n, Σ D_b]."""
        target = torch.arange(len(index), device=index.device)
        return self.sums_of(index, torch.ones_like(self.squared[index]), target, len(index))


class CompositeRows:
    """The rows of q(b:) for k-means and the explainers, exact, at the blocks' own resolutions.

    Rows run image by image and, within an image, along the shared grid, row-major.

    Parameters
    ----------
    read
        Gives x(b) of images start … stop as [n, D_b, H_b, W_b] each, shallowest block first. Called for the first
        image, then in order for each pass over the data (for one pass with ``keep``), and without ``keep`` for the
        single images that k-means++ draws. A list of such tensors stands for all images in memory.
    images
        How many there are; not needed with a list.
    keep
        Hold the activations in memory. Without it, memory is bounded by one reading, whatever the number of images.
    images_per_reading
        How many images to read at once.
    rows_per_chunk
        About how many rows are worked on at a time; by default what stays in a core's cache, or keeps a GPU busy.
    """

    def __init__(
        self,
        read: Sequence[torch.Tensor] | Callable[[int, int], Sequence[torch.Tensor]],
        normalisation: Normalisation = Normalisation(),
        *,
        images: int = 0,
        keep: bool = True,
        images_per_reading: int = 64,
        rows_per_chunk: int = 0,
    ) -> None:
        if not callable(read):
            blocks = list(read)
            images, read = len(blocks[0]), lambda start, stop: [x[start:stop] for x in blocks]
        self.images = images
        self.normalisation = normalisation
        first = read(0, 1)
        self.grid = normalisation.shared_grid(first)
        self.origin = first[0].new_zeros(())
        self._channels = [x.shape[1] for x in first]
        self.dim = sum(self._channels)
        self.device, self._dtype = first[0].device, first[0].dtype
        self.rows_per_image = self.grid[0] * self.grid[1]
        per_chunk = max(1, (rows_per_chunk or rows_at_once(self.device)) // self.rows_per_image)
        self._images_per_chunk = per_chunk
        self._images_per_reading = -(-images_per_reading // per_chunk) * per_chunk
        self._read = read
        self._kept = list(self._chunks()) if keep else None

    def _chunks(self) -> Iterator[tuple[slice, CompositeChunk]]:
        for start in range(0, self.images, self._images_per_reading):
            stop = min(start + self._images_per_reading, self.images)
            read = self._read(start, stop)
            for first in range(0, stop - start, self._images_per_chunk):
                some = [x[first : first + self._images_per_chunk] for x in read]
                begin = (start + first) * self.rows_per_image
                chunk = CompositeChunk(some, self.normalisation)
                yield slice(begin, begin + len(some[0]) * self.rows_per_image), chunk

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
        found = torch.empty(len(index), self.dim, dtype=self._dtype, device=self.device)
        image, position = self.locate(index)
        for i in image.unique().tolist():
            mine = image == i
            if self._kept is None:
                found[mine] = CompositeChunk(self._read(i, i + 1), self.normalisation).rows(position[mine])
            else:
                span, chunk = self._kept[i // self._images_per_chunk]
                found[mine] = chunk.rows(index[mine] - span.start)
        return found
