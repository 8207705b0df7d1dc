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
# # 2. A CNN is a self-explainable model
#
# A self-explainable model compares $h$ with prototypes and projects the similarities to a prediction (eq. 3):
#
# $$x \xrightarrow{\;\mathrm{enc}\;} h \xrightarrow{\;\mathrm{sim}\;} \bigl(\mathrm{sim}(h_r, p_k)\bigr)_{R,K}
# \xrightarrow{\;\mathrm{proj}\;} y .$$
#
# **Theorem 1.** A CNN with average pool and linear classifier is such a model. Its prototypes are the columns $c_j$,
# sim is the dot product and proj is the average pool, because the last two commute (eq. 4, 5):
#
# $$\mathrm{clf} \circ \mathrm{avg.\,pool}(h)_j = \Bigl(\frac1R\sum_r h_r\Bigr)\cdot c_j
# = \frac1R\sum_r \bigl(h_r\cdot c_j\bigr) = \mathrm{proj} \circ \mathrm{sim}(h)_j .$$
#
# In code sim is `h @ c.T` and proj is `similarity.mean(1)`: the class `CNNAsSEM` in
# [explainers.py](../kmex_utils/method/explainers.py), the first of four instances of eq. 3.

# %% tags=["parameters"]
# What the workflow sets
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain
runs: str = "runs"  # where the earlier notebooks left their results
# What you may change
image: int = 0  # index in the test split of the image looked at
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import parameters

settings = parameters.check(globals())

# %%
from kmex_utils import hardware
from kmex_utils.paper.runs import Run

run = Run.of(runs, dataset, seed)
device = hardware.pick_device(device)
network = run.network().to(device)
images = run.dataset()

# %% [markdown]
# ## Theorem 1, checked
#
# Both sides of eq. 5 on test images: left the network as it is, right `sem(h)`, which is `proj(sim(h))`.

# %%
import torch

from kmex_utils.method.explainers import CNNAsSEM

sem = CNNAsSEM(network.c, network.b)
x, labels = next(images.batches("test", 256, device))
with torch.no_grad():
    h = network.activations(x)
    left, right = network(x), sem(h)
residual = ((left - right).abs().max() / left.abs().max()).item()
print(f"largest difference, relative to the largest score: {residual:.1e}")
assert residual < 1e-5

# %% [markdown]
# The two differ by the rounding of float32 and no more, so the theorem holds of the network as trained. It follows that
# each position $r$ of an image adds $h_r \cdot c_j / R$ to the score of class $j$, and that these shares sum to it. In
# code: `sem.sim(sem.h(h)) / R`.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils.drawing import STYLE, literal, palette

plt.style.use(STYLE)

if not 0 <= image < len(images.test):
    raise ValueError(
        f"image must be an index of the {len(images.test)} test images, got {image}"
    )
with torch.no_grad():
    h = network.activations(images.input(images.test.pixels[[image]], device))
    shares = (
        sem.sim(sem.h(h))[0].T.unflatten(1, h[-1].shape[2:]).cpu() / h[-1][0, 0].numel()
    )
order = shares.sum((1, 2)).argsort(descending=True)[:5].tolist()
limit = shares[order].abs().max()
figure, axes = plt.subplots(1, len(order) + 1, figsize=(1.7 * (len(order) + 1), 2.1))
axes[0].imshow(images.test.rgb(image))
axes[0].set_title(literal(f"is {images.classes[images.test.labels[image]]}"))
for panel, j in zip(axes[1:], order, strict=True):
    shown = panel.imshow(shares[j], cmap="RdBu_r", vmin=-limit, vmax=limit)
    panel.set_title(literal(f"{images.classes[j]}: {shares[j].sum():+.1f}"))
for panel in axes:
    panel.set_axis_off()
figure.colorbar(shown, ax=axes, shrink=0.7, label="$h_r \\cdot c_j / R$")
plt.show()

# %% [markdown]
# Above each map stands the score it sums to; red positions speak for the class, blue ones against it. The predicted
# class comes first: most of its positions are red, so no single place decides. The maps are as coarse as $h$, on the
# embedded digits 2 x 2. So the network explains itself, but roughly, and by its own columns. Are those any good?

# %% [markdown]
# ## Are the $c_j$ good prototypes?
#
# A prototype should lie among the data it stands for. For each class the table has the cosine of $c_j$ with the class's
# embeddings,
#
# $$\cos(z, c_j) = \frac{z \cdot c_j}{\lVert z\rVert\,\lVert c_j\rVert},$$
#
# its cosine with all others, and the length of $c_j$ beside that of the embeddings. The formula is the line that begins
# with `cosine =`.

# %%
import pandas as pd
import torch.nn.functional as F

z, labels = run.embeddings("train")
c = network.c.cpu()
cosine = F.normalize(z, dim=1) @ F.normalize(c, dim=1).T
rows = []
for j, name in enumerate(images.classes):
    inside = labels == j
    rows.append(
        (
            name,
            cosine[inside, j].mean(),
            cosine[~inside, j].mean(),
            c[j].norm(),
            z[inside].norm(dim=1).mean(),
        )
    )
columns = ["class", "cos with class", "cos with others", "‖c_j‖", "mean ‖z‖"]
pd.DataFrame(rows, columns=columns).set_index("class").astype(float).round(2)

# %% [markdown]
# With its own class a column has a mean cosine of less than one half, an angle of more than 60 degrees; with the others
# it is about zero. And it is many times shorter than the embeddings. A column says on which side of a plane its class
# lies, not where.

# %%
between = F.normalize(c, dim=1) @ F.normalize(c, dim=1).T
off_diagonal = between[~torch.eye(len(c), dtype=bool)]
low, mean, high = off_diagonal.min(), off_diagonal.mean(), off_diagonal.max()
print(f"cosine between two columns: mean {mean:+.2f}, from {low:+.2f} to {high:+.2f}")
figure, axes = plt.subplots(figsize=(6, 2.2))
in_class = cosine[torch.arange(len(z)), labels]
axes.hist(in_class, 60, density=True, alpha=0.8, color=palette(2)[0], label="own class")
in_next = cosine[torch.arange(len(z)), (labels + 1) % len(c)]
axes.hist(
    in_next, 60, density=True, alpha=0.8, color=palette(2)[1], label="another class"
)
axes.set_xlabel("cosine of an embedding with a column $c_j$")
axes.set_yticks([])
axes.legend()
plt.show()

# %% [markdown]
# Two columns are nearly orthogonal to each other. The two histograms hardly overlap, so the columns separate the
# classes well, each in a half-space of its own. But neither comes near a cosine of 1: the columns point away from where
# the data lies. [Notebook 6](06_alignment.ipynb) measures it as Table 1, and [notebook 3](03_kmex.ipynb) mends it.

# %%
run.save_results("sem", [("CNN", "theorem1_residual", "test", residual)], image=image)
