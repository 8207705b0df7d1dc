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
# # 8. Where the prototypes lie (Figure 2)
#
# [Table 1](06_alignment.ipynb) says how closely prototypes point to the data. Figure 2 shows it: a UMAP projection of
# the embeddings $z$ of a group of classes, training images opaque and test images faint. Left are the classifier's
# columns $c_j$, raw (crosses) and rescaled to the mean length of their class (triangles); right the prototypes of KMEx
# (squares). UMAP is fitted on the training embeddings and projects everything else.

# %% tags=["parameters"]
# What the paper leaves open
neighbours: int = 15  # UMAP's n_neighbors
minimum_distance: float = 0.1  # UMAP's min_dist
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to show, and of UMAP
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # output goes to <figures_folder>/<dataset>/
# What you may change
group: str = ""  # names or patterns of the classes shown, e.g. *Sparrow; empty: all
model: str = "CNN"  # the paper's figure, or ProtoPNet: its prototypes instead
prototypes_per_class: int = 0  # K/C of the KMEx shown; 0: the data set's own
images_per_class: int = 100  # at most so many of each class and split; 0: all

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
trained = run.settings()
if model not in ("CNN", "ProtoPNet"):
    raise ValueError(f"model must be CNN or ProtoPNet, got {model!r}")
k = prototypes_per_class or trained["prototypes_per_class"]
if model == "CNN":
    explained = run.explained(needs={f"KMEx-{k}": "03_kmex"})
    kmex = explained.kmex[k].prototypes
    vectors, vector_labels = kmex.vectors, kmex.labels
    source = "embeddings", "01_train"
else:
    centroids, made_by = run.part("ProtoPNet-KMEx", "05_protopnet")
    k = made_by["prototypes_per_class"]
    vectors = centroids["vectors"]
    vector_labels = centroids["labels"]
    source = "ProtoPNet-embeddings", "05_protopnet"
z, labels = run.embeddings("train", *source)

# %% [markdown]
# ## The class group

# %%
import torch

from kmex_utils.data import matching

keep = matching(tuple(trained["classes"]), group)
names = [trained["classes"][j] for j in keep]


def of_group(vectors, labels, limit=0):
    """Rows of the kept classes, the first `limit` of each, and indices of `names`."""
    rows = [(labels == j).nonzero().flatten()[: limit or None] for j in keep]
    return vectors[torch.cat(rows)].numpy(), torch.cat(
        [torch.full((len(r),), i) for i, r in enumerate(rows)]
    ).numpy()


train = of_group(z, labels, images_per_class)
test = of_group(*run.embeddings("test", *source), images_per_class)
if len(train[0]) < 6:
    few = f"UMAP needs at least 6 training embeddings, got {len(train[0])}"
    raise ValueError(f"{few}: raise images_per_class")
of_splits = f"{len(train[0]):,} training and {len(test[0]):,} test embeddings"
print(f"{len(names)} classes, {of_splits}")

# %% [markdown]
# ## Prototypes
#
# A column is rescaled to the mean length of its class's embeddings, so that direction alone is compared:
#
# $$\tilde c_j = \frac{c_j}{\lVert c_j\rVert}\,\frac1{|Z_j|}\sum_{z \in Z_j}\lVert z\rVert ,$$
#
# the line that begins with `rescaled =`.

# %%
if model == "CNN":
    c = explained.network.c
    length = torch.stack([z[labels == j].norm(dim=1).mean() for j in range(len(c))])
    rescaled = c / c.norm(dim=1, keepdim=True) * length[:, None]
    index = torch.arange(len(c))
    prototypes = {"c_j": of_group(c, index), "c_j rescaled": of_group(rescaled, index)}
else:
    learned, _ = run.part("ProtoPNet", "05_protopnet")
    prototypes = {
        "ProtoPNet": of_group(learned["prototypes"].flatten(1), learned["labels"])
    }
prototypes[f"KMEx (K/C={k})"] = of_group(vectors, vector_labels)

# %% [markdown]
# ## Projection

# %%
from umap import UMAP

projection = UMAP(
    n_neighbors=neighbours, min_dist=minimum_distance, random_state=seed, n_jobs=1
).fit(train[0])
placed = {
    name: (projection.transform(vectors), classes)
    for name, (vectors, classes) in prototypes.items()
}
placed_test = projection.transform(test[0])

# %%
from kmex_utils import drawing, paths
from kmex_utils.paper import figures

*left, right = placed
figure = figures.figure2(
    names,
    projection.embedding_,
    train[1],
    placed_test,
    test[1],
    left={name: placed[name] for name in left},
    right={right: placed[right]},
)
stem = "figure2" if model == "CNN" else "figure2-protopnet"
drawing.save(figure, paths.resolve(figures_folder) / dataset / stem)
figure

# %% [markdown]
# The raw columns lie in one heap, wherever it falls: they are so short that to UMAP they are all the same point near
# zero. The rescaled ones lie at the rim of their cluster or in it. KMEx's squares spread over each cluster, also over
# its outlying arms. So the paper's claim about the raw columns shows here; that *rescaled* columns are rarely near
# their class does not, on ten classes that lie this far apart.

# %% [markdown]
# ## The same in numbers
#
# A projection can mislead, for UMAP follows neighbours and not distances. So the picture's claim is also measured in
# the embedding space. Of the ten training embeddings nearest to a prototype, how many are of its class? And how far is
# it from its class's mean $\bar z_j$, in units of the class's own radius,
#
# $$\frac{\lVert p - \bar z_j\rVert}{r_j}, \qquad r_j^2 = \frac1{|Z_j|}\sum_{z\in Z_j}\lVert z - \bar z_j\rVert^2 \; ?$$
#
# A typical embedding is at 1. In the code below these are `neighbours` and `distance`.

# %%
import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

from kmex_utils.store import replacing

near = NearestNeighbors(n_neighbors=min(10, len(train[0]))).fit(train[0])
centre = np.stack([train[0][train[1] == i].mean(0) for i in range(len(names))])
radius = np.array(
    [
        np.sqrt(((train[0][train[1] == i] - centre[i]) ** 2).sum(1).mean())
        for i in range(len(names))
    ]
)
rows = []
for name, (vectors, classes) in prototypes.items():
    neighbours = train[1][near.kneighbors(vectors, return_distance=False)]
    distance = np.linalg.norm(vectors - centre[classes], axis=1) / radius[classes]
    rows.append(
        (
            name,
            100 * (neighbours == classes[:, None]).mean(),
            np.median(distance),
            distance.max(),
        )
    )
columns = [
    "prototypes",
    "own class among 10 nearest (%)",
    "distance to class mean, median (radii)",
    "maximum (radii)",
]
numbers = pd.DataFrame(rows, columns=columns)
with replacing(paths.resolve(figures_folder) / dataset / f"{stem}.csv") as temporary:
    numbers.to_csv(temporary, index=False, float_format="%.4g")
numbers.set_index("prototypes").round(2)

# %% [markdown]
# A rescaled column has nearly only embeddings of its class around it, as a KMEx prototype does. But it lies at more
# than three radii from the class's mean, where hardly any embedding is; a KMEx prototype lies within one. So a column
# points *to* its class and lies *beyond* it. UMAP draws it into the cluster because the cluster is what is nearest.
# This is Table 1's finding once more, now in distances.
