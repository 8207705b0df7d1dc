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
# Prototypes are the class-wise k-means centroids of the *rows* of $q_h$. Every position of an image goes to its closest
# prototype (eq. 9), which gives the explanation map $q_s$; counting the map by class gives the prediction (eq. 10).

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain, and of k-means
start_blocks: list[int] = [4, 3, 2]  # 4: B4, 3: B34, 2: B234, 1: B1234
prototypes_per_class: int = 0  # K/C; 0: the data set's own
norm: str = "position"  # what ||u|| of eq. 8 runs over: position, channel or image
scale: str = "1/D"  # the factor beside it: 1/D, 1/sqrt(D) or 1
align_corners: bool = False  # of the bilinear interpolation of eq. 7
grid: str = "shallowest"  # R' of eq. 7: that of the shallowest or deepest block, or double the shallowest's
restarts: int = 10  # of k-means; the best is kept
store: str = "memory"  # of activations: memory, disk, disk-half (float16) or nowhere (computed anew at each pass)
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where 01_train left its results

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils import hardware
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.explainers import block_name
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
if not start_blocks:
    raise ValueError("start_blocks must name at least one block, as [4, 3, 2]")
names = {b: block_name(b) for b in sorted(start_blocks, reverse=True)}
normalisation = Normalisation(norm, scale, align_corners, grid)
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
images = run.dataset()
explained = run.explained(images)
prototypes_per_class = prototypes_per_class or run.settings()["prototypes_per_class"]

# %% [markdown]
# ## Activations
#
# Of the frozen network, each block at its own resolution. $q_h$ itself is never built: upsampling acts on positions and
# the dot product on channels, so the two commute, as average pool and classifier do in Theorem 1.

# %%
import torch

from kmex_utils.explanation.passed import Passed

passed = Passed.of(explained.network, images, min(names), store=store, folder=run.folder, device=device)
first = passed.x["train"].read(torch.tensor([0]), min(names))
{f"B{b}": f"{u.shape[2]} x {u.shape[3]} positions, {u.shape[1]} channels" for b, u in enumerate(first, min(names))}

# %% [markdown]
# ## Clustering
#
# The prototypes are saved with the training patches nearest to each, so that they explain any image from now on.

# %%
how = {"seed": seed, "restarts": restarts}
maps = {}
for b, name in names.items():
    explainer = passed.fit_encoder(b, normalisation, prototypes_per_class, **how)
    maps[b, "train"] = passed.map(explainer, "train")
    explained.add_encoder(explainer, passed, maps[b, "train"], **how)
    explained.save(run.folder, only=[name])
explained

# %% [markdown]
# ## Accuracy
#
# Eq. 10 can be read in two ways: the class with the most positions (our default), or the class of the single most
# frequent prototype. Both are reported.

# %%
from kmex_utils.explanation.passed import accuracies

results = []
for b, name in names.items():
    maps[b, "test"] = passed.map(explained.explainers[b], "test")
    for split, labels in passed.labels.items():
        of_split = accuracies(explained.explainers[b], maps[b, split], labels, split)
        results += [(name, *numbers) for numbers in of_split]
made_by = {"norm": norm, "scale": scale, "align_corners": align_corners, "grid": grid, "store": store}
made_by |= {"prototypes_per_class": prototypes_per_class, "restarts": restarts, "start_blocks": list(names)}
run.save_results("encoder", results, **made_by)

# %%
import pandas as pd

cnn = [(r["model"], r["metric"], r["split"], r["value"]) for r in run.results("train", "01_train")]
table = pd.DataFrame(cnn + results, columns=["model", "metric", "split", "%"])
table.pivot(index="model", columns=["metric", "split"], values="%").reindex(["CNN", *names.values()]).round(2)

# %% [markdown]
# ## A first look at the maps
#
# The same test images by each explainer; a colour is a class here, for an overview. Notebook 9 shows single prototypes.

# %%
import matplotlib.pyplot as plt

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
        axes[row, column].imshow(colours[explained.explainers[b].prototypes.labels[maps[b, "test"][i]]])
for row, name in enumerate(["image", *names.values()]):
    axes[row, 0].set_ylabel(name)
for panel in axes.flat:
    panel.set(xticks=[], yticks=[])
    panel.spines[:].set_visible(False)
plt.show()
