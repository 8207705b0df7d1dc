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
# # 5. ProtoPNet, the baseline
#
# The paper compares with *Chen et al. (2019)*, who learn prototypes together with the network instead of after it. The
# form is eq. 3 once more:
#
# 1. $h = \mathrm{add\text{-}on}(x^{(4)}) \in [0, 1]^{R \times D'}$: 1x1 convolution, ReLU, 1x1 convolution, sigmoid;
# 2. $\mathrm{sim}(h_r, p_k) = \log\dfrac{d^2 + 1}{d^2 + \varepsilon}$ with $d = \lVert h_r - p_k\rVert$;
# 3. proj takes the maximum over $r$, then a linear layer in which a prototype starts with weight 1 for its own class
#    and -0.5 for the others.
#
# In code these are `add_on`, `log((squared + 1) / (squared + epsilon))` and `similarity.amax(1) @ last.T`: the class
# `ProtoPNet` in [explainers.py](../kmex_utils/method/explainers.py).
#
# Training alternates. *Warm-up*: add-on and prototypes. *Joint*: the features too. *Push*: each prototype becomes the
# nearest training patch of its class. *Last layer*: a convex step with L1 on the weights to other classes. The loss is
#
# $$\mathrm{CE} + 0.8\,\underbrace{\frac1N\sum_n \min_{k \in y_n} \min_r d^2}_{\text{cluster}}
# - 0.08\,\underbrace{\frac1N\sum_n \min_{k \notin y_n} \min_r d^2}_{\text{separation}} + 10^{-4}\,\mathrm{L1}.$$

# %% tags=["parameters"]
# What the paper leaves open
features_from: str = ""  # imagenet, a file or network (01's); empty: as 01 began
joint_epochs: int = 0  # 0: the data set's own (16; the authors stop by hand)
push_every: int = 10  # epochs between two pushes
frozen_features: str = ""  # anew (authors) or once; empty: the data set's own
affine: bool = False  # rotate up to 15 degrees or shear up to 10 (authors: CUB-200)
embedding: str = "image"  # of Table 1: mean over an image's patches, or patch: each
box: str = "patch"  # in figures, or activation: the map's highest 5 % (authors)
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to start from, of all that is random here
threads: int = 0  # CPU threads; they fix the last bit; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
# What you may change
prototypes_per_class: int = 0  # K/C; 0: the data set's own
prototype_depth: int = 128  # D', channels of the add-on and of a prototype
prototype_size: int = 1  # s: a prototype covers s x s positions
warm_epochs: int = 0  # 0: the data set's own (authors: 5)
push_start: int = 10  # first epoch, from 0, that a push may follow; the last: always
last_passes: int = 20  # passes of the last layer after each push
batch_size: int = 0  # 0: the data set's own (authors: 80)
features_rate: float = 1e-4  # of Adam, joint phase
add_on_rate: float = 3e-3  # of Adam, warm-up and joint phase
prototypes_rate: float = 3e-3  # of Adam, warm-up and joint phase
last_rate: float = 1e-4  # of Adam, last layer
weight_decay: float = 1e-3  # of features and add-on
rate_step: int = 5  # the joint rates fall at every so-many-th joint epoch
rate_factor: float = 0.1  # what they are multiplied by
cross_entropy: float = 1.0  # weight in the loss
cluster: float = 0.8  # weight in the loss
separation: float = -0.08  # weight in the loss
l1: float = 1e-4  # weight in the loss
epsilon: float = 1e-4  # of the similarity
wrong_class: float = -0.5  # first weight of a prototype for other classes
image: int = 7  # index in the test split of the image explained
restarts: int = 10  # of k-means for ProtoPNet + KMEx
precision: str = "auto"  # float32, bfloat16, or auto: bfloat16 on a GPU that has it
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %% tags=["hide-input"]
from kmex_utils import hardware
from kmex_utils.paper.runs import Run
from kmex_utils.training import protopnet

run = Run.of(runs, dataset, seed)
trained, images = run.settings(), run.dataset()
if embedding not in ("image", "patch"):
    raise ValueError(f"embedding must be 'image' or 'patch', got {embedding!r}")
if restarts < 1:
    raise ValueError(f"restarts must be at least 1, got {restarts}")
if box not in protopnet.BOXES:
    raise ValueError(f"box must be one of {', '.join(protopnet.BOXES)}, got {box!r}")
if not 0 <= image < len(images.test):
    raise ValueError(
        f"image must be an index of the {len(images.test)} test images, got {image}"
    )
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
precision = str(hardware.training_dtype(precision, device)).removeprefix(
    "torch."
)  # as resolved

