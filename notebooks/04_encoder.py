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
# # 4. Explain the encoder: B4, B34, B234
#
# KMEx sees an image after pooling, so it cannot say *where*. Section 3.3 moves the prototypes into the encoder. The
# outputs $x^{(b)}$ of the blocks from $b$ on are upsampled to the shallowest one's grid (eq. 7), normalised, scaled and
# concatenated (eq. 8):
#
# $$u^{(b)} = \mathrm{Upsample}(x^{(b)}), \qquad
# q_h = \mathrm{Concatenate}\Bigl(\frac{u^{(b)}}{D_b\,\lVert u^{(b)}\rVert}\Bigr) \in \mathbb R^{R'\times\sum_b D_b}.$$
#
# [composite.py](../kmex_utils/method/composite.py) writes both as they stand, in two lines of a loop over blocks
# (`length` is $\lVert u^{(b)}\rVert$, `factor` is $1/D_b$):
#
# ```python
# u = F.interpolate(x, grid, mode="bilinear", align_corners=align_corners)  # eq. 7
# parts.append(torch.where(length > 0, u / length, 0) * factor)  # eq. 8
# ```
#
# Prototypes are the class-wise $k$-means centroids of the *rows* of $q_h$. Every position goes to its closest prototype
# (eq. 9), which gives the *explanation map* $q_s$. The predicted class is the one with most positions (eq. 10):
#
# $$q_{s,r} = \arg\min_k \lVert q_{h,r} - p_k\rVert, \qquad
# y_j = \mathrm{avg.\,pool}\Bigl(\sum_r q_{s,r};\, K/C\Bigr)_j .$$
#
# In code these are `sim` and `proj` of `EncoderKMeans` in [explainers.py](../kmex_utils/method/explainers.py).
# The name says which blocks take part: B4 is the last alone, B234 the last three.

# %% tags=["parameters"]
# What the paper leaves open
norm: str = "position"  # what ||u|| of eq. 8 runs over: position, channel or image
scale: str = "1/D"  # factor of eq. 8: 1/D, 1/sqrt(D) or 1
align_corners: bool = False  # of the bilinear interpolation of eq. 7
grid: str = "shallowest"  # R' of eq. 7, of the shallowest block, or: deepest, double
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain, and of k-means
threads: int = 0  # CPU threads; 0: as the environment says
shards: int = 1  # gathers what so many shards have made; 1: made here
runs: str = "runs"  # where the earlier notebooks left their results
# What you may change
start_blocks: list[int] = [4, 3, 2]  # 4: B4, 3: B34, 2: B234, 1: B1234
prototypes_per_class: int = 0  # K/C; 0: the data set's own
restarts: int = 10  # of k-means; the best is kept
store: str = "memory"  # of activations, or: disk, disk-half (float16), nowhere
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils import hardware
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.explainers import block_names
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
names = block_names(start_blocks, run.blocks)
normalisation = Normalisation(norm, scale, align_corners, grid)
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
images = run.dataset()
explained = run.explained(images)
prototypes_per_class = prototypes_per_class or run.settings()["prototypes_per_class"]

# %% [markdown]
# ## Activations
#
# Of the frozen network, each block at its own resolution. $q_h$ itself is never built: upsampling acts on positions and
# the dot product on channels, so the two commute, as average pool and classifier do in Theorem 1. What that saves is in
# [notebook 11](11_scaling.ipynb).

# %%
from kmex_utils.explanation.passed import Passed
from kmex_utils.paper.shards import Gathered

where = {"store": store, "folder": run.folder, "device": device}
if shards == 1:
    passed = Passed.of(explained.network, images, min(names), **where)
else:  # the same numbers, from processes of their own
    passed = Gathered(run, images, settings)

first = images.input(images.train.pixels[:1], device)
x = explained.network.eval().to(device).activations(first)
{
    f"B{b}": f"{u.shape[2]} x {u.shape[3]} positions, {u.shape[1]} channels"
    for b, u in enumerate(x, 1)
    if b >= min(names)
}

# %% [markdown]
# The shallowest of these blocks has the most positions and the fewest channels. With rows of unit length, the factor
# $1/D_b$ makes a block's share of the squared distance proportional to $1/D_b^2$: with 128, 256 and 512 channels block
# 2 has 76 % of it, block 3 has 19 % and block 4 has 5 %.

