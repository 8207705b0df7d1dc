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
# # 17. Does the attribution point at what the network uses?
#
# The paper's attribution (eq. 11) is averaged over segments, depth after depth ([notebook 9](09_interpretation.ipynb)).
# Here pixels are taken away in the order of an attribution, and the probability $P_j$ of the predicted class is
# watched. With $x_s$ the image without the highest share $s$ of pixels,
#
# $$\mathrm{deletion} = \int_0^1 P_j(x_s)\,ds :$$
#
# the sooner the probability falls, the more the pixels that went first mattered. Ours from every start block stand
# beside what is in use, and beside controls.
#
# | measure | what happens | good |
# |---|---|---|
# | deletion | the highest pixels first become the image's mean colour, or blurred | low |
# | insertion | on a mean or blurred image the highest pixels first come back | high |
# | ROAD | as deletion, each pixel filled from its neighbours, with noise | low |
# | exact deletion | rows of $h$ first give way to the mean row; no image is invented | low |
# | pointing game, energy inside | whether the highest pixel, how much attribution lies in the object's box | high |
#
# Attributions of maps are constant on a segment. So pixels of equal attribution go together, and areas are taken over
# the share of pixels that has actually gone. Every number has a null beside it: **the same pieces in random order**.
# The measures are functions of [faithfulness.py](../kmex_utils/evaluation/faithfulness.py). The defaults are quick:
# five images show how it works, not who wins.

# %% tags=["parameters"]
# What the paper leaves open
scales: list[str] = ["1/D", "1"]  # factors of eq. 8: 1/D, 1/sqrt(D) or 1
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # output goes to <figures_folder>/<dataset>/
# What you may change
start_block: int = 2  # the shallowest to explain from; 2: B4, B34 and B234
prototypes_per_class: int = 0  # K/C; 0: the data set's own
fit_on: int = 10  # images of each class to fit on, the first ones; 0: all
restarts: int = 1  # of k-means; the best is kept
refits: int = 1  # more clusterings by the first factor, for the noise floor
images: int = 5  # test images, drawn by the seed (100 for numbers to trust)
steps: int = 6  # of a curve (20 for numbers to trust)
tie_orders: int = 2  # random orders of tied pixels, for ours
rise_masks: int = 50  # of RISE (1000 for numbers to trust)
annotations: str = ""  # boxes or masks; empty: CUB-200's own, else no localisation
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import hardware, parameters
from kmex_utils.method.composite import Normalisation
from kmex_utils.paper.runs import Run, trained_seeds

settings = parameters.check(globals())
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
normalisations = {scale: Normalisation(scale=scale) for scale in scales}
all_runs = [
    Run.of(runs, dataset, seed) for seed in seeds or trained_seeds(runs, dataset)
]
if min(images, steps, rise_masks) < 2:
    least = "images, steps and rise_masks must be at least 2"
    raise ValueError(f"{least}, got {images}, {steps} and {rise_masks}")

# %% [markdown]
# ## The images
#
# Prototypes come from training images alone; the test images are drawn by the training's seed.

# %% tags=["hide-input"]
from dataclasses import replace

import torch

from kmex_utils.data.annotations import boxes as known_boxes
from kmex_utils.data.dataset import Images


def some(whole, seed):
    """The data set of those images alone, and the boxes of its test images, or None."""
    labels, parts = whole.train.labels, {}
    first = [
        (labels == c).nonzero().flatten()[: fit_on or None]
        for c in range(len(whole.classes))
    ]
    drawn = (
        torch.randperm(len(whole.test), generator=torch.Generator().manual_seed(seed))[
            :images
        ]
        .sort()
        .values
    )
    for split, index in (("train", torch.cat(first).sort().values), ("test", drawn)):
        of = whole.split(split)
        parts[split] = Images(
            of.pixels[index.numpy()],
            of.labels[index],
            tuple(of.names[i] for i in index),
        )
    has_boxes = annotations or (
        whole.settings["source"] == "cub200" and not whole.settings["crop"]
    )
    return replace(whole, **parts), known_boxes(whole, annotations)["test"][
        drawn
    ] if has_boxes else None


