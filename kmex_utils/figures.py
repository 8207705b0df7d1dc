"""One function per published figure; each draws from saved results and never trains."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .interpretation import Interpretation
from .protopnet import Activated
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
    predicted = _short(found.predicted)
    top[0].set_title(f"{found.name}: predicts{' ' if len(predicted) < 10 else chr(10)}{predicted}")
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
        name, share = _short(patch.class_name), f"{100 * patch.share:.0f} %"
        if len(name) < 10:
            axes.set_title(f"{name} · {share}", fontsize=8, pad=3)
        else:
            axes.set_title(f"{name}\n{share}", fontsize=7, pad=3)
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


def protopnet_curve(history: Sequence[dict]) -> Figure:
    """ProtoPNet's loss terms and running training accuracy by step of its schedule; lines mark each push."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.5))
    colours = palette(3)
    steps = [(i, record) for i, record in enumerate(history) if record["phase"] != "push"]
    for colour, phase in zip(colours, ("warm", "joint", "last"), strict=True):
        of_phase = [(i, record) for i, record in steps if record["phase"] == phase]
        look = {"color": colour, "marker": "o", "markersize": 3, "linestyle": "", "label": phase}
        for side, name in zip(axes, ("cross_entropy", "cluster", "accuracy"), strict=True):
            side.plot([i for i, _ in of_phase], [record[name] for _, record in of_phase], **look)
    names = ("cross-entropy", "cluster cost", "running accuracy (%)")
    for side, name in zip(axes, names, strict=True):
        for i, record in enumerate(history):
            if record["phase"] == "push":
                side.axvline(i, color="0.6", linewidth=0.9, zorder=0)
        side.set_xlabel("step (grey line: push)")
        side.set_ylabel(name)
        side.xaxis.get_major_locator().set_params(integer=True)
    axes[1].set_yscale("log")
    axes[1].yaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axes[1].yaxis.set_major_formatter("{x:g}")
    axes[1].yaxis.set_minor_formatter(plt.NullFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    plt.close(figure)  # shown once, by the caller
    return figure


def most_activated(image: np.ndarray, class_name: str, found: Sequence[Activated], title: str = "") -> Figure:
    """*This looks like that*: an image's most activated prototypes, one row each, and the points they add to a class.

    From left to right: the image, boxed where it is most similar; the activation map over it, on one scale for all
    rows; the training image the prototype came from, with its own box.

    Parameters
    ----------
    image
        uint8 [S, S, 3].
    class_name
        The class the points go to.
    """
    figure, axes = plt.subplots(len(found), 4, figsize=(6.2, 1.4 * len(found) + 0.4), squeeze=False)
    high = max(float(a.activation.max()) for a in found)
    colour = palette(2)[1]
    for row, a in zip(axes, found, strict=True):
        row[0].imshow(image)
        _box(row[0], a.box, colour)
        row[1].imshow(image)
        shown = row[1].imshow(a.activation, cmap="viridis", vmin=0, vmax=high, alpha=0.75)
        row[2].imshow(a.source)
        _box(row[2], a.source_box, colour)
        lines = [f"p{a.prototype}, class {_short(a.class_name)}", f"similarity {a.similarity:.2f}"]
        lines += [f"× weight {a.weight:.2f}", f"= {a.points:+.2f} for {_short(class_name)}"]
        row[3].text(0, 0.5, "\n".join(lines), va="center", fontsize=8, transform=row[3].transAxes)
    for side, name in zip(axes[0, :3], ("this …", "activation map", "… looks like that"), strict=True):
        side.set_title(name)
    for side in axes.flat:
        side.set_axis_off()
    figure.get_layout_engine().set(wspace=0.04)
    figure.colorbar(shown, ax=axes[:, 0], location="left", shrink=min(1.0, 2.2 / len(found)), label="similarity")
    if title:
        figure.suptitle(title)
    plt.close(figure)  # shown once, by the caller
    return figure


def _box(side, box: tuple[int, int, int, int], colour) -> None:
    top, bottom, left, right = box
    corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
    side.add_patch(plt.Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=2, clip_on=False))


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


