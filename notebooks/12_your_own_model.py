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
# # 12. Your own model, your own images
#
# The paper's explanations are computed after training, from a frozen network. So they need nothing but a network of
# the form of eq. 1 and 2,
#
# $$x \xrightarrow{\;\mathrm{enc}\;} h \xrightarrow{\;\mathrm{avg.\,pool}\;} z \xrightarrow{\;\mathrm{clf}\;} y,$$
#
# and a folder of images. With the defaults, this notebook explains the network that notebook 1 trained on the embedded
# digits; name a model and a folder to explain yours.

# %% tags=["parameters"]
model: str = "runs/mnist-mini/seed-0"  # a torchvision name, timm/<name>, or the folder of a run
arch_args: dict = {}  # arguments of a model by name, e.g. {layers: [2, 2, 2, 3]} for timm/resnet18
weights: str = ""  # of a model by name: imagenet, random, or a file with a state dict; empty: imagenet
classes: str = ""  # text file with the names of the network's classes, one a line; empty: known, or numbers
blocks: list[str] = []  # modules that end the blocks; empty: the last output at each resolution
head: str = ""  # the module that gives the scores; empty: what the network returns
folder: str = ""  # <class>/*, or train/ and test/ with <class>/*, or images alone; empty: as in notebook 1
image_size: int = 0  # pixels; 0: the weights' own
mean: list[float] = []  # of RGB values in [0, 1], for normalisation; empty: the weights' own, else ImageNet's
std: list[float] = []  # the same
fit: str = ""  # crop (the centre square) or stretch; empty: crop, or as notebook 1 does for its own weights
start_block: int = 0  # the shallowest block to explain from; 0: the last three blocks (B234 of four)
prototypes_per_class: int = 5  # K/C, the same for every class
norm: str = "position"  # what ||u|| of eq. 8 runs over: position, channel or image
scale: str = "1"  # the factor beside it: 1 (equal weights), 1/sqrt(D) or 1/D (as printed)
align_corners: bool = False  # of the bilinear interpolation of eq. 7
grid: str = "shallowest"  # R' of eq. 7: that of the shallowest or deepest block, or double the shallowest's
held_out: float = 0.2  # share of each class kept from the prototypes where the folder has no test/
fit_on: int = 0  # prototypes from so many images of each class; 0: from all, which is slower and surer
restarts: int = 3  # of k-means; the best is kept
seed: int = 0  # of k-means and of the held-out images
image: str = ""  # index or name of the image looked at; empty: the first held-out one
annotations: str = ""  # of the images: keypoints or boxes as CSV, or a folder of masks; empty: none
refits: int = 1  # of k-means from other seeds, to see how sure maps are; each takes as long as the fit
target: str = ""  # class to attribute to; empty: the network's prediction
against: str = ""  # class whose attribution is subtracted, for a contrast of the two; empty: none
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
scratch: str = ""  # folder for temporary files of what does not fit in memory; empty: the system's
out: str = "runs/your-own-model"  # prototypes, table, report and export go here

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %% [markdown]
# ## The network
#
# It is run once on noise and watched: $y$ are the scores it returns, $h$ the maps whose average
# they are made of, and the blocks $x^{(1)}, x^{(2)}, \dots$ are the last outputs at each resolution on the way there.

# %%
import pandas as pd
import torch

import kmex_utils as kmex
from kmex_utils import paths

run_folder = paths.resolve(model)
is_run = (run_folder / "network.json").is_file()
if not folder and not is_run:
    raise ValueError(f"give folder, the images to explain {model} on: only a run of notebook 1 comes with a data set")
