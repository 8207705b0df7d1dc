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
# This notebook trains it as *Gautam et al. (2024)* do and keeps the weights, the embeddings $z$ and the accuracy.
# Everything after it works on the frozen network.

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # mnist-mini, mnist, stl10, cub200; with `folder`, any label for your own images
seed: int = 0  # of initialisation, shuffling and augmentation
folder: str = ""  # own images: <class>/*, or train/<class>/* and test/<class>/*
classes: str = ""  # comma-separated names or patterns of the classes to keep, e.g. *Sparrow; empty: all
crop: bool = False  # cub200: cut each image to its bounding box
images_per_class: int = 0  # keep the first so many of each class in either split; 0: all
validation: float = 0.0  # to choose settings: this share of the training images stands in for the test split
held_out: float = 0.2  # share of each class that becomes the test split where a folder has none
image_size: int = 0  # pixels; 0: the data set's own
flip: float = -1.0  # probability of a horizontal flip; -1: the data set's own
padding: int = -1  # pixels around the random crop; -1: the data set's own
arch: str = "resnet34"  # any network of torchvision with average pool and linear head; timm/<name> for timm's
arch_args: dict = {}  # the network's own arguments, e.g. {layers: [2, 2, 2, 3]} for timm/resnet18
weights: str = ""  # imagenet, scratch, or a file with a state dict, e.g. another training's; empty: the data set's own
bias: bool = False  # of the classifier; eq. 2 has none
frozen: bool = False  # a linear probe: only the head is fitted, to its optimum; epochs to padding do not count
epochs: int = 0  # 0: the data set's own
batch_size: int = 0  # 0: the data set's own
learning_rate: float = 0.0  # at the first step; 0: the data set's own
momentum: float = -1.0  # of SGD; -1: the data set's own
precision: str = "auto"  # float32, bfloat16 (autocast), or auto: bfloat16 where the chip has it
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
threads: int = 0  # CPU threads, part of what fixes the result to the last bit; 0: as the environment says
data: str = "data"  # where downloads go
runs: str = "runs"  # where results go: <runs>/<dataset>/seed-<seed>/

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %% [markdown]
# ## Data
#
# Images are decoded and resized once. The recipe that comes with a data set holds the paper's settings for it; for
# `mnist-mini`, which trains from scratch in minutes, the deviations are marked in `kmex_utils/training/recipe.py`.

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
    data=data,
)
held_out_as = "validation" if validation else "test"
print(f"{len(images.train):,} training and {len(images.test):,} {held_out_as} images of {len(images.classes)} classes")
asdict(images.input) | asdict(recipe)

# %%
from kmex_utils import drawing

first = [int((images.train.labels == c).nonzero()[0]) for c in range(min(10, len(images.classes)))]
drawing.image_grid([images.train.rgb(i) for i in first], [images.classes[images.train.labels[i]] for i in first])
# %% [markdown]
# ## Network
#
# Seen as four blocks $x \to x^{(1)} \to \dots \to x^{(4)} = h$ (eq. 6): a ResNet's layers 1 to 4, in another network
# what ends at each of the deepest four resolutions. These fix how fine the explanation maps of B4, B34, B234 and B1234
# can be.

# %%
from kmex_utils import hardware, networks

device, threads = hardware.pick_device(device), hardware.set_threads(threads)
precision = str(hardware.training_dtype(precision, device)).removeprefix("torch.")  # as resolved
weights = weights or recipe.weights
network = networks.for_training(arch, images.classes, weights, images.input, arch_args=arch_args, seed=seed, bias=bias)
blocks = network.activations(images.input(images.train.pixels[:2]))
{f"B{b}": f"{x.shape[2]} x {x.shape[3]} positions, {x.shape[1]} channels" for b, x in enumerate(blocks, 1)}

# %% [markdown]
# ## Training
#
# SGD with a cosine from the first to the last step and cross-entropy. The state is kept after every epoch, in
# `training.safetensors`: a run that was killed continues from there and ends with the same weights, and a finished
# training of the same settings and code is not repeated. With `frozen` the encoder stays as it began, and the
# head is fitted to $z$ by logistic regression.

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
augmentation = {"flip": recipe.flip if flip == -1 else flip, "padding": recipe.padding if padding == -1 else padding}

# %% [markdown]
# Everything that fixes the result, as resolved; where the weights are of another training, its settings too.

# %%
from kmex_utils import paths
from kmex_utils.paper.runs import Run
from kmex_utils.store import load_json

made_by = {name: settings[name] for name in ("dataset", "arch", "arch_args", "bias", "frozen", "seed")}
made_by |= {"data": images.settings, "classes": list(images.classes), "weights": weights, "threads": threads}
made_by |= augmentation
earlier = paths.resolve(weights).with_name("training.json")
if earlier.is_file():
    made_by["before"] = load_json(earlier)

# %%
run = Run.of(runs, dataset, seed)
options = {"seed": seed, "checkpoint": run.training_state, "precision": precision, "device": device}
z = {}
if frozen:
    z["train"] = embed(network, images, "train", device=device)
    history = fit_probe(network.cpu(), z["train"], images.train.labels)
else:
    history = train(network, images, schedule, **augmentation, made_by=made_by, **options)

# %%
from kmex_utils.paper import figures

figures.training_curve(history)

# %% [markdown]
# ## Embeddings and accuracy
#
# One pass over the training images, without augmentation, and one over the test images, in float32.

# %%
from kmex_utils.method.measures import accuracy

z |= {split: embed(network, images, split, device=device) for split in ("train", "test") if split not in z}
labels = {split: images.split(split).labels for split in z}
y = {split: network.cpu().classifier(z[split]) for split in z}
reached = {split: accuracy(y[split].argmax(1), labels[split]) for split in z}
{held_out_as if split == "test" else split: f"{value:.2f} %" for split, value in reached.items()}

# %%
computed = {"precision": precision, "device": device.type, "machine": hardware.machine()}
trained = {"schedule": asdict(schedule), **computed, "history": history}
run.save_training(network, images, {**made_by, **trained, "prototypes_per_class": recipe.prototypes_per_class})
run.save_embeddings(**{split: (z[split], labels[split]) for split in z})
run.save_results(
    "train", [("CNN", "accuracy", split, value) for split, value in reached.items()], **trained["schedule"]
)
print(f"weights, embeddings and results are in {run.folder}")
