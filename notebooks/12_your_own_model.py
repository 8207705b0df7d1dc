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
# digits; name a model and a folder to explain yours. In a script the same is three lines, in which `network` is a name,
# a module of your own or a run's folder:
#
# ```python
# explained = kmex.explain(kmex.network("resnet50"), "photos")
# explained.panel("photos/cat.jpg")  # Figure 1
# explained.report("report.html")
# ```

# %% tags=["parameters"]
# What the paper leaves open
norm: str = "position"  # what ||u|| of eq. 8 runs over: position, channel or image
scale: str = "1"  # factor of eq. 8: 1 (equal weights), 1/sqrt(D) or 1/D (printed)
align_corners: bool = False  # of the bilinear interpolation of eq. 7
grid: str = "shallowest"  # R' of eq. 7, of the shallowest block, or: deepest, double
prototypes_per_class: int = 5  # K/C, the same for every class
# What you may change: the network
model: str = "runs/mnist-mini/seed-0"  # torchvision name, timm/<name> or run folder
arch_args: dict = {}  # its arguments, e.g. {layers: [2, 2, 2, 3]} for timm/resnet18
weights: str = ""  # of a name: imagenet, random or a file; empty: imagenet
classes: str = ""  # file of class names, one a line; empty: known ones, or numbers
blocks: list[str] = []  # modules that end them; empty: the last at each resolution
head: str = ""  # the module that gives the scores; empty: what the network returns
# What you may change: the images
folder: str = ""  # <class>/*, or train/ and test/ with it, or images; empty: as in 1
image_size: int = 0  # pixels; 0: the weights' own
mean: list[float] = []  # of RGB in [0, 1]; empty: the weights' own, else ImageNet's
std: list[float] = []  # the same
fit: str = ""  # crop (centre square) or stretch; empty: crop, or as notebook 1 did
held_out: float = 0.2  # share of each class kept aside where there is no test/
annotations: str = ""  # keypoints or boxes as CSV, or a folder of masks; empty: none
# What you may change: the explanation
start_block: int = 0  # the shallowest; 0: the last three blocks (B234 of four)
fit_on: int = 0  # images of each class to fit on; 0: all, slower and surer
restarts: int = 3  # of k-means; the best is kept
seed: int = 0  # of k-means and of the held-out images
image: str = ""  # index or name of the image looked at; empty: the first held out
refits: int = 1  # from other seeds, for certainty; each takes as long as the fit
target: str = ""  # class to attribute to; empty: the network's prediction
against: str = ""  # class whose attribution is subtracted; empty: none
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
scratch: str = ""  # folder for what does not fit in memory; empty: the system's
out: str = "runs/your-own-model"  # prototypes, table, report and export go here

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %% [markdown]
# ## The network
#
# It is run once on noise and watched. $y$ are the scores it returns, and $h$ are the maps whose average they are made
# of. The blocks $x^{(1)}, x^{(2)}, \dots$ of eq. 6 are the last outputs at each resolution on the way there.

# %%
import pandas as pd
import torch

import kmex_utils as kmex
from kmex_utils import paths

run_folder = paths.resolve(model)
is_run = (run_folder / "network.json").is_file()
if not folder and not is_run:
    missing = f"give folder, the images to explain {model} on"
    raise ValueError(f"{missing}: only a run of notebook 1 comes with a data set")
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
shapes = [
    (name, u.shape[1], f"{u.shape[2]} x {u.shape[3]}")
    for name, u in zip(network.blocks, x, strict=True)
]
numbers = [f"B{b}" for b in range(1, len(x) + 1)]
pd.DataFrame(shapes, numbers, ["ends at", "channels", "positions"])

# %% [markdown]
# Printed first is how images must be prepared for these weights: compare it with how the network was trained, as
# nothing else can tell. The table has the blocks. The last one's positions are those of B4's map; the shallowest block
# used sets the grid of the finest.

# %% [markdown]
# ## Theorem 1, checked
#
# Most heads have a bias, $y_j = z \cdot c_j + b_j$. The paper omits it "without loss of generality": give $h$ one
# channel more that is 1 everywhere and $c_j$ the entry $b_j$ there. The average pool keeps the 1, and eq. 2 has its
# form again:
#
# $$y_j = \frac1R \sum_r (h_r, 1) \cdot (c_j, b_j) .$$
#
# Layer normalisation before the head leaves the columns and adds one factor an image (*scaled*). A head of several
# layers has columns of each image's own (*gated*). In any other form the theorem and eq. 11 do not hold; the $k$-means
# explanations do.

# %%
from kmex_utils.networks import theorem1_residual

noise = torch.randn(4, channels, *size, generator=torch.Generator().manual_seed(seed))
if network.form:
    residual = theorem1_residual(network, noise)
    print(f"{network.form}; largest difference over largest score: {residual:.1e}")
    assert residual < 1e-4
else:
    print(f"Theorem 1 does not hold: {network.between}")

# %% [markdown]
# Both sides of eq. 5 agree up to rounding, as in [notebook 2](02_cnn_as_sem.ipynb): the network is self-explainable,
# and its attribution sums to its score.