network = kmex.network(
    run_folder if is_run else model,
    weights if weights in ("", "imagenet", "random") else paths.resolve(weights),
    arch_args=arch_args,
    classes=paths.resolve(classes) if classes else "",
    blocks=blocks,
    head=head,
    image_size=image_size,
    mean=mean,
    std=std,
    fit=fit,
)
print(network.preprocessing())
channels, size = network.input.channels, network.input.size
x, y = network.outputs(torch.zeros(1, channels, *size))
shapes = [(name, u.shape[1], f"{u.shape[2]} x {u.shape[3]}") for name, u in zip(network.blocks, x, strict=True)]
numbers = [f"B{b}" for b in range(1, len(x) + 1)]
pd.DataFrame(shapes, numbers, ["ends at", "channels", "positions"])

# %% [markdown]
# ## Theorem 1, checked
#
# Most heads have a bias. The paper omits it "without loss of generality": give $h$ one channel more that is 1
# everywhere and $c_j$ the entry $b_j$ there; the average pool keeps the 1, and $y_j = z \cdot c_j + b_j$ has the form
# of eq. 2 again. So both sides of eq. 5 must agree up to rounding. Layer normalisation before the head leaves the
# columns and adds one factor an image (*scaled*); a head of several layers has columns of each image's own (*gated*).
# In any other form the theorem and eq. 11 do not hold; the k-means explanations do.

# %%
from kmex_utils.networks import theorem1_residual

noise = torch.randn(4, channels, *size, generator=torch.Generator().manual_seed(seed))
if network.form:
    residual = theorem1_residual(network, noise)
    print(f"{network.form}; largest difference, relative to the largest score: {residual:.1e}")
    assert residual < 1e-4
else:
    print(f"Theorem 1 does not hold: {network.between}")

# %% [markdown]
# ## Prototypes
#
# Class-wise k-means on the embeddings (KMEx) and on the composite of the last blocks (B4, B34 …), as in notebooks 3 and
# 4. Without labels, the network's own predictions stand in for them.

# %%
from kmex_utils.paper.runs import Run

images = paths.resolve(folder) if folder else Run.at(run_folder).dataset()
explained = kmex.explain(
    network,
    images,
    start_block=start_block,
    prototypes_per_class=prototypes_per_class,
    norm=norm,
    scale=scale,
    align_corners=align_corners,
    grid=grid,
    held_out=held_out,
    fit_on=fit_on,
    restarts=restarts,
    seed=seed,
    device=device,
    scratch=paths.resolve(scratch) if scratch else None,
)
explained

# %% [markdown]
# Cosines as in Table 1, accuracy as in Table 2 (agreement with the network where there are no labels).

# %%
explained.table.round(2)

# %% [markdown]
# ## Prototypes of a class
#
# Of each prototype of the first class the nearest training patch, then, as that flatters, a typical one and the
# weakest: of the class's images in which it has cells, the median and the last by distance. Above: in how many it has
# any.

# %%
from kmex_utils.drawing import image_grid

shallowest = explained.start_blocks[-1]
gallery = explained.gallery(shallowest)
of_class = [k for k in gallery.index[gallery["class"] == explained.classes[0]] if explained.sharing(shallowest, k)[0]]
of_class = of_class[:10]
patches = [explained.patch(shallowest, k, rank).pixels for rank in (0, "typical", "weakest") for k in of_class]
titles = ["{}: {} of {}".format(k, *explained.sharing(shallowest, k)) for k in of_class]
image_grid(patches, titles + ["typical"] * len(of_class) + ["weakest"] * len(of_class), columns=len(of_class))
# %% [markdown]
# How they are used in the held-out images: a prototype that serves more wrong than right predictions, lies mostly in
# `elsewhere`, or is close to another (`copy_distance`: over the median distance of two prototypes) is one to look at.
# `explained.edits` leaves it out, merges or renames it, without touching the network.

# %%
gallery.loc[of_class].round(2)
# %% [markdown]
# Which classes an explainer takes for which, and what each model gets right (%). `explained.predictions()` names the
# images.

