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
# # 10. How many images do the prototypes need?
#
# The paper names the cost of $k$-means as its main limitation and mentions that *performance remains stable on
# subsets of the training data*. This notebook measures it: fit on a fraction of each class, then ask three questions of
# all training and test images.
#
# - **accuracy** of the prediction on the test images;
# - **inertia** on *all* training rows, $\sum_j \sum_{x \in X_j} \min_{k \in j} \lVert x - p_k\rVert^2$, relative to
#   that of prototypes fitted on all of them;
# - **agreement**: do training positions share a prototype under the one fit exactly when they do under the other? This
#   is the adjusted Rand index, 1 for the same partition and 0 for chance.
#
# In code these are `accuracy`, `total_inertia` and `adjusted_rand_score`. At fraction 1 the draws differ by the seed of
# $k$-means only, which shows how far two fits of the *same* data agree.

# %% tags=["parameters"]
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # output goes to <figures_folder>/<dataset>/
# What you may change
fractions: list[float] = [0.05, 0.1, 0.25, 0.5, 1.0]  # of a class's training images
draws: int = 3  # of images, for each fraction
start_blocks: list[int] = [4, 2]  # 4: B4, 3: B34, 2: B234, 1: B1234, beside KMEx
prototypes_per_class: int = 0  # K/C; 0: the data set's own
restarts: int = 10  # of k-means; the best is kept
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import hardware, parameters
from kmex_utils.method.explainers import block_names

settings = parameters.check(globals())
if not all(0 < fraction <= 1 for fraction in fractions):
    raise ValueError(f"fractions must lie in (0, 1], got {fractions}")
if draws < 1:
    raise ValueError(f"draws must be at least 1, got {draws}")
device, threads = hardware.pick_device(device), hardware.set_threads(threads)

# %% [markdown]
# ## Drawing and fitting
#
# Each draw takes the same fraction of every class, and at least as many images as $K/C$.

# %% tags=["hide-input"]
import torch


