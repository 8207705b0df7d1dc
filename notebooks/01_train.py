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
# # 1. Train the network
#
# The paper starts from a CNN that ends in average pool and a linear layer without bias (eq. 1, 2):
#
# $$x \xrightarrow{\;\mathrm{enc}\;} h \xrightarrow{\;\mathrm{avg.\,pool}\;} z \xrightarrow{\;\mathrm{clf}\;} y,
# \qquad z = \frac1R\sum_{r=1}^R h_r, \qquad y_j = z \cdot c_j .$$
#
# $h_r$ are the $R$ positions of the encoder's last output, $z$ is their mean, and the columns $c_j$ of the classifier
# give one score $y_j$ a class. In code that is `z = h.mean((2, 3))` and `y = z @ c.T`.
#
# This notebook trains such a network as *Gautam et al. (2024)* do and keeps its weights, the embeddings $z$ and the
# accuracy. Everything after it is post-hoc: no later notebook of the paper's own method changes a weight.

# %% tags=["parameters"]
# What the paper leaves open
bias: bool = False  # of the classifier; eq. 2 has none
crop: bool = False  # cub200: cut each image to its bounding box
epochs: int = 0  # 0: the data set's own
# What the workflow sets
dataset: str = "mnist-mini"  # or mnist, stl10, cub200; with `folder`, any name
seed: int = 0  # of initialisation, shuffling and augmentation
threads: int = 0  # CPU threads; they fix the last bit; 0: as the environment says
runs: str = "runs"  # where results go: <runs>/<dataset>/seed-<seed>/
# What you may change
folder: str = ""  # own images: <class>/*, or train/<class>/* and test/<class>/*
classes: str = ""  # names or patterns to keep, e.g. 1,7 or *Sparrow; empty: all
images_per_class: int = 0  # the first so many of each class, either split; 0: all
validation: float = 0.0  # share of the training images in place of the test split
held_out: float = 0.2  # share of each class to test on where a folder has no test/
stream: bool = False  # decode files whenever they are read: what no disk holds decoded
image_size: int = 0  # pixels; 0: the data set's own
flip: float = -1.0  # probability of a horizontal flip; -1: the data set's own
padding: int = -1  # pixels around the random crop; -1: the data set's own
arch: str = "resnet34"  # a network of torchvision, or timm/<name>
arch_args: dict = {}  # its arguments, e.g. {layers: [2, 2, 2, 3]} for timm/resnet18
weights: str = ""  # imagenet, scratch or a file; empty: the data set's own
frozen: bool = False  # a linear probe: only the head is fitted; no epochs, no flips
batch_size: int = 0  # 0: the data set's own
learning_rate: float = 0.0  # at the first step; 0: the data set's own
momentum: float = -1.0  # of SGD; -1: the data set's own
precision: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU that has it
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
data: str = "data"  # where downloads go

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %% [markdown]
# ## Data
#
# Images are decoded and resized once. Each data set comes with a recipe, the paper's settings for it. `mnist-mini`
# trains from scratch in minutes; [recipe.py](../kmex_utils/training/recipe.py) marks where it deviates.
# Printed below are size, normalisation and recipe.

# %%
from dataclasses import asdict, replace

from kmex_utils import data as data_sets
from kmex_utils.training import recipe as recipes

recipe = recipes.recipe(dataset)
paper_input = data_sets.own_input(dataset)
images = data_sets.load(
    folder or dataset,
    replace(paper_input, image_size=image_size or paper_input.image_size),
    name=dataset,
    classes=classes,
    crop=crop,
    images_per_class=images_per_class,
    validation=validation,
    held_out=held_out if folder else 0.0,
    seed=seed,
    stream=stream,
    data=data,
)
held_out_as = "validation" if validation else "test"
sizes = f"{len(images.train):,} training and {len(images.test):,} {held_out_as} images"
print(f"{sizes} of {len(images.classes)} classes")
asdict(images.input) | asdict(recipe)

# %%
from kmex_utils import drawing

first = [
    int((images.train.labels == c).nonzero()[0])
    for c in range(min(10, len(images.classes)))
]
drawing.image_grid(
    [images.train.rgb(i) for i in first],
    [images.classes[images.train.labels[i]] for i in first],
)

# %% [markdown]
# One image of each class, as the network sees it. The embedded digits are thin strokes on an empty ground. So most
# positions of a map will show ground, and many prototypes will stand for where a stroke is *not*.

# %% [markdown]
# ## Network
#
# The encoder is a chain of blocks (eq. 6),
#
# $$x \xrightarrow{f_1} x^{(1)} \xrightarrow{f_2} \dots \xrightarrow{f_4} x^{(4)} = h, \qquad
# x^{(b)} \in \mathbb R^{R_b \times D_b} .$$
#
# In a ResNet these are its layers 1 to 4; in another network, what ends at each of its deepest four resolutions. In
# code: `network.activations(x)`. Their grids fix how fine the maps of B4, B34, B234 and B1234 can be.

# %%
from kmex_utils import hardware, networks

