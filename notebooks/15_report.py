# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: kernelspec,jupytext,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 15. The reproduction report
#
# Every number of the paper's Tables 1 and 2 beside ours, what of its findings holds, what each open choice is worth,
# and what it cost. It only puts together what the notebooks before have saved. The page for readers is
# [report.md](../figures/report/report.md); others are of [a ResNet](../figures/resnet/report/report.md) and
# [an EfficientNet](../figures/efficientnet/report/report.md) with ImageNet weights.

# %% tags=["parameters"]
# What the workflow sets
datasets: list[str] = ["mnist-mini"]  # data sets whose notebooks have run
config: str = ""  # the configuration of the runs, e.g. config/scratch.yaml; printed
studies: list[str] = []  # folders with fidelity and section 5, e.g. frozen/cub200
name: str = "report"  # the report goes to <figures_folder>/<name>/
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # where tables and figures of the data sets are
# What you may change
beside: str = ""  # a report to draw weightings of beside, e.g. figures/report

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils import paths

made_by = paths.resolve(config)
if config and not made_by.is_file():
    raise FileNotFoundError(
        f"{made_by} does not exist: give the configuration that made the runs, or none"
    )
folder = paths.resolve(figures_folder)
for path in (
    folder / dataset / f"table{i}.csv" for dataset in datasets for i in (1, 2)
):
    if not path.exists():
        of = path.parent.name
        missing = f"{path} does not exist: run notebooks"
        raise FileNotFoundError(f"{missing} 06_alignment and 07_accuracy for {of}")

# %% [markdown]
# ## What was run
#
# Of data sets whose runs are no longer here, the report's own tables tell.

# %%
from kmex_utils.paper import report

trained, curves = report.trainings(runs, datasets)
earlier = {
    stem: folder / name / f"{stem}.csv"
    for stem in ("trained", "curves", "cost", "disk")
}
trained = report.with_earlier(trained, earlier["trained"], datasets, "01_train")
curves = report.with_earlier(curves, earlier["curves"], datasets)
trained

# %% [markdown]
# One line a training: read `weights` and `epochs` before any comparison with the paper, whose network was pretrained on
# ImageNet.
#
# Training curves, a column for each data set and a line for each seed: loss and running accuracy on augmented training
# images.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils import drawing

plt.style.use(drawing.STYLE)
names = list(dict.fromkeys(curves.dataset))
figure, panels = plt.subplots(
    2, len(names), figsize=(3.0 * len(names) + 0.6, 3.6), squeeze=False, sharex="col"
)
for (above, below), dataset in zip(panels.T, names, strict=True):
    for seed, curve in curves[curves.dataset == dataset].groupby("seed"):
        look = {
            "marker": ".",
            "color": drawing.palette(10)[seed % 10],
            "label": f"seed {seed}",
        }
        above.plot(curve.epoch, curve.loss, **look)
        below.plot(curve.epoch, curve.accuracy, **look)
    above.set(title=dataset, yscale="log")
    below.set_xlabel("epoch")
    below.xaxis.get_major_locator().set_params(integer=True)
panels[0, 0].set_ylabel("loss")
panels[1, 0].set_ylabel("running accuracy (%)")
lines = {line.get_label(): line for axes in panels[0] for line in axes.lines}
figure.legend(
    [lines[label] for label in sorted(lines)], sorted(lines), loc="outside right center"
)
drawing.save(figure, folder / name / "curves")

# %% [markdown]
# A curve that still falls at its end is of a network that could learn more; its accuracy is then a lower bound.

# %% [markdown]
# ## Does what the paper finds hold?
#
# Each finding as a number, with the criterion that makes it hold; `holds_in` counts the seeds.

# %%
import pandas as pd

from kmex_utils.paper import claims

k_over_c = {d: report.own_prototypes_per_class(runs, d) for d in datasets}
records = {
    d: pd.concat([pd.read_csv(folder / d / f"table{i}-seeds.csv") for i in (1, 2)])
    for d in datasets
}
relations = [claims.check_relations(records[d], d, k_over_c[d]) for d in datasets]
checks = {
    "fidelity-differences": claims.check_fidelity,
    "section5": claims.check_section5,
}
for stem, check in checks.items():  # of notebooks 16 and 18, where they have run
    tables = {d: folder / d / f"{stem}.csv" for d in [*datasets, *studies]}
    relations += [
        check(pd.read_csv(path), d) for d, path in tables.items() if path.exists()
    ]
relations = pd.concat(relations, ignore_index=True)
relations.round(2)

# %% [markdown]
# On the embedded digits the findings about KMEx, B4, B234 and the columns hold in both seeds. Two about ProtoPNet hang
# by little: it comes within a fraction of a point of the CNN, and its cosines in and out of class are about a tenth
# apart.

# %% [markdown]
# ## Every number
#
# With $s$ the standard deviation over our $n$ seeds, the difference of two means has the 95 % margin
# $t\, s \sqrt{1/n + 1/5}$, plus rounding, if the paper's five seeds spread as ours do. `outside` marks differences
# beyond `margin` and is empty where one seed has no spread.

# %%
tables = {}
for table in ("table1", "table2"):
    compared = [
        claims.compare(pd.read_csv(folder / d / f"{table}.csv")) for d in datasets
    ]
    tables[table] = pd.concat(compared, ignore_index=True)
tables["table1"].round(2)

# %%
tables["table2"].round(1)

# %% [markdown]
# With two seeds the margin is wide, and the networks and images are not the paper's. So the relations above are what
# can be compared, these numbers less so. Most of *difference* is the network's own, as the CNN's rows show: it recurs
# in the rows of the explainers.

