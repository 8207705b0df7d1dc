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
# # 19. How sure is a map?
#
# $k$-means starts from random rows, so another seed gives other prototypes and another map. Here the same network is
# clustered again and again from the same images. Prototypes $p'$ of each refit are paired with those of the first fit,
# one to one within each class, by the permutation
#
# $$\pi = \arg\min_\pi \sum_k \lVert p_k - p'_{\pi(k)}\rVert ,$$
#
# in code `refitted` in [refits.py](../kmex_utils/explanation/refits.py). Then each position of the test images is
# asked:
#
# - **prototype**, **class**: in which share of the refits does it keep its prototype, or one of the same class?
# - **adjusted Rand**: are both maps the same partition (1), or as alike as by chance (0), whatever its numbers?
# - **prediction**: in which share of the refits does the class of eq. 10 stay?
#
# Two controls stand beside every number. *Shuffled*: the positions of each refit's map are shuffled within its image
# (for the prediction, which does not see positions, the images). *Random rows*: prototypes that were never clustered,
# random training rows of each class, treated the same way.

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
start_blocks: list[int] = [4, 3, 2]  # 4: B4, 3: B34, 2: B234, 1: B1234
prototypes_per_class: int = 0  # K/C; 0: the data set's own
refits: int = 5  # from other seeds, beside the first fit
restarts: int = 3  # of k-means in each fit; more of them make refits more alike
fit_on: int = 50  # the first so many images of each class, either split; 0: all
shown: int = 4  # test images drawn, each the first of its class
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import hardware, parameters
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.explainers import block_names
from kmex_utils.paper.runs import Run, trained_seeds

settings = parameters.check(globals())
if refits < 2:
    raise ValueError(f"refits must be at least 2, which have a spread, got {refits}")
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
seeds = seeds or trained_seeds(runs, dataset)
names = block_names(start_blocks, Run.of(runs, dataset, seeds[0]).blocks, last=True)
last = max(start_blocks)
readings = [(b, scale) for b in names for scale in (scales if b < last else scales[:1])]

# %% [markdown]
# ## The images
#
# Those that a training used, or the first of each class alone: `run.dataset(fit_on)`.

# %% [markdown]
# ## One explainer, refitted
#
# The fit from the training's own seed comes first, then those from the seeds after it, their prototypes renumbered.

# %% tags=["hide-input"]
import torch

from kmex_utils.evaluation.certainty import agreement, records
from kmex_utils.explanation.refits import refitted


def fitted(passed, b, scale, k, seed, **options):
    """The explainer, its test maps [N, H, W] and those of its refits [n, N, H, W]."""
    explainer = passed.fit_encoder(
        b, Normalisation(scale=scale), k, seed=seed, **options
    )
    others = refitted(passed, explainer, refits, seed=seed, **options)
    return (
        explainer,
        passed.map(explainer, "test"),
        torch.stack([passed.map(other, "test") for other in others]),
    )


# %% [markdown]
# Each measure with its spread over refits and over images, and both controls.


# %% tags=["hide-input"]
def records_of(passed, b, scale, k, seed):
    """A record for each measure, and the maps."""
    explainer, q_s, others = fitted(passed, b, scale, k, seed, restarts=restarts)
    random_rows = agreement(
        *fitted(passed, b, scale, k, seed, start="random", restarts=1, max_iterations=0)
    )
    of = {
        "model": names[b],
        "scale": scale if b < last else "",
        "prototypes_per_class": k,
    }
    of |= {"seed": seed, "refits": refits, "grid": "x".join(map(str, q_s.shape[1:]))}
    found = records(explainer, q_s, others, seed)
    return [
        {**of, **r, "random_rows": random_rows[r["measure"]].mean()} for r in found
    ], (q_s, others)


# %% [markdown]
# ## The study
#
# One pass through each network. The maps of the first training are kept for the picture.

# %%
import pandas as pd

from kmex_utils.explanation.passed import Passed

rows, maps = [], {}
for run in [Run.of(runs, dataset, seed) for seed in seeds]:
    images = run.dataset(fit_on)
    k = prototypes_per_class or run.settings()["prototypes_per_class"]
    where = {"store": "auto", "folder": run.folder, "device": device}
    passed = Passed.of(run.network(), images, min(names), **where)
    for b, scale in readings:
        found, of_reading = records_of(passed, b, scale, k, run.seed)
        rows += found
        if run.seed == seeds[0]:
            pictured, maps[b, scale] = images.test, of_reading

# %% [markdown]
# ## The table
#
# Means over trainings. A map is as sure as its value lies above both controls: shuffling shows what the choice of
# prototypes alone would give, random rows what the network's own classes give without any clustering.

# %%
from kmex_utils import drawing, paths
from kmex_utils.store import save_text

