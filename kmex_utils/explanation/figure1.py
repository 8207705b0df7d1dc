"""Figure 1: per explainer the image, its explanation map, the attribution and the nearest training patches."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from ..drawing import COLOURED, Colour, coloured, literal, palette, short, styled
from .interpretation import Interpretation, Patch


@styled
def figure1(image: np.ndarray, interpretations: Sequence[Interpretation], title: str = "") -> Figure:
    """The interpretation process of one image, uint8 [H, W, 3].

    The interpretations, one per explainer, are drawn from left to right (the paper: B4, B234); all attributions share
    one scale.
    """
    limit = max(0.0 if i.attribution is None else float(np.abs(i.attribution).max()) for i in interpretations) or 1.0
    wide = 1 if all(i.certainty is None for i in interpretations) else 4 / 3
    figure = plt.figure(figsize=(5.2 * wide * len(interpretations), 4.2))
    if title:
        figure.suptitle(literal(title))
    panels = figure.subfigures(1, len(interpretations), squeeze=False, wspace=0.04)[0]
    for panel, interpretation in zip(panels, interpretations, strict=True):
        _draw(panel, image, interpretation, limit)
    return figure


def _draw(panel: SubFigure, image: np.ndarray, part: Interpretation, limit: float) -> None:
    grid = panel.add_gridspec(3, 15, height_ratios=[3, 1.35, 1.35])
    places = [grid[0, 5 * i : 5 * i + 5] for i in range(3)]
    if part.certainty is not None:  # 20 columns would leave constrained layout no room
        wider = grid[0, :].subgridspec(1, 4)
        places = [wider[0, i] for i in range(4)]
    top = [panel.add_subplot(place) for place in places]
    extent = (0, image.shape[1], image.shape[0], 0)
    top[0].imshow(image)
    predicted = short(part.predicted)
    top[0].set_title(f"{part.name}: predicts{' ' if len(predicted) < 10 else chr(10)}{predicted}")
    top[1].imshow(coloured(part.map, len(part.patches)), extent=extent)
    top[1].set_title("explanation map")
    if part.attribution is None:
        top[2].text(0.5, 0.5, "no attribution:\neq. 11 does not hold", ha="center", va="center")
    else:
        drawn = top[2].imshow(part.attribution, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        top[2].set_title("attribution")
        panel.colorbar(drawn, ax=top[2], shrink=0.8, pad=0.03)
    if part.certainty is not None:
        top[3].imshow(part.certainty, cmap="cividis", vmin=0, vmax=1, extent=extent)  # yellow: in all, blue: in none
        top[3].set_title(f"same in refits: {100 * part.certainty.mean():.0f} %")
    for axes in top:
        axes.set_axis_off()
    for i, colour in enumerate(palette(COLOURED)):
        axes = panel.add_subplot(grid[1 + i // 5, 3 * (i % 5) : 3 * (i % 5) + 3], xticks=[], yticks=[])
        if i < len(part.patches):
            _draw_patch(axes, part.patches[i], colour)
        else:
            axes.set_axis_off()


def _draw_patch(axes: Axes, patch: Patch, colour: Colour) -> None:
    axes.imshow(patch.pixels)
    name, share = short(patch.label), f"{100 * patch.share:.0f} %"
    if len(name) < 10:
        axes.set_title(f"{name} · {share}", fontsize=8, pad=3)
    else:
        axes.set_title(f"{name}\n{share}", fontsize=7, pad=3)
    for spine in axes.spines.values():
        spine.set(visible=True, color=colour, linewidth=3)