def subset_study(records: pd.DataFrame) -> Figure:
    """Accuracy, inertia and agreement against the fraction of images; bands from the lowest to the highest.

    ``records`` of :func:`kmex_utils.subsets.study`.
    """
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 2.9))
    names = {
        "accuracy": "test accuracy (%)",
        "inertia": "inertia, relative to all images",
        "agreement": "agreement with all images (ARI)",
    }
    for side, (column, name) in zip(axes, names.items(), strict=True):
        for colour, marker, (model, some) in zip(
            palette(10), "osD^vP", records.groupby("model", sort=False), strict=False
        ):
            found = some.groupby("fraction")[column].agg(["mean", "min", "max"])
            side.plot(100 * found.index, found["mean"], marker=marker, markersize=4, color=colour, label=model)
            side.fill_between(100 * found.index, found["min"], found["max"], color=colour, alpha=0.2, linewidth=0)
        side.set_xscale("log")
        side.set_xticks(100 * records.fraction.unique(), [f"{100 * f:g}" for f in records.fraction.unique()])
        side.minorticks_off()
        side.set(xlabel="images of each class (%)", ylabel=name)
    axes[0].legend()
    plt.close(figure)  # shown once, by the caller
    return figure


def scaling_fits(fits: pd.DataFrame) -> Figure:
    """Seconds and memory of each case, ours and the others; ``fits`` of :func:`kmex_utils.scaling.compare_fits`."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 0.5 * len(fits) + 1.2), sharey=True)
    looks = {"ours": "o", "sklearn": "s", "faiss": "D", "minibatch": "^"}
    names = {
        "ours": "this engine",
        "sklearn": "scikit-learn",
        "faiss": "faiss",
        "minibatch": "scikit-learn, mini-batch",
    }
    place = np.arange(len(fits))[::-1]
    for colour, (method, marker) in zip(palette(4), looks.items(), strict=True):
        for side, unit in zip(axes, ("s", "mib"), strict=True):
            if f"{method}_{unit}" in fits:
                side.plot(fits[f"{method}_{unit}"], place, marker, color=colour, label=names[method])
    for side, name in zip(axes, ("seconds", "peak memory beyond the activations (MiB)"), strict=True):
        side.set_xscale("log")
        side.set_xlabel(name)
        side.grid(axis="y", alpha=0.3)
    axes[0].set_yticks(place, fits.case)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    plt.close(figure)  # shown once, by the caller
    return figure


def scaling_explanations(explained: pd.DataFrame) -> Figure:
    """Time per image over a forward pass; ``explained`` of :func:`kmex_utils.scaling.compare_explanations`."""
    some = explained[explained.method != "forward"]
    figure, side = plt.subplots(figsize=(6.4, 2.2))
    bars = side.barh(some.method, some.over_forward, color=[palette(2)[0 if m == "ours" else 1] for m in some.method])
    side.bar_label(bars, [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in some.over_forward], padding=3)
    side.set(xscale="log", xlabel="time, in forward passes")
    side.margins(x=0.15)
    side.invert_yaxis()
    plt.close(figure)  # shown once, by the caller
    return figure


DEPTHS = ("B4", "B34", "B234", "B1234")  # their colours and markers, the same in every figure


def _of_depth(model: str) -> dict:
    return dict(zip(("color", "marker"), (palette(10)[DEPTHS.index(model)], "osD^"[DEPTHS.index(model)]), strict=True))


def ledger(changes: pd.DataFrame) -> Figure:
    """Change of test accuracy under each option, a mark per seed; ``changes`` of :func:`kmex_utils.studies.changes`."""
    some = changes.query("metric == 'accuracy' and split == 'test'")
    some = some[some.model.isin(DEPTHS)]
    options = list(dict.fromkeys(zip(some.question, some.option, strict=True)))
    models = [model for model in DEPTHS if model in set(some.model)]
    figure, side = plt.subplots(figsize=(7.2, 0.42 * len(options) + 1.1))
    for i, model in enumerate(models):
        mine = some[some.model == model]
        aside = 0.22 * (i - (len(models) - 1) / 2)
        place = [-options.index(key) - aside for key in zip(mine.question, mine.option, strict=True)]
        side.plot(mine.change, place, linestyle="", markersize=5, alpha=0.85, label=model, **_of_depth(model))
    side.axvline(0, color="0.6", linewidth=0.8, zorder=0)
    side.set_yticks([-i for i in range(len(options))], [f"{question}: {option}" for question, option in options])
    side.set(xlabel="change of test accuracy (points), one mark per seed")
    side.grid(axis="y", alpha=0.3)
    side.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)  # shown once, by the caller
    return figure


def depth_study(records: pd.DataFrame) -> Figure:
    """Test accuracy against K/C for each start block, a panel per scale; ``records`` of notebook 14."""
    some = records.query("metric == 'accuracy' and split == 'test'")
    scales = [scale for scale in dict.fromkeys(some.scale) if scale]
    figure, axes = plt.subplots(1, len(scales), figsize=(4.2 * len(scales) + 1, 3.2), sharey=True, squeeze=False)
    for side, scale in zip(axes[0], scales, strict=True):
        for model, mine in some.groupby("model", sort=False):
            one_scale = model in ("KMEx", "CNN", "B4")
            mine = mine if one_scale else mine[mine.scale == scale]
            found = mine.groupby("per_class")["value"].agg(["mean", "min", "max"])
            if model == "CNN":
                side.axhline(found["mean"].iloc[0], color="0.3", linestyle="--", linewidth=1.2, label="CNN")
                continue
            look = _of_depth(model) if model in DEPTHS else {"color": "0.5", "marker": "P"}
            side.plot(found.index, found["mean"], markersize=4, label=model, **look)
            side.fill_between(found.index, found["min"], found["max"], color=look["color"], alpha=0.2, linewidth=0)
        side.set_xscale("log")
        ticks = sorted(k for k in some.per_class.unique() if k)
        side.set_xticks(ticks, [f"{k:g}" for k in ticks])
        side.minorticks_off()
        names = {"1/D": "factor $1/D_b$ (as printed)", "1/sqrt(D)": "factor $1/\\sqrt{D_b}$", "1": "equal weights"}
        side.set(xlabel="prototypes per class, K/C", title=names.get(scale, scale))
    axes[0, 0].set_ylabel("test accuracy (%)")
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)  # shown once, by the caller
    return figure


def weightings(found: pd.DataFrame, printed: float) -> Figure:
    """What B234 loses against the share of its deepest block; ``found`` of :func:`kmex_utils.reproduction.weightings`.

    ``printed`` is that share in the paper's network with the factor as printed: where its own numbers stand, hollow.
    """
    figure, side = plt.subplots(figsize=(6.4, 3.4))
    names = sorted(set(found.dataset))
    networks = list(dict.fromkeys(found.network))
    for (network, dataset), mine in found.groupby(["network", "dataset"], sort=False):
        mine = mine.sort_values("last_share")
        look = {"color": palette(max(3, len(names)))[names.index(dataset)], "marker": "osD^"[networks.index(network)]}
        side.errorbar(
            mine.last_share, mine["mean"], mine["std"].fillna(0), **look, markersize=5, capsize=2,
            linestyle=["-", "--", ":", "-."][networks.index(network)], label=f"{dataset}, {network.split('/')[-1]}",
        )  # fmt: skip
    for dataset, paper in found.dropna(subset="paper").groupby("dataset", sort=False)["paper"].first().items():
        colour = palette(max(3, len(names)))[names.index(dataset)]
        side.plot(
            printed, paper, "*", markersize=11, markerfacecolor="none", color=colour, label=f"{dataset}, the paper"
        )
    side.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    side.set(xscale="log", xlabel="nominal share of B4 in the squared distance", ylabel="points B234 loses to the CNN")
    side.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    side.xaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    side.minorticks_off()
    side.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)  # shown once, by the caller
    return figure


def training_curves(curves: pd.DataFrame) -> Figure:
    """Loss and running accuracy of every epoch, a panel pair per data set and a line per seed."""
    names = list(dict.fromkeys(curves.dataset))
    figure, axes = plt.subplots(2, len(names), figsize=(3.0 * len(names) + 0.6, 3.6), squeeze=False, sharex="col")
    for (above, below), dataset in zip(axes.T, names, strict=True):
        for seed, mine in curves[curves.dataset == dataset].groupby("seed"):
            above.plot(mine.epoch, mine.loss, marker=".", color=palette(10)[seed % 10], label=f"seed {seed}")
            below.plot(mine.epoch, mine.accuracy, marker=".", color=palette(10)[seed % 10])
        above.set_title(dataset)
        above.set_yscale("log")
        below.set_xlabel("epoch")
        below.xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("running accuracy (%)")
    lines = {line.get_label(): line for side in axes[0] for line in side.lines}
    figure.legend([lines[name] for name in sorted(lines)], sorted(lines), loc="outside right center")
    plt.close(figure)  # shown once, by the caller
    return figure