numbers = ["value", "spread", "spread_images", "null", "random_rows"]
keys = [
    "model",
    "scale",
    "prototypes_per_class",
    "measure",
    *numbers[:3],
    "seed",
    "refits",
    "grid",
    *numbers[3:],
]
table = pd.DataFrame(rows)[keys].astype(dict.fromkeys(numbers, float))
folder = paths.resolve(figures_folder) / dataset
save_text(folder / "certainty.csv", table.to_csv(index=False, float_format="%.6g"))
table.groupby(["model", "scale", "measure"], sort=False)[numbers].mean().round(3)

# %% [markdown]
# Positions keep their prototype far more often than under both controls, so maps are no accident of a seed. But they
# differ. On the digits B4 keeps nearly nine positions in ten, B34 and B234 with the printed factor about six. With
# equal weights they keep eight to nine. `class` is hardly above *shuffled* where one class fills the map: shuffling its
# positions changes nothing there.
#
# The same as a picture: a mark for each training, its spread over refits as a bar.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils.paper.figures import look

plt.style.use(drawing.STYLE)
measures = {
    "prototype": "keeps prototype",
    "class": "keeps class",
    "adjusted_rand": "adjusted Rand",
}
measures |= {"prediction": "keeps prediction"}
labels_of = [f"{names[b]}, {scale}" if b < last else names[b] for b, scale in readings]
figure, panels = plt.subplots(
    1, len(measures), figsize=(9.6, 0.32 * len(labels_of) + 1.2), sharey=True
)
for axes, (measure, title) in zip(panels, measures.items(), strict=True):
    for i, (b, scale) in enumerate(readings):
        chosen = table[
            (table.model == names[b])
            & table.scale.isin([scale, ""])
            & (table.measure == measure)
        ]
        height = [-i] * len(chosen)
        for control, marker, name in (
            ("random_rows", "x", "random rows"),
            ("null", "|", "shuffled"),
        ):
            axes.plot(
                chosen[control],
                height,
                linestyle="",
                marker=marker,
                color="0.5",
                label=name,
            )
        axes.errorbar(
            chosen.value,
            height,
            xerr=chosen.spread,
            linestyle="",
            **look(names[b]),
            markersize=5,
        )
    axes.set(
        title=title,
        xlim=(-0.05, 1.05),
        yticks=[-i for i in range(len(labels_of))],
        yticklabels=labels_of,
    )
    axes.grid(axis="y", alpha=0.3)
handles, controls = axes.get_legend_handles_labels()
figure.legend(handles[:2], controls[:2], loc="outside lower center", ncols=2)
drawing.save(figure, folder / "certainty")

# %% [markdown]
# Where classes lie apart, as trained digits do in the last block and with equal weights, a position that changes its
# prototype keeps its class. With the printed factor B234 changes both: its prototypes are small strokes that classes
# share. Predictions stay all the same, as they count many positions. Birds in a frozen network are less sure: a refit
# keeps about half of the positions, and a quarter to a third of the predictions change
# ([table](../figures/resnet/frozen/cub200/certainty.csv)).

# %% [markdown]
# ## A map of certainty
#
# Beside each explanation map, in how many refits each position keeps its prototype. A segment that is dark came out of
# one start of $k$-means; another would have drawn it elsewhere.

# %% tags=["hide-input"]
labels = pictured.labels
pictures = [int((labels == c).nonzero()[0]) for c in labels.unique().tolist()][:shown]
size = (1.15 * (1 + 2 * len(readings)) + 0.6, 1.15 * len(pictures) + 0.5)
figure, grid = plt.subplots(
    len(pictures), 1 + 2 * len(readings), figsize=size, squeeze=False
)
for row, i in zip(grid, pictures, strict=True):
    row[0].imshow(pictured.rgb(i))
    row[0].set_title(drawing.short(images.classes[labels[i]]), fontsize=8)
    for (q_s, others), left, right in zip(
        maps.values(), row[1::2], row[2::2], strict=True
    ):
        left.imshow(drawing.coloured(q_s[i].numpy()))
        kept = right.imshow(
            (others[:, i] == q_s[i]).float().mean(0), cmap="cividis", vmin=0, vmax=1
        )
for left, right, label in zip(grid[0, 1::2], grid[0, 2::2], labels_of, strict=True):
    left.set_title(label)
    right.set_title("certainty")
for axes in grid.flat:
    axes.set_axis_off()
figure.colorbar(
    kept, ax=grid, shrink=min(1.0, 2 / len(pictures)), pad=0.01, label="share of refits"
)
drawing.save(figure, folder / "certainty-maps")

# %% [markdown]
# With equal weights the dark positions lie between segments, where two prototypes are about equally close; the insides
# are bright. With the printed factor whole parts of B234's maps are dark. So read the inside of a segment and distrust
# its border. To see this of your own images, `explained.certainty()` adds it to every panel ([notebook
# 12](12_your_own_model.ipynb)).