# %% [markdown]
# ## Ours
#
# For each factor the prototypes of every start block, from one pass; of the first factor some more fits from other
# seeds, whose differences are the noise floor.

# %% tags=["hide-input"]
from kmex_utils.evaluation import faithfulness
from kmex_utils.explanation.explained import Explained
from kmex_utils.explanation.passed import Passed


def fitted(run, network, passed):
    """(factor, draw, what explains with it)."""
    k = prototypes_per_class or run.settings()["prototypes_per_class"]
    for scale, draw in [
        *((scale, 0) for scale in scales),
        *((scales[0], 1 + i) for i in range(refits)),
    ]:
        explained = Explained(
            network, None, {"dataset": dataset, "classes": passed.classes}
        )
        for b in range(passed.blocks, start_block - 1, -1):
            options = {
                "seed": run.seed + 101 * draw,
                "restarts": restarts,
            }  # apart from the trainings' seeds
            explained.explainers[b] = passed.fit_encoder(
                b, normalisations[scale], k, **options
            )
        yield scale, draw, explained


# %% [markdown]
# Each training with its images on the bench: what does not depend on an attribution is computed once.

# %%
benches, explainers, parts = {}, {}, {}
for run in all_runs:
    part, boxes = some(run.dataset(), run.seed)
    network = run.network().to(device)
    passed = Passed.of(network, part, start_block, device=device)
    x = part.input(part.test.pixels, device)
    how = {
        "steps": steps,
        "seed": run.seed,
        "mean": passed.z("train").mean(0),
        "boxes": boxes,
    }
    benches[run.seed], parts[run.seed] = faithfulness.Bench(network, x, **how), part
    explainers[run.seed] = list(fitted(run, network, passed))
print(
    "boxes: localisation is measured"
    if boxes is not None
    else "no boxes: localisation is left out"
)

# %% [markdown]
# The probability of the predicted class on whole images, and on those that the curves end at. Where the fill leaves it
# high, curves with that fill are flat and say little.

# %%
import pandas as pd

kept = {
    seed: {fill: ends.mean(0).tolist() for fill, ends in bench.ends.items()}
    for seed, bench in benches.items()
}
kept = pd.DataFrame(kept).rename_axis("fill").rename_axis("seed", axis=1)
kept.map(lambda ends: "{:.3f} to {:.3f}".format(*ends))

# %% [markdown]
# On digits a blurred image keeps most of the probability: what is left of a digit still looks like one. So read the
# columns with the mean colour, and take the blurred ones as a warning that a fill decides what a curve can show.

# %% [markdown]
# ## Measured
#
# A record for each measure of an attribution. The null of ours are its own segments in random order; of other
# attributions random pixels, or random cells of the last block enlarged as they are. Of localisation it is the box's
# share of the image, of exact deletion the straight line. Both random orders are controls, too; of the other two one
# sees no image, one no network.

# %% tags=["hide-input"]
rows, nulls, costs = [], {}, []


def add(seed, method, att, values, null, seconds=0.0, scale="", draw=0):
    of = {"method": method, "scale": scale, "draw": draw, "seed": seed}
    if seconds:
        costs.append({**of, "seconds": seconds})
    of |= {"grid": "x".join(map(str, att.shape[1:])), "images": len(att)}
    rows.extend({**of, **record} for record in faithfulness.summary(values, null))


for seed, bench in benches.items():
    generator = torch.Generator().manual_seed(seed)
    for name, size in (
        ("random pixels", bench.x.shape[2:]),
        ("random cells", bench.h.shape[2:]),
    ):
        att = torch.rand(len(bench.x), *size, generator=generator)
        nulls[seed, name] = bench.null(att, smooth=name == "random cells")
        add(seed, name, att, nulls[seed, name], nulls[seed, name])
    for name, att in (
        ("centre", faithfulness.centre(bench.x)),
        ("edges", faithfulness.edges(bench.x)),
    ):
        add(seed, name, att, bench.measure(att), nulls[seed, "random pixels"])

