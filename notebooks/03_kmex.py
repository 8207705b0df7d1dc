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
# Replace the linear classifier by centroids of the data (section 3.2; *Gautam et al. 2024*):
#
# 1. for each class, $K/C$ prototypes are the centroids of k-means on the embeddings $z$ of its training images;
# 2. $\mathrm{sim}(z, p_k) = \exp(-\lVert z - p_k\rVert)$;
# 3. proj returns the class of the most similar prototype.

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain, and of k-means
prototypes_per_class: list[int] = []  # K/C, one KMEx for each; empty: 1, 5 and the data set's own
restarts: int = 10  # of k-means; the best is kept
runs: str = "runs"  # where 01_train left its results

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
images, explained = run.dataset(), run.explained()
z, labels = run.embeddings("train")
choices = sorted(set(prototypes_per_class or [1, 5, run.settings()["prototypes_per_class"]]))
print(f"{len(z):,} embeddings of {z.shape[1]} dimensions; K/C = {choices}")

# %% [markdown]
# ## Clustering
#
# Each class is clustered by itself, so every prototype has a class. A $K/C$ that some class cannot fill is refused
# before anything is computed.

# %%
from kmex_utils.method.kmex import fit_kmex
from kmex_utils.method.prototypes import check_enough

members = [(labels == c).nonzero().flatten() for c in range(len(images.classes))]
check_enough(members, images.classes, max(choices), lambda index: index)
how = {"seed": seed, "restarts": restarts}
names = [explained.add_kmex(fit_kmex(z, labels, images.classes, k, **how), **how) for k in choices]
explained.save(run.folder, only=names)
explained

# %% [markdown]
# ## Accuracy
#
# The paper: *replacing the linear classifier with KMEx does not affect the performance*.

# %%
import pandas as pd

from kmex_utils.method.measures import accuracy

results = [(r["model"], r["metric"], r["split"], r["value"]) for r in run.results("train", "01_train")]
for k in choices:
    kmex = explained.kmex[k]
    for split in ("train", "test"):
        embeddings, truth = run.embeddings(split)
        predicted = kmex.proj(kmex.sim(embeddings)).argmax(1)
        results.append((f"KMEx (K/C={k})", "accuracy", split, accuracy(predicted, truth)))
run.save_results("kmex", [r for r in results if r[0] != "CNN"], prototypes_per_class=choices, restarts=restarts)
table = pd.DataFrame(results, columns=["model", "metric", "split", "%"])
table.pivot(index="model", columns="split", values="%")[["train", "test"]].round(2)

# %% [markdown]
# ## The prototypes, seen
#
# A centroid is not an image; the training image whose embedding is closest to it shows what it stands for. Under each
# the share of its class that it represents.

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
