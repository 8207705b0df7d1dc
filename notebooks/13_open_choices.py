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
# From here on the notebooks go beyond the paper. It leaves several points of eq. 7 to 11 open:
#
# $$u^{(b)} = \mathrm{Upsample}(x^{(b)}), \qquad
# q_h = \mathrm{Concatenate}\Bigl(\frac{u^{(b)}}{D_b\,\lVert u^{(b)}\rVert}\Bigr) .$$
#
# Upsampled how, and to which grid? The norm of what? Is the factor $1/D_b$ meant? Each is an argument of
# `Normalisation` in [composite.py](../kmex_utils/method/composite.py). Here each is switched alone, on the same trained
# networks with the same seeds, and the change is measured against the default reading:
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
# What matters most is the factor. With rows of unit length a block has the share $s_b^2 / \sum_{b'} s_{b'}^2$ of the
# squared distance, where $s_b$ is its factor. In a ResNet34's B234 ($D = 128, 256, 512$) that is
#
# | factor $s_b$ | block 2 | block 3 | block 4 |
# |---|---|---|---|
# | $1/D_b$, as printed | 76 % | 19 % | 5 % |
# | $1/\sqrt{D_b}$ | 57 % | 29 % | 14 % |
# | 1, equal weights | 33 % | 33 % | 33 % |

# %% tags=["parameters"]
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # output goes to <figures_folder>/<dataset>/
# What you may change
fit_on: int = 500  # images of each class to fit on, the first ones; 0: all
prototypes_per_class: int = 0  # K/C; 0: the data set's own
restarts: int = 10  # of k-means; the best is kept
attribution_images: int = 1000  # test images to compare attribution starts on
others: list[str] = []  # name:folder of runs with one thing switched, same seeds
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import hardware, parameters
from kmex_utils.paper.runs import Run, trained_seeds

settings = parameters.check(globals())
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
seeds = seeds or trained_seeds(runs, dataset)
all_runs = [Run.of(runs, dataset, seed) for seed in seeds]
for run in all_runs:
    run.results("kmex", "03_kmex")  # there, or refused before any clustering

# %% [markdown]
# Trainings with one thing switched, of the seeds that both have.

# %% tags=["hide-input"]
switched = dict(other.split(":", 1) for other in others)
seeds_of = {
    name: sorted({*seeds} & {*trained_seeds(folder, dataset)})
    for name, folder in switched.items()
}
for name, common in seeds_of.items():
    if not common:
        nothing = f"{switched[name]} has no training of {dataset} with a seed of"
        raise ValueError(f"{nothing} {seeds}: run 01_train there")
    for seed in common:
        Run.of(switched[name], dataset, seed).results("encoder", "04_encoder")

# %% [markdown]
# ## Readings of eq. 7, 8 and 10
#
# B4, B34 and B234 are clustered anew under each reading, all from one pass through the network. The line that does it
# is `passed.fit_encoder(b, normalisation, k)`.

# %%
import time

from kmex_utils.method.explainers import block_name
from kmex_utils.paper.ledger import READINGS


def readings(passed, k, index, seed):
    """Records of every reading, and the default one's explainers by start block."""
    records, default = [], {}
    for (question, option, normalisation), b in (
        (reading, b) for reading in READINGS for b in (4, 3, 2)
    ):
        start = time.perf_counter()
        explainer = passed.fit_encoder(
            b, normalisation, k, seed=seed, restarts=restarts, index=index
        )
        seconds = time.perf_counter() - start
        if question == "default":
            default[b] = explainer
        for metric, split, value in passed.accuracies(explainer):
            record = {
                "question": question,
                "option": option,
                "seed": seed,
                "model": block_name(b),
            }
            records.append(
                {
                    **record,
                    "metric": metric,
                    "split": split,
                    "value": value,
                    "seconds": seconds,
                }
            )
    return records, default


# %% [markdown]
# ## Two starts of the attribution
#
# The recursion of [notebook 9](09_interpretation.ipynb) needs a first $\mathrm{att}^{(4:)}$: eq. 11 averaged over the
# segments of B4, or eq. 11 as it is. For some test images the attribution of the predicted class is made both ways; the
# correlation of both maps says how far the ways agree.

# %%
import torch

from kmex_utils.method.attribution import attribution, carried
from kmex_utils.paper.ledger import map_correlation


def starts(passed, network, explainers):
    """Mean correlation of both starts' maps by start block, deepest first."""
    index = torch.arange(min(attribution_images, len(passed.x["test"])))
    target = passed.y["test"][index].argmax(1)
    att = attribution(passed.x["test"].read(index, passed.blocks)[0], network.c[target])
    maps = {
        b: passed.map(explainer, "test")[index] for b, explainer in explainers.items()
    }
    segments, raw = (carried(att, maps, start=start) for start in ("segments", "raw"))
    return {b: float(map_correlation(segments[b], raw[b]).mean()) for b in maps}


# %% [markdown]
# Both studies for each training.

# %%
from kmex_utils.explanation.passed import Passed

rows = []
for run in all_runs:
    network = run.network()
    k = prototypes_per_class or run.settings()["prototypes_per_class"]
    passed = Passed.of(network, run.dataset(), 2, device=device)
    records, explainers = readings(
        passed, k, passed.first_of_each_class(fit_on), run.seed
    )
    rows += records
    shared = {
        "question": "attribution start",
        "option": "raw",
        "seed": run.seed,
        "split": "test",
    }
    for b, value in starts(passed, network.cpu(), explainers).items():
        rows.append(
            {
                **shared,
                "model": block_name(b),
                "metric": "map_correlation",
                "value": value,
            }
        )

# %% [markdown]
# ## Readings of Table 1
#
# Each embedding's nearest prototype of a class in place of all of them.

