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
# - **inertia** on *all* training images, relative to prototypes fitted on all of them;
# - **agreement**: do training positions share a prototype under the one fit exactly when they do under the other
#   (adjusted Rand index, 1: the same partition, 0: chance)?
#
# At fraction 1 the draws differ by the seed of $k$-means only, which shows how far two fits of the *same* data agree.

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
fractions: list[float] = [0.05, 0.1, 0.25, 0.5, 1.0]  # of each class's training images
draws: int = 3  # of images, for each fraction
start_blocks: list[int] = [4, 2]  # 4: B4, 3: B34, 2: B234, 1: B1234; KMEx comes with them
prototypes_per_class: int = 0  # K/C; 0: the data set's own
restarts: int = 10  # of k-means; the best is kept
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where 01_train left its results
figures_folder: str = "figures"  # the table and the figure go to <figures_folder>/<dataset>/

# %%
from kmex_utils import hardware, parameters
from kmex_utils.subsets import check, study

settings = parameters.check(globals())
check(fractions, draws, start_blocks)
device, threads = hardware.pick_device(device), hardware.set_threads(threads)

# %% [markdown]
# ## The study
#
# Each draw takes the same fraction of every class (at least as many images as $K/C$), and is clustered like the whole.

# %%
import pandas as pd

from kmex_utils.runs import Run, trained_seeds

options = {"prototypes_per_class": prototypes_per_class, "restarts": restarts, "device": device}
found = []
for seed in seeds or trained_seeds(runs, dataset):
    run = Run.of(runs, dataset, seed)
    found += study(run.backbone(), run.load_dataset(), fractions, draws, start_blocks, seed=seed, **options)
records = pd.DataFrame(found)

# %%
columns = ["accuracy", "inertia", "agreement", "seconds"]
order = records.model.unique()
table = records.groupby(["model", "fraction"], sort=False)[columns].agg(["mean", "std"])
table.round(3)

# %% [markdown]
# ## The picture
#
# Lines are means over trainings and draws, bands reach from the lowest to the highest.

# %%
from kmex_utils import figures, paths
from kmex_utils.store import save_text

folder = paths.resolve(figures_folder) / dataset
save_text(folder / "subset.csv", records.to_csv(index=False, float_format="%.6g"))
figure = figures.subset_study(records)
figures.save(figure, folder / "subset")
figure

# %% [markdown]
# ## In one line each

# %%
largest = max(fractions)
whole = records[records.fraction == largest].groupby("model", sort=False).accuracy.mean()
for model, some in records.groupby("model", sort=False):
    lost = whole[model] - some.groupby("fraction").accuracy.mean()
    enough = min(fraction for fraction in fractions if lost[fraction] <= 0.5)
    print(f"{model}: {100 * enough:.0f} % of the images stay within 0.5 points of {100 * largest:.0f} %")
