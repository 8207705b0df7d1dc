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
# # 16. What depth buys: semantic fidelity against accuracy
#
# The paper's thesis is a trade-off: shallower blocks cost accuracy and give maps that follow the parts of an object.
# [Table 2](07_accuracy.ipynb) measures the price. Here is what is bought with it, on images whose parts are known. What
# is said of results below holds of a frozen ResNet with ImageNet weights and 23 classes of CUB-200
# ([tables](../figures/resnet/frozen/cub200/fidelity.csv)); the digits have no parts.
#
# Every visible part of an image lies in some segment of its map. If prototypes mean parts, the prototype tells the
# part. Each prototype is called by its most frequent part on the *training* images; on the *test* images
#
# - **NMI_m** and **ARI_m** say how much the called part $\hat t$ tells of the true part $t$, **purity** how often it is
#   right:
#   $\;\mathrm{NMI}_m = \dfrac{2\, I(t; \hat t)}{H(t) + H(\hat t)}, \quad \mathrm{purity} = P(\hat t = t)$;
# - the **null** is the same after shuffling the positions of every map: what a map of no meaning would get;
# - the **position baseline** calls each place by the part that lies nearest on average: below it, a map says no more
#   than that birds are in the middle;
# - the **ceiling** gives each cell its most frequent part: more a map of this grid cannot say.

# %% tags=["parameters"]
# What the paper leaves open
scales: list[str] = ["1/D", "1/sqrt(D)", "1"]  # of eq. 8, or weights by block
# What the workflow sets
dataset: str = "cub200"  # as in 01_train; with parts of its own, or `annotations`
seeds: list[int] = []  # trainings to study; empty: all there are
threads: int = 0  # CPU threads; 0: as the environment says
runs: str = "runs"  # where the earlier notebooks left their results
figures_folder: str = "figures"  # output goes to <figures_folder>/<dataset>/
# What you may change
annotations: str = ""  # keypoints as CSV or a folder of masks; empty: CUB-200's own
start_blocks: list[int] = [4, 3, 2]  # 4: B4, 3: B34, 2: B234, 1: B1234
prototypes_per_class: list[int] = [1, 5, 10, 20]  # K/C, each
named: int = 10  # the K/C of the points that are named, repeated and compared
weights: list[float] = []  # of blocks 2 and 3, the last 1, e.g. [0.25, 0.5, 1, 2, 4]
shared: list[int] = [4, 8, 16]  # K of one k-means over all classes
refits: int = 3  # of the named points, from other seeds of k-means
baseline: bool = True  # ProtoPNet too, where notebook 5 has run
fit_on: int = 0  # images of each class to fit on, the first ones; 0: all
restarts: int = 3  # of k-means; the best is kept
device: str = "auto"  # cpu, cuda, mps, or auto: the fastest there is

# %%
from kmex_utils import hardware, parameters
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.explainers import block_names
from kmex_utils.paper.runs import Run, trained_seeds

settings = parameters.check(globals(), may_be_empty=["shared"])
if named not in prototypes_per_class:
    choices = f"prototypes_per_class, {prototypes_per_class}"
    raise ValueError(f"named must be one of {choices}, got {named}")
device, threads = hardware.pick_device(device), hardware.set_threads(threads)
seeds = seeds or trained_seeds(runs, dataset)
all_runs = [Run.of(runs, dataset, seed) for seed in seeds]
last = all_runs[0].blocks
names = block_names(start_blocks, last, last=True)
points = [
    (b, scale) for b in start_blocks for scale in (scales if b < last else scales[:1])
]
[f"{names[b]}, {scale}" for b, scale in points]

# %% [markdown]
# ## Parts
#
# Where each visible part lies in the image as the network sees it. Parts are the same for all trainings.

# %%
from kmex_utils.data.annotations import parts as parts_of

images = all_runs[0].dataset()
parts = parts_of(images, annotations)
{
    split: f"{len(of):,} visible parts in {of.images:,} images"
    for split, of in parts.items()
}

