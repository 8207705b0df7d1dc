"""The interpretation process of Figure 1: explanation map, attribution and nearest training patches of an image."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.ndimage import find_objects, label

from .attribution import attributions
from .backbones import Backbone
from .datasets import Dataset
from .explainers import EncoderKMeans, block_name


@dataclass(frozen=True)
class Patch:
    """A prototype seen in an explanation map and the training patch nearest to it.

    ``share`` of the explained image's positions; ``pixels`` uint8 [s, s, 3], the training image around the segment
    of the nearest row, faded outside it; ``image`` its index in the training split.
    """

    prototype: int
    class_name: str
    share: float
    pixels: np.ndarray
    image: int


@dataclass(frozen=True)
class Interpretation:
    """One image by one explainer: ``map`` of prototype indices [H', W'], ``attribution`` [H', W'], patches by size.

    ``attribution`` is None where eq. 11 does not hold: something lies between average pool and linear head.
    """

    name: str
    map: np.ndarray
    attribution: np.ndarray | None
    patches: tuple[Patch, ...]
    predicted: str


def interpret(
    backbone: Backbone,
    dataset: Dataset,
    explainers: Mapping[int, EncoderKMeans],
    pixels: np.ndarray,
    start_blocks: list[int],
    *,
    target: int | None = None,
    attribution_start: str = "segments",
    max_patches: int = 10,
) -> list[Interpretation]:
    """Explain one image from each start block.

    Parameters
    ----------
    explainers
        By start block, from the shallowest of ``start_blocks`` to the last without gaps.
    pixels
        uint8 [1 or 3, S, S].
    target
        Class to attribute to; None takes the backbone's prediction.
    """
    x, y = backbone.outputs(dataset.normalise(pixels[None]))
    j = y.argmax(1) if target is None else torch.tensor([target])
    needed = {b: e for b, e in explainers.items() if b >= min(start_blocks)}
    att = attributions(x, backbone.c, j, needed, start=attribution_start) if backbone.pooled_linear else None
    found = []
    for b in start_blocks:
        explainer = explainers[b]
        q_s = explainer.sim(explainer.h(x))
        votes = explainer.proj(q_s)[0]
        found.append(
            Interpretation(
                block_name(b, len(x)),
                q_s[0].numpy(),
                att[b][0].numpy() if att else None,
                _patches(backbone, dataset, explainer, q_s[0], max_patches),
                dataset.classes[int(votes.argmax())],
            )
        )
    return found


def _patches(backbone, dataset, explainer, q_s: torch.Tensor, limit: int) -> tuple[Patch, ...]:
    """Patches of the prototypes in a map, largest segment first."""
    used, counts = q_s.unique(return_counts=True)
    order = counts.argsort(descending=True, stable=True)[:limit]
    prototypes = explainer.prototypes
    images = prototypes.image[used[order]]
    x = backbone.activations(dataset.normalise(dataset.train.pixels[images.numpy()]))
    maps = explainer.sim(explainer.h(x))
    patches = []
    for k, count, i, segments in zip(used[order].tolist(), counts[order].tolist(), images.tolist(), maps, strict=True):
        patches.append(
            Patch(
                k,
                dataset.classes[int(prototypes.labels[k])],
                count / q_s.numel(),
                segment_patch(dataset.train.rgb(i), segments.numpy(), int(prototypes.position[k])),
                i,
            )
        )
    return tuple(patches)


def segment_patch(image: np.ndarray, segments: np.ndarray, position: int) -> np.ndarray:
    """The part of an image that one row's segment covers.

    The connected part of the segment around ``position`` (row-major on the map's grid) is cut out in a square with one
    cell of context on each side; what is outside the segment is faded towards grey.

    ``image`` uint8 [S, S, 3], ``segments`` int [H', W']; returns uint8 [s, s, 3].
    """
    row, column = divmod(position, segments.shape[1])
    parts, _ = label(segments == segments[row, column])
    part = parts == parts[row, column]
    rows, columns = find_objects(part.astype(int))[0]
    size = image.shape[0]
    cell_h, cell_w = size / part.shape[0], size / part.shape[1]
    side = round(max((rows.stop - rows.start + 2) * cell_h, (columns.stop - columns.start + 2) * cell_w))
    side = min(side, size)
    top, left = (
        int(np.clip(round((s.start + s.stop) / 2 * cell - side / 2), 0, size - side))
        for s, cell in ((rows, cell_h), (columns, cell_w))
    )
    row_of, column_of = (np.arange(size) * cells // size for cells in part.shape)
    inside = part[row_of][:, column_of, None]
    shown = np.where(inside, image, 0.35 * image + 0.65 * 160).astype(np.uint8)
    return shown[top : top + side, left : left + side]
