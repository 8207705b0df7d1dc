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
# # 9. The interpretation process (Figure 1)
#
# Each image receives two explanations. The *explanation map* $q_s$ of [notebook 4](04_encoder.ipynb) shows which
# prototype each position is closest to. The *attribution* says how much it speaks for the network's class $j$ (eq. 11),
#
# $$\mathrm{att}(h_{wh}, c_j) = \frac{h_{wh}\cdot c_j}{\lVert c_j\rVert^2}, \qquad \mathrm{att}(c_j, c_j) = 1 .$$
#
# Up to a factor it is the share of Theorem 1 ([notebook 2](02_cnn_as_sem.ipynb)). It has the coarse grid of $h$, and no
# gradient is needed to refine it. At each depth, from the last block up,
#
# 1. take the explanation map $q_s^{(b:)}$;
# 2. upsample $\mathrm{att}^{(b+1:)}$ to its grid;
# 3. average over each segment, all positions $S_r$ that have the prototype of $r$:
#    $\;\mathrm{att}^{(b:)}_r = \frac1{|S_r|}\sum_{r' \in S_r} \mathrm{att}^{(b+1:,\mathrm{up})}_{r'} .$
#
# In [attribution.py](../kmex_utils/method/attribution.py) eq. 11 is one line and the steps are the loop of `carried`,
# `att = segment_mean(upsample(att, grid), maps[b])`.

# %% tags=["parameters"]
# What the paper leaves open
attribution_start: str = "segments"  # att(4:) over B4's segments, or raw: eq. 11
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain
threads: int = 0  # of the closer look; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # output goes to <figures_folder>/<dataset>/
# What you may change
image: int = 7  # index in the test split
target: str = ""  # class to attribute to; empty: the network's prediction
start_blocks: list[int] = [4, 2]  # drawn from left to right: 4 is B4, 2 is B234
baseline: bool = False  # also the most activated prototypes of 05_protopnet
closer: int = 0  # pixels of a closer look, after a second training; 0: none
device: str = "auto"  # of the closer look: cpu, cuda, mps, or auto

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils.method.explainers import block_names
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
images = run.dataset()
explained = run.explained(
    needs=dict.fromkeys(block_names(start_blocks, run.blocks).values(), "04_encoder")
)
explained

# %% [markdown]
# ## One image
#
# A colour of the map is a prototype, and the border of its patch has the same colour: the closest training example,
# with the segment it lies in outlined. Above each patch stand the prototype's class, the share of the image it covers
# and the points that its segment adds to the score. In the attribution red is more than the map's own mean and blue
# less, for behind a ReLU nearly every position speaks for the class. The scale says where zero lies.

# %%
from kmex_utils import drawing, paths

if not 0 <= image < len(images.test):
    raise ValueError(
        f"image must be an index of the {len(images.test)} test images, got {image}"
    )
truth = images.classes[images.test.labels[image]].replace("_", " ")
picture = explained.picture(images.test.rgb(image))
figure = explained.panel(
    picture,
    start_blocks,
    target,
    title=f"{dataset}, test image {image} ({truth})",
    attribution_start=attribution_start,
)
drawing.save(figure, paths.resolve(figures_folder) / dataset / "figure1")
figure

# %% [markdown]
# B4 sees the digit as four quarters, each closest to the same quarter of another 7: what it shows is right and says
# little. B234 cuts finer, into strokes and what surrounds them. The larger segments are of the image's class; some
# small ones are closest to patches of other digits, mostly empty ground or a piece of stroke that digits share. That is
# the printed factor at work, as in [notebook 4](04_encoder.ipynb). Attribution differs little over the image: the scale
# is far from zero, so the whole digit speaks for its class.

# %% [markdown]
# ## In numbers
#
# The segments of each map, the attribution of each and the points it adds to the score. With $w_r$ the share of
# position $r$ of $h$ that a segment covers, its points are $\frac1R\sum_r w_r\, h_r \cdot c_j$ (`contributions` in
# [attribution.py](../kmex_utils/method/attribution.py)).

# %%
import pandas as pd

rows = []
for result in explained.interpretations(
    picture, start_blocks, target, attribution_start=attribution_start
):
    for patch in result.patches:
        attribution = result.attribution[result.map == patch.prototype].mean()
        segment = (result.name, patch.prototype, patch.class_name, 100 * patch.share)
        rows.append((*segment, attribution, patch.contribution))