# %%
explained.by_class(shallowest).round(1)
# %% [markdown]
# ## One image
#
# Figure 1 for an image of the folder, from the last block and from the shallowest. Above each patch stand its class,
# the share of the image and the points that the segment adds to the score (of a contrast: to the difference of the
# scores). Red is more attribution than the map's mean, blue less; the scale says where zero lies.

# %%
which = int(image) if image.isdigit() else image or 0
to = (target, against) if against else target
explained.panel(which, target=to)
# %% [markdown]
# The same on the picture itself, at its own resolution; what the network does not see is lighter. A cell has seen far
# more than its square: `explained.overlay(which, cell=(0, 0))` frames all pixels that can influence one.

# %%
explained.overlay(which, target=to, of="attribution" if network.form else "map")
# %% [markdown]
# Why is its largest segment of this prototype, and not of the nearest one of the second class? The difference of the
# squared distances is a sum over blocks: each bar speaks for one of the two, its line is the spread over positions.

# %%
explained.margin(which).figure()
# %% [markdown]
# ## Explore
#
# Choose an image (arrow keys, thumbnails, filters), a start block and the class of the attribution. Hover over a
# segment to see its prototype, click it to see more of its patches, typical and weakest ones too. (Where widgets cannot
# run, a still view stands here.)

# %%
explorer = explained.explorer(which)
explorer
# %% [markdown]
# ## How far can it be believed?
#
# Three questions, each with what chance alone would give (`null`); notebooks 16, 17 and 19 ask them at length. Would
# the map come out again? The share of positions that keep prototype and class when $k$-means starts from other seeds
# (from here on, panels show it position by position, and the report in how many refits each prototype exists):

# %%
from kmex_utils.evaluation.measured import measured

if refits:
    explained.certainty(refits, device=device, scratch=paths.resolve(scratch) if scratch else None)
how = {"images": 10, "steps": 6, "refits": refits, "device": device}
tables = measured(explained, paths.resolve(annotations) if annotations else "", **how)
if refits:
    sure = tables["certainty"].pivot(index="explainer", columns="measure", values=["value", "null"])
    shown = sure.swaplevel(axis=1)[["prototype", "class", "prediction"]].round(2)
shown if refits else "no refits"

# %% [markdown]
# Does the attribution point at what the network uses? Low is good for deletion and ROAD, high for insertion and, where
# boxes or masks are known, inside them. Beyond the null by more than twice `margin_spread`, the order of the segments
# says something.

# %%
if "faithfulness" in tables:
    by_measure = tables["faithfulness"].set_index(["measure", "method"])
    shown = by_measure.loc[["ROAD", "insertion, blur"]].round(3)
shown if "faithfulness" in tables else "there are no attributions: eq. 11 does not hold"

# %% [markdown]
# Do prototypes mean parts? Where keypoints or masks are given: how much of the part at a position its prototype tells
# (NMI), beside the null, what the place alone tells (*position*), and the most that a map of this grid could.

# %%
if "fidelity" in tables:
    columns = ["explainer", "grid", "nmi", "null_nmi", "ceiling_nmi", "purity"]
    shown = tables["fidelity"][columns].round(1)
shown if "fidelity" in tables else "no keypoints or masks were given"

# %% [markdown]
# ## Keep and send
#
# The prototypes with their settings, a report and a page, which is the explorer of 20 images: one HTML file each, that
# needs neither kernel nor network. `explained.export(…)` writes maps, attributions and tables of a whole folder to
# Parquet and NPZ. Tomorrow, nothing is fitted again:
#
# ```python
# kmex.load("runs/your-own-model").panel("new.jpg")
# ```

# %%
results = explained.save(paths.resolve(out))
first = range(min(4, len(explained.names)))
report = explained.report(
    results / "report.html", [which, *(i for i in first if i != which)], target=to, overwrite=True
)
page = explained.page(results / "page.html", 20, to, overwrite=True)
sizes = ", ".join(f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in (report, page))
print(f"{sizes}, beside the prototypes in {results}")
