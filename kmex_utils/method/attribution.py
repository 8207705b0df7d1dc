"""Gradient-free feature attribution (eq. 11) and its recursion over depths by segment-wise averages."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from .explainers import EncoderKMeans


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
    """Bilinear, [N, H, W] -> [N, *size]."""
    return F.interpolate(att[:, None], size, mode="bilinear", align_corners=align_corners)[:, 0]


def attributions(
    activations: Sequence[torch.Tensor],
    c: torch.Tensor,
    target: torch.Tensor,
    explainers: Mapping[int, EncoderKMeans],
    *,
    start: str = "segments",
) -> dict[int, torch.Tensor]:
    """att(b:) for every start block b from the last down to the shallowest explainer; ``start`` as in :func:`carried`.

    From ``activations`` x(1) … x(B), each [N, D_b, H_b, W_b], the classifier's columns ``c`` [C, D], the class j to
    explain for each image ``target`` [N] (the paper: the predicted one), and the ``explainers`` by start block, without
    gaps: B234 needs those of 4, 3 and 2.
    """
    last, shallowest = len(activations), min(explainers)
    missing = [b for b in range(shallowest, last + 1) if b not in explainers]
    if missing:
        raise ValueError(f"attribution down to block {shallowest} also needs the prototypes from block(s) {missing}")
    att = attribution(activations[-1], c.to(activations[-1])[target])
    maps = {b: explainer.sim(explainer.h(activations)) for b, explainer in explainers.items()}
    return carried(att, maps, explainers[last].normalisation.align_corners, start=start)


def carried(
    att: torch.Tensor, maps: Mapping[int, torch.Tensor], align_corners: bool = False, *, start: str = "segments"
) -> dict[int, torch.Tensor]:
    """att(b:) [N, H_b, W_b] by start block, from eq. 11 of the last, [N, H, W], and the maps q_s(b:) [N, H_b, W_b].

    att(b:) is the segment-wise mean over q_s(b:) of att(b+1:), upsampled to the grid of q_s(b:). With ``start``
    ``segments`` att(B:) averages eq. 11 over q_s(B:), too; ``raw`` leaves it as it is (a class activation map).
    """
    if start not in ("segments", "raw"):
        raise ValueError(f"start must be 'segments' or 'raw', got {start!r}")
    last, by_block = max(maps), {}
    for b in sorted(maps, reverse=True):
        if att.shape != maps[b].shape:
            height, width = maps[b].shape[1:]
            att = upsample(att, (height, width), align_corners)
        if b < last or start == "segments":
            att = segment_mean(att, maps[b])
        by_block[b] = att
    return by_block
