"""One function per published figure; each draws from saved results and never trains."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .interpretation import Interpretation
from .store import replacing

STYLE = Path(__file__).with_name("kmex.mplstyle")
plt.style.use(STYLE)


def save(figure: Figure, stem: Path) -> None:
    """As PNG and PDF beside each other; the same figure gives the same bytes."""
    for ending, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        with replacing(stem.with_name(stem.name + ending)) as temporary:
            figure.savefig(temporary, metadata=metadata)


def palette(count: int) -> list[tuple[float, float, float]]:
    """The style's ten colour-blind-safe colours; evenly spaced hues for more."""
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    if count <= len(colours):
        return [to_rgb(colour) for colour in colours[:count]]
    import seaborn as sns

    return sns.husl_palette(count, s=0.85, l=0.6)


def figure1(image: np.ndarray, interpretations: Sequence[Interpretation], title: str = "") -> Figure:
    """Interpretation process: per explainer the image, explanation map, attribution and nearest training patches.

    Parameters
    ----------
    image
        uint8 [S, S, 3].
    interpretations
        One per explainer, drawn from left to right (the paper: B4, B234). All attributions share one scale.
    """
    limit = max(0.0 if i.attribution is None else float(np.abs(i.attribution).max()) for i in interpretations) or 1.0
    figure = plt.figure(figsize=(5.2 * len(interpretations), 4.2))
    if title:
        figure.suptitle(title)
    sides = figure.subfigures(1, len(interpretations), squeeze=False, wspace=0.04)[0]
    for side, interpretation in zip(sides, interpretations, strict=True):
        _interpretation_panel(side, image, interpretation, limit)
    plt.close(figure)  # shown once, by the caller
    return figure


def _interpretation_panel(side, image: np.ndarray, found: Interpretation, limit: float) -> None:
    extent = (0, image.shape[1], image.shape[0], 0)
    grid = side.add_gridspec(3, 15, height_ratios=[3, 1.35, 1.35])
    top = [side.add_subplot(grid[0, 5 * i : 5 * i + 5]) for i in range(3)]
    top[0].imshow(image)
    top[0].set_title(f"{found.name}: predicts {_short(found.predicted)}")
    top[1].imshow(_coloured(found), extent=extent)
    top[1].set_title("explanation map")
    if found.attribution is None:
        top[2].text(0.5, 0.5, "no attribution:\neq. 11 does not hold", ha="center", va="center")
    else:
        shown = top[2].imshow(found.attribution, cmap="RdBu_r", vmin=-limit, vmax=limit, extent=extent)
        top[2].set_title("attribution")
        side.colorbar(shown, ax=top[2], shrink=0.8, pad=0.03)
    for axes in top:
        axes.set_axis_off()
    colours = palette(10)
    for i in range(10):
        axes = side.add_subplot(grid[1 + i // 5, 3 * (i % 5) : 3 * (i % 5) + 3])
        axes.set_xticks([])
        axes.set_yticks([])
        if i >= len(found.patches):
            axes.set_axis_off()
            continue
        patch = found.patches[i]
        axes.imshow(patch.pixels)
        axes.set_title(f"{_short(patch.class_name)} · {100 * patch.share:.0f} %", fontsize=8, pad=3)
        for spine in axes.spines.values():
            spine.set(visible=True, color=colours[i], linewidth=3)


def _coloured(found: Interpretation) -> np.ndarray:
    """The map in the patches' colours, RGB; prototypes without a patch are light grey."""
    rgb = np.full((*found.map.shape, 3), 0.88)
    for patch, colour in zip(found.patches, palette(10), strict=False):
        rgb[found.map == patch.prototype] = colour
    return rgb


def _short(name: str, limit: int = 14) -> str:
    name = name.replace("_", " ")
    return name if len(name) <= limit else name[: limit - 1] + "…"


def figure2(
    classes: Sequence[str],
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    left: dict[str, tuple[np.ndarray, np.ndarray]],
    right: dict[str, tuple[np.ndarray, np.ndarray]],
    title: str = "",
) -> Figure:
    """UMAP of a class group: embeddings of training (opaque) and test (faint) images, with prototypes.

    Parameters
    ----------
    train, test
        Projected embeddings [N, 2] with labels [N] (indices into ``classes``).
    left, right
        Prototypes by name, projected [K, 2] with labels [K]. The paper: classifier columns raw and rescaled on
        the left, KMEx on the right. Markers go by name: ``c_j`` crosses, ``c_j rescaled`` triangles, else squares.
    """
    colours = np.array(palette(len(classes)))
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.6), sharex=True, sharey=True)
    for side, prototypes in zip(axes, (left, right), strict=True):
        side.scatter(*test.T, c=colours[test_labels], s=5, alpha=0.2, linewidths=0, rasterized=True)
        side.scatter(*train.T, c=colours[train_labels], s=5, alpha=0.75, linewidths=0, rasterized=True)
        for name, (points, labels) in prototypes.items():
            marker = {"c_j": "X", "c_j rescaled": "^"}.get(name, "s")
            look = {"marker": marker, "s": 30, "edgecolors": "black", "linewidths": 0.7}
            side.scatter(*points.T, c=colours[labels], label=name.replace("c_j", "$c_j$"), zorder=3, **look)
        side.set_xticks([])
        side.set_yticks([])
        side.spines[:].set_visible(False)
        legend = side.legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=len(prototypes), handletextpad=0.2)
        for handle in legend.legend_handles:
            handle.set_facecolor("0.75")
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=c, markersize=5) for c in colours]
    names = [_short(name, 24) for name in classes]
    columns = len(classes) if len(classes) <= 10 else 5
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handletextpad=0.1, columnspacing=1.2)
    if title:
        figure.suptitle(title)
    plt.close(figure)  # shown once, by the caller
    return figure


def training_curve(history: Sequence[dict[str, float]]) -> Figure:
    """Loss and running training accuracy by epoch."""
    epochs = [record["epoch"] for record in history]
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.4))
    for side, key, name in ((axes[0], "loss", "training loss"), (axes[1], "accuracy", "running accuracy (%)")):
        side.plot(epochs, [record[key] for record in history], marker="o", color=palette(1)[0])
        side.set_xlabel("epoch")
        side.set_ylabel(name)
        side.xaxis.get_major_locator().set_params(integer=True)
    plt.close(figure)  # shown once, by the caller
    return figure


def image_grid(images: Sequence[np.ndarray], titles: Sequence[str], columns: int = 10) -> Figure:
    """Small images with a title each."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(0.95 * columns, 1.15 * rows), squeeze=False)
    for side in axes.flat:
        side.set_axis_off()
    for side, image, title in zip(axes.flat, images, titles, strict=False):
        side.imshow(image)
        side.set_title(_short(title, 12), fontsize=8, pad=2)
    plt.close(figure)  # shown once, by the caller
    return figure
