"""Gradient-free feature attribution (eq. 11) and its recursion over depths by segment-wise averages."""

from collections.abc import Mapping

import torch
import torch.nn.functional as F


def attribution(h: torch.Tensor, c_j: torch.Tensor) -> torch.Tensor:
    """Eq. 11: att(h_wh, c_j) = h_wh · c_j / ||c_j||², so that att(c_j, c_j) = 1.

    The encoder's output ``h`` [N, D, H, W] and the classifier's column ``c_j`` of each image [N, D] give [N, H, W].
    """
    return torch.einsum("ndhw,nd->nhw", h, c_j / c_j.square().sum(1, keepdim=True))


def segment_mean(values: torch.Tensor, q_s: torch.Tensor) -> torch.Tensor:
    """Every position gets the mean of its segment: all positions of the image with the same prototype.

    ``values`` float [N, H, W] and the explanation map ``q_s`` int [N, H, W] give [N, H, W].
    """
    index = q_s.flatten(1)
    shape = (len(index), int(index.max()) + 1)
    total = values.new_zeros(shape).scatter_add_(1, index, values.flatten(1))
    count = values.new_zeros(shape).scatter_add_(1, index, torch.ones_like(values).flatten(1))
    return (total / count.clamp_min(1)).gather(1, index).view_as(values)


def upsample(att: torch.Tensor, size: tuple[int, int], align_corners: bool = False) -> torch.Tensor:
    """Bilinear, [N, H, W] -> [N, H', W'] of ``size``."""
    return F.interpolate(att[:, None], size, mode="bilinear", align_corners=align_corners)[:, 0]


def carried(
    att: torch.Tensor, maps: Mapping[int, torch.Tensor], align_corners: bool = False, *, start: str = "segments"
) -> dict[int, torch.Tensor]:
    """att(b:) [N, H_b, W_b] by start block, from the last down to the shallowest of the maps q_s(b:) [N, H_b, W_b].

    att(b:) is the segment-wise mean over q_s(b:) of att(b+1:), upsampled to the grid of q_s(b:), so the maps have no
    gap. Before the last block B, ``att`` [N, H, W] is eq. 11; with ``start`` ``segments`` att(B:) averages it over
    q_s(B:), ``raw`` leaves it as it is (a class activation map).
    """
    if start not in ("segments", "raw"):
        raise ValueError(f"start must be 'segments' or 'raw', got {start!r}")
    shallowest, last = min(maps), max(maps)
    missing = [b for b in range(shallowest, last) if b not in maps]
    if missing:
        raise ValueError(f"attribution down to block {shallowest} also needs the prototypes from block(s) {missing}")
    by_block = {}
    for b in sorted(maps, reverse=True):
        if att.shape != maps[b].shape:
            height, width = maps[b].shape[1:]
            att = upsample(att, (height, width), align_corners)
        if b < last or start == "segments":
            att = segment_mean(att, maps[b])
        by_block[b] = att
    return by_block


def chance(h: torch.Tensor, c_j: torch.Tensor) -> torch.Tensor:
    """How far eq. 11 lies from 0 where c_j, at its length, has a random direction: ||h_r|| / (||c_j|| √D), [N].

    The root mean square over positions r and directions. ``h`` [N, D, H, W] and ``c_j`` [N, D] as in
    :func:`attribution`.
    """
    length = h.square().sum(1).mean((1, 2)).sqrt()
    return length / (torch.linalg.vector_norm(c_j, dim=1) * h.shape[1] ** 0.5)


def contributions(dots: torch.Tensor, q_s: torch.Tensor, prototypes: int, align_corners: bool = False) -> torch.Tensor:
    """What each segment adds to the score y_j: 1/R Σ_r w_r h_r · c_j with w = Aᵀ 1_segment / Aᵀ 1, [N, K].

    A is the upsampling from the R positions of h to those of the map, so w_r is the part of position r that lies in the
    segment. Over segments w sums to 1: the contributions sum to avg_r(h_r · c_j), which is y_j - b_j (eq. 5), on every
    grid. ``dots`` h_r · c_j [N, H, W], the map ``q_s`` int [N, H', W'] of K ``prototypes``; those not in it have 0.
    """
    size = (q_s.shape[1], q_s.shape[2])
    height, width = (
        F.interpolate(torch.eye(n).to(dots)[None], out, mode="linear", align_corners=align_corners)[0].sum(1)
        for n, out in zip(dots.shape[1:], size, strict=True)
    )
    # Σ_r w_r dots_r = 1_segment · A (dots / Aᵀ 1): one upsampling serves all segments
    by_position = upsample(dots / torch.outer(height, width), size, align_corners).flatten(1) / dots[0].numel()
    return dots.new_zeros(len(dots), prototypes).scatter_add_(1, q_s.flatten(1), by_position)
