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
# **Theorem 1.** A CNN with average pool and linear classifier is one, with the columns $c_j$ as prototypes, the dot
# product as sim and the average pool as proj, because the last two commute (eq. 4, 5):
#
# $$\Bigl(\frac1R\sum_r h_r\Bigr)\cdot c_j = \frac1R\sum_r \bigl(h_r\cdot c_j\bigr).$$

# %% tags=["parameters"]
dataset: str = "mnist-mini"  # as in 01_train
seed: int = 0  # of the training to explain
image: int = 0  # index in the test split of the image looked at
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is
runs: str = "runs"  # where 01_train left its results

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
# Both sides of eq. 5 on test images. They differ by rounding only.

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
# So each position $r$ of an image adds $h_r \cdot c_j / R$ to the score of class $j$, and the maps below sum to the
# CNN's prediction exactly.

# %%
import matplotlib.pyplot as plt

from kmex_utils.drawing import STYLE, literal, palette

plt.style.use(STYLE)

if not 0 <= image < len(images.test):
    raise ValueError(f"image must be an index of the {len(images.test)} test images, got {image}")
with torch.no_grad():
    h = network.activations(images.input(images.test.pixels[[image]], device))
    shares = sem.sim(sem.h(h))[0].T.unflatten(1, h[-1].shape[2:]).cpu() / h[-1][0, 0].numel()
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
# ## Are the $c_j$ good prototypes?
#
# A prototype should lie among the data it stands for. Below, for each class: the cosine between $c_j$ and its own
# embeddings, the cosine with all others, and the length of $c_j$ beside that of its embeddings.

# %%
import pandas as pd
import torch.nn.functional as F

z, labels = run.embeddings("train")
c = network.c.cpu()
cosine = F.normalize(z, dim=1) @ F.normalize(c, dim=1).T
rows = []
for j, name in enumerate(images.classes):
    inside = labels == j
    rows.append((name, cosine[inside, j].mean(), cosine[~inside, j].mean(), c[j].norm(), z[inside].norm(dim=1).mean()))
columns = ["class", "cos with class", "cos with others", "‖c_j‖", "mean ‖z‖"]
pd.DataFrame(rows, columns=columns).set_index("class").astype(float).round(2)

# %%
between = F.normalize(c, dim=1) @ F.normalize(c, dim=1).T
off_diagonal = between[~torch.eye(len(c), dtype=bool)]
low, mean, high = off_diagonal.min(), off_diagonal.mean(), off_diagonal.max()
print(f"cosine between two columns: mean {mean:+.2f}, from {low:+.2f} to {high:+.2f}")
figure, axes = plt.subplots(figsize=(6, 2.2))
in_class = cosine[torch.arange(len(z)), labels]
axes.hist(in_class, 60, density=True, alpha=0.8, color=palette(2)[0], label="own class")
in_next = cosine[torch.arange(len(z)), (labels + 1) % len(c)]
axes.hist(in_next, 60, density=True, alpha=0.8, color=palette(2)[1], label="another class")
axes.set_xlabel("cosine of an embedding with a column $c_j$")
axes.set_yticks([])
axes.legend()
plt.show()

# %% [markdown]
# The columns separate the classes, each class in its own half-space, but they point away from where the data lies:
# that is what Table 1 measures (notebook 6) and KMEx mends (notebook 3).

# %%
run.save_results("sem", [("CNN", "theorem1_residual", "test", residual)], image=image)
