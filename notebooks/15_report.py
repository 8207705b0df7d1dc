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
# # 15. The reproduction report
#
# Every number of the paper's Tables 1 and 2 beside ours, what of its findings holds, what each open choice is worth,
# and what it cost. It only puts together what the notebooks before have saved; the page for readers is
# `figures/report/report.md`.

# %% tags=["parameters"]
datasets: list[str] = ["mnist-mini"]  # data sets whose notebooks have run
config: str = ""  # the batch configuration that made the runs, e.g. config/scratch.yaml; printed in the report
beside: str = ""  # another report's folder, e.g. figures/report: its networks stand beside in the picture of weightings
name: str = "report"  # the report goes to <figures_folder>/<name>/
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # where tables and figures of the data sets are

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
import pandas as pd

from kmex_utils import paths, reproduction
from kmex_utils.datasets import RECIPES

made_by = paths.resolve(config)
if config and not made_by.is_file():
    raise FileNotFoundError(f"{made_by} does not exist: give the configuration that made the runs, or none")
folder = paths.resolve(figures_folder)
read = {}
for dataset in datasets:
    for part in ("table1", "table2", "table1-seeds", "table2-seeds", "ledger", "depth"):
        path = folder / dataset / f"{part}.csv"
        if path.exists():
            read[dataset, part] = pd.read_csv(path)
        elif part.startswith("table"):
            raise FileNotFoundError(f"{path} does not exist: run notebooks 06_alignment and 07_accuracy for {dataset}")
own = {dataset: RECIPES.get(dataset, RECIPES["folder"]).prototypes_per_class for dataset in datasets}
records = {d: pd.concat([read[d, "table1-seeds"], read[d, "table2-seeds"]]) for d in datasets}

# %% [markdown]
# ## What was run
#
# Of data sets whose runs are no longer here, the report's own tables tell.

# %%
trained, curves = reproduction.trainings(runs, datasets)
earlier = {stem: folder / name / f"{stem}.csv" for stem in ("trained", "curves", "cost", "disk")}
trained = reproduction.with_earlier(trained, earlier["trained"], datasets, "01_train")
curves = reproduction.with_earlier(curves, earlier["curves"], datasets)
trained

# %% [markdown]
# Training curves: loss and running accuracy on augmented training images.

# %%
from kmex_utils import figures

figure = figures.training_curves(curves)
figures.save(figure, folder / name / "curves")
figure

# %% [markdown]
# ## Does what the paper finds hold?
#
# Each finding as a number, with the criterion that makes it hold; `holds_in` counts the seeds.

# %%
found = pd.concat([reproduction.check_relations(records[d], d, own[d]) for d in datasets])
found.round(2)

# %% [markdown]
# ## Every number
#
# `margin` is what chance allows for the difference if the paper's five seeds spread as ours do (95 %); `outside` marks
# differences beyond it and is empty where one seed has no spread.

# %%
tables = {
    part: pd.concat([reproduction.compare(read[d, part]) for d in datasets], ignore_index=True)
    for part in ("table1", "table2")
}
tables["table1"].round(2)

# %%
tables["table2"].round(1)

# %% [markdown]
# ## The price of each reading
#
# What B4 and B234 lose to the CNN on test images, in the paper and under each reading of what it leaves open. Where
# notebook 13 has not run, notebook 14 tells of the factor.

# %%
ledgers = {d: read[d, "ledger"] for d in datasets if (d, "ledger") in read}
scaled = {d: reproduction.ledger_of_depth(read[d, "depth"], own[d]) for d in datasets if (d, "depth") in read}
found_in = {d: some for d, some in scaled.items() if {"", "1"} <= {*some.option}} | ledgers
priced = [reproduction.prices(found_in[d], records[d], d) for d in datasets if d in found_in]
priced = pd.concat(priced, ignore_index=True) if priced else pd.DataFrame()
priced.round(2)

# %%
effects = [reproduction.effects(ledger, d) for d, ledger in ledgers.items()]
effects = pd.concat(effects, ignore_index=True) if effects else pd.DataFrame()
effects.round(2)

# %% [markdown]
# With $1/D_b$ the shallowest block carries most of the distance, the more so the more channels grow with depth. The
# loss against the share of $B4$, for the three factors; hollow: the paper's, if its factor is as printed.

# %%
networks = trained.groupby("dataset")["network"].first()
weighted = reproduction.weightings(priced, networks) if len(priced) else pd.DataFrame()
if len(weighted):
    drawn = pd.concat([weighted, pd.read_csv(paths.resolve(beside) / "weighting.csv")]) if beside else weighted
    figure = figures.weightings(drawn, reproduction.last_share("resnet34", "1/D"))
    figures.save(figure, folder / name / "weighting")
    display(figure)

# %% [markdown]
# ## Hours and bytes

# %%
cost = reproduction.with_earlier(reproduction.costs(runs, datasets), earlier["cost"], datasets)
files = reproduction.with_earlier(reproduction.disk(runs, datasets), earlier["disk"], datasets)
cost.pivot_table(index="notebook", columns="dataset", values="minutes").round(1) if len(cost) else cost

# %% [markdown]
# ## Beside others' networks from scratch
#
# A sanity check of the training: test accuracies that others report for networks trained from scratch on the same data.

# %%
others = reproduction.beside_others(records, trained)
others

# %% [markdown]
# ## The page

# %%
from IPython.display import Markdown

from kmex_utils.store import save_text

parts = {
    "trained": trained,
    "relations": found,
    **tables,
    "prices": priced,
    "effects": effects,
    "cost": cost,
    "disk": files,
}
for stem, part in {**parts, "curves": curves, "weighting": weighted}.items():
    save_text(folder / name / f"{stem}.csv", part.to_csv(index=False, float_format="%.6g"))
made_by = made_by.read_text() if config else ""
page = reproduction.page({**parts, "others": others}, folder, datasets, made_by, name)
Markdown(page)
