"""One style for every figure, in force while a figure is made and saved; the user's own settings stay as they are."""

import base64
import io
import textwrap
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import ParamSpec

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from .paths import unnumbered
from .store import replacing

STYLE = Path(__file__).with_name("kmex.mplstyle")
Colour = tuple[float, float, float]
COLOURED = 10  # prototypes of a map that have a colour of their own: all that the style's palette tells apart
GREY = 0.88  # of the others
P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """A function that makes a figure, run in the style; the figure is closed, for the caller to show once."""

    @wraps(draw)
    @plt.style.context(STYLE)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        figure = draw(*args, **kwargs)
        for axes in figure.axes:  # ticks are made and counted when the figure is shown, by then outside the style
            axes.tick_params("x", which="both", labelsize=plt.rcParams["xtick.labelsize"])
            axes.tick_params("y", which="both", labelsize=plt.rcParams["ytick.labelsize"])
        plt.close(figure)
        return figure

    return drawn


@plt.style.context(STYLE)
def save(figure: Figure, stem: Path) -> None:
    """As PNG and PDF beside each other; the same figure gives the same bytes."""
    for ending, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        with replacing(stem.with_name(stem.name + ending)) as temporary:
            figure.savefig(temporary, metadata=metadata)


@plt.style.context(STYLE)
def png(figure: Figure, dpi: float | None = None) -> bytes:
    """A figure as a PNG file, in the style's resolution or another."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def data_url(pixels: np.ndarray, size: int = 0, *, quality: int = 85, method: int = 4) -> str:
    """uint8 [H, W, 3] as WebP for a page, at most ``size`` a side; ``method`` 0 is quick, 6 gives small files."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if size:
        image.thumbnail((size, size), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=method)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


@plt.style.context(STYLE)
def palette(count: int) -> list[Colour]:
    """The style's ten colour-blind-safe colours; evenly spaced hues for more."""
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    if count <= len(colours):
        return [to_rgb(colour) for colour in colours[:count]]
    try:
        from seaborn import husl_palette
    except ImportError:
        raise ImportError("more than ten colours need seaborn: pip install 'kmex-utils[notebooks]'") from None
    return list(husl_palette(count, s=0.85, l=0.6))


def coloured(q_s: np.ndarray, largest: int = COLOURED) -> np.ndarray:
    """A map [H, W] in colours, RGB: its largest prototypes in the palette's order, others light grey."""
    used, counts = np.unique(q_s, return_counts=True)
    rgb = np.full((*q_s.shape, 3), GREY)
    for prototype, colour in zip(used[(-counts).argsort(kind="stable")][:largest], palette(COLOURED), strict=False):
        rgb[q_s == prototype] = colour
    return rgb


def diverging(values: np.ndarray, centre: float, half: float) -> np.ndarray:
    """Values [H, W] in colours, RGB: white at the centre, red above it and blue below, full at ``half`` away."""
    rgba: np.ndarray = plt.get_cmap("RdBu_r")(0.5 + (values - centre) / (2 * half))
    return rgba[..., :3]


def literal(words: str) -> str:
    """Words for a figure as they are: matplotlib would set what lies between two $ as a formula."""
    return words.replace("$", r"\$")


def short(name: str, limit: int = 14, lines: int = 1) -> str:
    """A class name for a figure: without CUB's or ImageNet's number, in lines of up to ``limit`` characters.

    What is too long loses its beginning: the end tells birds, dogs and lorries apart.
    """
    name = unnumbered(name).replace("_", " ")
    while len(parts := textwrap.wrap(name, limit)) > lines:
        name = "…" + name.removeprefix("…")[1:].lstrip()
    return literal("\n".join(parts))


def percent(share: float) -> str:
    """A share of 0 to 1 in whole per cent."""
    return "< 1 %" if share < 0.01 else f"{100 * share:.0f} %"


@styled
def image_grid(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 10) -> Figure:
    """Small images, uint8 [H, W, 3], with a title each."""
    rows = -(-len(images) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(0.95 * columns, 1.15 * rows), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, image, title in zip(grid.flat, images, titles, strict=False):
        axes.imshow(image)
        axes.set_title(short(title, 12), fontsize=8, pad=2)
    return figure
