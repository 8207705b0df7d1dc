"""Map and attribution laid over the picture itself, at its own resolution, and what a cell of them has seen."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from ..data.input import Box
from ..data.reading import opened, rgb
from ..drawing import coloured, diverging
from ..networks import Network
from ..networks.network import Target
from ..paths import expanded

if TYPE_CHECKING:
    from .explained import AnyImage, Explained

LAYERS = ("map", "attribution")
DRAWS = 8  # images of noise: a pixel all of whose paths a gate closes in each of them is taken as not seen


def overlay(
    explained: "Explained",
    image: "AnyImage",
    start_block: int = 0,
    target: Target = "",
    *,
    of: str = "map",
    opacity: float = 0.4,
    outline: bool = True,
    cell: Sequence[int] = (),
    attribution_start: str = "segments",
) -> Image.Image:
    """The picture [H, W] under its map or attribution, as :meth:`Explained.overlay` says."""
    if of not in LAYERS:
        raise ValueError(f"of must be map or attribution, got {of!r}")
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity must be from 0 (the picture alone) to 1, got {opacity}")
    b = start_block or explained.start_blocks[-1]
    picture, (pixels, box) = explained.picture(image), original(explained, image)
    (part,) = explained.interpretations(picture, [b], target, 0, attribution_start)
    if of == "attribution" and part.attribution is None:
        raise ValueError(f"there is no attribution, as eq. 11 does not hold: {explained.network.between}")
    att = part.attribution if of == "attribution" else None
    colours = coloured(part.map) if att is None else diverging(att, part.centre, part.half)
    rows, columns = cells(pixels.shape[:2], box, part.map.shape)
    labels = part.map[rows[:, None], columns]
    alpha = np.full(labels.shape, opacity)
    if outline:  # each segment's edge in its own colour
        alpha[_edges(labels, max(1, round(min(labels.shape) / 150)))] = 1
    layer = np.where(((rows < 0)[:, None] | (columns < 0))[..., None], 1, colours[rows[:, None], columns])
    blended = Image.fromarray((pixels + alpha[..., None] * (255 * layer - pixels)).round().astype(np.uint8))
    if cell:
        field = receptive_field(explained.network, b, part.map.shape, cell)
        row, column = cell
        _frame(blended, (column, row, column + 1, row + 1), part.map.shape, box)
        _frame(blended, field, explained.network.input.size, box)
    return blended


def original(explained: "Explained", image: "AnyImage") -> tuple[np.ndarray, Box]:
    """Upright pixels of an image, uint8 [H, W, 3], and the box of them that enters the network.

    From its file or Pillow image; of others, as of a data set that lies in no folder, the network's square is all there
    is.
    """
    picture, input = explained.picture(image), explained.network.input
    file = Path(explained.settings.get("folder") or ".") / picture.name if picture.split else image
    if isinstance(file, str | Path) and expanded(file).is_file():
        with opened(expanded(file)) as stored:
            upright = rgb(stored, input.window)[0]
    elif isinstance(image, Image.Image):
        upright = rgb(image, input.window)[0]
    else:
        return picture.rgb, (0, 0, picture.rgb.shape[1], picture.rgb.shape[0])
    return np.asarray(upright), input.box((upright.height, upright.width))


def cells(size: Sequence[int], box: Box, grid: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Row [H] and column [W] of a grid over a ``box`` in which the pixels of an image of ``size`` (H, W) lie, or -1."""
    left, top, right, bottom = box
    indices = []
    for pixels, start, stop, count in ((size[0], top, bottom, grid[0]), (size[1], left, right, grid[1])):
        index = np.floor((np.arange(pixels) + 0.5 - start) / (stop - start) * count).astype(int)
        indices.append(np.where((index >= 0) & (index < count), index, -1))
    return indices[0], indices[1]


def receptive_field(network: Network, start_block: int, grid: Sequence[int], cell: Sequence[int]) -> Box:
    """The pixels (left, top, right, bottom) of the network's input that can influence a cell of q(b:)'s grid [H', W'].

    By autograd: the box of all pixels at which the gradient of the cell's activations is not zero on any of some images
    of noise. Where layers are convolutions, pools and ReLUs these are the pixels that can influence it, and no others;
    most of them do so faintly. Means over the image, as in squeeze and excitation, reach everything.
    """
    row, column = cell
    if not (0 <= row < grid[0] and 0 <= column < grid[1]):
        raise ValueError(f"cell must be a row and a column of {grid[0]} x {grid[1]}, got {tuple(cell)}")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(DRAWS, network.input.channels, *network.input.size, generator=generator)
    seen = torch.zeros(network.input.size, dtype=torch.bool)
    for x in noise.split(1):
        with torch.enable_grad():
            x.requires_grad_()
            total = x.new_zeros(())
            for u in network.eval().activations(x)[start_block - 1 :]:
                at = F.interpolate(u, (grid[0], grid[1]), mode="bilinear")[0, :, row, column]
                total = total + at @ torch.randn(at.shape, generator=generator)  # no two paths cancel
        (gradient,) = torch.autograd.grad(total, x)
        seen |= (gradient != 0).any(1)[0]
    rows, columns = (seen.any(axis).nonzero().flatten().tolist() for axis in (1, 0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


def _frame(image: Image.Image, rectangle: Box, size: Sequence[int], box: Box) -> None:
    """Draw a rectangle given on a grid of ``size`` (H, W) that covers a box of the image."""
    x, y = (box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0]
    left, top, right, bottom = rectangle
    corners = (box[0] + left * x, box[1] + top * y, box[0] + right * x - 1, box[1] + bottom * y - 1)
    line = max(1, round(min(image.size) / 150))
    for width, colour in ((2 * line, "white"), (line, "black")):
        ImageDraw.Draw(image).rectangle(corners, outline=colour, width=width)


def _edges(labels: np.ndarray, width: int) -> np.ndarray:
    """The pixels of [H, W] with another label at most ``width`` away along a row or a column."""
    edges = np.zeros(labels.shape, bool)
    for distance in range(1, width + 1):
        for here, there in ((np.s_[distance:], np.s_[:-distance]), (np.s_[:, distance:], np.s_[:, :-distance])):
            differ = labels[here] != labels[there]
            edges[here] |= differ
            edges[there] |= differ
    return edges
