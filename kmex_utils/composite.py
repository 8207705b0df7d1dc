"""The composite q(b:) of several depths (eq. 7, 8): as a matrix, and as an operator that never builds it.

:func:`composite` writes the paper's definition down. :class:`CompositeRows` answers every question k-means and the
explainers ask of that matrix from the activations at their own resolution: upsampling acts on positions, the dot
product on channels, so the two commute, as average pool and classifier do in Theorem 1:

    q_r · p_k = Σ_b s(b)_r [A_b (x(b) p_k(b))]_r

with A_b the interpolation to the shallowest block's grid and s(b)_r the normalisation of eq. 8.
"""

from collections.abc import Iterator, Sequence
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


class _Upsampled:
    """One block: x at its own resolution, with u = A x implied; ``s`` the scale of each row of u."""

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
        self.x = x.permute(0, 2, 3, 1).reshape(self.n, -1, self.channels)
        squared = self._squared_lengths_of_rows()
        match normalisation.norm:
            case "position":
                self.s = factor * _inverse(squared).sqrt()
            case "image":
                self.s = factor * _inverse(squared.sum(1, keepdim=True)).sqrt().expand_as(squared)
            case "channel":
                self.s = torch.full_like(squared, factor)
        self.squared = self.s**2 * squared

    def _squared_lengths_of_channels(self, x: torch.Tensor) -> torch.Tensor:
        """||u_c||² over positions, [N, D], as x_cᵀ (AᵀA) x_c."""
        gram = (self.a_h.T @ self.a_h) @ x @ (self.a_w.T @ self.a_w)
        return (x * gram).sum((2, 3)).clamp_min(0)

    def _squared_lengths_of_rows(self) -> torch.Tensor:
        """||u_r||² of every upsampled row, [N, R'], without u.

        A row of u is a weighted sum of at most four neighbouring rows of x, so its squared length needs only the
        inner products of neighbours: with itself, right, below, and along both diagonals.
        """
        x = self.x.view(self.n, self.height, self.width, self.channels)
        dot = lambda a, b: torch.einsum("nhwd,nhwd->nhw", a, b)  # noqa: E731
        own_h, own_w = self.a_h**2, self.a_w**2
        next_h, next_w = 2 * self.a_h[:, :-1] * self.a_h[:, 1:], 2 * self.a_w[:, :-1] * self.a_w[:, 1:]
        total = own_h @ dot(x, x) @ own_w.T
        if self.width > 1:
            total += own_h @ dot(x[:, :, :-1], x[:, :, 1:]) @ next_w.T
        if self.height > 1:
            total += next_h @ dot(x[:, :-1], x[:, 1:]) @ own_w.T
        if self.width > 1 and self.height > 1:
            diagonals = dot(x[:, :-1, :-1], x[:, 1:, 1:]) + dot(x[:, :-1, 1:], x[:, 1:, :-1])
            total += next_h @ (diagonals / 2) @ next_w.T
        return total.flatten(1).clamp_min(0)

    def up(self, maps: torch.Tensor) -> torch.Tensor:
        """A maps: [n, R_b, K] -> [n, R', K]."""
        n, _, k = maps.shape
        if self.out == (self.height, self.width):
            return maps
        wide = self.a_w @ maps.view(n * self.height, self.width, k)
        return (self.a_h @ wide.view(n, self.height, -1)).view(n, -1, k)

    def down(self, maps: torch.Tensor) -> torch.Tensor:
        """Aᵀ maps: [n, R', K] -> [n, R_b, K]."""
        n, _, k = maps.shape
        if self.out == (self.height, self.width):
            return maps
        narrow = self.a_h.T @ maps.view(n, self.out[0], -1)
        return (self.a_w.T @ narrow.view(n * self.height, self.out[1], k)).view(n, -1, k)


def _inverse(squared: torch.Tensor) -> torch.Tensor:
    return torch.where(squared > 0, 1 / squared, 0)


class CompositeRows:
    """The rows of q(b:) for k-means and the explainers, exact, at the blocks' own resolutions.

    Parameters
    ----------
    blocks
        x(b) [N, D_b, H_b, W_b], shallowest first; R' = H W of the first.
    """

    def __init__(self, blocks: Sequence[torch.Tensor], normalisation: Normalisation = Normalisation()) -> None:
        if not all(torch.isfinite(x).all() for x in blocks):
            raise ValueError("the activations hold NaN or infinite values: check the images and the weights")
        self.grid = tuple(blocks[0].shape[2:])
        self.parts = [_Upsampled(x, self.grid, normalisation) for x in blocks]
        self.images = len(blocks[0])
        self.rows_per_image = self.grid[0] * self.grid[1]
        self.squared = sum(part.squared for part in self.parts)
        self.dim = sum(part.channels for part in self.parts)
        self.device = blocks[0].device

    def __len__(self) -> int:
        return self.images * self.rows_per_image

    def _columns(self, p: torch.Tensor) -> list[torch.Tensor]:
        return list(p.split([part.channels for part in self.parts], 1))

    def chunks(self, columns: int, budget: int = 2**25) -> Iterator[slice]:
        """Row ranges, whole images each, of about ``budget`` numbers for ``columns`` numbers a row."""
        images = max(1, budget // (self.rows_per_image * max(columns, 1)))
        for start in range(0, self.images, images):
            yield slice(start * self.rows_per_image, min(start + images, self.images) * self.rows_per_image)

    def _images(self, rows: slice) -> slice:
        return slice(rows.start // self.rows_per_image, rows.stop // self.rows_per_image)

    def squared_lengths(self, rows: slice) -> torch.Tensor:
        """||q_r||², [n]."""
        return self.squared[self._images(rows)].flatten()

    def dots(self, p: torch.Tensor, rows: slice) -> torch.Tensor:
        """q_r · p_k for a chunk's rows and p [K, Σ D_b]: [n, K]."""
        index = self._images(rows)
        total = None
        for part, p_b in zip(self.parts, self._columns(p), strict=True):
            term = part.up(part.x[index] @ p_b.T) * part.s[index][:, :, None]
            total = term if total is None else total.add_(term)
        return total.flatten(0, 1)

    def sums(self, weights: torch.Tensor, rows: slice) -> torch.Tensor:
        """Σ_r weights_rk q_r for a chunk's rows and weights [n, K]: [K, Σ D_b]."""
        index = self._images(rows)
        weights = weights.view(-1, self.rows_per_image, weights.shape[1])
        columns = []
        for part in self.parts:
            low = part.down(weights * part.s[index][:, :, None])
            columns.append(low.flatten(0, 1).T @ part.x[index].flatten(0, 1))
        return torch.cat(columns, 1)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """Some rows of q themselves, [n, Σ D_b]."""
        image, position = index // self.rows_per_image, index % self.rows_per_image
        columns = []
        for part in self.parts:
            weights = part.a_h[position // part.out[1]][:, :, None] * part.a_w[position % part.out[1]][:, None, :]
            u = torch.einsum("nr,nrd->nd", weights.flatten(1), part.x[image])
            columns.append(u * part.s[image, position][:, None])
        return torch.cat(columns, 1)