columns = [
    "explainer",
    "prototype",
    "class",
    "share (%)",
    "attribution",
    "points of the score",
]
pd.DataFrame(rows, columns=columns).round(2)

# %% [markdown]
# Points go with the share of the image, since attribution is nearly even. The points of all segments sum to the
# network's score, in B4 as in B234: depth cuts the same score into finer pieces. A segment of a prototype of another
# class has positive points, too. The map says what a position looks like, the points what the network makes of it.

# %% [markdown]
# ## The baseline's explanation
#
# Asked for with `baseline`: the prototypes of [ProtoPNet](05_protopnet.ipynb) that the image activates most. It names a
# few patches that match well; the maps above say something of every position.

# %%
from kmex_utils.paper import figures
from kmex_utils.training import protopnet

if baseline:
    j = int(explained.target(target, explained.seen(picture))[0, 0])
    learned = protopnet.load(run.network(), *run.part("ProtoPNet", "05_protopnet"))
    j, activated = protopnet.most_activated(
        learned, images, images.test.pixels[image], target=j if target else None
    )
    title = f"ProtoPNet: {dataset}, test image {image} ({truth})"
    figure = figures.most_activated(
        images.test.rgb(image), images.classes[j], activated, title
    )
    drawing.save(figure, paths.resolve(figures_folder) / dataset / "figure1-protopnet")
figure if baseline else None

# %% [markdown]
# ## A closer look
#
# On images as small as the embedded digits B4's map has 2 x 2 positions. `closer` asks for larger ones: the same
# network is trained for one more epoch at that size with 200 images a class, and prototypes come from 50. No table uses
# it. The learning rate is half the recipe's, as the network has been trained already.

# %% tags=["hide-input"]
from dataclasses import replace

from kmex_utils import data, hardware, networks
from kmex_utils.explanation.figure1 import figure1
from kmex_utils.explanation.fit import explain
from kmex_utils.training.sgd import Schedule, train


def enlarged(images_per_class):
    """The training's images at ``closer`` pixels, the first of each class."""
    settings = run.settings()["data"]
    larger = settings["input"] | {"image_size": closer}
    return data.reopen(
        {**settings, "input": larger, "images_per_class": images_per_class}
    )


def trained_on(images):
    """The network, trained for another epoch at their size."""
    began = run.settings()
    how = {"arch_args": began["arch_args"], "seed": seed, "bias": began["bias"]}
    network = networks.for_training(
        began["arch"],
        images.classes,
        str(run.folder / "weights.safetensors"),
        images.input,
        **how,
    )
    checkpoint = run.folder / "training-closer.safetensors"
    precision = str(hardware.training_dtype("auto", on)).removeprefix("torch.")
    options = {
        "seed": seed,
        "precision": precision,
        "device": on,
        "made_by": {"closer": closer, "network": began["network"]},
    }
    train(
        network,
        images,
        Schedule(1, 32, 0.005, momentum=0.9),
        checkpoint=checkpoint,
        **options,
    )
    return network.cpu()


# %%
if closer:
    on, _ = hardware.pick_device(device), hardware.set_threads(threads)
    network, few, parts = trained_on(enlarged(200)), enlarged(50), []
    for scale, blocks in (("1", [4, 2]), ("1/D", [2])):
        near = explain(
            network, few, scale=scale, prototypes_per_class=5, seed=seed, device=device
        )
        enlarged_image = near.picture(images.test.rgb(image))
        for part in near.interpretations(enlarged_image, blocks, target):
            parts.append(
                part
                if part.name == "B4"
                else replace(part, name=f"{part.name}, {scale}")
            )
    figure = figure1(
        enlarged_image.rgb,
        parts,
        f"{dataset} at {closer} pixels, test image {image} ({truth})",
    )
    drawing.save(figure, paths.resolve(figures_folder) / dataset / "figure1-closer")
figure if closer else None

# %% [markdown]
# `make reproduce` draws it at 112 pixels ([figure](../figures/mnist-mini/figure1-closer.png)). B4 has the middle of the
# digit and four sides. B234 with equal weights (1) has the bar of the 7, its stem and the ground around them as
# segments of their own, nearly all of them closest to sevens; the bar has the highest attribution. With the printed
# $1/D_b$ (1/D) the shallowest block decides, the map falls into small pieces and many are closest to other digits. What
# such maps are worth is asked in notebooks [16](16_fidelity.ipynb) (do prototypes mean parts?),
# [17](17_faithfulness.ipynb) (does the attribution point at what the network uses?) and [19](19_certainty.ipynb) (would
# the map come out again?).