# %% [markdown]
# ## Prototypes
#
# Class-wise $k$-means on the embeddings (KMEx, [notebook 3](03_kmex.ipynb)) and on the composite of the last blocks
# (B4, B34 …, [notebook 4](04_encoder.ipynb)). Without labels, the network's own predictions stand in for them. All
# blocks weigh the same by default (`scale="1"`), since the printed $1/D_b$ costs accuracy ([notebook
# 13](13_open_choices.ipynb)).

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
# Two questions to the table. Does KMEx keep the network's accuracy, held out? Then the centroids represent the data,
# and their cosines with the class are far above those of the columns. Does the accuracy hold from B4 to the shallowest
# explainer? On the digits it does within a point or two. Where it does not, take more prototypes a class or a deeper
# `start_block`.

# %% [markdown]
# ## Prototypes of a class
#
# The first row has the training patch nearest to each prototype of the first class. As that flatters, a typical one
# stands below it and then the weakest: of the class's images in which the prototype has cells, the median and the last
# by distance. The numbers above say in how many of them it has any.

# %%
from kmex_utils.drawing import image_grid

shallowest = explained.start_blocks[-1]
gallery = explained.gallery(shallowest)
of_class = [
    k
    for k in gallery.index[gallery["class"] == explained.classes[0]]
    if explained.sharing(shallowest, k)[0]
]
of_class = of_class[:10]
patches = [
    explained.patch(shallowest, k, rank).pixels
    for rank in (0, "typical", "weakest")
    for k in of_class
]
titles = ["{}: {} of {}".format(k, *explained.sharing(shallowest, k)) for k in of_class]
image_grid(
    patches,
    titles + ["typical"] * len(of_class) + ["weakest"] * len(of_class),
    columns=len(of_class),
)

# %% [markdown]
# A column whose three patches show the same thing is a concept. Where the weakest shows something else, the prototype
# is a mixture, and its segments should be named with care.
#
# How prototypes are used in the held-out images:


# %%
gallery.loc[of_class].round(2)

# %% [markdown]
# Look at a prototype that serves more wrong than right predictions, that lies mostly in images of other classes
# (`elsewhere`), or that is close to another (`copy_distance`, relative to the median distance of two prototypes).
# `explained.edits` leaves it out, merges or renames it, without touching the network.
#
# What each model gets right (%), and which classes an explainer takes for which:

# %%
explained.by_class(shallowest).round(1)

# %% [markdown]
# A class that only the explainer gets wrong has prototypes that do not represent it; one that the network gets wrong
# too is the network's own. `explained.predictions()` names the images.

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
# Patches of the image's class on the parts that matter, with most of the points, are a prediction for reasons one can
# see. Large segments of another class, or points that come from the background, are a reason to doubt it.
#
# The same on the picture itself, at its own resolution; what the network does not see is lighter:

# %%
explained.overlay(which, target=to, of="attribution" if network.form else "map")

# %% [markdown]
# The borders of segments follow the grid, not the object, and a cell has seen far more than its square:
# `explained.overlay(which, cell=(0, 0))` frames all pixels that can influence one.
#
# Why does its largest segment have this prototype $a$, and not $b$, the nearest one of the second class? The difference
# of the squared distances is a sum over blocks,
#
# $$\lVert q - p_b\rVert^2 - \lVert q - p_a\rVert^2
# = \sum_{b'} \bigl(\lVert q^{(b')} - p_b^{(b')}\rVert^2 - \lVert q^{(b')} - p_a^{(b')}\rVert^2\bigr) .$$

# %%
explained.margin(which).figure()

# %% [markdown]
# Each bar is a block; it speaks for one of the two prototypes, and its line is the spread over the positions of the
# segment. The longest bar is the depth that decided.

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
# Three questions, each with what chance alone would give (`null`). Notebooks [16](16_fidelity.ipynb),
# [17](17_faithfulness.ipynb) and [19](19_certainty.ipynb) ask them at length.
#
# Would the map come out again? Below is the share of positions that keep prototype and class when $k$-means starts from
# other seeds. From here on, panels show it position by position, and the report in how many refits each prototype
# exists.

# %%
from kmex_utils.evaluation.measured import measured

if refits:
    explained.certainty(
        refits, device=device, scratch=paths.resolve(scratch) if scratch else None
    )
how = {"images": 10, "steps": 6, "refits": refits, "device": device}
tables = measured(explained, paths.resolve(annotations) if annotations else "", **how)
if refits:
    sure = tables["certainty"].pivot(
        index="explainer", columns="measure", values=["value", "null"]
    )
    shown = sure.swaplevel(axis=1)[["prototype", "class", "prediction"]].round(2)
shown if refits else "no refits"

# %% [markdown]
# Values far above their null are sure. Where `class` is high and `prototype` is not, the map's colours may change in
# another fit, but not what it says of classes.
#
# Does the attribution point at what the network uses? Low is good for ROAD, high for insertion and, where boxes or
# masks are known, inside them.

# %%
if "faithfulness" in tables:
    by_measure = tables["faithfulness"].set_index(["measure", "method"])
    shown = by_measure.loc[["ROAD", "insertion, blur"]].round(3)
shown if "faithfulness" in tables else "there are no attributions: eq. 11 does not hold"

# %% [markdown]
# Where a value is beyond its null by more than twice `margin_spread`, the order of the segments says something. With
# few images, or on digits, it often does not: a large segment takes most of a digit with it, whatever the order.
#
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
    results / "report.html",
    [which, *(i for i in first if i != which)],
    target=to,
    overwrite=True,
)
page = explained.page(results / "page.html", 20, to, overwrite=True)
sizes = ", ".join(
    f"{file.name} {file.stat().st_size / 1e6:.1f} MB" for file in (report, page)
)
print(f"{sizes}, beside the prototypes in {results}")
