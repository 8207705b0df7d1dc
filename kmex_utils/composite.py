"""The composite q(b:) of several depths (eq. 7, 8): as a matrix, and as an operator that never builds it.

:func:`composite` writes the paper's definition down. :class:`CompositeRows` answers every question k-means and the
explainers ask of that matrix from the activations at their own resolution: upsampling acts on positions, the dot
product on channels, so the two commute, as average pool and classifier do in Theorem 1:

    q_r · p_k = Σ_b s(b)_r [A_b (x(b) p_k(b))]_r

with A_b the interpolation to the shallowest block's grid and s(b)_r the normalisation of eq. 8.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

NORMS = ("position", "channel", "image")
SCALES = ("1/D", "1/sqrt(D)", "1")


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
    """

    norm: str = "position"
    scale: str = "1/D"
    align_corners: bool = False

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {self.scale!r}")

    def factor(self, channels: int) -> float:
        """The scale of a block of D_b channels."""
        return {"1/D": 1 / channels, "1/sqrt(D)": channels**-0.5, "1": 1.0}[self.scale]


def composite(blocks: Sequence[torch.Tensor], normalisation: Normalisation = Normalisation()) -> torch.Tensor:
    """q of eq. 8, written down: [N, R', Σ D_b] from block outputs x(b) [N, D_b, H_b, W_b], shallowest first.

    All-zero rows (or channels, or images) stay zero. Memory grows with R' Σ D_b; see :class:`CompositeRows`.
    """
    size = blocks[0].shape[2:]
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


class _Block:
    """One block of some images: x at its own resolution, position-major [R_b, n, D_b], with u = A x implied.

    ``s`` [R', n] is the scale of each row of u, ``squared`` [R', n] the squared length of each scaled row.
    """

    def __init__(self, x: torch.Tensor, size: tuple[int, int], normalisation: Normalisation) -> None:
        self.n, self.channels, self.height, self.width = x.shape
        self.out = size
        self.a_h, self.a_w = (
            interpolation(o, i, normalisation.align_corners).to(x)
            for o, i in zip(size, (self.height, self.width), strict=True)
        )
        factor = normalisation.factor(self.channels)
        if normalisation.norm == "channel":
            x = x * _inverse(self._squared_lengths_of_channels(x)).sqrt()[:, :, None, None]
        self.x = x.permute(2, 3, 0, 1).reshape(-1, self.n, self.channels).contiguous()
        squared = self._squared_lengths_of_rows()
        match normalisation.norm:
            case "position":
                self.s = factor * _inverse(squared).sqrt()
            case "image":
                self.s = factor * _inverse(squared.sum(0, keepdim=True)).sqrt().expand_as(squared)
            case "channel":
                self.s = torch.full_like(squared, factor)
        self.squared = self.s**2 * squared

    def _squared_lengths_of_channels(self, x: torch.Tensor) -> torch.Tensor:
        """||u_c||² over positions, [n, D], as x_cᵀ (AᵀA) x_c."""
        gram = (self.a_h.T @ self.a_h) @ x @ (self.a_w.T @ self.a_w)
        return (x * gram).sum((2, 3)).clamp_min(0)

    def _squared_lengths_of_rows(self) -> torch.Tensor:
        """||u_r||² of every upsampled row, [R', n], without u.

        A row of u is a weighted sum of at most four neighbouring rows of x, so its squared length needs only the
        inner products of neighbours: with itself, right, below, and along both diagonals.
        """
        x = self.x.view(self.height, self.width, self.n, self.channels)
        dot = lambda a, b: torch.einsum("hwnd,hwnd->hwn", a, b)  # noqa: E731
        own_h, own_w = self.a_h**2, self.a_w**2
        next_h, next_w = 2 * self.a_h[:, :-1] * self.a_h[:, 1:], 2 * self.a_w[:, :-1] * self.a_w[:, 1:]
        total = _separable(own_h, own_w, dot(x, x))
        if self.width > 1:
            total += _separable(own_h, next_w, dot(x[:, :-1], x[:, 1:]))
        if self.height > 1:
            total += _separable(next_h, own_w, dot(x[:-1], x[1:]))
        if self.width > 1 and self.height > 1:
            diagonals = dot(x[:-1, :-1], x[1:, 1:]) + dot(x[:-1, 1:], x[1:, :-1])
            total += _separable(next_h, next_w, diagonals / 2)
        return total.clamp_min(0)

    @property
    def same_grid(self) -> bool:
        return self.out == (self.height, self.width)

    def up(self, maps: torch.Tensor) -> torch.Tensor:
        """A maps: [R_b, n, K] -> [R', n, K]."""
        if self.same_grid:
            return maps
        grid = maps.view(self.height, self.width, -1)
        return _separable(self.a_h, self.a_w, grid).view(-1, *maps.shape[1:])

    def down(self, maps: torch.Tensor) -> torch.Tensor:
        """Aᵀ maps: [R', n, K] -> [R_b, n, K]."""
        if self.same_grid:
            return maps
        grid = maps.view(*self.out, -1)
        return _separable(self.a_h.T, self.a_w.T, grid).view(-1, *maps.shape[1:])