# %% [markdown]
# ## Options
#
# The authors' numbers, but for those that the data set or a parameter above changes. `mnist-mini` has one joint epoch,
# so that it trains in seconds.

# %%
from dataclasses import asdict, replace

defaults = asdict(protopnet.Options())
chosen = {name: settings[name] for name in defaults if name in settings}
of_data_set = ("warm_epochs", "joint_epochs", "batch_size", "frozen_features")
for name in of_data_set:  # where empty or 0
    if not chosen[name]:
        del chosen[name]
chosen |= {"depth": prototype_depth, "size": prototype_size}
options = replace(protopnet.OPTIONS.get(dataset, protopnet.Options()), **chosen)
prototypes_per_class = prototypes_per_class or trained["prototypes_per_class"]
deviations = {
    name: value for name, value in asdict(options).items() if value != defaults[name]
}
print(f"K/C = {prototypes_per_class}")
print(f"other than the authors' defaults: {deviations or 'nothing'}")

# %% [markdown]
# ## Network
#
# The authors start from ImageNet weights. Where [notebook 1](01_train.ipynb) did not have them, the features start from
# its trained network instead. That is a deviation: these features know the data set already.

# %%
from kmex_utils.method.prototypes import check_enough

labels = {split: images.split(split).labels for split in ("train", "test")}
members = [
    (labels["train"] == c).nonzero().flatten() for c in range(len(images.classes))
]
# for KMEx below; refused before the training
check_enough(members, images.classes, prototypes_per_class, lambda index: index)
features_from = features_from or (
    "network" if trained["weights"] in ("scratch", "random") else trained["weights"]
)
network = protopnet.start(
    run.network(), features_from, prototypes_per_class, options, seed
)
grid = (
    network.to(device)
    .eval()
    .features(images.input(images.train.pixels[:1], device))
    .shape[2:]
)
prototypes = f"{len(network.labels)} prototypes on {grid[0]} x {grid[1]} positions"
print(f"features from {features_from}; {prototypes}")
if grid.numel() == 1:
    print("With one position a prototype is a whole image: use a larger image_size")

# %% [markdown]
# ## Training
#
# The state is kept on the way: a run that was killed continues from there and ends with the same weights.

# %%
made_by = {
    name: trained[name]
    for name in ("dataset", "data", "arch", "arch_args", "network", "seed", "classes")
}
made_by |= {
    "features_from": features_from,
    "prototypes_per_class": prototypes_per_class,
    "threads": threads,
}
checkpoint = run.folder / "training-protopnet.safetensors"
how = {
    "flip": trained["flip"],
    "padding": trained["padding"],
    "precision": precision,
    "device": device,
}
history = protopnet.train(
    network, images, options, seed=seed, checkpoint=checkpoint, made_by=made_by, **how
)

# %%
from kmex_utils.paper import figures

figures.protopnet_curve(history)

# %% [markdown]
# The cluster cost falls in the warm-up, when prototypes move towards patches of their class. It is higher in the joint
# phase, which trains the features and so moves the patches. At the grey line each prototype becomes a patch; the last
# layer then adapts to the prototypes as they are.

# %% [markdown]
# ## Accuracy
#
# Of ProtoPNet, and of KMEx on its embedding (class-wise k-means on the mean patch of each image, *ProtoPNet + KMEx* in
# the KMEx paper).

# %%
from kmex_utils.method.kmex import fit_kmex
from kmex_utils.method.measures import accuracy

predicted, h = {}, {}
for split in labels:
    predicted[split], h[split] = protopnet.evaluate(network, images, split)
z = {split: h[split].mean(1) for split in h}
kmex = fit_kmex(
    z["train"],
    labels["train"],
    images.classes,
    prototypes_per_class,
    seed=seed,
    restarts=restarts,
)
results = [
    ("ProtoPNet", "accuracy", split, accuracy(predicted[split], labels[split]))
    for split in labels
]
for split in labels:
    y = kmex.proj(kmex.sim(z[split]))
    results.append(
        ("ProtoPNet + KMEx", "accuracy", split, accuracy(y.argmax(1), labels[split]))
    )

# %%
import pandas as pd

table = pd.DataFrame(results, columns=["model", "metric", "split", "%"])
table.pivot(index="model", columns="split", values="%")[["train", "test"]].round(2)

# %% [markdown]
# On the embedded digits both are within a point of the CNN, so learned prototypes win nothing over centroids that are
# computed afterwards. The two rows are close to each other as well: the learned embedding does the work, the learned
# prototypes add little to it. [Notebook 7](07_accuracy.ipynb) sets them beside the CNN, KMEx and the encoder.

