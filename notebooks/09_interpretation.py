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
# Each image receives two explanations. The *explanation map* shows which prototype each position is closest to. The
# *attribution* says how much each segment speaks for the network's class $j$ (eq. 11),
#
# $$\mathrm{att}(h_{wh}, c_j) = \frac{h_{wh}\cdot c_j}{\lVert c_j\rVert^2},$$
#
# carried up to shallower blocks without gradients: upsample $\mathrm{att}^{(b+1:)}$ to block $b$'s grid and average it
# over each segment of $q_s^{(b:)}$.

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain
image: int = 7  # index in the test split
target: str = ""  # class to attribute to; empty: the network's prediction
start_blocks: list[int] = [4, 2]  # explainers drawn from left to right: 4 is B4, 2 is B234
baseline: bool = False  # also draw the prototypes of ProtoPNet (05_protopnet) that the image activates most
closer: int = 0  # pixels of a second, short training for a closer look, e.g. 112 for digits of 56; 0: none
attribution_start: str = "segments"  # att(4:) averaged over B4's segments, or raw: eq. 11 as it is
device: str = "auto"  # of the closer look: cpu, cuda, mps, or auto
threads: int = 0  # of the closer look; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # the figure goes to <figures_folder>/<dataset>/

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils.method.explainers import block_name
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
images = run.dataset()
explained = run.explained(needs={block_name(b): "04_encoder" for b in range(min(start_blocks), 5)})
explained

# %% [markdown]
# ## One image
#
# The map's colours are the borders of the patches: for each prototype the closest training example, with the segment
# it lies in outlined. Above each patch, the prototype's class, the share of the image it covers and the points that
# its segment adds to the score. Red is more attribution than the map's own mean, blue less: behind a ReLU nearly every
# position speaks for the class. Where zero lies is ticked beside the scale, or pointed to.

# %%
from kmex_utils import drawing, paths

if not 0 <= image < len(images.test):
    raise ValueError(f"image must be an index of the {len(images.test)} test images, got {image}")
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
# ## In numbers
#
# The segments of each map with the attribution they share and the points they add to the score; those of all segments
# of a map sum to the score without its bias.

# %%
import pandas as pd

rows = []
for result in explained.interpretations(picture, start_blocks, target, attribution_start=attribution_start):
    for patch in result.patches:
        attribution = result.attribution[result.map == patch.prototype].mean()
        segment = (result.name, patch.prototype, patch.class_name, 100 * patch.share)
        rows.append((*segment, attribution, patch.contribution))
columns = ["explainer", "prototype", "class", "share (%)", "attribution", "points of the score"]
pd.DataFrame(rows, columns=columns).round(2)

# %% [markdown]
# ## The baseline's explanation
#
# Asked for with `baseline`: the learned prototypes that the image activates most, beside the patches above.

# %%
from kmex_utils.paper import figures
from kmex_utils.training import protopnet

if baseline:
    j = int(explained.target(target, explained.seen(picture))[0, 0])
    learned = protopnet.load(run.network(), *run.part("ProtoPNet", "05_protopnet"))
    j, activated = protopnet.most_activated(learned, images, images.test.pixels[image], target=j if target else None)
    title = f"ProtoPNet: {dataset}, test image {image} ({truth})"
    figure = figures.most_activated(images.test.rgb(image), images.classes[j], activated, title)
    drawing.save(figure, paths.resolve(figures_folder) / dataset / "figure1-protopnet")
figure if baseline else None

# %% [markdown]
# ## A closer look
#
# On images as small as the embedded digits B4's map has 2 x 2 positions. Asked for with `closer`: the same network,
# trained on for one epoch at that size with 200 images a class, and prototypes from 50. No table uses it. Beside B4
# stands B234 twice: with equal weights (1) its segments are strokes of the digit and what surrounds them; with the
# printed $1/D_b$ (1/D) the shallowest block decides, and segments of other digits come in.

# %%
from dataclasses import replace

from kmex_utils import data, hardware, networks
from kmex_utils.explanation.figure1 import figure1
from kmex_utils.explanation.fit import explain
from kmex_utils.training.sgd import Schedule, train


def enlarged(images_per_class):
    """The training's images at ``closer`` pixels, the first of each class."""
    settings = run.settings()["data"]
    larger = settings["input"] | {"image_size": closer}
    return data.reopen({**settings, "input": larger, "images_per_class": images_per_class})


def trained_on(images):
    """The network, trained for another epoch at their size."""
    began = run.settings()
    how = {"arch_args": began["arch_args"], "seed": seed, "bias": began["bias"]}
    network = networks.for_training(
        began["arch"], images.classes, str(run.folder / "weights.safetensors"), images.input, **how
    )
    checkpoint = run.folder / "training-closer.safetensors"
    precision = str(hardware.training_dtype("auto", on)).removeprefix("torch.")
    options = {
        "seed": seed,
        "precision": precision,
        "device": on,
        "made_by": {"closer": closer, "network": began["network"]},
    }
    train(network, images, Schedule(1, 32, 0.005, momentum=0.9), checkpoint=checkpoint, **options)
    return network.cpu()


# %% [markdown]
# The learning rate is half the recipe's, as the network has been trained already.

# %%
if closer:
    on, _ = hardware.pick_device(device), hardware.set_threads(threads)
    network, few, parts = trained_on(enlarged(200)), enlarged(50), []
    for scale, blocks in (("1", [4, 2]), ("1/D", [2])):
        near = explain(network, few, scale=scale, prototypes_per_class=5, seed=seed, device=device)
        enlarged_image = near.picture(images.test.rgb(image))
        for part in near.interpretations(enlarged_image, blocks, target):
            parts.append(part if part.name == "B4" else replace(part, name=f"{part.name}, {scale}"))
    figure = figure1(enlarged_image.rgb, parts, f"{dataset} at {closer} pixels, test image {image} ({truth})")
    drawing.save(figure, paths.resolve(figures_folder) / dataset / "figure1-closer")
figure if closer else None
