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
# The paper states a trade-off: shallower blocks give finer maps and cost accuracy. Here it is as one figure: accuracy
# of the prediction from prototype counts (eq. 10) against $K/C$, for each start block, and for two factors of eq. 8,
# the printed $1/D_b$ and equal weights. KMEx, which sees the pooled embedding, and the CNN stand beside them.
#
# If depth itself had a price, it would remain when all blocks weigh the same.

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
start_blocks: list[int] = [4, 3, 2, 1]  # 4: B4, 3: B34, 2: B234, 1: B1234
prototypes_per_class: list[int] = [1, 2, 5, 10, 20]  # K/C, each
scales: list[str] = ["1/D", "1"]  # factors of eq. 8: 1/D, 1/sqrt(D) or 1
fit_on: int = 100  # prototypes come from the first so many training images of each class; 0: from all
restarts: int = 3  # of k-means; the best is kept
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where 01_train left its results
figures_folder: str = "figures"  # the table and the figure go to <figures_folder>/<dataset>/

# %%
from kmex_utils import hardware, parameters
from kmex_utils.composite import Normalisation
from kmex_utils.explainers import block_name
from kmex_utils.runs import Run, trained_seeds

settings = parameters.check(globals())
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
names = [block_name(b) for b in start_blocks]
readings = [Normalisation(scale=scale) for scale in scales]
seeds = seeds or trained_seeds(runs, dataset)

# %% [markdown]
# ## The fits

# %%
import pandas as pd

from kmex_utils.studies import Kept, depths

found = []
for seed in seeds:
    run = Run.of(runs, dataset, seed)
    kept = Kept.of(run.backbone(), run.load_dataset(), min(start_blocks), fit_on, device=device)
    found += depths(kept, prototypes_per_class, start_blocks, scales, seed=seed, restarts=restarts)
    for r in [r for r in run.results("train", "01_train") if r["split"] == "test"]:
        cnn = {key: r[key] for key in ("model", "metric", "split", "seed", "value")}
        found.append({**cnn, "scale": "", "per_class": 0, "seconds": 0.0})
records = pd.DataFrame(found)

# %%
shown = records.query("metric == 'accuracy'")
shown.pivot_table(index=["scale", "model"], columns="per_class", values="value", sort=False).round(1)

# %% [markdown]
# ## The picture
#
# Lines are means over trainings, bands reach from the lowest to the highest.

# %%
from kmex_utils import figures, paths
from kmex_utils.store import save_text

folder = paths.resolve(figures_folder) / dataset
save_text(folder / "depth.csv", records.to_csv(index=False, float_format="%.6g"))
figure = figures.depth_study(records)
figures.save(figure, folder / "depth")
figure