# %% [markdown]
# ## Alignment
#
# Cosines for Table 1, in ProtoPNet's own latent space. A sigmoid's outputs are all positive, so no cosine here can be
# negative: a high value by itself says little about a prototype; its distance to the *out* value says more.

# %%
from kmex_utils.method.measures import cosine_alignment

network.cpu()
p, p_labels = network.prototypes.flatten(1), network.labels
spaces = {"image": (z["train"], labels["train"])}
spaces["patch"] = (
    h["train"].flatten(0, 1),
    labels["train"].repeat_interleave(h["train"].shape[1]),
)
cosines = []
for space, (vectors, truth) in spaces.items():
    for pairs, suffix in (("all", ""), ("nearest", "_nearest")):
        values = cosine_alignment(vectors, truth, p, p_labels, pairs)
        of_space = "" if space == embedding else f"_{space}"
        for name, value in zip(("cos_class", "cos_out"), values, strict=True):
            cosines.append(("ProtoPNet", name + suffix + of_space, "train", value))
pd.DataFrame(cosines, columns=["model", "measure", "split", "cosine"]).set_index(
    "measure"
)[["cosine"]].round(2)

# %% [markdown]
# Both are high, and a tenth apart on the digits: all of ProtoPNet's embeddings lie in a narrow cone. The paper finds
# them still closer, near 1 in and out of class. `_nearest` takes for each embedding only the nearest prototype.
# `_patch` compares with single patches and is lower, as many of them show no part that the prototype stands for.

# %% [markdown]
# ## The prototypes, seen
#
# The training image of each prototype, faded outside its patch; the network sees the patch's surroundings too.

# %%
from kmex_utils import drawing

distinct = [record["distinct"] for record in history if record["phase"] == "push"][-1]
print(f"{distinct} distinct patches for {len(p_labels)} prototypes")
shown = [k for k in range(len(p_labels)) if p_labels[k] < 10]
drawing.image_grid(
    [
        protopnet.faded(*protopnet.prototype_source(network, images, k, box)[1:])
        for k in shown
    ],
    [images.classes[p_labels[k]] for k in shown],
    columns=prototypes_per_class
    if prototypes_per_class > 5
    else 2 * prototypes_per_class,
)

# %% [markdown]
# Where the number of distinct patches is below that of prototypes, some of one class were pushed to the same patch:
# nothing in the loss keeps them apart. Some patches of the digits are empty: the network looks at where a stroke is
# not.

# %% [markdown]
# ## This looks like that
#
# The prototypes that a test image activates most. Similarity times weight are the points a prototype adds to the
# predicted class; the points of all prototypes sum to its score.

# %%
j, activated = protopnet.most_activated(
    network, images, images.test.pixels[image], box=box
)
truth = images.classes[labels["test"][image]].replace("_", " ")
figures.most_activated(
    images.test.rgb(image),
    images.classes[j],
    activated,
    f"{dataset}, test image {image} ({truth})",
)

# %% [markdown]
# The first rows are of the predicted class and add points; prototypes of another class have a negative weight, so what
# they recognise counts against the prediction. ProtoPNet explains by few patches that match well. The encoder's
# explanation in [notebook 9](09_interpretation.ipynb) says something of *every* position.

# %% [markdown]
# ## What is kept
#
# The network, its embeddings, the centroids on them, and the numbers for Tables 1 and 2.

# %% tags=["hide-input"]
memory = hardware.peak_memory()
trained_as = {
    **made_by,
    "history": history,
    "embedding": embedding,
    "restarts": restarts,
}
trained_as |= {"precision": precision, "device": device.type}
trained_as |= {"machine": hardware.machine(), "peak_memory_gib": memory}
run.save_part(
    "ProtoPNet", network.state_dict(), {**trained_as, "options": asdict(options)}
)
run.save_embeddings(
    "ProtoPNet-embeddings", **{split: (z[split], labels[split]) for split in z}
)
fitted = {"prototypes_per_class": prototypes_per_class, "restarts": restarts}
run.save_part("ProtoPNet-KMEx", vars(kmex.prototypes), {**fitted, "seed": seed})
made_with = {"features_from": features_from, **fitted, "embedding": embedding}
run.save_results("protopnet", results + cosines, **asdict(options), **made_with)

# %%
seconds = pd.DataFrame(history).groupby("phase", sort=False).seconds.sum()
print(
    ", ".join(f"{phase} {spent:.1f} s" for phase, spent in seconds.items()),
    f"; at most {memory:.1f} GiB",
)

# %% [markdown]
# This is the price of joint training: a second training on top of the one in [notebook 1](01_train.ipynb). The
# clusterings of notebooks [3](03_kmex.ipynb) and [4](04_encoder.ipynb) need none. The digits get one joint epoch here;
# the authors train for many.
