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
# # 14. Depth and the number of prototypes
#
# The paper states a trade-off: shallower blocks give finer maps and cost accuracy. Here it is as one figure. It has the
# accuracy of the prediction from prototype counts (eq. 10) against $K/C$, for each start block and for two factors
# $s_b$ of eq. 8,
#
# $$q_h = \mathrm{Concatenate}\Bigl(s_b\,\frac{u^{(b)}}{\lVert u^{(b)}\rVert}\Bigr), \qquad
# s_b = \frac1{D_b} \text{ as printed, or } s_b = 1 ,$$
#
# in code `Normalisation(scale="1/D")` and `Normalisation(scale="1")`. KMEx, which sees the pooled embedding, and the
# CNN stand beside them. If depth itself had a price, it would remain when all blocks weigh the same.

# %% tags=["parameters"]
# What the paper leaves open
scales: list[str] = ["1/D", "1"]  # factors of eq. 8: 1/D, 1/sqrt(D) or 1
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # output goes to <figures_folder>/<dataset>/
# What you may change
start_blocks: list[int] = [4, 3, 2, 1]  # 4: B4, 3: B34, 2: B234, 1: B1234
prototypes_per_class: list[int] = [1, 2, 5, 10, 20]  # K/C, each
fit_on: int = 100  # images of each class to fit on, the first ones; 0: all
restarts: int = 3  # of k-means; the best is kept
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import hardware, parameters
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.explainers import block_names
from kmex_utils.paper.runs import Run, trained_seeds

settings = parameters.check(globals())
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
readings = {scale: Normalisation(scale=scale) for scale in scales}
seeds = seeds or trained_seeds(runs, dataset)
names = block_names(start_blocks, Run.of(runs, dataset, seeds[0]).blocks, last=True)

# %% [markdown]
# ## One number of prototypes
#
# KMEx and each start block with the same $K/C$, from the same images. One block alone has one scale.

# %% tags=["hide-input"]
import time

from kmex_utils.method.measures import accuracy


def fits(passed, k, seed, index):
    options = {"seed": seed, "restarts": restarts, "index": index}
    start = time.perf_counter()
    kmex = passed.fit_kmex(k, **options)
    seconds = time.perf_counter() - start
    yield (
        "KMEx",
        "",
        "accuracy",
        accuracy(kmex.predict(passed.z("test")), passed.labels["test"]),
        seconds,
    )
    for b in start_blocks:
        for scale in scales if b < max(start_blocks) else scales[:1]:
            start = time.perf_counter()
            explainer = passed.fit_encoder(b, readings[scale], k, **options)
            seconds = time.perf_counter() - start
            for metric, _, value in passed.accuracies(explainer, ["test"]):
                yield names[b], scale, metric, value, seconds


# %% [markdown]
# ## The fits
#
# One pass through each network; where a class cannot fill the largest $K/C$, nothing is clustered. The CNN's own
# accuracy comes from its training.

# %%
import pandas as pd

from kmex_utils.explanation.passed import Passed
from kmex_utils.method.prototypes import check_enough

rows = []
for run in [Run.of(runs, dataset, seed) for seed in seeds]:
    passed = Passed.of(run.network(), run.dataset(), min(start_blocks), device=device)
    index = passed.first_of_each_class(fit_on)
    members = [
        index[passed.labels["train"][index] == c] for c in range(len(passed.classes))
    ]
    check_enough(
        members, passed.classes, max(prototypes_per_class), lambda images: images
    )
    for k in prototypes_per_class:
        for model, scale, metric, value, seconds in fits(passed, k, run.seed, index):
            record = {
                "model": model,
                "scale": scale,
                "metric": metric,
                "split": "test",
                "value": value,
            }
            rows.append(
                {
                    **record,
                    "prototypes_per_class": k,
                    "seed": run.seed,
                    "seconds": seconds,
                }
            )
    for result in (
        result
        for result in run.results("train", "01_train")
        if result["split"] == "test"
    ):
        cnn = {
            key: result[key] for key in ("model", "metric", "split", "seed", "value")
        }
        rows.append({**cnn, "scale": "", "prototypes_per_class": 0, "seconds": 0.0})
records = pd.DataFrame(rows)

# %% [markdown]
# Accuracy of both factors side by side; the CNN is in the column of no prototypes.

# %%
shown = records.query("metric == 'accuracy'")
shown.pivot_table(
    index=["scale", "model"], columns="prototypes_per_class", values="value", sort=False
).round(1)

# %% [markdown]
# Read the rows of one factor from top to bottom: with $1/D$ each shallower start block is below the one before it, the
# first block most of all. With equal weights the rows are close. Read a row from left to right: with $1/D$ more
# prototypes give back a part of the loss; with equal weights a few are enough.

# %% [markdown]
# ## The picture
#
# Lines are means over trainings, bands reach from the lowest to the highest. Where the lines of one panel lie together,
# depth is free.

# %% tags=["hide-input"]
from kmex_utils import paths
from kmex_utils.store import save_text

folder = paths.resolve(figures_folder) / dataset
save_text(folder / "depth.csv", records.to_csv(index=False, float_format="%.6g"))
ticks = sorted(prototypes_per_class)
titles = {
    "1/D": "factor $1/D_b$ (as printed)",
    "1/sqrt(D)": "factor $1/\\sqrt{D_b}$",
    "1": "equal weights",
}

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils import drawing
from kmex_utils.paper.figures import look

plt.style.use(drawing.STYLE)
figure, panels = plt.subplots(
    1, len(scales), figsize=(4.2 * len(scales) + 1, 3.2), sharey=True, squeeze=False
)
for axes, scale in zip(panels[0], scales, strict=True):
    for model, values in shown.groupby("model", sort=False):
        values = (
            values if model in ("KMEx", "CNN", "B4") else values[values.scale == scale]
        )
        values = values.groupby("prototypes_per_class")["value"].agg(
            ["mean", "min", "max"]
        )
        if model == "CNN":
            axes.axhline(
                values["mean"].iloc[0],
                color="0.3",
                linestyle="--",
                linewidth=1.2,
                label="CNN",
            )
            continue
        axes.plot(
            values.index, values["mean"], markersize=4, label=model, **look(model)
        )
        band = {"color": look(model)["color"], "alpha": 0.2, "linewidth": 0}
        axes.fill_between(values.index, values["min"], values["max"], **band)
    axes.set(xscale="log", xlabel="prototypes per class, K/C", title=titles[scale])
    axes.set_xticks(ticks, [f"{k:g}" for k in ticks])
    axes.minorticks_off()
panels[0, 0].set_ylabel("test accuracy (%)")
panels[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
drawing.save(figure, folder / "depth")

# %% [markdown]
# On the left the lines fan out, and B1234 is lowest: what decides there are channels of block 1, which see a few
# pixels. On the right they lie together, just below the CNN. So depth is nearly free where the blocks weigh the same;
# the factor has the price. The same on other data: MNIST ([figure](../figures/mnist/depth.png)), STL-10 from scratch
# ([figure](../figures/stl10/depth.png)) and with ImageNet weights ([figure](../figures/efficientnet/stl10/depth.png)).
# There no number of prototypes up to 20 makes up for the printed factor. What depth buys for its price is [notebook
# 16](16_fidelity.ipynb).
