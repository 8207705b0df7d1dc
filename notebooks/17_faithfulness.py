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
# The paper's attribution (eq. 11) is averaged over segments, depth after depth. Here pixels are taken away in the order
# of an attribution, and the probability of the predicted class is watched: the sooner it falls, the more the pixels
# that went first mattered. Ours from every start block stand beside what is in use, and beside controls.
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

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seeds: list[int] = []  # trainings to study; empty: all there are
start_block: int = 1  # the shallowest to explain from; 1: B1234 and all before it
scales: list[str] = ["1/D", "1/sqrt(D)", "1"]  # factors of eq. 8
prototypes_per_class: int = 0  # K/C; 0: the data set's own
fit_on: int = 20  # prototypes come from the first so many training images of each class; 0: from all
restarts: int = 2  # of k-means; the best is kept
refits: int = 1  # further clusterings by the first factor, for the noise floor
images: int = 4  # test images, drawn by the training's seed (100 for numbers to trust)
steps: int = 5  # of a curve (20 for numbers to trust)
tie_orders: int = 2  # random orders of tied pixels, for ours
rise_masks: int = 100  # of RISE (1000 for numbers to trust)
annotations: str = ""  # boxes as a table or a folder of masks; empty: CUB-200's own, else none and no localisation
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where 01_train left its results
figures_folder: str = "figures"  # the table and the figure go to <figures_folder>/<dataset>/

# %%
from kmex_utils import hardware, parameters
from kmex_utils.method.composite import Normalisation
from kmex_utils.paper.runs import Run, trained_seeds

settings = parameters.check(globals())
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
normalisations = {scale: Normalisation(scale=scale) for scale in scales}
all_runs = [Run.of(runs, dataset, seed) for seed in seeds or trained_seeds(runs, dataset)]
if min(images, steps, rise_masks) < 2:
    raise ValueError(f"images, steps and rise_masks must be at least 2, got {images}, {steps} and {rise_masks}")

# %% [markdown]
# ## The images
#
# Prototypes come from training images alone; the test images are drawn by the training's seed.

# %%
from dataclasses import replace

import torch

from kmex_utils.data import annotations as known
from kmex_utils.data.dataset import Images


def some(whole, seed):
    """The data set of those images alone, and the boxes of the test images, or None."""
    labels = whole.train.labels
    first = [(labels == c).nonzero().flatten()[: fit_on or None] for c in range(len(whole.classes))]
    drawn = torch.randperm(len(whole.test), generator=torch.Generator().manual_seed(seed))[:images].sort().values
    parts = {}
    for split, index in (("train", torch.cat(first).sort().values), ("test", drawn)):
        of, i = whole.split(split), index.numpy()
        parts[split] = Images(of.pixels[i], of.labels[index], tuple(of.names[n] for n in i))
    has_boxes = annotations or (whole.settings["source"] == "cub200" and not whole.settings["crop"])
    return replace(whole, **parts), known.boxes(whole, annotations)["test"][drawn] if has_boxes else None


# %% [markdown]
# ## Ours
#
# Maps and att(b:) of the predicted class from every start block, with the seconds of an image, pass included.

# %%
import time

from kmex_utils.explanation.explained import Explained
from kmex_utils.method.attribution import attribution, carried


def explained_by(network, passed, normalisation, k, seed):
    explained = Explained(network, None, {"dataset": dataset, "classes": passed.classes})
    for b in range(passed.blocks, start_block - 1, -1):
        options = {"seed": seed, "restarts": restarts}
        explained.explainers[b] = passed.fit_encoder(b, normalisation, k, **options)
    return explained


def ours(explained, x, target):
    """For each start block: map, att(b:), seconds of an image."""
    network, explainers = explained.network.to(device), explained.explainers
    for b in explained.start_blocks:
        start = time.perf_counter()
        explained.explainers = {other: explainers[other] for other in explainers if other >= b}
        seen = explained.see_inputs(x)
        att = carried(attribution(seen.h, network.c[target].detach().cpu()), seen.maps)[b]
        yield b, seen.maps[b], att, (time.perf_counter() - start) / len(x)
    explained.explainers = explainers


# %% [markdown]
# ## What it is compared with
#
# captum's Grad-CAM, Integrated Gradients (50 steps from the mean colour) and occlusion (a seventh of the side, by half of
# it) as they come, attributions added up over channels. LayerCAM is captum's gradient times activation, its positive
# part added up over channels, at the last block and at the second. RISE follows its paper. CAM is eq. 11 as it is.

# %%
from captum.attr import IntegratedGradients, LayerGradCam, LayerGradientXActivation, Occlusion

from kmex_utils.evaluation import faithfulness