# %% [markdown]
# ## What is measured of a map
#
# Its fidelity as it is, and resampled to the last block's grid, which all maps share: scores at parts depend on the
# grid. Beside it the accuracy of its prediction (eq. 10). The scores themselves are `agreement` and `fidelity` in
# [fidelity.py](../kmex_utils/evaluation/fidelity.py).

# %% tags=["hide-input"]
from kmex_utils.evaluation import fidelity as f
from kmex_utils.method.measures import accuracy


def of_maps(maps, prototypes, coarse):
    """Fidelity of maps as they are and on the common grid: (grid, metric, value)."""
    own = f.fidelity(maps, parts, prototypes)
    common = f.fidelity(
        {split: f.resampled(q_s, coarse) for split, q_s in maps.items()},
        parts,
        prototypes,
    )
    grids = ("x".join(map(str, maps["test"].shape[1:])), "common")
    values = [
        (g, *item)
        for g, of in zip(grids, (own, common), strict=True)
        for item in of.scores().items()
    ]
    return own, values


def predicted(explainer, maps, passed):
    """Accuracy on both splits, as (grid, metric, value)."""
    for split, q_s in maps.items():
        yield (
            "",
            f"accuracy_{split}",
            accuracy(explainer.proj(q_s).argmax(1), passed.labels[split]),
        )


# %% [markdown]
# With only a class's own prototypes in competition, the map of an image of known class.

# %% tags=["hide-input"]
import torch


def own_class(explainer, passed, split):
    """Maps [N, H, W] in which only the prototypes of each image's class compete."""
    index = explainer.prototypes.labels
    maps = torch.empty(0)
    for c in range(len(passed.classes)):
        of_class = (index == c).nonzero().flatten()
        members = (passed.labels[split] == c).nonzero().flatten()
        rows = passed.x[split].rows(
            members, explainer.start_block, explainer.normalisation, keep=False
        )
        alone = replace(
            explainer,
            prototypes=replace(
                explainer.prototypes, vectors=explainer.prototypes.vectors[of_class]
            ),
        )
        q_s = of_class[alone.sim(rows)]
        maps = (
            maps
            if len(maps)
            else torch.empty(
                len(passed.labels[split]), *q_s.shape[1:], dtype=torch.int64
            )
        )
        maps[members] = q_s
    return maps


# %% [markdown]
# ## Is a prototype the same thing in every image?
#
# Its nearest position is looked up in every test image, as it is and with noise added ($\sigma = 0.2$, at most 0.25, as
# *Huang et al. 2023*). Consistency: near it, one part lies in 80 % of the images. Stability: noise does not change the
# parts near it. Patch purity (PIP-Net): its ten nearest patches hold the same part.

# %% tags=["hide-input"]
from dataclasses import replace

from kmex_utils.method.operator import CompositeRows


def noisy_activations(network, first):
    """x(b) of the test images with noise, from a block on, [N, D_b, H_b, W_b] each."""
    generator, parts_of_x = torch.Generator().manual_seed(0), []
    with torch.no_grad(), hardware.exact():
        for x, _ in images.batches("test", 64):
            noise = (0.2 * torch.randn(x.shape, generator=generator)).clamp(-0.25, 0.25)
            parts_of_x.append(
                [
                    u.cpu()
                    for u in network.to(device).activations((x + noise).to(device))[
                        first - 1 :
                    ]
                ]
            )
    network.cpu()
    return [torch.cat(block) for block in zip(*parts_of_x, strict=True)]


def sameness(explainer, passed, noisy, first):
    """Consistency, stability and patch purity in %, as (grid, metric, value)."""
    b = explainer.start_block
    reading = explainer.normalisation
    vectors = explainer.prototypes.vectors
    every = torch.arange(len(passed.labels["test"]))
    rows = passed.x["test"].rows(every, b, reading, keep=False)
    near = f.Nearest.of(rows, vectors)
    after = f.Nearest.of(
        CompositeRows([u.double() for u in noisy[b - first :]], reading, keep=False),
        vectors.double(),
    )
    labels = explainer.prototypes.labels, passed.labels["test"]
    yield "", "consistency", f.consistency(near, parts["test"], *labels)
    yield "", "stability", f.stability(near, after, parts["test"], *labels)
    yield "", "patch_purity", f.patch_purity(near, parts["test"])