def _separable(a_h: torch.Tensor, a_w: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """(a_h ⊗ a_w) on the first two axes of [h, w, m]: [h' w', m], the smaller product first."""
    h, w, m = grid.shape
    if a_h.shape[0] <= h:
        tall = (a_h @ grid.reshape(h, -1)).view(-1, w, m)
        return torch.matmul(a_w, tall).flatten(0, 1)
    wide = torch.matmul(a_w, grid)
    return (a_h @ wide.view(h, -1)).view(-1, m)


def _inverse(squared: torch.Tensor) -> torch.Tensor:
    return torch.where(squared > 0, 1 / squared, 0)


class CompositeChunk:
    """The rows of q of some images, position-major: row r n + i is position r of image i."""

    def __init__(self, blocks: Sequence[torch.Tensor], normalisation: Normalisation) -> None:
        if not all(torch.isfinite(x).all() for x in blocks):
            raise ValueError("the activations hold NaN or infinite values: check the images and the weights")
        size = tuple(blocks[0].shape[2:])
        self.blocks = [_Block(x, size, normalisation) for x in blocks]
        self.squared = sum(block.squared for block in self.blocks).flatten()

    def _columns(self, p: torch.Tensor) -> list[torch.Tensor]:
        return list(p.split([block.channels for block in self.blocks], 1))

    def dots(self, p: torch.Tensor) -> torch.Tensor:
        """q_r · p_k for p [K, Σ D_b]: [rows, K]."""
        total = None
        for block, p_b in zip(self.blocks, self._columns(p), strict=True):
            term = block.up(block.x @ p_b.T)
            s = block.s[:, :, None]
            total = term.mul_(s) if total is None else total.addcmul_(term, s)
        return total.flatten(0, 1)

    def sums(self, weights: torch.Tensor) -> torch.Tensor:
        """Σ_r weights_rk q_r for weights [rows, K]: [K, Σ D_b]."""
        weights = weights.view(-1, self.blocks[0].n, weights.shape[1])
        columns = []
        for block in self.blocks:
            low = block.down(weights * block.s[:, :, None])
            columns.append(low.flatten(0, 1).T @ block.x.flatten(0, 1))
        return torch.cat(columns, 1)

    def rows(self, position: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Some rows of q themselves, [n, Σ D_b]."""
        columns = []
        for block in self.blocks:
            weights = block.a_h[position // block.out[1]][:, :, None] * block.a_w[position % block.out[1]][:, None, :]
            u = torch.einsum("nr,nrd->nd", weights.flatten(1), block.x.transpose(0, 1)[image])
            columns.append(u * block.s[position, image][:, None])
        return torch.cat(columns, 1)


class CompositeRows:
    """The rows of q(b:) for k-means and the explainers, exact, at the blocks' own resolutions.

    Parameters
    ----------
    read
        Gives x(b) of images start … stop as [n, D_b, H_b, W_b] each, shallowest block first; called once per pass
        over the data, or once at all with ``keep``. A list of such tensors stands for all images in memory.
    images
        How many there are; not needed with a list.
    keep
        Hold the chunks in memory. Without it, memory is bounded by one chunk, whatever the number of images.
    rows_per_chunk
        About how many rows are worked on at a time.
    """

    def __init__(
        self,
        read: Sequence[torch.Tensor] | Callable[[int, int], Sequence[torch.Tensor]],
        normalisation: Normalisation = Normalisation(),
        *,
        images: int = 0,
        keep: bool = True,
        rows_per_chunk: int = 8192,
    ) -> None:
        if not callable(read):
            blocks = list(read)
            images, read = len(blocks[0]), lambda start, stop: [x[start:stop] for x in blocks]
        self.images = images
        self.normalisation = normalisation
        self._read = read
        first = read(0, 1)
        self.grid = tuple(first[0].shape[2:])
        self.dim = sum(x.shape[1] for x in first)
        self.device = first[0].device
        self.rows_per_image = self.grid[0] * self.grid[1]
        self.images_per_chunk = max(1, rows_per_chunk // self.rows_per_image)
        self._kept = [self._chunk(i) for i in range(self._count())] if keep else None

    def _count(self) -> int:
        return -(-self.images // self.images_per_chunk)

    def _chunk(self, i: int) -> CompositeChunk:
        start = i * self.images_per_chunk
        return CompositeChunk(self._read(start, min(start + self.images_per_chunk, self.images)), self.normalisation)

    def __len__(self) -> int:
        return self.images * self.rows_per_image

    def chunks(self) -> Iterator[tuple[slice, CompositeChunk]]:
        """Row ranges, whole images each, with what answers for them."""
        start = 0
        for i in range(self._count()):
            chunk = self._kept[i] if self._kept is not None else self._chunk(i)
            stop = start + len(chunk.squared)
            yield slice(start, stop), chunk
            start = stop

    def locate(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Image and position (row-major on the grid) of rows."""
        chunk = index // (self.images_per_chunk * self.rows_per_image)
        first = chunk * self.images_per_chunk
        count = (self.images - first).clamp_max(self.images_per_chunk)
        within = index - first * self.rows_per_image
        return first + within % count, within // count

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of q themselves, [n, Σ D_b]."""
        image, position = self.locate(index)
        chunk = image // self.images_per_chunk
        found = torch.empty(len(index), self.dim, device=self.device)
        for i in chunk.unique().tolist():
            mine = chunk == i
            source = self._kept[i] if self._kept is not None else self._chunk(i)
            found[mine] = source.rows(position[mine], image[mine] - i * self.images_per_chunk).to(found)
        return found