def others(network, y):
    """Functions from images and classes to attributions, by name."""
    second, last = (network.module.get_submodule(network.blocks[b]) for b in (1, -1))
    window = [max(1, side // 7) for side in network.input.size]
    sliding = {"sliding_window_shapes": (3, *window), "strides": (3, *(max(1, side // 2) for side in window))}

    def layer_cam(x, j, layer=last):
        return LayerGradientXActivation(network, layer).attribute(x, j).relu().sum(1)

    return {
        "CAM": lambda x, j: attribution(network.activations(x)[-1], network.c[j]),
        "Grad-CAM": lambda x, j: LayerGradCam(network, last).attribute(x, j, relu_attributions=True)[:, 0],
        "LayerCAM": layer_cam,
        "LayerCAM, block 2": lambda x, j: layer_cam(x, j, second),
        "Integrated Gradients": lambda x, j: (
            IntegratedGradients(network).attribute(x, target=j, internal_batch_size=len(x)).sum(1)
        ),
        "occlusion": lambda x, j: Occlusion(network).attribute(x, target=j, perturbations_per_eval=8, **sliding).sum(1),
        "RISE": lambda x, j: faithfulness.rise(y, x, j, rise_masks),
    }


# %% [markdown]
# Each on ten images at a time, with the seconds of one. The controls know no network, or no image, or neither.

# %%
SMOOTH = ("CAM", "Grad-CAM", "LayerCAM", "LayerCAM, block 2", "random cells")  # shown enlarged bilinearly
PIXELS = ("Integrated Gradients", "edges", "random pixels")  # their pieces are pixels, those of the others cells


def timed(method, x, target):
    start, parts = time.perf_counter(), []
    for images_of, classes in zip(x.split(10), target.split(10), strict=True):
        parts.append(method(images_of.clone().requires_grad_(), classes).detach().float())
    return torch.cat(parts), (time.perf_counter() - start) / len(x)


def controls(x, grid, seed):
    generator = torch.Generator().manual_seed(seed)
    random = {"random pixels": x.shape[2:], "random cells": grid}
    drawn = {name: torch.rand(len(x), *size, generator=generator).to(x.device) for name, size in random.items()}
    return {**drawn, "centre": faithfulness.centre(x), "edges": faithfulness.edges(x)}


# %% [markdown]
# ## Measured
#
# One attribution by all measures, image by image. For ours the null is the attribution's own segments in random order;
# for others random pixels or random cells of the last block; for localisation the box's share of the image, for exact
# deletion the straight line.


# %%
def measured(att, smooth, x, target, y, boxes, effect):
    """Values [N] by measure; ``effect`` gives what each position of a grid is worth."""
    sized = faithfulness.at_pixels(att, x.shape[2:], smooth)
    values = faithfulness.curves(y, x, target, sized, steps)
    values["exact deletion"] = faithfulness.exact_deletion(att, effect(att.shape[1:]))
    if boxes is not None:
        inside = faithfulness.localisation(sized, boxes.to(x))
        values |= {measure: inside[measure] for measure in ("pointing game", "energy inside")}
    return values


def ties(att, x, target, y, seed):
    """Deletion with ties broken at random, once for each order."""
    sized, generator = faithfulness.at_pixels(att, x.shape[2:]), torch.Generator().manual_seed(seed)
    for _ in range(tie_orders):
        step = faithfulness.steps_of(faithfulness.shuffled_ties(sized, generator), steps)
        yield faithfulness.area(y, x, target, step, faithfulness.mean_colour(x))


# %% [markdown]
# All attributions of one training. `draw` counts refits and tie orders; its first is 0.


# %%
def study(run):
    """Records of every method and measure."""
    (data, boxes), network = some(run.dataset(), run.seed), run.network()
    passed = Passed.of(network, data, start_block, device=device)
    x, y = data.input(data.test.pixels, device), faithfulness.probabilities(network.to(device))
    target, h = passed.y["test"].argmax(1).to(device), passed.x["test"].read(torch.arange(len(x)), passed.blocks)[0]
    mean, columns = passed.z("train").mean(0), network.c.detach().cpu()[target.cpu()]
    known = {"x": x, "target": target, "y": y, "boxes": boxes}
    known["effect"] = lambda grid: faithfulness.effects(h, columns, mean, grid).to(device)
    fixed = {"exact deletion": 0.5}
    if boxes is not None:
        share = faithfulness.localisation(torch.ones(x[:, 0].shape), boxes)["box"]
        share[boxes.isnan().any(1)] = torch.nan
        fixed |= {"pointing game": share, "energy inside": share}

    def records(method, att, values, null, seconds, scale="", draw=0):
        of = {"method": method, "scale": scale, "draw": draw, "seed": run.seed, "images": len(x), "seconds": seconds}
        of["grid"] = "x".join(map(str, att.shape[1:]))
        return [{**of, **record} for record in faithfulness.summary(values, {**null, **fixed})]

    rows, nulls = [], {}
    for name, att in controls(x, h.shape[2:], run.seed).items():
        values = measured(att, name in SMOOTH, **known)
        nulls[name] = values if name.startswith("random") else {}
        rows += records(name, att, values, nulls["random pixels" if name in PIXELS else "random cells"], 0.0)
    for name, method in others(network, y).items():
        att, seconds = timed(method, x, target)
        values = measured(att, name in SMOOTH, **known)
        rows += records(name, att, values, nulls["random pixels" if name in PIXELS else "random cells"], seconds)
    return rows