# %% [markdown]
# Ours, with the seconds of an image, its pass included. Of B4 all factors are the same.

# %% tags=["hide-input"]
import time

from kmex_utils.method.attribution import attribution, carried


def attributed(explained, bench, b):
    """The map q_s(b:) and att(b:) of the images, for the bench's classes."""
    part = Explained(explained.network, None, explained.settings)
    part.explainers = {
        other: explainer
        for other, explainer in explained.explainers.items()
        if other >= b
    }
    seen = part.see_inputs(bench.x)
    att = attribution(seen.h, part.network.c.detach()[bench.target].cpu())
    return seen.maps[b], carried(att, seen.maps)[b]


# %%
of_ours = {}  # map and attribution
for seed, bench in benches.items():
    for scale, draw, explained in explainers[seed]:
        for b in (
            explained.start_blocks if scale == scales[0] else explained.start_blocks[1:]
        ):
            start = time.perf_counter()
            q_s, att = of_ours[seed, scale, draw, b] = attributed(explained, bench, b)
            seconds, key = (time.perf_counter() - start) / len(att), (seed, scale, b)
            if key not in nulls:  # refits are measured against the first fit's
                nulls[key] = bench.null(att)
            add(
                seed,
                explained.name(b),
                att,
                bench.measure(att),
                nulls[key],
                seconds,
                scale,
                draw,
            )

# %% [markdown]
# ## What it is compared with
#
# CAM is eq. 11 as it is. captum's Grad-CAM, Integrated Gradients (50 steps from the mean colour) and occlusion (windows
# of a seventh of the side, half of it apart) as they come, added up over channels. LayerCAM is captum's gradient times
# activation, its positive part added up over channels, at the last block and at the second. RISE follows its paper.

# %% tags=["hide-input"]
from captum.attr import (
    IntegratedGradients,
    LayerGradCam,
    LayerGradientXActivation,
    Occlusion,
)


