"""Gradient-free feature attribution (eq. 11) and its recursion over depths by segment-wise averages."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from .explainers import EncoderKMeans


def attribution(h: torch.Tensor, c_j: torch.Tensor) -> torch.Tensor:
    """Eq. 11: att(h_wh, c_j) = h_wh · c_j / ||c_j||², so that att(c_j, c_j) = 1.

    Parameters
    ----------
    h
        The encoder's output, [N, D, H, W].
    c_j
        The classifier's column for each image, [N, D].

    Returns
    -------
    Tensor
        [N, H, W].
    """
    return torch.einsum("ndhw,nd->nhw", h, c_j / c_j.square().sum(1, keepdim=True))


def segment_mean(values: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Every position gets the mean of its segment: all positions of the image with the same prototype.

    ``values`` float [N, H, W] and ``segments`` int [N, H, W] give [N, H, W].
    """
    index = segments.flatten(1)
    shape = (len(index), int(index.max()) + 1)
    total = values.new_zeros(shape).scatter_add_(1, index, values.flatten(1))
    count = values.new_zeros(shape).scatter_add_(1, index, torch.ones_like(values).flatten(1))
    return (total / count.clamp_min(1)).gather(1, index).view_as(values)


def upsample(maps: torch.Tensor, size: tuple[int, int], align_corners: bool = False) -> torch.Tensor:
    """Bilinear, [N, H, W] -> [N, *size]."""
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=align_corners)[:, 0]


def attributions(
    activations: Sequence[torch.Tensor],
    c: torch.Tensor,
    target: torch.Tensor,
    explainers: Mapping[int, EncoderKMeans],
    *,
    start: str = "segments",
) -> dict[int, torch.Tensor]:
    """att(b:) for every start block b from the last down to the shallowest explainer.

    att(b:) is the segment-wise mean over q_s(b:) of att(b+1:), upsampled to block b's grid.

    Parameters
    ----------
    activations
        x(1) … x(B), each [N, D_b, H_b, W_b].
    c
        The classifier's columns, [C, D].
    target
        The class j to explain for each image, [N] (the paper: the predicted one).
    explainers
        By start block, without gaps: B234 needs those of 4, 3 and 2.
    start
        att(B:): ``segments`` averages eq. 11 over q_s(B:); ``raw`` leaves it as it is (a class activation map).

    Returns
    -------
    dict
        start block -> [N, H_b, W_b].
    """
    last, shallowest = len(activations), min(explainers)
    missing = [b for b in range(shallowest, last + 1) if b not in explainers]
    if missing:
        raise ValueError(f"attribution down to block {shallowest} also needs the prototypes from block(s) {missing}")
    att = attribution(activations[-1], c.to(activations[-1])[target])
    segments = {b: explainer.sim(explainer.h(activations)) for b, explainer in explainers.items()}
    return carried(att, segments, explainers[last].normalisation.align_corners, start=start)


def carried(
    att: torch.Tensor, segments: Mapping[int, torch.Tensor], align_corners: bool = False, *, start: str = "segments"
) -> dict[int, torch.Tensor]:
    """Eq. 11 of the last block, [N, H, W], carried up to every block with ``segments`` q_s(b:) [N, H_b, W_b]."""
    if start not in ("segments", "raw"):
        raise ValueError(f"start must be 'segments' or 'raw', got {start!r}")
    last, maps = max(segments), {}
    for b in sorted(segments, reverse=True):
        if b < last:
            att = upsample(att, segments[b].shape[1:], align_corners)
        if b < last or start == "segments":
            att = segment_mean(att, segments[b])
        maps[b] = att
    return maps
