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
# # 6. Alignment of the prototypes (Table 1)
#
# How close do prototypes point to the data they stand for? For each class, the mean cosine between its prototypes and
# its embeddings (*class*) and between them and all other embeddings (*out*), averaged over classes.
#
# A mean over pairs of cosines is a dot product of two mean unit vectors,
#
# $$\frac1{|Z_j||P_j|}\sum_{z\in Z_j}\sum_{p\in P_j}\frac{z\cdot p}{\lVert z\rVert\lVert p\rVert}
# = \Bigl(\frac1{|Z_j|}\sum_{z\in Z_j}\frac{z}{\lVert z\rVert}\Bigr)
# \cdot\Bigl(\frac1{|P_j|}\sum_{p\in P_j}\frac{p}{\lVert p\rVert}\Bigr),$$
#
# so no table of all pairs is needed.

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to average over; empty: all there are
baseline: bool = True  # with ProtoPNet; False where 05_protopnet has not run
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # tables go to <figures_folder>/<dataset>/

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils.paper.runs import Run, trained_seeds

seeds = seeds or trained_seeds(runs, dataset)
all_runs = [Run.of(runs, dataset, seed) for seed in seeds]
print(f"seeds {seeds}")

# %% [markdown]
# ## Cosines
#
# The paper does not say which pairs enter: all prototypes of a class with each embedding (our default, `cos_class` and
# `cos_out`), or each embedding with the class's nearest prototype (`…_nearest`). Both are computed, on the training
# embeddings. ProtoPNet's lie in its own latent space; notebook 5 measured them there, with the mean patch of each image
# and (`…_patch`) with every patch.

# %%
import torch
import torch.nn.functional as F

from kmex_utils.method.measures import cosine_alignment

records = []
for run in all_runs:
    z, labels = run.embeddings("train")
    explained = run.explained(needs={"KMEx-1": "03_kmex", "KMEx-5": "03_kmex"})
    c = explained.network.c
    prototypes = {"CNN": (c, torch.arange(len(c)))}
    for k in (1, 5):
        p = explained.kmex[k].prototypes
        prototypes[f"KMEx (K/C={k})"] = p.vectors, p.labels
    for model, (vectors, classes) in prototypes.items():
        for pairs, suffix in (("all", ""), ("nearest", "_nearest")):
            values = cosine_alignment(z, labels, vectors, classes, pairs)
            for name, value in zip(("cos_class", "cos_out"), values, strict=True):
                records.append(
                    dict(dataset=dataset, model=model, metric=name + suffix, split="train", seed=run.seed, value=value)
                )
    between = F.normalize(c, dim=1) @ F.normalize(c, dim=1).T
    value = between[~torch.eye(len(c), dtype=bool)].mean().item()  # near 0: the columns are nearly orthogonal
    records.append(dict(dataset=dataset, model="CNN", metric="cos_columns", split="train", seed=run.seed, value=value))
    learned = run.results("protopnet", "05_protopnet") if baseline else []
    records += [r for r in learned if r["metric"].startswith("cos")]

# %% [markdown]
# ## Table 1

# %%
from IPython.display import Markdown

from kmex_utils import paths
from kmex_utils.paper import published

table = published.tidy(records, published.TABLE1)
path = paths.resolve(figures_folder) / dataset / "table1.csv"
published.save(table, path, digits=2, note=published.note(all_runs[0].settings()), records=records)
Markdown(path.with_suffix(".md").read_text())

# %% [markdown]
# What to look for: the columns $c_j$ of the CNN reach cosines of about one half with their own class and about zero
# with the others, so they span nearly orthogonal half-spaces; the centroids of KMEx point into the data. ProtoPNet's
# latent space is a positive cube, so its cosines cannot be negative; the paper's are near one in and out of class.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from kmex_utils.drawing import STYLE, palette

plt.style.use(STYLE)

main = pd.DataFrame(records).query("metric in ['cos_class', 'cos_out']")
figure, axes = plt.subplots(figsize=(5.2, 2.4))
sns.stripplot(main, x="value", y="model", hue="metric", palette=palette(2), size=7, jitter=False, ax=axes)
axes.axvline(0, color="0.7", linewidth=0.8, zorder=0)
axes.set(xlabel="mean cosine, one mark per seed", ylabel="")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
