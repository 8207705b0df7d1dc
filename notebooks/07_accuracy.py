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
# # 7. Concept-based accuracy (Table 2)
#
# What does it cost to predict from prototypes? Plain accuracy, predicted = true, on the training images (without
# augmentation) and on the test images, mean and standard deviation over seeds. The paper prints the mean of five.

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
stages = {"train": "01_train", "kmex": "03_kmex", "protopnet": "05_protopnet", "encoder": "04_encoder"}
if not baseline:
    del stages["protopnet"]
records = []
for run in all_runs:
    for stage, notebook in stages.items():
        records += [r for r in run.results(stage, notebook) if r["metric"].startswith("accuracy")]
print(f"seeds {seeds}, {len(records)} results")

# %% [markdown]
# ## Table 2
#
# `accuracy_most_frequent` is the other reading of eq. 10 (the class of the most frequent prototype). *ProtoPNet + KMEx*
# puts KMEx, with the data set's own $K/C$, on ProtoPNet's embedding.

# %%
from IPython.display import Markdown

from kmex_utils import paths
from kmex_utils.paper import published

table = published.tidy(records, published.TABLE2)
path = paths.resolve(figures_folder) / dataset / "table2.csv"
published.save(table, path, digits=1, note=published.note(all_runs[0].settings()), records=records)
Markdown(path.with_suffix(".md").read_text())

# %% [markdown]
# ## The trade-off
#
# The paper's finding: KMEx and B4 keep the CNN's accuracy; each shallower block that enters costs some of it.

# %%
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from kmex_utils.drawing import STYLE, palette

plt.style.use(STYLE)

main = pd.DataFrame(records).query("metric == 'accuracy'")
figure, axes = plt.subplots(figsize=(5.6, 2.6))
sns.stripplot(main, x="value", y="model", hue="split", palette=palette(2), size=6, jitter=False, dodge=True, ax=axes)
axes.set(xlabel="accuracy (%), one mark per seed", ylabel="")
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
plt.show()