def draw(labels, classes, fraction, at_least, seed):
    """A random fraction of the images of each class, as an ascending index [n]."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for c in range(classes):
        index = (labels == c).nonzero().flatten()
        count = min(len(index), max(at_least, round(fraction * len(index))))
        parts.append(index[torch.randperm(len(index), generator=generator)[:count]])
    return torch.cat(parts).sort().values


# %% [markdown]
# A part is clustered as the whole is. The start block says which explainer: 4 is B4; 0 stands for KMEx.

# %% tags=["hide-input"]
from kmex_utils.method.composite import Normalisation


def fit(passed, b, k, seed, index=None):
    """An explainer with K/C = k from all training images, or from those of an index."""
    if b:
        return passed.fit_encoder(
            b, Normalisation(), k, seed=seed, restarts=restarts, index=index
        )
    return passed.fit_kmex(k, seed=seed, restarts=restarts, index=index)


# %% [markdown]
# ## The questions
#
# What an explainer says of a split: the prototype of every embedding (KMEx) or position, and the predicted classes.


# %% tags=["hide-input"]
def explained(passed, explainer, b, split):
    if b:
        q_s = passed.map(explainer, split)
        return q_s.flatten(), explainer.proj(q_s).argmax(1)
    z = passed.z(split)
    return explainer.nearest(z), explainer.predict(z)


# %% [markdown]
# Inertia: the squared distances of *all* training rows to the nearest prototype of their class, summed.

# %% tags=["hide-input"]
from kmex_utils.method.kmeans import DenseRows, inertia


def total_inertia(passed, explainer, b):
    total = 0.0
    for c, p in enumerate(
        explainer.prototypes.vectors.unflatten(0, (explainer.classes, -1))
    ):
        index = (passed.labels["train"] == c).nonzero().flatten()
        rows = (
            passed.rows(index, b, Normalisation())
            if b
            else DenseRows(passed.z("train", index))
        )
        total += inertia(rows, p)
    return total


# %% [markdown]
# One explainer from all images, then one from each draw, put to the questions. Seconds are those of clustering.

# %%
import time

from sklearn.metrics import adjusted_rand_score

from kmex_utils.method.measures import accuracy


def study(passed, b, k, seed):
    whole = fit(passed, b, k, seed)
    all_inertia = total_inertia(passed, whole, b)
    partition = explained(passed, whole, b, "train")[0]
    for fraction, i in ((fraction, i) for fraction in fractions for i in range(draws)):
        index = draw(
            passed.labels["train"], whole.classes, fraction, k, seed=1000 * seed + i
        )
        start = time.perf_counter()
        part = fit(passed, b, k, seed + 101 * (i + 1), index)
        seconds = time.perf_counter() - start
        row = {"fraction": fraction, "seed": seed, "draw": i, "images": len(index)}
        row["accuracy"] = accuracy(
            explained(passed, part, b, "test")[1], passed.labels["test"]
        )
        row["inertia"] = total_inertia(passed, part, b) / all_inertia
        row["agreement"] = adjusted_rand_score(
            partition, explained(passed, part, b, "train")[0]
        )
        yield {**row, "seconds": seconds}


# %% [markdown]
# ## The study
#
# One pass through each network, which is then clustered again and again.

# %%
import pandas as pd

from kmex_utils.explanation.passed import Passed
from kmex_utils.paper.runs import Run, trained_seeds

rows = []
for seed in seeds or trained_seeds(runs, dataset):
    run = Run.of(runs, dataset, seed)
    network = run.network()
    k = prototypes_per_class or run.settings()["prototypes_per_class"]
    blocks = len(network.blocks)
    names = {0: "KMEx"} | block_names(start_blocks, blocks)
    passed = Passed.of(network, run.dataset(), min(start_blocks), device=device)
    for b, model in names.items():
        rows += [{"model": model, **row} for row in study(passed, b, k, seed)]
records = pd.DataFrame(rows)

# %% [markdown]
# Mean and standard deviation over trainings and draws:

# %%
columns = ["accuracy", "inertia", "agreement", "seconds"]
records.groupby(["model", "fraction"], sort=False)[columns].agg(["mean", "std"]).round(
    3
)

# %% [markdown]
# Accuracy hardly falls with the fraction: a twentieth of the digits costs B4 nothing and the others about a point. The
# seconds fall with it. So the paper's remark holds, and $k$-means' cost can be had down. Agreement tells another story.

# %% [markdown]
# ## The picture
#
# Lines are means over trainings and draws, bands reach from the lowest to the highest.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils import drawing, paths
from kmex_utils.store import save_text

folder = paths.resolve(figures_folder) / dataset
kept = records.drop(columns="seconds")  # the same whenever it runs
save_text(folder / "subset.csv", kept.to_csv(index=False, float_format="%.6g"))
plt.style.use(drawing.STYLE)
figure, panels = plt.subplots(1, 3, figsize=(9.6, 2.9))
measures = (
    "test accuracy (%)",
    "inertia, relative to all images",
    "agreement with all images (ARI)",
)
for axes, column, measure in zip(panels, columns, measures, strict=False):
    looks = zip(records.model.unique(), drawing.palette(10), "osD^vP", strict=False)
    for model, colour, marker in looks:
        values = (
            records[records.model == model]
            .groupby("fraction")[column]
            .agg(["mean", "min", "max"])
        )
        axes.plot(
            100 * values.index,
            values["mean"],
            marker=marker,
            markersize=4,
            color=colour,
            label=model,
        )
        axes.fill_between(
            100 * values.index,
            values["min"],
            values["max"],
            color=colour,
            alpha=0.2,
            linewidth=0,
        )
    axes.set_xscale("log")
    axes.set_xticks(
        100 * records.fraction.unique(),
        [f"{100 * f:g}" for f in records.fraction.unique()],
    )
    axes.minorticks_off()
    axes.set(xlabel="images of each class (%)", ylabel=measure)
panels[0].legend()
drawing.save(figure, folder / "subset")

# %% [markdown]
# The left panel is flat, the right one is not. B4's partition is nearly the same from any part of the images; KMEx's
# and B234's agree with that of all images by little more than a half where the fraction is small, and not fully where
# it is 1. So prototypes from few images predict as well, but they are other prototypes, as they are from another seed.
# KMEx's inertia rises most: five centroids in 512 dimensions follow the few images they see. How far a single map can
# be relied on is [notebook 19](19_certainty.ipynb).

# %% [markdown]
# ## In one line each

# %%
largest = max(fractions)
for model, values in records.groupby("model", sort=False):
    reached = values.groupby("fraction").accuracy.mean()
    enough = min(
        fraction
        for fraction in fractions
        if reached[largest] - reached[fraction] <= 0.5
    )
    stay = f"{100 * enough:.0f} % of the images stay within 0.5 points"
    print(f"{model}: {stay} of {100 * largest:.0f} %")

# %% [markdown]
# To fit on part of the images is one argument: `fit_on` of `kmex.explain` and of notebooks [13](13_open_choices.ipynb)
# to [19](19_certainty.ipynb). For a figure that others should get again, use all of them.
