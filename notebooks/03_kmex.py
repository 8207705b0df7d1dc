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
# # 3. KMEx: explain the classifier
#
# [Notebook 2](02_cnn_as_sem.ipynb) found the columns $c_j$ far from the data. KMEx replaces them by centroids of the
# data (section 3.2; *Gautam et al. 2024*). The network stays as it is.
#
# 1. For each class, $K/C$ prototypes are the centroids of $k$-means on the embeddings $z$ of its training images. They
#    minimise the inertia $\sum_{z \in Z_j} \min_{k \in j} \lVert z - p_k\rVert^2$. In code:
#    `fit_kmex(z, labels, classes, k)`.
# 2. $\mathrm{sim}(z, p_k) = \exp(-\lVert z - p_k\rVert)$, in code `torch.exp(-distances)`.
# 3. proj returns the class of the most similar prototype, in code `one_hot(labels[similarity.argmax(1)])`.
#
# The exponential is monotone, so this is the class of the nearest centroid. The code is `KMEx` in
# [explainers.py](../kmex_utils/method/explainers.py).

# %% tags=["parameters"]
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain, and of k-means
runs: str = "runs"  # where the earlier notebooks left their results
# What you may change
prototypes_per_class: list[int] = []  # K/C, each; empty: 1, 5, the data set's own
restarts: int = 10  # of k-means; the best is kept

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
images, explained = run.dataset(), run.explained()
z, labels = run.embeddings("train")
choices = sorted(
    set(prototypes_per_class or [1, 5, run.settings()["prototypes_per_class"]])
)
print(f"{len(z):,} embeddings of {z.shape[1]} dimensions; K/C = {choices}")

# %% [markdown]
# ## Clustering
#
# Each class is clustered by itself, so every prototype has a class. Where a class has fewer images than $K/C$, nothing
# is computed and a line says so.

# %%
from kmex_utils.method.kmex import fit_kmex
from kmex_utils.method.prototypes import check_enough

members = [(labels == c).nonzero().flatten() for c in range(len(images.classes))]
check_enough(members, images.classes, max(choices), lambda index: index)
how = {"seed": seed, "restarts": restarts}
names = [
    explained.add_kmex(fit_kmex(z, labels, images.classes, k, **how), **how)
    for k in choices
]
explained.save(run.folder, only=names)
explained

# %% [markdown]
# ## Accuracy
#
# The paper expects no loss: *replacing the linear classifier with KMEx does not affect the performance*.

# %%
import pandas as pd

from kmex_utils.method.measures import accuracy

results = [
    (r["model"], r["metric"], r["split"], r["value"])
    for r in run.results("train", "01_train")
]
for k in choices:
    kmex = explained.kmex[k]
    for split in ("train", "test"):
        embeddings, truth = run.embeddings(split)
        predicted = kmex.proj(kmex.sim(embeddings)).argmax(1)
        results.append(
            (f"KMEx (K/C={k})", "accuracy", split, accuracy(predicted, truth))
        )
run.save_results(
    "kmex",
    [r for r in results if r[0] != "CNN"],
    prototypes_per_class=choices,
    restarts=restarts,
)
table = pd.DataFrame(results, columns=["model", "metric", "split", "%"])
table.pivot(index="model", columns="split", values="%")[["train", "test"]].round(2)

# %% [markdown]
# On the embedded digits five prototypes a class stay within a point of the CNN. One prototype a class loses up to a
# point or a little more, as a class of digits has more than one shape. The prediction is now explained by what the
# image is closest to.

# %% [markdown]
# ## The prototypes, seen
#
# A centroid is not an image. The training image whose embedding is closest to it shows what it stands for. The number
# above is the share of the class's training images that belong to the centroid.

# %%
from kmex_utils.drawing import image_grid

shown = max(k for k in choices if k <= 10) if min(choices) <= 10 else min(choices)
p = explained.kmex[shown].prototypes
of_ten_classes = [k for k in range(len(p)) if p.labels[k] < 10]
share = p.sizes / p.sizes.view(-1, shown).sum(1).repeat_interleave(shown)
image_grid(
    [images.train.rgb(int(p.image[k])) for k in of_ten_classes],
    [f"{images.classes[p.labels[k]]}: {100 * share[k]:.0f} %" for k in of_ten_classes],
    columns=shown if shown > 5 else 2 * shown,
)

# %% [markdown]
# A class's prototypes are different ways to write it: upright and slanted, thin and bold. The shares are uneven, so
# some ways are common and others rare. The classifier's single column could not tell them apart. What KMEx cannot say
# is *where* in the image it sees them, for $z$ is an average over positions: that is [notebook 4](04_encoder.ipynb).