# %%
from kmex_utils.method.measures import cosine_alignment

options = {"all": ("default", ""), "nearest": ("pairs", "nearest")}
for run in all_runs:
    counts = (1, run.settings()["prototypes_per_class"])
    z, labels = run.embeddings("train")
    explained = run.explained(needs={f"KMEx-{k}": "03_kmex" for k in counts})
    for k in counts:
        p = explained.kmex[k].prototypes
        for pairs, (question, option) in options.items():
            values = cosine_alignment(z, labels, p.vectors, p.labels, pairs)
            for metric, value in zip(("cos_class", "cos_out"), values, strict=True):
                record = {
                    "model": f"KMEx (K/C={k})",
                    "metric": metric,
                    "split": "train",
                    "value": value,
                }
                rows.append(
                    {"question": question, "option": option, "seed": run.seed, **record}
                )

# %% [markdown]
# ## Other trainings
#
# Their results and those of the trainings they are compared with.

# %%
stages = {"train": "01_train", "kmex": "03_kmex", "encoder": "04_encoder"}
for name, folder in {"": runs, **switched}.items() if switched else ():
    question, option = (name, "switched") if name else ("as trained", "")
    for seed in seeds_of.get(name, seeds):
        run = Run.of(folder, dataset, seed)
        for result in (
            result
            for stage, notebook in stages.items()
            for result in run.results(stage, notebook)
        ):
            record = {key: result[key] for key in ("model", "metric", "split", "value")}
            rows.append(
                {"question": question, "option": option, "seed": seed, **record}
            )

# %% [markdown]
# ## The ledger
#
# The change of each number against the default reading of the same seed: mean and standard deviation over seeds.

# %%
import pandas as pd

from kmex_utils import paths
from kmex_utils.paper import ledger
from kmex_utils.store import save_text

folder, records = paths.resolve(figures_folder) / dataset, pd.DataFrame(rows)
kept = records.drop(columns="seconds")  # the same whenever it runs
save_text(folder / "ledger.csv", kept.to_csv(index=False, float_format="%.6g"))
changes = ledger.changes(records)
table = changes.groupby(["question", "option", "metric", "split", "model"], sort=False)[
    "change"
].agg(["mean", "std"])
table.query("split == 'test' or metric != 'accuracy'").round(2)

# %% [markdown]
# B4 has one block, so no factor changes it; its rows show how little the other readings do. B234 gains about two points
# with $1/\sqrt{D_b}$, a little more with equal weights, and nearly as much when each channel is normalised over the
# positions, which also takes weight from the block that dominates. It loses where the class of the most frequent
# prototype is predicted and where $R'$ is the deepest grid. On the digits both starts of the attribution agree
# (`map_correlation` 1): four positions are four segments.
#
# The same as a picture, a row for each option and a mark for each seed; only changes of test accuracy.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils import drawing
from kmex_utils.paper.figures import DEPTHS, look

plt.style.use(drawing.STYLE)
shown = changes[
    changes.model.isin(DEPTHS)
    & (changes.metric == "accuracy")
    & (changes.split == "test")
]
options = list(dict.fromkeys(zip(shown.question, shown.option, strict=True)))
models = [model for model in DEPTHS if model in set(shown.model)]
figure, axes = plt.subplots(figsize=(7.2, 0.42 * len(options) + 1.1))
for i, model in enumerate(models):
    marks = shown[shown.model == model]
    aside = 0.22 * (i - (len(models) - 1) / 2)  # one above the other
    place = [
        -options.index(option) - aside
        for option in zip(marks.question, marks.option, strict=True)
    ]
    axes.plot(
        marks.change,
        place,
        linestyle="",
        markersize=5,
        alpha=0.85,
        label=model,
        **look(model),
    )
axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
axes.set_yticks(
    [-i for i in range(len(options))],
    [f"{question}: {option}" for question, option in options],
)
axes.set(xlabel="change of test accuracy (points), one mark per seed")
axes.grid(axis="y", alpha=0.3)
axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
drawing.save(figure, folder / "ledger")

# %% [markdown]
# Where all marks of a model lie on one side of the line, seeds agree on the sign. For B234 they do in the rows of the
# factor, well away from zero. B4 stays near it in all rows, and B34 in all but that of the other prediction.

# %% [markdown]
# ## The price of depth, under each reading
#
# What B4, B34 and B234 lose to the CNN on the test images. If depth itself had a price, no reading would remove it.

# %%
cnn = {
    run.seed: r["value"]
    for run in all_runs
    for r in run.results("train", "01_train")
    if r["split"] == "test"
}
tested = records[
    (records.split == "test")
    & (records.metric == "accuracy")
    & records.model.isin(["B4", "B34", "B234"])
]
tested = tested[tested.question.isin([question for question, _, _ in READINGS])]
lost = tested.assign(lost=tested.seed.map(cnn) - tested.value)
lost.groupby(["question", "option", "model"], sort=False)["lost"].agg(
    ["mean", "std"]
).unstack("model").round(2)

# %% [markdown]
# With equal weights B234 loses no more than B4. So the two to three points that [notebook 4](04_encoder.ipynb) found
# are the price of the printed factor, not of depth. On STL-10 the same holds of larger losses: equal weights give back
# 14 of 15 points in a ResNet34 from scratch and 35 of 37 in an EfficientNet with ImageNet weights, whose channels grow
# faster ([report](../figures/efficientnet/report/report.md)). Still, the printed factor is what the paper reports: in a
# network of its channels with ImageNet weights B234 loses with it what the paper's loses, 8 points
# ([report](../figures/resnet/report/report.md)). Notebooks 1 to 9 keep it for that reason; [notebook
# 12](12_your_own_model.ipynb) begins with equal weights.
