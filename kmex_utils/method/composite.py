"""The composite q(b:) of several depths, eq. 7 and 8, as written.

Nothing computes with this matrix but tests and examples: :mod:`kmex_utils.method.operator` answers for its rows without
building it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

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
        The factor beside it: ``1/D`` (as printed), ``1/sqrt(D)`` or ``1``; or weights by block, the last ones those of
        the deepest: ``4,2,1`` gives B234 4, 2 and 1, B34 2 and 1.
    align_corners
        Of the bilinear interpolation, as in PyTorch.
    grid
        The shared resolution R': that of the ``shallowest`` block used (the default) or of the ``deepest``, or the
        ``double`` of the shallowest in height and width.
    """

    norm: str = "position"
    scale: str = "1/D"
    align_corners: bool = False
    grid: str = "shallowest"

    def __post_init__(self) -> None:
        if not isinstance(self.align_corners, bool):
            raise ValueError(f"align_corners must be True or False, got {self.align_corners!r}")
        for name, allowed in (("norm", NORMS), ("scale", SCALES), ("grid", GRIDS)):
            if getattr(self, name) not in allowed and not (
                name == "scale" and isinstance(self.scale, str) and self._weights()
            ):
                weights = ", or weights such as 4,2,1" if name == "scale" else ""
                raise ValueError(f"{name} must be one of {', '.join(allowed)}{weights}, got {getattr(self, name)!r}")

    def _weights(self) -> list[float]:
        """Those that ``scale`` names, block by block; empty if there are none, or not all are positive."""
        try:
            weights = [float(weight) for weight in self.scale.split(",")] if "," in self.scale else []
        except ValueError:
            return []
        return weights if all(0 < weight < float("inf") for weight in weights) else []

    def factors(self, channels: Sequence[int]) -> list[float]:
        """The scales of blocks of D_b channels, shallowest first; a ValueError where there are fewer weights."""
        if weights := self._weights():
            if len(weights) < len(channels):
                raise ValueError(f"scale {self.scale!r} has {len(weights)} weights for {len(channels)} blocks")
            return weights[-len(channels) :]
        return [{"1/D": 1 / d, "1/sqrt(D)": d**-0.5, "1": 1.0}[self.scale] for d in channels]

    def shared_grid(self, blocks: Sequence[torch.Tensor]) -> tuple[int, int]:
        """(H', W') for activations [N, D_b, H_b, W_b], shallowest first."""
        height, width = blocks[-1 if self.grid == "deepest" else 0].shape[2:]
        return (2 * height, 2 * width) if self.grid == "double" else (height, width)


PRINTED = Normalisation()  # the default: the printed factor, rows of unit length, the shallowest block's grid


def composite(blocks: Sequence[torch.Tensor], normalisation: Normalisation = PRINTED) -> torch.Tensor:
    """q of eq. 8, [N, R', Σ D_b], from activations x(b) [N, D_b, H_b, W_b], shallowest first.

    All-zero rows (or channels, or images) stay zero.
    """
    grid = normalisation.shared_grid(blocks)
    over = {"position": (1,), "channel": (2, 3), "image": (1, 2, 3)}[normalisation.norm]
    parts = []
    for x, factor in zip(blocks, normalisation.factors([x.shape[1] for x in blocks]), strict=True):
        u = F.interpolate(x, grid, mode="bilinear", align_corners=normalisation.align_corners)  # eq. 7
        length = torch.linalg.vector_norm(u, dim=over, keepdim=True)
        parts.append(torch.where(length > 0, u / length, 0) * factor)  # eq. 8
    return torch.cat(parts, 1).flatten(2).transpose(1, 2)