device, threads = hardware.pick_device(device), hardware.set_threads(threads)
dtype = hardware.training_dtype(precision, device)
precision = str(dtype).removeprefix("torch.")  # as resolved
weights = weights or recipe.weights
network = networks.for_training(
    arch,
    images.classes,
    weights,
    images.input,
    arch_args=arch_args,
    seed=seed,
    bias=bias,
)
blocks = network.activations(images.input(images.train.pixels[:2]))
{
    f"B{b}": f"{x.shape[2]} x {x.shape[3]} positions, {x.shape[1]} channels"
    for b, x in enumerate(blocks, 1)
}

# %% [markdown]
# From block to block the grid is halved and the channels are doubled. With 56 pixels B4 has four positions and B234, on
# block 2's grid, has 49. Remember the channels $D_b$: eq. 8 divides by them, and in
# [notebook 4](04_encoder.ipynb) that decides how much each block counts.

# %% [markdown]
# ## Training
#
# SGD minimises the cross-entropy; the learning rate falls along a cosine from the first step to the last. The state is
# kept after every epoch, in `training.safetensors`: a run that was killed continues from there and ends with the same
# weights, and a finished training of the same settings and code is not repeated. With `frozen` the encoder stays as it
# began, and logistic regression fits the head to $z$.

# %%
from kmex_utils.explanation.activations import embed
from kmex_utils.training.probe import fit_probe
from kmex_utils.training.sgd import Schedule, train

schedule = Schedule(
    epochs=epochs or recipe.epochs,
    batch_size=batch_size or recipe.batch_size,
    learning_rate=learning_rate or recipe.learning_rate,
    final_learning_rate=recipe.final_learning_rate,
    momentum=recipe.momentum if momentum < 0 else momentum,
)
augmentation = {
    "flip": recipe.flip if flip == -1 else flip,
    "padding": recipe.padding if padding == -1 else padding,
}

# %% [markdown]
# What follows is bookkeeping: everything that fixes the result is saved as resolved. If the weights come from another
# training, its settings are saved too.

# %% tags=["hide-input"]
from kmex_utils import paths
from kmex_utils.paper.runs import Run
from kmex_utils.store import load_json

made_by = {
    name: settings[name]
    for name in ("dataset", "arch", "arch_args", "bias", "frozen", "seed")
}
made_by |= {
    "data": images.settings,
    "classes": list(images.classes),
    "weights": weights,
    "threads": threads,
}
made_by |= augmentation
earlier = paths.resolve(weights).with_name("training.json")
if earlier.is_file():
    made_by["before"] = load_json(earlier)

# %%
run = Run.of(runs, dataset, seed)
options = {
    "seed": seed,
    "checkpoint": run.training_state,
    "precision": precision,
    "device": device,
}
z = {}
if frozen:
    z["train"] = embed(network, images, "train", device=device)
    history = fit_probe(network.cpu(), z["train"], images.train.labels)
else:
    history = train(
        network, images, schedule, **augmentation, made_by=made_by, **options
    )

# %%
from kmex_utils.paper import figures

figures.training_curve(history)

# %% [markdown]
# The loss falls and the accuracy rises until the learning rate is spent. The accuracy is a running one, taken on
# augmented images while the weights still change, so its first value lags behind what the network can do by the end of
# that epoch. On the embedded digits two epochs suffice.

# %% [markdown]
# ## Embeddings and accuracy
#
# One pass over the training images, without augmentation, and one over the test images, in float32. Eq. 2 is the line
# `network.classifier(z[split])`.

# %%
from kmex_utils.method.measures import accuracy

z |= {
    split: embed(network, images, split, device=device)
    for split in ("train", "test")
    if split not in z
}
labels = {split: images.split(split).labels for split in z}
y = {split: network.cpu().classifier(z[split]) for split in z}
reached = {split: accuracy(y[split].argmax(1), labels[split]) for split in z}
{
    held_out_as if split == "test" else split: f"{value:.2f} %"
    for split, value in reached.items()
}

# %% [markdown]
# On the embedded digits the network reaches more than 95 % of the test images, about two points less than of the
# training images. It started from random weights and saw 2,500 digits; the paper's starts from ImageNet and reaches
# 99.4 % on all of MNIST. So [Table 2](07_accuracy.ipynb) compares what models lose to *this* network, not the numbers
# themselves.

# %% tags=["hide-input"]
computed = {
    "precision": precision,
    "device": device.type,
    "machine": hardware.machine(),
}
trained = {"schedule": asdict(schedule), **computed, "history": history}
run.save_training(
    network,
    images,
    {**made_by, **trained, "prototypes_per_class": recipe.prototypes_per_class},
)
run.save_embeddings(**{split: (z[split], labels[split]) for split in z})
run.save_results(
    "train",
    [("CNN", "accuracy", split, value) for split, value in reached.items()],
    **trained["schedule"],
)
print(f"weights, embeddings and results are in {run.folder}")

# %% [markdown]
# These files are all that later notebooks read. `kmex.load("runs/mnist-mini/seed-0")` opens the same folder as an
# explanation, once [3](03_kmex.ipynb) and [4](04_encoder.ipynb) have added their prototypes. Next:
# [why this network explains itself already](02_cnn_as_sem.ipynb).