# %% [markdown]
# ## Clustering
#
# One clustering a start block. The prototypes are saved with the training patches nearest to each, so that they explain
# any image from now on.

# %%
how = {"seed": seed, "restarts": restarts}
maps = {}
for b, name in names.items():
    explainer = passed.fit_encoder(b, normalisation, prototypes_per_class, **how)
    maps[b, "train"] = passed.map(explainer, "train")
    nearest = passed.nearest(explainer, maps[b, "train"])
    explained.add_encoder(explainer, nearest, maps[b, "train"], **how)
    explained.save(run.folder, only=[name])
explained

# %% [markdown]
# ## Accuracy
#
# Eq. 10 can be read in two ways: the class with the most positions (`accuracy`, our default), or the class of the
# single most frequent prototype (`accuracy_most_frequent`). Both are reported.

# %% tags=["hide-input"]
from kmex_utils.explanation.passed import accuracies

results = []
for b, name in names.items():
    maps[b, "test"] = passed.map(explained.explainers[b], "test")
    for split, labels in passed.labels.items():
        of_split = accuracies(explained.explainers[b], maps[b, split], labels, split)
        results += [(name, *numbers) for numbers in of_split]
made_by = {
    "norm": norm,
    "scale": scale,
    "align_corners": align_corners,
    "grid": grid,
    "store": store,
}
made_by |= {
    "prototypes_per_class": prototypes_per_class,
    "restarts": restarts,
    "start_blocks": list(names),
}
run.save_results("encoder", results, **made_by)

# %%
import pandas as pd

cnn = [
    (r["model"], r["metric"], r["split"], r["value"])
    for r in run.results("train", "01_train")
]
table = pd.DataFrame(cnn + results, columns=["model", "metric", "split", "%"])
table.pivot(index="model", columns=["metric", "split"], values="%").reindex(
    ["CNN", *names.values()]
).round(2)

# %% [markdown]
# B4 stays within a point of the CNN on the embedded digits, and B34 too. B234 loses two to three points, more with the
# most frequent prototype. The cause is not that shallow features know nothing of the class. It is the factor $1/D_b$ of
# eq. 8: it leaves the last block a twentieth of the squared distance, so the choice of prototype is made by block 2,
# which sees small patches. With equal weights nearly all of the loss goes away:
# [notebook 13](13_open_choices.ipynb) switches each open choice alone, and [notebook 14](14_depth.ipynb) draws accuracy
# against depth under both factors. Here the factor is as printed; `scale="1"` gives equal weights.

# %% [markdown]
# ## A first look at the maps
#
# The same test images by each explainer. A colour is a *class* here, for an overview;
# [notebook 9](09_interpretation.ipynb) shows single prototypes.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import torch

from kmex_utils.drawing import STYLE, palette, short

plt.style.use(STYLE)
labels = passed.labels["test"]
shown = [int((labels == c).nonzero()[0]) for c in labels.unique().tolist()][:10]
colours = torch.tensor(palette(len(images.classes)))
size = (len(shown), 1.1 * (1 + len(names)))
figure, axes = plt.subplots(1 + len(names), len(shown), figsize=size, squeeze=False)
for column, i in enumerate(shown):
    axes[0, column].imshow(images.test.rgb(i))
    axes[0, column].set_title(short(images.classes[labels[i]], 10), fontsize=8)
    for row, b in enumerate(names, 1):
        axes[row, column].imshow(
            colours[explained.explainers[b].prototypes.labels[maps[b, "test"][i]]]
        )
for row, name in enumerate(["image", *names.values()]):
    axes[row, 0].set_ylabel(name)
for panel in axes.flat:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
plt.show()

# %% [markdown]
# B4's maps have one colour almost everywhere: each position votes for the class of the image, since the last block
# already knows it. B234's maps are finer and scattered over many classes, for the same reason that its accuracy is
# lower: with $1/D_b$ a position is compared by the small stroke or the piece of ground that block 2 sees there, and
# digits share those. The class of the image still wins the count, but by less. With equal weights the maps are finer
# *and* of few classes: see the closer look at the end of [notebook 9](09_interpretation.ipynb).