# %% [markdown]
# ## Every setting
#
# The start blocks, each factor of eq. 8 and each $K/C$, from one pass through each network. The named points, at one
# $K/C$, are refitted from other seeds of k-means.

# %% tags=["hide-input"]
import time

import pandas as pd

from kmex_utils import paths
from kmex_utils.explanation.passed import Passed
from kmex_utils.store import save_text

folder = paths.resolve(figures_folder) / dataset
rows, named_maps, of_last = [], {}, {}


def note(values, **of):
    rows.extend(
        {**of, "grid": grid, "metric": metric, "value": value}
        for grid, metric, value in values
    )


def fit(passed, b, scale, k, seed):
    """B4, B34 …, and its maps by split."""
    explainer = passed.fit_encoder(
        b, Normalisation(scale=scale), k, seed=seed, restarts=restarts, index=index
    )
    return explainer, {
        split: passed.map(explainer, split) for split in ("train", "test")
    }


# %%
passes = {}
for run in all_runs:
    network = run.network()
    passes[run.seed] = passed = Passed.of(
        network, images, min(start_blocks), device=device
    )
    index = passed.first_of_each_class(fit_on)
    coarse = passed.x["test"].read(torch.tensor([0]), last)[0].shape[2:]
    noisy = noisy_activations(network, min(start_blocks))
    right = accuracy(passed.y["test"].argmax(1), passed.labels["test"])
    note([("", "accuracy_test", right)], seed=run.seed, model="CNN")
    for (b, scale), k in ((point, k) for point in points for k in prototypes_per_class):
        for refit in range(refits if k == named else 1):
            start = time.perf_counter()
            explainer, maps = fit(passed, b, scale, k, run.seed + 1000 * refit)
            of = {
                "model": names[b],
                "scale": scale,
                "prototypes_per_class": k,
                "seed": run.seed,
                "refit": refit,
            }
            own, values = of_maps(maps, len(explainer.prototypes), coarse)
            note([*values, *predicted(explainer, maps, passed)], **of)
            if k != named:
                continue
            named_maps[run.seed, names[b], scale, refit] = own
            note(sameness(explainer, passed, noisy, min(start_blocks)), **of)
            if refit == 0:
                of_last |= {run.seed: explainer} if b == last else {}
                alone = {split: own_class(explainer, passed, split) for split in maps}
                note(
                    of_maps(alone, len(explainer.prototypes), coarse)[1],
                    **{**of, "of": "own class"},
                )
            seconds = time.perf_counter() - start
            point = f"seed {run.seed}, {names[b]}, {scale}, refit {refit}"
            print(f"{point}: {seconds:.0f} s")

# %% [markdown]
# ## What a finer grid alone gives
#
# B4's similarities, upsampled to the grids of the shallower blocks: no shallower block has a say. What depth buys is
# what B34 and B234 have beyond that.

# %%
for seed, passed in passes.items():
    explainer = of_last[seed]
    every = {split: torch.arange(len(of)) for split, of in passed.labels.items()}
    for b in (b for b in start_blocks if b < last):
        grid = passed.x["test"].read(torch.tensor([0]), b)[0].shape[2:]
        maps = {}
        for split, members in every.items():
            of_last_block = passed.x[split].rows(
                members, last, explainer.normalisation, keep=False
            )
            maps[split] = f.finer(explainer, of_last_block, tuple(grid))
        of = {
            "model": f"B{last} on the grid of B{b}",
            "scale": scales[0],
            "prototypes_per_class": named,
            "seed": seed,
        }
        own, values = of_maps(maps, len(explainer.prototypes), coarse)
        named_maps[seed, f"B{last} on the grid of B{b}", scales[0], 0] = own
        note([*values, *predicted(explainer, maps, passed)], **of, refit=0)

# %% [markdown]
# ## One weight a block
#
# The printed factor and equal weights are two points of a plane. Here each block has a weight of its own, beside 1 for
# the last. Nothing is chosen on test images: prototypes come from four fifths of the training images, and accuracy and
# fidelity from the last fifth.

# %% tags=["hide-input"]
from kmex_utils.data import held_out


