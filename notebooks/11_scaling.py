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
# # 11. What it costs
#
# The engine behind KMEx and the encoder's explainers never builds $q_h$. With $A_b$ the upsampling of block $b$ and
# $p^{(b)}$ a prototype's part for it,
#
# $$q_{h,r} \cdot p = \sum_b \frac{1}{D_b\lVert u^{(b)}_r\rVert}\,\bigl[A_b\,(x^{(b)} p^{(b)})\bigr]_r .$$
#
# $A_b$ acts on positions and the dot product on channels, so both commute: the product is taken on the low-resolution
# activations, and only its result is upsampled ([operator.py](../kmex_utils/method/operator.py), `closeness`).
# This notebook measures what that is worth **on this machine**: against materialising $q_h$ for scikit-learn and faiss,
# against a bare forward pass, and against Grad-CAM and Integrated Gradients from captum. Methods take turns in one run;
# medians are quoted.

# %% tags=["parameters"]
# What the workflow sets
figures_folder: str = "figures"  # output goes to <figures_folder>/scaling/
# What you may change
repeats: int = 3  # turns of every fit
images: list[int] = [10, 90]  # of a class at 224 px, beside the 30 of CUB-200
prototypes_per_class: list[int] = [5, 20]  # K/C, beside 10
start_blocks: list[int] = [4, 3]  # beside 2 (B234)
class_images: int = 30  # of the class that the other cases vary
restarts: int = 10  # of k-means
batch: int = 8  # images explained at a time
prototypes: int = 2000  # of all classes (CUB-200: 200 times 10)
explanation_repeats: int = 7  # turns of every explanation
gradient_steps: int = 50  # of Integrated Gradients
stream_rows: list[int] = [100_000, 1_000_000]  # rows never in memory; try 10_000_000
threads: int = 0  # CPU threads; 0: as the environment says

# %%
from kmex_utils import parameters, paths

settings = parameters.check(
    globals(), may_be_empty=["images", "prototypes_per_class", "start_blocks"]
)
folder = paths.resolve(figures_folder) / "scaling"

# %% [markdown]
# ## Measuring
#
# `benchmarks/scaling.py` does it, for some minutes, and leaves tables. So it also runs without this notebook, on a
# machine that has nothing else to do; what it compares with is the extra `compare`.

# %%
import subprocess
import sys

options = {
    name: value for name, value in settings.items() if name != "figures_folder"
} | {"out": folder}
command = [sys.executable, paths.ROOT / "benchmarks" / "scaling.py"]
for name, value in options.items():
    values = value if isinstance(value, list) else [value]
    command += [f"--{name.replace('_', '-')}", *map(str, values)]
subprocess.run(command, check=True)
print((folder / "machine.md").read_text())

# %% [markdown]
# ## Fitting
#
# The activations of embedded digits at 224 px in a ResNet34 with random weights, given; one class, as every class is
# clustered by itself. `cub-class` has the shape of one class of CUB-200; each other case changes one thing. All start
# from k-means++ but faiss, which draws its starts and stops after 25 iterations. Each library runs in its own process;
# `mib` is its peak memory on top of the activations.

# %%
import pandas as pd

fits = pd.read_csv(folder / "fit.csv")
fits.round(3).T

# %% [markdown]
# What was aimed for, in the shape of a class of CUB-200:

# %%
first = fits.set_index("case").loc["cub-class"]
print(
    f"fit: scikit-learn takes {first.sklearn_over_ours:.1f} times as long (target: 5)"
)
ours, theirs = f"{first.ours_mib:.0f} MiB", f"{first.sklearn_mib:.0f} MiB"
print(f"memory: ours {ours}, scikit-learn {theirs} (target: a quarter)")
inertia = first.ours_inertia / first.sklearn_inertia
print(f"inertia: ours / scikit-learn = {inertia:.5f} (target: 1.0005)")

# %% [markdown]
# Seconds and memory of every case, further left is better.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt

from kmex_utils import drawing

plt.style.use(drawing.STYLE)
figure, panels = plt.subplots(1, 2, figsize=(9.6, 0.5 * len(fits) + 1.2), sharey=True)
names = {
    "ours": "this engine",
    "sklearn": "scikit-learn",
    "faiss": "faiss",
    "minibatch": "scikit-learn, mini-batch",
}
place = range(len(fits) - 1, -1, -1)
for (method, label), marker, colour in zip(
    names.items(), "osD^", drawing.palette(4), strict=True
):
    for axes, unit in zip(panels, ("s", "mib"), strict=True):
        if f"{method}_{unit}" in fits:
            axes.plot(
                fits[f"{method}_{unit}"], place, marker, color=colour, label=label
            )
for axes, label in zip(
    panels, ("seconds", "peak memory beyond the activations (MiB)"), strict=True
):
    axes.set(xscale="log", xlabel=label)
    axes.grid(axis="y", alpha=0.3)
panels[0].set_yticks(place, fits.case)
figure.legend(
    *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=4
)
drawing.save(figure, folder / "fit")

# %% [markdown]
# On two cores ([table](../figures/scaling/fit.csv)) the engine took less than a fifth of scikit-learn's time and memory
# in this shape, at the same inertia, and was three to six times as fast in the other cases. From B4 alone nothing is
# upsampled, and it needs more memory than scikit-learn. Mini-batches are faster with many images and end at a slightly
# higher inertia.

# %% [markdown]
# ## Explaining
#
# B4, B34 and B234 and the attribution through them for a batch of images against all prototypes, on top of the forward
# pass that gives the prediction anyway; captum's methods run passes of their own and are counted whole.

# %%
explained = pd.read_csv(folder / "explain.csv")
explained.round(4)

# %% [markdown]
# The same in forward passes.

# %% tags=["hide-input"]
shown = explained[explained.method != "forward"]
ours, others = drawing.palette(2)
figure, axes = plt.subplots(figsize=(6.4, 2.2))
bars = axes.barh(
    shown.method,
    shown.over_forward,
    color=[ours if m == "ours" else others for m in shown.method],
)
axes.bar_label(
    bars,
    [f"{value:.2f}" if value < 10 else f"{value:.0f}" for value in shown.over_forward],
    padding=3,
)
axes.set(xscale="log", xlabel="time, in forward passes")
axes.margins(x=0.15)
axes.invert_yaxis()
drawing.save(figure, folder / "explain")

# %% [markdown]
# All three maps and the attribution cost less than half a forward pass, materialised $q_h$ more than half.
# Grad-CAM needs one pass, Integrated Gradients about a hundred.

# %% [markdown]
# ## More rows than memory
#
# Synthetic activations, made anew whenever a chunk is read, so no row is ever kept: what stays is a label and a
# distance per row. Memory is that of the whole process, PyTorch included; it should hardly grow with the rows.

# %%
streams = pd.read_csv(folder / "stream.csv")
streams.round(3).T

# %% [markdown]
# From a hundred thousand rows to ten million the peak grew by a tenth ([table](../figures/scaling/stream.csv)); time
# grows with the rows, as it must.

# %% [markdown]
# ### ImageNet
#
# 1.28 million images at 224 px from block 2 are 10⁹ rows; class by class, 1,300 images are about a million rows. One
# such class of real photographs is measured end to end by [imagenet.py](../benchmarks/imagenet.py); what all of them
# take on several machines follows from it ([scaling](../docs/scaling.md)). Classes are independent, so they share any
# number of machines. On the digits a tenth of the images gives prototypes that predict as well
# ([notebook 10](10_subset.ipynb)), so it need not take that long.
