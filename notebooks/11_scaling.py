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
# The engine behind KMEx and the encoder's explainers never builds $q_h$: upsampling acts on positions and the dot
# product on channels, so both commute (`kmex_utils/composite.py`). This notebook measures what that is worth **on this
# machine**: against materialising $q_h$ for scikit-learn and faiss, against a bare forward pass, and against Grad-CAM
# and Integrated Gradients from captum. Methods take turns in one run; medians are quoted.

# %% tags=["parameters"]
repeats: int = 3  # turns of every fit
images: list[int] = [10, 90]  # of a class at 224 px, beside the 30 of a CUB-200 class
prototypes_per_class: list[int] = [5, 20]  # K/C, beside 10
start_blocks: list[int] = [4, 3]  # beside 2 (B234)
class_images: int = 30  # of the class that the other cases vary
restarts: int = 10  # of k-means
batch: int = 8  # images explained at a time
prototypes: int = 2000  # of all classes (CUB-200: 200 times 10)
explanation_repeats: int = 7  # turns of every explanation
gradient_steps: int = 50  # of Integrated Gradients
stream_rows: list[int] = [100_000, 1_000_000]  # composite rows that are never in memory; try 10_000_000
threads: int = 0  # CPU threads; 0: as the environment says
figures_folder: str = "figures"  # tables and figures go to <figures_folder>/scaling/

# %%
from kmex_utils import hardware, parameters, paths, scaling
from kmex_utils.store import save_text

settings = parameters.check(globals())
folder = paths.resolve(figures_folder) / "scaling"
machine = f"{hardware.machine()}, {hardware.set_threads(threads)} threads"
print(machine)

# %% [markdown]
# ## Fitting
#
# The activations of embedded digits at 224 px in a ResNet34 with random weights, given; one class, as every class is
# clustered by itself. `cub-class` has the shape of one class of CUB-200; each other case changes one thing. All start
# from k-means++ but faiss, which draws its starts and stops after 25 iterations. Each library runs in its own process;
# `mib` is its peak memory on top of the activations.

# %%
base = scaling.Case("cub-class", class_images, restarts=restarts)
cases = [base]
cases += [scaling.Case(f"{n} images", n, restarts=restarts) for n in images]
cases += [scaling.Case(f"K = {k}", class_images, k=k, restarts=restarts) for k in prototypes_per_class]
cases += [scaling.Case(f"from B{b}", class_images, b, restarts=restarts) for b in start_blocks]
fits = scaling.compare_fits(cases, repeats, threads)
save_text(folder / "fit.csv", fits.to_csv(index=False, float_format="%.5g"))
fits.round(3).T

# %%
first = fits.set_index("case").loc["cub-class"]
print(f"fit: scikit-learn takes {first.sklearn_over_ours:.1f} times as long (target: 5)")
print(f"memory: ours {first.ours_mib:.0f} MiB, scikit-learn {first.sklearn_mib:.0f} MiB (target: a quarter)")
print(f"inertia: ours / scikit-learn = {first.ours_inertia / first.sklearn_inertia:.5f} (target: 1.0005)")

# %%
from kmex_utils import figures

figure = figures.scaling_fits(fits)
figures.save(figure, folder / "fit")
figure

# %% [markdown]
# ## Explaining
#
# B4, B34 and B234 and the attribution through them for a batch of images against all prototypes, on top of the forward
# pass that gives the prediction anyway; captum's methods run passes of their own and are counted whole.

# %%
explained = scaling.compare_explanations(batch, prototypes, explanation_repeats, threads, gradient_steps)
save_text(folder / "explain.csv", explained.to_csv(index=False, float_format="%.5g"))
explained.round(4)

# %%
figure = figures.scaling_explanations(explained)
figures.save(figure, folder / "explain")
figure

# %% [markdown]
# ## More rows than memory
#
# Synthetic activations, made anew whenever a chunk is read, so no row is ever kept: what stays is a label and a
# distance per row. Memory is that of the whole process, PyTorch included.

# %%
import pandas as pd
from tqdm.auto import tqdm

streams = pd.DataFrame(tqdm(scaling.stream(stream_rows, threads=threads), "streams", len(stream_rows), leave=False))
save_text(folder / "stream.csv", streams.to_csv(index=False, float_format="%.5g"))
streams.round(3).T

# %% [markdown]
# ### ImageNet, extrapolated
#
# 1.28 million images at 224 px from block 2 are 10⁹ rows; class by class, 1,300 images are about a million rows.
# Passes: two for each k-means++ start but the first, one for each Lloyd iteration (50 assumed), and three more (the
# variance, the first start, the last assessment).

# %%
per_pass = streams.seconds_per_pass_and_million_rows.iloc[-1]
rows_per_class, k, iterations = 1_281_167 / 1000 * 28 * 28 / 1e6, 10, 50
passes = 2 * (k - 1) + iterations + 3
hours = 1000 * passes * rows_per_class * per_pass / 3600
print(
    f"{per_pass:.2f} s for a pass over a million rows, {passes} passes, 1,000 classes: {hours:.0f} hours on {machine}, "
    "one restart, with activations as quick to read as these are to make"
)
save_text(
    folder / "machine.md", f"Measured on {machine}. ImageNet from B234, one restart, extrapolated: {hours:.0f} h.\n"
)
