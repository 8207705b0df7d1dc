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
# # 13. What each open choice is worth
#
# The paper leaves several points of eq. 7 to 11 open. Here each is switched alone, on the same trained networks with
# the same seeds, and the change is measured against the default reading:
#
# | question | default | options |
# |---|---|---|
# | what $\lVert u\rVert$ of eq. 8 runs over | a position's row | each channel, the whole image |
# | the factor beside it | $1/D_b$, as printed | $1/\sqrt{D_b}$, 1 |
# | corners in the interpolation of eq. 7 | not aligned | aligned |
# | the shared resolution $R'$ of eq. 7 | the shallowest block's | the deepest's, double the shallowest's |
# | prediction from $q_s$ (eq. 10) | class with most positions | class of the most frequent prototype |
# | pairs in Table 1 | all | each embedding's nearest prototype |
# | start of the attribution | eq. 11 averaged over segments | eq. 11 as it is |
# | anything that needs another training (bias, crop) | | `others` |
#
# What matters most is the factor: with $1/D_b$ the shallowest block carries most of the distance.

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
fit_on: int = 500  # prototypes come from the first so many training images of each class; 0: from all
prototypes_per_class: int = 0  # K/C; 0: the data set's own
restarts: int = 10  # of k-means; the best is kept
attribution_images: int = 1000  # test images on which both starts of the attribution are compared
others: list[str] = []  # runs trained with one thing switched, as name:folder; of the same seeds or some of them
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # the table and the figure go to <figures_folder>/<dataset>/

# %%
from kmex_utils import hardware, parameters
from kmex_utils.runs import Run, trained_seeds

settings = parameters.check(globals())
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
seeds = seeds or trained_seeds(runs, dataset)
all_runs = [Run.of(runs, dataset, seed) for seed in seeds]
for run in all_runs:
    run.results("kmex", "03_kmex")  # there, or refused before any clustering
switched = dict(other.split(":", 1) for other in others)
seeds_of = {name: sorted({*seeds} & {*trained_seeds(folder, dataset)}) for name, folder in switched.items()}
for name, common in seeds_of.items():
    if not common:
        raise ValueError(f"{switched[name]} has no training of {dataset} with a seed of {seeds}: run 01_train there")
    for seed in common:
        Run.of(switched[name], dataset, seed).results("encoder", "04_encoder")

# %% [markdown]
# ## Readings of eq. 7, 8 and 10
#
# B4, B34 and B234, clustered anew under each reading.

# %%
import pandas as pd

from kmex_utils.studies import Kept, attribution_starts, readings

found = []
for run in all_runs:
    backbone, images = run.backbone(), run.load_dataset()
    per_class = prototypes_per_class or images.recipe.prototypes_per_class
    kept = Kept.of(backbone, images, 2, fit_on, device=device)
    records, explainers = readings(kept, per_class, seed=run.seed, restarts=restarts)
    shared = {"question": "attribution start", "option": "raw", "seed": run.seed, "split": "test"}
    agreement = attribution_starts(kept, backbone.cpu(), explainers, attribution_images)
    records += [{**shared, "model": m, "metric": "map_correlation", "value": value} for m, value in agreement.items()]
    found += records

# %% [markdown]
# ## Readings of Table 1, and other trainings

# %%
from kmex_utils.measures import cosine_alignment

for run in all_runs:
    z, labels = run.embeddings("train")
    for k in (1, run.recipe().prototypes_per_class):
        p, _ = run.prototypes(f"KMEx-{k}", "03_kmex")
        for pairs in ("all", "nearest"):
            question = ("pairs", "nearest") if pairs == "nearest" else ("default", "")
            values = cosine_alignment(z, labels, p.vectors, p.labels, pairs)
            for metric, value in zip(("cos_class", "cos_out"), values, strict=True):
                record = {"model": f"KMEx (K/C={k})", "metric": metric, "split": "train", "value": value}
                found.append({"question": question[0], "option": question[1], "seed": run.seed, **record})

# %%
stages = {"train": "01_train", "kmex": "03_kmex", "encoder": "04_encoder"}
for name, folder in {"": runs, **switched}.items() if switched else ():
    for seed in seeds_of.get(name, seeds):
        run = Run.of(folder, dataset, seed)
        given = {"question": name or "as trained", "option": "switched" if name else "", "seed": seed}
        for stage, notebook in stages.items():
            for r in run.results(stage, notebook):
                found.append({**given, **{key: r[key] for key in ("model", "metric", "split", "value")}})
records = pd.DataFrame(found)

# %% [markdown]
# ## The ledger
#
# The change of each number against the default reading of the same seed: mean and standard deviation over seeds.

# %%
from kmex_utils import paths, studies
from kmex_utils.store import save_text

folder = paths.resolve(figures_folder) / dataset
save_text(folder / "ledger.csv", records.to_csv(index=False, float_format="%.6g"))
changes = studies.changes(records)
table = changes.groupby(["question", "option", "metric", "split", "model"], sort=False)["change"].agg(["mean", "std"])
table.query("split == 'test' or metric != 'accuracy'").round(2)

# %%
from kmex_utils import figures

figure = figures.ledger(changes)
figures.save(figure, folder / "ledger")
figure

# %% [markdown]
# ## The price of depth, under each reading
#
# What B4, B34 and B234 lose to the CNN on the test images.

# %%
cnn = {run.seed: r["value"] for run in all_runs for r in run.results("train", "01_train") if r["split"] == "test"}
some = records.query("split == 'test' and model in ['B4', 'B34', 'B234'] and metric == 'accuracy'")
some = some[some.question.isin(["default", "norm", "scale", "align_corners", "grid"])]
lost = some.assign(lost=some.seed.map(cnn) - some.value)
lost.groupby(["question", "option", "model"], sort=False)["lost"].agg(["mean", "std"]).unstack("model").round(2)