def others(bench):
    """Functions from images and classes to attributions, by name."""
    network = bench.network
    second, last = (network.module.get_submodule(network.blocks[b]) for b in (1, -1))
    windows, strides = (
        (3, *(max(1, side // n) for side in network.input.size)) for n in (7, 14)
    )
    slide = {
        "sliding_window_shapes": windows,
        "strides": strides,
        "perturbations_per_eval": 16,
    }
    gradients = [LayerGradientXActivation(network, layer) for layer in (last, second)]
    return {
        "CAM": lambda x, j: attribution(network.activations(x)[-1], network.c[j]),
        "Grad-CAM": lambda x, j: LayerGradCam(network, last).attribute(
            x, j, relu_attributions=True
        )[:, 0],
        "LayerCAM": lambda x, j: gradients[0].attribute(x, j).relu().sum(1),
        "LayerCAM, block 2": lambda x, j: gradients[1].attribute(x, j).relu().sum(1),
        "Integrated Gradients": lambda x, j: (
            IntegratedGradients(network)
            .attribute(x, target=j, internal_batch_size=32)
            .sum(1)
        ),
        "occlusion": lambda x, j: (
            Occlusion(network).attribute(x, target=j, **slide).sum(1)
        ),
        "RISE": lambda x, j: faithfulness.rise(bench.y, x, j, rise_masks),
    }


# %% [markdown]
# Each on ten images at a time. Maps of a block are enlarged bilinearly, as is their custom.

# %%
for seed, bench in benches.items():
    for name, method in others(bench).items():
        start, made = time.perf_counter(), []
        for x, target in zip(bench.x.split(10), bench.target.split(10), strict=True):
            made.append(method(x.clone().requires_grad_(), target).detach().float())
        seconds, att = (time.perf_counter() - start) / len(bench.x), torch.cat(made)
        null = nulls[
            seed, "random pixels" if name == "Integrated Gradients" else "random cells"
        ]
        add(seed, name, att, bench.measure(att, smooth="CAM" in name), null, seconds)

# %% [markdown]
# ## Ties broken at random
#
# What metrics print that rank single pixels: deletion of ours in several random orders of tied pixels. They stay within
# the segments but leave them in holes, which disturbs a network in another way than a segment that goes at once.

# %%
for (seed, scale, draw, b), (_, att) in of_ours.items():
    for order in range(tie_orders if draw == 0 else 0):
        values = {"deletion, ties at random": benches[seed].with_ties_broken(att)}
        null = {
            "deletion, ties at random": nulls[seed, "random pixels"][
                "deletion, mean colour"
            ]
        }
        add(
            seed,
            explainers[seed][0][2].name(b),
            att,
            values,
            null,
            scale=scale,
            draw=order,
        )

# %% [markdown]
# ## Does it depend on the network at all?
#
# The network is randomised from the head down, block by block, and prototypes are fitted anew (the first factor). Maps
# are compared with the original by adjusted Rand index, attributions by Spearman's correlation: both must fall. A refit
# of the network as it is says how far they can agree.

# %%
for seed, bench in benches.items():
    run, last = Run.of(runs, dataset, seed), len(bench.network.blocks)
    stages = [("refit", explainers[seed][len(scales)][2])] if refits else []
    for block in range(last + 1, 0, -1):
        network = faithfulness.randomised(bench.network, block, seed).to(device)
        passed = Passed.of(network, parts[seed], start_block, device=device)
        stages.append(
            (
                "head" if block > last else f"block {block}",
                next(fitted(run, network, passed))[2],
            )
        )
    for stage, explained in stages:
        for b in explained.start_blocks:
            map_before, before = of_ours[seed, scales[0], 0, b]
            q_s, att = attributed(explained, bench, b)
            values = {
                f"adjusted Rand, {stage}": faithfulness.adjusted_rand(map_before, q_s)
            }
            values[f"Spearman, {stage}"] = faithfulness.spearman(before, att)
            null = dict.fromkeys(values, torch.zeros(len(att)))
            add(seed, explained.name(b), att, values, null, scale=scales[0])

# %% [markdown]
# ## The table
#
# Means over images and trainings; `spread` in the file is the standard error over images. What an image costs is a file
# of its own, as it changes from run to run.

# %%
from kmex_utils import paths
from kmex_utils.store import save_text

folder, records = paths.resolve(figures_folder) / dataset, pd.DataFrame(rows)
first = [
    "method",
    "scale",
    "draw",
    "measure",
    "value",
    "spread",
    "null",
    "margin_spread",
]
records = records[[*first, "seed", "grid", "images"]]
save_text(folder / "faithfulness.csv", records.to_csv(index=False, float_format="%.6g"))
costs = pd.DataFrame(costs)
save_text(
    folder / "faithfulness-seconds.csv", costs.to_csv(index=False, float_format="%.3g")
)
for table in (records, costs):
    table["shown"] = table.method + table.scale.map(
        lambda scale: f", {scale}" if scale else ""
    )
values = records[
    (records.draw == 0) & ~records.measure.str.contains("Rand|Spearman|ties")
]
values.pivot_table(index="shown", columns="measure", values="value", sort=False).round(
    3
)

# %% [markdown]
# Do not compare these values between methods: one that goes pixel by pixel and one that goes quarter by quarter have
# curves of other shapes, whatever their order.
#
# The same less the null. Large pieces give another curve than pixels whatever their order, so this is what can be
# compared between grids: where it is zero, the order says nothing.

# %%
margins = values.assign(margin=values.value - values.null)
margins.pivot_table(
    index="shown", columns="measure", values="margin", sort=False
).round(3)

# %% [markdown]
# Low is good for deletion and ROAD, so what works is negative there. On the digits the methods that ask the network
# pixel by pixel or at block 2 are; B4, CAM and Grad-CAM are not. All three are eq. 11 on 2 x 2 positions, and each
# position of $h$ has seen the whole digit: where it speaks most for the class is not where the strokes are. In exact
# deletion, which takes rows of $h$ and not pixels, they are on the right side.
#
# Differences smaller than the noise floor, the standard deviation over refits, are none:

# %%
refitted = records[(records.scale == scales[0]) & records.measure.isin(values.measure)]
floor = refitted.groupby(["measure", "method", "seed"], sort=False)["value"].std()
floor.groupby(level=[0, 1], sort=False).mean().unstack(0).round(3)

# %% [markdown]
# The same map under other orders of its tied pixels: the mean and the spread over orders, beside ties that go together.

# %%
broken = records[records.measure == "deletion, ties at random"].groupby(
    "shown", sort=False
)["value"]
broken = broken.agg(["mean", "std"])
together = (
    values[values.measure == "deletion, mean colour"]
    .groupby("shown")["value"]
    .mean()
    .rename("together")
)
broken.join(together).round(3)

# %% [markdown]
# A tool that ranks single pixels prints the first column, and another value for another order in memory. It measures
# segments with holes, not the map.
#
# The sanity check: how far maps and attributions agree with the original's.

# %%
checked = records[records.measure.str.contains("Rand|Spearman")]
checked.pivot_table(
    index="measure", columns="method", values="value", sort=False
).round(2)

# %% [markdown]
# With a random head maps stay as they are, as they must: they do not see it. Attributions lose all correlation at once.
# As blocks go, the maps of B34 and B234 fall, at last far below what a refit reaches. B4's stay on the digits, for four
# positions in four segments are one partition whatever the prototypes. So where a map can tell, it depends on the
# network and not on the image alone.

# %% [markdown]
# ## The picture
#
# A mark for each attribution, a line where its null lies. The bar is two standard errors of the difference between the
# two, image by image: where it reaches the line, the order of the pieces says nothing. With few images most do.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils import drawing
from kmex_utils.paper.figures import look

plt.style.use(drawing.STYLE)
panels = {
    "deletion, mean colour": "low",
    "insertion, blur": "high",
    "ROAD": "low",
    "exact deletion": "low",
}
panels |= {
    name: "high"
    for name in ("pointing game", "energy inside")
    if name in set(values.measure)
}
names = list(dict.fromkeys(values.shown))[::-1]
figure, axes = plt.subplots(
    1, len(panels), figsize=(1.6 * len(panels) + 2.6, 0.2 * len(names) + 1), sharey=True
)
for panel, (measure, good) in zip(axes, panels.items(), strict=True):
    of = values[values.measure == measure].groupby(["shown", "method"], sort=False)
    for (shown, method), row in (
        of[["value", "null", "margin_spread"]].mean().iterrows()
    ):
        style = {**look(method), "markersize": 4, "linestyle": ""}
        panel.errorbar(
            row.value,
            names.index(shown),
            xerr=2 * row.margin_spread,
            elinewidth=0.9,
            **style,
        )
        panel.plot(row.null, names.index(shown), marker="|", color="0.2", markersize=7)
    panel.set_title(f"{measure}\n({good} is good)", fontsize=8)
    panel.locator_params(axis="x", nbins=3)
axes[0].set_yticks(range(len(names)), names)
drawing.save(figure, folder / "faithfulness")

# %% [markdown]
# Most bars of ours reach their null: with five digits the order of their segments cannot be told from a random one.
# Exact deletion is the exception. On images where an object has a place, the measures separate more; [notebook
# 12](12_your_own_model.ipynb) takes them of your own.
#
# What an image costs, in seconds:

# %%
costs.groupby("shown", sort=False)["seconds"].mean().map("{:.3f}".format).to_frame()

# %% [markdown]
# Ours is the pass through the network and little more. What asks the network again and again, such as RISE or
# Integrated Gradients, costs many times that.