def tried(passed, b, scale, seed):
    """(accuracy, NMI_m) on held-out training images."""
    labels = passed.labels["train"]
    mask = torch.from_numpy(held_out(labels.numpy(), 0.2, seed))
    members = {"train": (~mask).nonzero().flatten(), "test": mask.nonzero().flatten()}
    reading = Normalisation(scale=scale)
    options = {"seed": seed, "restarts": 1, "index": members["train"]}
    explainer = passed.fit_encoder(b, reading, named, **options)
    maps = {
        split: explainer.sim(passed.x["train"].rows(of, b, reading, keep=False)).cpu()
        for split, of in members.items()
    }
    held = {split: parts["train"].of(of) for split, of in members.items()}
    right = accuracy(explainer.proj(maps["test"]).argmax(1), labels[mask])
    return right, f.fidelity(maps, held, len(explainer.prototypes)).scores()["nmi"]


# %%
plane = [(3, f"{w:g},1") for w in weights] + [
    (2, f"{v:g},{w:g},1") for v in weights for w in weights
]
surface = []
for seed, passed in passes.items():
    for b, scale in (point for point in plane if point[0] in start_blocks):
        right, nmi = tried(passed, b, scale, seed)
        surface.append(
            {
                "seed": seed,
                "model": names[b],
                "scale": scale,
                "accuracy": right,
                "nmi": nmi,
            }
        )
surface = pd.DataFrame(surface, columns=["seed", "model", "scale", "accuracy", "nmi"])
save_text(folder / "weights.csv", surface.to_csv(index=False, float_format="%.6g"))
surface.groupby(["model", "scale"], sort=False)[["accuracy", "nmi"]].mean().round(1)

# %% [markdown]
# The same for B234 as a plane, in which the last block weighs 1. Equal weights lie in the middle; the printed factor, 4
# and 2, in a corner.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
import seaborn

from kmex_utils import drawing

plt.style.use(drawing.STYLE)
of_plane = surface[surface.model == "B234"]
if len(of_plane):
    both = (
        of_plane.scale.str.split(",", expand=True)
        .astype(float)[[0, 1]]
        .set_axis(["block 2", "block 3"], axis=1)
    )
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.0))
    for axes, (column, title) in zip(
        panels, {"accuracy": "accuracy (%)", "nmi": "NMI$_m$ (%)"}.items(), strict=True
    ):
        grid = of_plane.assign(**both).pivot_table(
            index="block 2", columns="block 3", values=column
        )
        shown = {
            "annot": True,
            "fmt": ".0f",
            "cmap": "cividis",
            "cbar": False,
            "square": True,
        }
        seaborn.heatmap(
            grid.rename(index="{:g}".format, columns="{:g}".format), ax=axes, **shown
        )
        axes.set(title=title, xlabel="weight of block 3", ylabel="weight of block 2")
    drawing.save(figure, folder / "weights")

# %% [markdown]
# The more the earlier blocks weigh, the less accurate. What that buys in NMI_m comes with the weight of block 3; block
# 2 buys nothing ([figure](../figures/resnet/frozen/cub200/weights.png)).
#
# Chosen: of the weights within a point of the highest accuracy on the held-out training images, those with the most
# NMI_m. They are then fitted to all training images and measured on the test images like the others.

# %%
chosen = {}
for model, of_model in surface.groupby("model", sort=False):
    mean = of_model.groupby("scale", sort=False)[["accuracy", "nmi"]].mean()
    chosen[model] = mean[mean.accuracy >= mean.accuracy.max() - 1].nmi.idxmax()
for seed, passed in passes.items():
    index = passed.first_of_each_class(fit_on)
    for b in (b for b in start_blocks if names[b] in chosen):
        scale = chosen[names[b]]
        explainer, maps = fit(passed, b, scale, named, seed)
        own, values = of_maps(maps, len(explainer.prototypes), coarse)
        named_maps[seed, names[b], scale, 0] = own
        of = {
            "model": names[b],
            "scale": scale,
            "prototypes_per_class": named,
            "seed": seed,
            "refit": 0,
        }
        note([*values, *predicted(explainer, maps, passed)], **of, chosen=True)
chosen

