"""Figures that two notebooks share or that stand in the paper; each draws from saved results and never trains."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullFormatter

from ..drawing import Colour, literal, palette, short, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..training.protopnet.views import Activated

DEPTHS = ("B4", "B34", "B234", "B1234")
DASHES = ("-", "--", "-.", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 3)))  # lines that are told apart without their colours
Points = tuple[np.ndarray, np.ndarray]  # projected [N, 2], labels [N]


def look(model: str) -> dict[str, Any]:
    """Colour and marker of a model, the same in every figure: those of :data:`DEPTHS`, a grey cross for others."""
    if model not in DEPTHS:
        return {"color": "0.5", "marker": "P"}
    i = DEPTHS.index(model)
    return {"color": palette(10)[i], "marker": "osD^"[i]}


@styled
def figure2(
    classes: Sequence[str],
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    left: Mapping[str, Points],
    right: Mapping[str, Points],
    title: str = "",
) -> "Figure":
    """UMAP of a class group: projected embeddings [N, 2] of training (opaque) and test (faint) images, with prototypes.

    Labels are indices into ``classes``. Prototypes go by name; the paper has classifier columns raw and rescaled on the
    left, KMEx on the right. ``c_j`` are crosses, ``c_j rescaled`` triangles, others squares.
    """
    colours = np.array(palette(len(classes)))
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.6), sharex=True, sharey=True)
    for axes, prototypes in zip(panels, (left, right), strict=True):
        axes.scatter(*test.T, c=colours[test_labels], s=5, alpha=0.2, linewidths=0, rasterized=True)
        axes.scatter(*train.T, c=colours[train_labels], s=5, alpha=0.75, linewidths=0, rasterized=True)
        for name, (points, labels) in prototypes.items():
            marker = {"c_j": "X", "c_j rescaled": "^"}.get(name, "s")
            drawn = {"marker": marker, "s": 30, "edgecolors": "black", "linewidths": 0.7, "zorder": 3}
            axes.scatter(*points.T, c=colours[labels], label=name.replace("c_j", "$c_j$"), **drawn)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        legend = axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.09), ncols=len(prototypes), handletextpad=0.2)
        for handle in legend.legend_handles:
            handle.set_facecolor("0.75")
    handles = [Line2D([], [], marker="o", linestyle="", color=colour, markersize=5) for colour in colours]
    columns = len(classes) if len(classes) <= 10 else 5
    names = [short(name, 24) for name in classes]
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handletextpad=0.1, columnspacing=1.2)
    if title:
        figure.suptitle(literal(title))
    return figure


@styled
def training_curve(history: Sequence[Mapping[str, float]]) -> "Figure":
    """Loss and running training accuracy by epoch."""
    epochs = [record["epoch"] for record in history]
    figure, panels = plt.subplots(1, 2, figsize=(7, 2.4))
    for axes, key, name in zip(panels, ("loss", "accuracy"), ("training loss", "running accuracy (%)"), strict=True):
        axes.plot(epochs, [record[key] for record in history], marker="o", color=palette(1)[0])
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


@styled
def protopnet_curve(history: Sequence[Mapping[str, Any]]) -> "Figure":
    """ProtoPNet's loss terms and running training accuracy by step of its schedule; lines mark each push."""
    figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.5))
    shown = {"cross_entropy": "cross-entropy", "cluster": "cluster cost", "accuracy": "running accuracy (%)"}
    for axes, (key, name) in zip(panels, shown.items(), strict=True):
        for colour, phase in zip(palette(3), ("warm", "joint", "last"), strict=True):
            steps = [i for i, record in enumerate(history) if record["phase"] == phase]
            values = [history[i][key] for i in steps]
            axes.plot(steps, values, color=colour, marker="o", markersize=3, linestyle="", label=phase)
        for i, record in enumerate(history):
            if record["phase"] == "push":
                axes.axvline(i, color="0.6", linewidth=0.9, zorder=0)
        axes.set(xlabel="step (grey line: push)", ylabel=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panels[1].yaxis.set_major_formatter("{x:g}")
    panels[1].yaxis.set_minor_formatter(NullFormatter())
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


@styled
def most_activated(image: np.ndarray, class_name: str, activated: Sequence["Activated"], title: str = "") -> "Figure":
    """*This looks like that*: an image's most activated prototypes, one row each, and the points they add to a class.

    From left to right: the image, uint8 [S, S, 3], boxed where it is most similar; the activation map over it, on one
    scale for all rows; the training image the prototype came from, with its own box.
    """
    figure, rows = plt.subplots(len(activated), 4, figsize=(6.2, 1.4 * len(activated) + 0.4), squeeze=False)
    high = max(float(a.activation.max()) for a in activated)
    colour = palette(2)[1]
    for row, a in zip(rows, activated, strict=True):
        row[0].imshow(image)
        _box(row[0], a.box, colour)
        row[1].imshow(image)
        over = row[1].imshow(a.activation, cmap="viridis", vmin=0, vmax=high, alpha=0.75)
        row[2].imshow(a.source)
        _box(row[2], a.source_box, colour)
        lines = [f"p{a.prototype}, class {short(a.class_name)}", f"similarity {a.similarity:.2f}"]
        lines += [f"× weight {a.weight:.2f}", f"= {a.points:+.2f} for {short(class_name)}"]
        row[3].text(0, 0.5, "\n".join(lines), va="center", fontsize=8, transform=row[3].transAxes)
    for axes, name in zip(rows[0, :3], ("this …", "activation map", "… looks like that"), strict=True):
        axes.set_title(name)
    for axes in rows.flat:
        axes.set_axis_off()
    figure.set_layout_engine("constrained", wspace=0.04)
    figure.colorbar(over, ax=rows[:, 0], location="left", shrink=min(1.0, 2.2 / len(activated)), label="similarity")
    if title:
        figure.suptitle(literal(title))
    return figure


def _box(axes: "Axes", box: tuple[int, int, int, int], colour: Colour) -> None:
    top, bottom, left, right = box
    outline: dict[str, Any] = {"fill": False, "edgecolor": colour, "linewidth": 2, "clip_on": False}
    axes.add_patch(Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, **outline))  # pixels lie around i


