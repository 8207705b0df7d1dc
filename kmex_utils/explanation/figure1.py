"""Figure 1: per explainer the image, its explanation map, the attribution and the nearest training patches."""

import textwrap
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure, SubFigure

from ..drawing import COLOURED, Colour, coloured, literal, palette, percent, short, styled
from .interpretation import Interpretation, Patch


@styled
def figure1(
    image: np.ndarray, interpretations: Sequence[Interpretation], title: str = "", notes: Sequence[str] = ()
) -> Figure:
    """The interpretation process of one image, uint8 [H, W, 3].

    The interpretations, one per explainer, are drawn from left to right (the paper: B4, B234). Each attribution is red
    above its own mean and blue below; where zero lies is ticked, or pointed to.
    """
    wide = 1 if all(i.certainty is None for i in interpretations) else 4 / 3
    figure = plt.figure(figsize=(5.2 * wide * len(interpretations), 4.7 + 0.2 * len(notes)))
    if title:
        lines = [textwrap.fill(line, 60 * len(interpretations)) for line in title.splitlines()]
        figure.suptitle(literal("\n".join(lines)))
    if notes:
        lines = [textwrap.fill(line, 90 * len(interpretations)) for line in notes]
        figure.supxlabel(literal("\n".join(lines)), fontsize=8)
    panels = figure.subfigures(1, len(interpretations), squeeze=False, wspace=0.04)[0]
    for panel, interpretation in zip(panels, interpretations, strict=True):
        _draw(panel, image, interpretation)
    return figure


def _draw(panel: SubFigure, image: np.ndarray, part: Interpretation) -> None:
    decimals = _decimals(max(abs(points) for points in (part.total, *(p.contribution or 0 for p in part.patches))))
    grid = panel.add_gridspec(3, 15, height_ratios=[3, 1.35, 1.35])
    places = [grid[0, 5 * i : 5 * i + 5] for i in range(3)]
    if part.certainty is not None:  # 20 columns would leave constrained layout no room
        wider = grid[0, :].subgridspec(1, 4)
        places = [wider[0, i] for i in range(4)]
    top = [panel.add_subplot(place) for place in places]
    extent = (0, image.shape[1], image.shape[0], 0)
    top[0].imshow(image)
    predicted = short(part.predicted, 24)
    top[0].set_title(f"{part.name}: predicts{' ' if len(predicted) < 10 else chr(10)}{predicted}")
    top[1].imshow(coloured(part.map, len(part.patches)), extent=extent)
    top[1].set_title("explanation map")
    if part.attribution is None:
        top[2].text(0.5, 0.5, "no attribution:\neq. 11 does not hold", ha="center", va="center")
    else:
        low, high = part.centre - part.half, part.centre + part.half
        drawn = top[2].imshow(part.attribution, cmap="RdBu_r", vmin=low, vmax=high, extent=extent)
        to = "\n− ".join(short(name, 22) for name in part.target)
        top[2].set_title(f"attribution to{' ' if len(to) < 8 else chr(10)}{to}")
        _tick(panel.colorbar(drawn, ax=top[2], shrink=0.8, pad=0.03), part.centre, part.half)
        of_all = f"points of the score (all segments: {part.total:+.{decimals}f})"
        if len(part.target) > 1:
            of_all += "\nof the difference of two; the map's are over the columns' squared lengths (eq. 11)"
        panel.supxlabel(f"prototype: class, share of the map, {of_all}", fontsize=7)
    if part.certainty is not None:
        top[3].imshow(part.certainty, cmap="cividis", vmin=0, vmax=1, extent=extent)  # yellow: in all, blue: in none
        top[3].set_title(f"same in refits: {100 * part.certainty.mean():.0f} %")
    for axes in top:
        axes.set_axis_off()
    for i, colour in enumerate(palette(COLOURED)):
        axes = panel.add_subplot(grid[1 + i // 5, 3 * (i % 5) : 3 * (i % 5) + 3], xticks=[], yticks=[])
        if i < len(part.patches):
            _draw_patch(axes, part.patches[i], colour, decimals)
        else:
            axes.set_axis_off()


def _tick(bar: Colorbar, centre: float, half: float) -> None:
    """Ticks at centre and ends, and at zero: a scale about a map's mean must say where for turns to against."""
    decimals = _decimals(half)
    ends = [centre - half, centre, centre + half]
    if abs(centre) <= half:  # a tick of its own, in the place of one that it would touch
        ends = [0.0, *(tick for tick in ends if abs(tick) > 0.2 * half)]
        bar.ax.axhline(0, color="black", linewidth=1.2)
    else:
        arrow, y, va = ("0 ↓", -0.03, "top") if centre > 0 else ("0 ↑", 1.03, "bottom")
        bar.ax.text(0.5, y, arrow, transform=bar.ax.transAxes, ha="center", va=va, fontsize=8)
    bar.set_ticks(ends, labels=["0" if tick == 0 else f"{tick:.{decimals}f}" for tick in ends])


def _decimals(largest: float) -> int:
    """Of numbers of which the largest is to have three digits."""
    return max(0, 2 - int(np.floor(np.log10(abs(largest) or 1))))


def _draw_patch(axes: Axes, patch: Patch, colour: Colour, decimals: int) -> None:
    axes.imshow(patch.pixels, interpolation="antialiased")  # else lines are lost where it is drawn smaller
    points = "" if patch.contribution is None else f" · {patch.contribution:+.{decimals}f}"
    words, name = percent(patch.share) + points, short(patch.label, 15, 2)
    beside = len(f"{name} · {words}") <= 15  # characters above a patch
    axes.set_title(f"{name} · {words}" if beside else f"{name}\n{words}", fontsize=8 if beside else 7, pad=3)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=3)