# %% [markdown]
# ## What needs no prototypes
#
# The position baseline, and the ceiling of each grid.

# %%
base = f.Fidelity(*[f.position_baseline(parts)] * 3, f.position_baseline(parts).sum(0))
note([("", metric, base.scores()[metric]) for metric in f.METRICS], model="position")
for b in start_blocks:
    grid = tuple(passed.x["test"].read(torch.tensor([0]), b)[0].shape[2:])
    table = f.ceiling(parts["test"], grid).sum(0)
    for metric, value in f.agreement(table[None]).items():
        note(
            [("x".join(map(str, grid)), metric, 100 * value.item())],
            model=f"ceiling of B{b}",
        )

# %% [markdown]
# ## One vocabulary for all classes
#
# One k-means over the rows of all classes, as part-discovery papers have it: few prototypes, shared. No prediction
# comes from them.

# %%
for seed, passed in passes.items():
    one = replace(
        passed,
        classes=("all",),
        labels={split: torch.zeros_like(of) for split, of in passed.labels.items()},
    )
    for (b, scale), k in ((point, k) for point in points for k in shared):
        explainer, maps = fit(one, b, scale, k, seed)
        of = {
            "model": names[b],
            "scale": scale,
            "prototypes_per_class": k,
            "seed": seed,
            "of": "shared",
        }
        note(of_maps(maps, k, coarse)[1], **of, refit=0)

# %% [markdown]
# ## ProtoPNet
#
# The baseline by the same measures on its own grid: each position has the learned prototype that is nearest.

# %% tags=["hide-input"]
from kmex_utils.training import protopnet


def of_protopnet(run):
    """Maps by split, nearest positions of the test images, the prototypes' labels."""
    learned = protopnet.load(run.network(), *run.part("ProtoPNet", "05_protopnet")).to(
        device
    )
    maps, near = {}, []
    with torch.no_grad(), hardware.exact():
        for split in ("train", "test"):
            of_split = []
            for latent in protopnet.latents(learned, images, split):
                squared = learned.explainer.squared_distances(
                    learned.explainer.patches(latent)
                )
                sides = [
                    side - learned.prototypes.shape[2] + 1 for side in latent.shape[2:]
                ]
                of_split.append(squared.argmin(2).view(-1, *sides).cpu())
                near += [squared.min(1)] if split == "test" else []
            maps[split] = torch.cat(of_split)
    distance, position = (torch.cat([part[i].cpu() for part in near]).T for i in (0, 1))
    return (
        maps,
        f.Nearest(position, distance, tuple(maps["test"].shape[1:])),
        learned.labels.cpu(),
    )


for run in all_runs if baseline else ():
    if not (run.folder / "ProtoPNet.safetensors").exists():
        continue
    maps, near, labels_of = of_protopnet(run)
    of = {
        "model": "ProtoPNet",
        "prototypes_per_class": len(labels_of) // len(images.classes),
        "seed": run.seed,
    }
    own, values = of_maps(maps, len(labels_of), coarse)
    named_maps[run.seed, "ProtoPNet", "", 0] = own
    same = f.consistency(near, parts["test"], labels_of, images.test.labels)
    values += [("", "consistency", same)]
    values += [("", "patch_purity", f.patch_purity(near, parts["test"]))]
    values += [
        ("", r["metric"] + "_test", r["value"])
        for r in run.results("protopnet", "05_protopnet")
        if r["split"] == "test" and r["model"] == "ProtoPNet"
    ]
    note(values, **of, refit=0)

# %% [markdown]
# ## The numbers
#
# Saved as they are; here the named points, as means over seeds and refits, in %. Read `nmi` and `purity` beside their
# nulls, and `accuracy_test` beside the CNN's.

# %% tags=["hide-input"]
records = pd.DataFrame(rows)
records = records.assign(
    of=records["of"].fillna("all classes") if "of" in records else "all classes"
)
save_text(folder / "fidelity.csv", records.to_csv(index=False, float_format="%.6g"))
at_named = records[
    (records.prototypes_per_class == named)
    & (records["of"] == "all classes")
    & (records.grid != "common")
]
metrics = [
    "nmi",
    "null_nmi",
    "ari",
    "purity",
    "null_purity",
    "consistency",
    "stability",
    "patch_purity",
    "accuracy_test",
]
means = at_named.pivot_table(
    index=["model", "scale"], columns="metric", values="value", sort=False
)
means.reindex(columns=metrics).round(1)

