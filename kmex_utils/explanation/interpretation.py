"""The parts of Figure 1 for one image and one explainer: explanation map, attribution, nearest training patches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

EXAMPLES = ("typical", "weakest")  # of a prototype, beside the nearest patch, which flatters


@dataclass(frozen=True)
class Patch:
    """A prototype and a training patch near it.

    ``share`` of the explained image's positions; ``pixels`` uint8 [h, w, 3], the training image around the segment
    of the nearest row, which is outlined; ``index`` of that image in the training split; ``contribution`` of the
    explained image's segment to the score, None where eq. 11 does not hold; ``name``: one's own for the prototype, or
    empty.
    """

    prototype: int
    class_name: str
    share: float
    pixels: np.ndarray
    index: int
    contribution: float | None = None
    name: str = ""

    @property
    def label(self) -> str:
        """What to call the prototype: its name, else its class."""
        return self.name or self.class_name


@dataclass(frozen=True)
class Interpretation:
    """One image by one explainer: ``map`` of prototype indices [H', W'], ``attribution`` [H', W'], patches by size.

    ``attribution`` is None where eq. 11 does not hold: something lies between average pool and linear head. It is to
    the class ``target``, or to the first of two minus the second; ``centre`` and ``half`` are the middle and the
    half-width of its colours, ``total`` is what the contributions of all segments sum to. ``certainty`` [H', W']: the
    share of refits in which a position keeps its prototype; None where there are none.
    """

    name: str
    map: np.ndarray
    attribution: np.ndarray | None
    patches: tuple[Patch, ...]
    predicted: str
    target: tuple[str, ...] = ()
    centre: float = 0.0
    half: float = 1.0
    total: float = 0.0
    certainty: np.ndarray | None = None


def segment_patch(image: np.ndarray, segments: np.ndarray, position: int) -> np.ndarray:
    """The connected part of a segment around ``position`` (row-major on the map's grid), cut out of its image.

    A square with one cell of context on each side, or what the image has of it; the segment is outlined, and what is
    outside it is slightly lighter. ``image`` uint8 [H, W, 3], ``segments`` int [H', W']; returns uint8 [h, w, 3].
    """
    row, column = divmod(position, segments.shape[1])
    part = _connected(segments == segments[row, column], row, column)
    rows, columns = (np.flatnonzero(part.any(axis)) for axis in (1, 0))
    cells = tuple(length / count for length, count in zip(image.shape[:2], part.shape, strict=True))
    # with a cell of context on each side
    side = round(
        max((reached[-1] - reached[0] + 3) * cell for reached, cell in zip((rows, columns), cells, strict=True))
    )
    height, width = (min(side, length) for length in image.shape[:2])
    top, left = (
        int(np.clip(round((reached[0] + reached[-1] + 1) / 2 * cell - extent / 2), 0, length - extent))
        for reached, cell, extent, length in zip((rows, columns), cells, (height, width), image.shape[:2], strict=True)
    )
    cut = np.s_[top : top + height, left : left + width]
    inside, image = enlarged(part, image.shape[:2])[cut], image[cut]
    patch = np.where(inside[..., None], image, image + 0.1 * (255.0 - image))
    line = max(1, round(side / 50))  # seen where a patch is drawn as small as in Figure 1
    for thickness, colour in ((2 * line, 255), (line, 0)):  # black within white tells on any photograph
        patch[_around(inside, thickness)] = colour
    return patch.astype(np.uint8)


def enlarged(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """[…, H, W] at a larger size: every position a block of pixels."""
    rows, columns = (np.arange(n) * cells // n for n, cells in zip(size, values.shape[-2:], strict=True))
    return values[..., rows[:, None], columns]


def _around(inside: np.ndarray, thickness: int) -> np.ndarray:
    """The pixels outside a mask [H, W] that are at most so many away from it, along rows, columns and diagonals."""
    near = np.pad(inside, thickness)
    for axis in (0, 1):
        near = np.lib.stride_tricks.sliding_window_view(near, 2 * thickness + 1, axis).max(-1)
    return near & ~inside


def _connected(segment: np.ndarray, row: int, column: int) -> np.ndarray:
    """The part of a mask [H', W'] that is connected with a position, along rows and columns."""
    reached, spread = np.zeros_like(segment), np.zeros_like(segment)
    spread[row, column] = True
    while not np.array_equal(spread, reached):
        reached, padded = spread, np.pad(spread, 1)
        beside = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        spread = segment & (reached | beside)
    return reached