# %% [markdown]
# ## The price of each reading
#
# What B4 and B234 lose to the CNN on test images, in the paper and under each reading of what it leaves open. Where
# [notebook 13](13_open_choices.ipynb) has not run, [notebook 14](14_depth.ipynb) tells of the factor, if it was given
# the printed one and equal weights.

# %%
from kmex_utils.paper import ledger

read = {
    path.parent.name: pd.read_csv(path)
    for d in datasets
    for path in (folder / d).glob("ledger.csv")
}
depths = {
    path.parent.name: pd.read_csv(path)
    for d in datasets
    for path in (folder / d).glob("depth.csv")
}
scales = {d: ledger.ledger_of_depth(depth, k_over_c[d]) for d, depth in depths.items()}
ledgers = {
    d: scale for d, scale in scales.items() if {"", "1"} <= {*scale.option}
} | read
prices = [ledger.prices(ledgers[d], records[d], d) for d in datasets if d in ledgers]
prices = pd.concat(prices, ignore_index=True) if prices else pd.DataFrame()
prices.round(2)

# %% [markdown]
# B4's loss is the same under every factor. B234's is largest with the printed one and nearly B4's with equal weights.
#
# What else notebook 13 has switched: pairs of Table 1, the start of the attribution, whole trainings.

# %%
effects = [ledger.effects(table, d) for d, table in read.items()]
effects = pd.concat(effects, ignore_index=True) if effects else pd.DataFrame()
effects.round(2)

# %% [markdown]
# With $1/D_b$ the shallowest block carries most of the distance, the more so the more channels grow with depth. This is
# the share that each factor leaves to $B4$, in the networks here and in those of `beside`.

# %%
networks = trained.groupby("dataset")["network"].first()
weighted = ledger.weightings(prices, networks) if len(prices) else pd.DataFrame()
drawn = (
    pd.concat([weighted, pd.read_csv(paths.resolve(beside) / "weighting.csv")])
    if beside
    else weighted
)
drawn.round(3)

# %% [markdown]
# The loss of B234 against that share: the less $B4$ counts, the more is lost. Hollow: the paper's own loss, if its
# factor is as printed.

# %% tags=["hide-input"]
from matplotlib.ticker import LogLocator

if len(weighted):
    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    colours = dict(zip(sorted({*drawn.dataset}), drawing.palette(10), strict=False))
    looks = dict(zip(drawn.network.unique(), ("o-", "s--", "D:", "^-."), strict=False))
    for (network, dataset), lost in drawn.groupby(["network", "dataset"], sort=False):
        lost = lost.sort_values("last_share")
        label = f"{dataset}, {network.split('/')[-1]}"
        look = {
            "fmt": looks[network],
            "color": colours[dataset],
            "markersize": 5,
            "capsize": 2,
        }
        axes.errorbar(
            lost.last_share, lost["mean"], lost["std"].fillna(0), label=label, **look
        )
    for dataset, paper in (
        drawn.dropna(subset="paper")
        .groupby("dataset", sort=False)["paper"]
        .first()
        .items()
    ):
        look = {"markersize": 11, "markerfacecolor": "none", "color": colours[dataset]}
        axes.plot(
            ledger.last_share("resnet34", "1/D"),
            paper,
            "*",
            label=f"{dataset}, the paper",
            **look,
        )
    axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes.set(
        xscale="log",
        xlabel="nominal share of B4 in the squared distance",
        ylabel="points B234 loses to the CNN",
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    axes.minorticks_off()
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    drawing.save(figure, folder / name / "weighting")

# %% [markdown]
# The lines fall to the right in every network: the more the last block weighs, the less is lost. So it is the share,
# not the network, that sets the price; the EfficientNet's printed factor leaves its last block a thousandth.

# %% [markdown]
# ## Hours and bytes
#
# As the batch noted them for each notebook, and what the runs take on disk (in the page).

# %%
cost = report.with_earlier(report.costs(runs, datasets), earlier["cost"], datasets)
disk = report.with_earlier(report.disk(runs, datasets), earlier["disk"], datasets)
cost.pivot_table(index="notebook", columns="dataset", values="minutes").round(1) if len(
    cost
) else cost

# %% [markdown]
# Of notebooks 1 to 9 the training of the network ([1](01_train.ipynb)) takes most of the time, then come the baseline
# ([5](05_protopnet.ipynb)) and the clusterings of the encoder ([4](04_encoder.ipynb)). A study of many fits, as
# [14](14_depth.ipynb), takes as long again. Without a batch nothing was noted, and the table is empty.

# %% [markdown]
# ## Beside others' networks from scratch
#
# A sanity check of the training: test accuracies that others report for networks trained from scratch on the same data.

# %%
others = report.beside_others(records, trained)
others

# %% [markdown]
# Where ours is close to others' of the same epochs, the training is sound, and what is missing to the paper's numbers
# are its ImageNet weights.

# %% [markdown]
# ## The page
#
# Its text is a template, `kmex_utils/paper/report.md.j2`; the tables behind it are saved beside it.

# %%
from IPython.display import Markdown

from kmex_utils.store import save_text

parts = {
    "trained": trained,
    "relations": relations,
    **tables,
    "prices": prices,
    "effects": effects,
}
parts |= {"cost": cost, "disk": disk}
for stem, part in {**parts, "curves": curves, "weighting": weighted}.items():
    save_text(
        folder / name / f"{stem}.csv", part.to_csv(index=False, float_format="%.6g")
    )
made_by = made_by.read_text() if config else ""
page = report.page({**parts, "others": others}, folder, datasets, made_by, name)
Markdown(page)