# %% [markdown]
# All explainers are far above their nulls, so prototypes mean something. Of the points with the last block alone or
# with equal weights, B34 and B234 have some three points of NMI_m more than B4, at about its accuracy. With the printed
# factor B34 has a point or two more again and loses ten points of accuracy; B234 falls below B4 on both.
#
# What says less, and what could be said at most:

# %%
others = records[records.model.str.startswith(("position", "ceiling"))]
others.pivot_table(index=["model"], columns="metric", values="value", sort=False).round(
    1
)

# %% [markdown]
# The position baseline is about as good as B4: B4's maps tell hardly more of a part than where it lies in the picture.
# The ceilings are several times higher, so the grid is not what limits the maps.

# %% [markdown]
# ## Which differences are there?
#
# Pairs of named points on the same test images, in points of NMI_m and purity, with a 95 % interval over images drawn
# with replacement. One has *more fidelity* than another where the interval excludes zero in every seed.

# %% tags=["hide-input"]
coarse_of = {names[b]: f"B{last} on the grid of B{b}" for b in start_blocks if b < last}
pairs = [
    ((names[b], scale), (names[last], scales[0])) for b, scale in points if b < last
]
pairs += [((model, scale), (names[last], scales[0])) for model, scale in chosen.items()]
pairs += [
    ((names[b], scale), (coarse_of[names[b]], scales[0]))
    for b, scale in points
    if b < last
]
if 2 in start_blocks and 3 in start_blocks:
    pairs += [((names[2], scale), (names[3], scale)) for scale in scales]
if any(key[1] == "ProtoPNet" for key in named_maps):
    pairs += [((names[last], scales[0]), ("ProtoPNet", ""))]
rows = []
for seed in seeds:
    for one, other in pairs:
        for metric in ("nmi", "purity"):
            apart = f.difference(
                named_maps[seed, *one, 0], named_maps[seed, *other, 0], metric
            )
            pair = {
                "seed": seed,
                "more": ", ".join(one).rstrip(", "),
                "than": ", ".join(other).rstrip(", "),
            }
            rows.append(
                {
                    **pair,
                    "metric": metric,
                    **dict(zip(("difference", "low", "high"), apart, strict=True)),
                }
            )
differences = pd.DataFrame(rows)
save_text(
    folder / "fidelity-differences.csv",
    differences.to_csv(index=False, float_format="%.6g"),
)
held = differences.assign(more_in=differences.low > 0, less_in=differences.high < 0)
of_pair = held.groupby(["more", "than", "metric"], sort=False)
of_pair.agg(
    difference=("difference", "mean"),
    more_in=("more_in", "sum"),
    less_in=("less_in", "sum"),
).round(1)

# %% [markdown]
# Compare each row of B34 and B234 with the one beside *B4 on the grid of* the same block. With equal weights about a
# point or less is left: most of what depth seems to buy is the finer grid. What remains beyond it comes where block 3
# weighs more than block 4, at the price of accuracy. Under no factor has B234 more than B34.

# %% [markdown]
# ## The frontier
#
# To the right it costs more accuracy, upwards it says more of parts. Each line is a factor of eq. 8 from B4 over B34 to
# B234 at the named $K/C$; faint marks are other $K/C$. A setting dominates another where it lies above and not to the
# right of it.

# %%
from kmex_utils.paper.figures import frontier

figure = frontier(records, named)
drawing.save(figure, folder / "frontier")
figure

# %% [markdown]
# On the birds ([figure](../figures/resnet/frozen/cub200/frontier.png)) the printed factor's line runs to the right, and
# in its last step down: block 2 costs accuracy and fidelity. The line of equal weights stays at the left.
# B34 with equal weights and 20 prototypes a class lies above and to the left of the paper's B4 and B234 at 10, so more
# prototypes buy more than depth does. The trade-off of the paper's pictures is there for block 3, and small.