@styled
def frontier(records: "pd.DataFrame", named: int) -> "Figure":
    """Accuracy lost to the CNN against NMI_m and purity, from notebook 16's ``records``: a line a factor of eq. 8.

    Marks are means over seeds and refits, bars their standard deviation; ``named`` is the K/C of the lines.
    """
    table = records[records["of"] == "all classes"].copy()
    cnn = table[table.model == "CNN"].groupby("seed")["value"].first()
    key = ["model", "scale", "prototypes_per_class", "seed", "refit"]
    table["scale"] = table.scale.fillna("")
    own = table[(table.grid != "common") & table.model.isin([*DEPTHS, "ProtoPNet"])]
    wide = own.pivot_table(index=key, columns="metric", values="value").reset_index()
    wide["lost"] = wide.seed.map(cnn) - wide.accuracy_test
    names = {"1/D": "$1/D_b$ (printed)", "1/sqrt(D)": "$1/\\sqrt{D_b}$", "1": "equal weights"}
    found = list(dict.fromkeys(wide.scale[wide.model.isin(DEPTHS[1:])]))
    scales = sorted(found, key=lambda scale: [*names, *found].index(scale))  # each has its colour in every figure
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.0), sharex=True)
    position = table[table.model == "position"].set_index("metric")["value"]
    for axes, metric, name in zip(panels, ("nmi", "purity"), ("NMI$_m$ (%)", "purity (%)"), strict=True):
        for scale, colour, dashes in zip(scales, palette(10), cycle(DASHES), strict=False):
            of_scale = wide[(wide.scale == scale) | (wide.model == "B4")]
            line = []
            for model in DEPTHS:
                of_model = of_scale[of_scale.model == model]
                look_of = {"color": colour if model != "B4" else "0.35", "marker": look(model)["marker"]}
                for k, at in of_model.groupby("prototypes_per_class"):
                    x, y, dx, dy = at.lost.mean(), at[metric].mean(), at.lost.std(), at[metric].std()
                    if k == named:
                        line.append((x, y))
                        bars = {"xerr": dx if dx == dx else 0, "yerr": dy if dy == dy else 0}
                        axes.errorbar(x, y, **bars, markersize=7, capsize=2, linestyle="", zorder=3, **look_of)
                    else:
                        axes.plot(x, y, markersize=4, alpha=0.35, linestyle="", **look_of)
            axes.plot(
                *zip(*line, strict=True),
                color=colour,
                linestyle=dashes,
                linewidth=1.2,
                label=names.get(scale, f"weights {scale}"),
                zorder=2,
            )
        learned = wide[wide.model == "ProtoPNet"]
        if len(learned):
            axes.plot(learned.lost.mean(), learned[metric].mean(), **look("ProtoPNet"), markersize=8, linestyle="")
        null = own[(own.metric == f"null_{metric}") & (own.prototypes_per_class == named)]["value"]
        axes.axhspan(null.min(), null.max(), color="0.85", linewidth=0, zorder=0)
        axes.axhline(position[metric], color="0.4", linestyle=":", linewidth=1.2, zorder=0)
        axes.set(xlabel="accuracy lost to the CNN (points)", ylabel=name)
    handles, labels = panels[0].get_legend_handles_labels()
    marks = [(look(model)["marker"], model) for model in DEPTHS if (wide.model == model).any()]
    marks += [(look("ProtoPNet")["marker"], "ProtoPNet")] if len(learned) else []
    handles += [Line2D([], [], marker=m, linestyle="", color="0.3", markersize=6) for m, _ in marks]
    labels += [name for _, name in marks]
    handles += [Line2D([], [], color="0.4", linestyle=":"), Rectangle((0, 0), 1, 1, color="0.85")]
    figure.legend(handles, [*labels, "position alone", "null"], loc="outside right center")
    return figure
