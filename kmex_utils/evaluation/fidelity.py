"""Semantic fidelity: does a prototype mean a part, and the same one in every image?

Maps are read at the visible parts of images. Class-wise prototypes are many and pure, which raw mutual information
punishes, so each is first mapped to its most frequent part on the *training* images; scores are of the test images.

- NMI_m, ARI_m and purity of (part, mapped part): the protocol of part discovery (Choudhury et al. 2021), with many
  prototypes mapped to few parts as in DisParQ.
- Consistency and stability (Huang et al. 2023), purity of patches (PIP-Net, Nauta et al. 2023).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.annotations import Parts
from ..method.explainers import EncoderKMeans
from ..method.operator import CompositeRows

METRICS = ("nmi", "ari", "purity")
CONSISTENT = 0.8  # share of the images a part must lie near a prototype in (Huang et al. 2023)
CONSISTENCY_WINDOW, PURITY_WINDOW = 72 / 224, 32 / 224  # shares of the image (Huang et al. 2023; Nauta et al. 2023)
NEAREST_PATCHES = 10  # of PIP-Net's purity


# --- agreement of two labellings, from their contingency tables ------------------------------------------------------


def agreement(tables: Tensor) -> dict[str, Tensor]:
    """NMI, ARI and purity, [M] each, of M contingency tables [M, P, Q] of parts and mapped parts.

    Both are scikit-learn's (NMI with the arithmetic mean). Column q < P says part q, the others are wrong: purity is
    the share of the diagonal.
    """
    n = tables.double()
    total = n.sum((1, 2))
    rows, columns = n.sum(2), n.sum(1)
    entropies = [_entropy(part / total[:, None]) for part in (rows, columns)]
    joint = _entropy(n.flatten(1) / total[:, None])
    mean = (entropies[0] + entropies[1]) / 2
    nmi = torch.where(mean > 0, (entropies[0] + entropies[1] - joint) / mean, 1.0)
    together, of_rows, of_columns = (pairs(part).sum(1) for part in (n.flatten(1), rows, columns))
    ari = adjusted_for_chance(together, of_rows, of_columns, pairs(total))
    return {"nmi": nmi, "ari": ari, "purity": n.diagonal(dim1=1, dim2=2).sum(1) / total}


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(1)


def pairs(n: Tensor) -> Tensor:
    """How many pairs n things make."""
    return n * (n - 1) / 2


def adjusted_for_chance(together: Tensor, of_a: Tensor, of_b: Tensor, of_all: Tensor) -> Tensor:
    """Adjusted Rand index (Hubert & Arabie 1985) from the pairs together in both labellings, in each, and of all.

    1: the same partition, 0: as by chance. Two that both put all into one, or each alone, are the same.
    """
    expected = of_a * of_b / of_all.clamp_min(1)
    largest = (of_a + of_b) / 2
    return torch.where(largest > expected, (together - expected) / (largest - expected), 1.0)


# --- prototypes and parts --------------------------------------------------------------------------------------------


def at(maps: Tensor, parts: Parts) -> Tensor:
    """Prototypes at the visible parts of maps q_s [N, H, W], [n]."""
    return maps.flatten(1)[parts.image, parts.cells(maps.shape[1:])]


def majority(prototype: Tensor, part: Tensor, prototypes: int, parts: int) -> Tensor:
    """Each prototype's most frequent part, [K]; of equals the first, ``parts`` where it has none: always wrong."""
    counts = torch.zeros(prototypes, parts, dtype=torch.int64)
    counts.index_put_((prototype, part), torch.ones_like(part), accumulate=True)
    return torch.where(counts.any(1), counts.argmax(1), parts)


def tables(mapped: Tensor, parts: Parts) -> Tensor:
    """Contingency tables of parts and mapped parts by image, [N, P, P + 1]; a split's is their sum."""
    count = len(parts.names)
    by_image = torch.zeros(parts.images, count, count + 1, dtype=torch.int64)
    return by_image.index_put_((parts.image, parts.part, mapped), torch.ones_like(mapped), accumulate=True)


@dataclass(frozen=True)
class Fidelity:
    """What maps say of parts: contingency tables by test image [N, P, P + 1].

    ``optimistic``: with the mapping fitted on the test images themselves, as published variants do; ``null``: after
    shuffling the positions of each map, the mapping fitted anew; ``raw``: of parts and prototypes [P, K], not mapped.
    """

    tables: Tensor
    optimistic: Tensor
    null: Tensor
    raw: Tensor

    def scores(self) -> dict[str, float]:
        """NMI_m, ARI_m and purity in %, those of the null, of the optimistic mapping, and raw NMI and ARI."""
        named = {"": self.tables, "null_": self.null, "optimistic_": self.optimistic}
        values = {f"{name}{metric}": v for name, t in named.items() for metric, v in percent(t.sum(0)).items()}
        raw = percent(self.raw)
        return values | {"raw_nmi": raw["nmi"], "raw_ari": raw["ari"]}

    def bootstrap(self, draws: int = 1000, seed: int = 0) -> dict[str, Tensor]:
        """NMI_m, ARI_m and purity in % over test images drawn with replacement, [draws] each; the same for all maps."""
        images = len(self.tables)
        drawn = torch.randint(images, (draws, images), generator=torch.Generator().manual_seed(seed))
        weights = torch.zeros(draws, images).scatter_add_(1, drawn, torch.ones(draws, images))
        tables = (weights @ self.tables.flatten(1).float()).view(draws, *self.tables.shape[1:])
        return {metric: 100 * value for metric, value in agreement(tables).items()}


def fidelity(maps: Mapping[str, Tensor], parts: Mapping[str, Parts], prototypes: int, seed: int = 0) -> Fidelity:
    """Of maps q_s [N, H, W] of K prototypes by split (``train``, ``test``) and the visible parts of the same images."""
    without = {split: shuffled(q_s, seed) for split, q_s in maps.items()}
    assigned, apart = ({split: at(q_s, parts[split]) for split, q_s in of.items()} for of in (maps, without))
    visible, count = parts["test"], len(parts["test"].names)

    def mapped(prototype: Mapping[str, Tensor], fitted_on: str) -> Tensor:
        means = majority(prototype[fitted_on], parts[fitted_on].part, prototypes, count)
        return tables(means[prototype["test"]], visible)

    raw = torch.zeros(count, prototypes, dtype=torch.int64)
    raw.index_put_((visible.part, assigned["test"]), torch.ones_like(visible.part), accumulate=True)
    return Fidelity(mapped(assigned, "train"), mapped(assigned, "test"), mapped(apart, "train"), raw)


def difference(one: Fidelity, other: Fidelity, metric: str = "nmi", draws: int = 1000) -> tuple[float, float, float]:
    """``one`` less ``other`` in points, paired by test image: the difference and its 95 % interval (bootstrap).

    One has more where the interval lies above zero.
    """
    apart = one.bootstrap(draws)[metric] - other.bootstrap(draws)[metric]
    low, high = apart.quantile(torch.tensor([0.025, 0.975], dtype=apart.dtype)).tolist()
    return one.scores()[metric] - other.scores()[metric], low, high


def shuffled(maps: Tensor, seed: int) -> Tensor:
    """The same prototypes of each map [..., H, W] at positions of no meaning."""
    keys = torch.rand(maps.flatten(-2).shape, generator=torch.Generator().manual_seed(seed))
    return maps.flatten(-2).gather(-1, keys.argsort(-1)).view_as(maps)


def percent(table: Tensor) -> dict[str, float]:
    """NMI, ARI and purity in % of one contingency table [P, Q]."""
    return {metric: 100 * value.item() for metric, value in agreement(table[None]).items()}


# --- what says less, and what could be said at most ------------------------------------------------------------------


def position_baseline(parts: Mapping[str, Parts]) -> Tensor:
    """Tables [N, P, P + 1] of saying the part whose mean position over the training images is nearest."""
    train, test = parts["train"], parts["test"]
    where = torch.stack([train.y, train.x], 1)
    means = torch.full((len(train.names), 2), torch.inf, dtype=where.dtype)
    for part in train.part.unique().tolist():
        means[part] = where[train.part == part].mean(0)
    distance = torch.cdist(torch.stack([test.y, test.x], 1), means.nan_to_num(posinf=1e6))
    return tables(distance.argmin(1), test)


def ceiling(parts: Parts, grid: tuple[int, int]) -> Tensor:
    """Tables [N, P, P + 1] of a map of this grid (H, W) that gives each cell its most frequent part."""
    cell = parts.image * (grid[0] * grid[1]) + parts.cells(grid)
    _, cell = cell.unique(return_inverse=True)
    return tables(majority(cell, parts.part, int(cell.max()) + 1, len(parts.names))[cell], parts)


def finer(explainer: EncoderKMeans, rows: CompositeRows, grid: tuple[int, int]) -> Tensor:
    """Maps [N, H', W'] where not the activations but the similarities of each prototype are upsampled, bilinearly.

    A finer grid alone, without a shallower block: what depth buys is what is left beyond it.
    """
    p = explainer.prototypes.vectors.to(rows.device)
    half = p.square().sum(1) / 2
    maps = []
    for _, chunk in rows.chunks():
        similarity = chunk.closeness(p, half).view(-1, *rows.grid, len(p)).permute(0, 3, 1, 2)
        for part in similarity.split(16):  # images: 1,000 prototypes on 56 x 56 positions take 400 MB
            maps.append(F.interpolate(part, grid, mode="bilinear").argmax(1).cpu())
    return torch.cat(maps)


def resampled(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Maps [N, H, W] on another grid: each cell takes what lies at its centre."""
    rows, columns = (((torch.arange(n) + 0.5) * m / n).long() for n, m in zip(grid, maps.shape[1:], strict=True))
    return maps[:, rows[:, None], columns]


# --- is a prototype the same thing in every image? -------------------------------------------------------------------


@dataclass(frozen=True)
class Nearest:
    """The position of each image nearest to each prototype, ``position`` [K, N], and its ``distance``; its grid."""

    position: Tensor
    distance: Tensor
    grid: tuple[int, int]

    @classmethod
    def of(cls, rows: CompositeRows, vectors: Tensor) -> "Nearest":
        """Of the rows of q(b:) of N images and prototypes [K, Σ D_b]."""
        distance, position = rows.nearest(vectors)
        return cls(position, distance, rows.grid)

    def holds(self, parts: Parts, window: float, prototype: Tensor, image: Tensor) -> Tensor:
        """Which parts lie in the window, a share of the image's side, around M (prototype, image), bool [M, P]."""
        height, width = self.grid
        position = self.position[prototype, image]
        centre = torch.stack([(position // width + 0.5) / height, (position % width + 0.5) / width], 1)
        where, part = _by_image(parts)
        inside = ((where[image] - centre[:, None]).abs() <= window / 2).all(2)  # NaN, no point: false
        held = torch.zeros(len(image), len(parts.names), dtype=torch.int64)
        return held.scatter_add_(1, part[image], inside.long()) > 0


def _by_image(parts: Parts) -> tuple[Tensor, Tensor]:
    """The points of each image: (y, x) as shares [N, L, 2], NaN where there are fewer, and their parts [N, L]."""
    order = parts.image.argsort(stable=True)
    image = parts.image[order]
    counts = image.bincount(minlength=parts.images)
    column = torch.arange(len(image)) - (counts.cumsum(0) - counts)[image]
    longest = int(counts.max())
    where = torch.full((parts.images, longest, 2), torch.nan, dtype=torch.float64)
    part = torch.zeros(parts.images, longest, dtype=torch.int64)
    where[image, column] = torch.stack([parts.y, parts.x], 1)[order].double()
    part[image, column] = parts.part[order]
    return where, part


def _visible(parts: Parts) -> Tensor:
    """Which parts are visible in which image, bool [N, P]."""
    seen = torch.zeros(parts.images, len(parts.names), dtype=torch.bool)
    seen[parts.image, parts.part] = True
    return seen


def of_class(prototype_labels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of a prototype and an image of its class: (prototype, image), [M] each."""
    prototype, image = (prototype_labels[:, None] == labels).nonzero().T
    return prototype, image


def consistency(nearest: Nearest, parts: Parts, prototype_labels: Tensor, labels: Tensor) -> float:
    """Share, in %, of prototypes near which one part lies in 80 % of the images of the class where it is visible."""
    prototype, image = of_class(prototype_labels, labels)
    inside = nearest.holds(parts, CONSISTENCY_WINDOW, prototype, image)
    visible = _visible(parts)[image]
    near, seen = (torch.zeros(len(prototype_labels), len(parts.names)) for _ in range(2))
    near.index_add_(0, prototype, inside.float())
    seen.index_add_(0, prototype, visible.float())
    share = torch.where(seen > 0, near / seen, 0)
    return 100 * (share >= CONSISTENT).any(1).double().mean().item()


def stability(nearest: Nearest, with_noise: Nearest, parts: Parts, prototype_labels: Tensor, labels: Tensor) -> float:
    """Share, in %, of (prototype, image of its class) whose parts stay the same when noise is added to the images."""
    pairs = of_class(prototype_labels, labels)
    before, after = (of.holds(parts, CONSISTENCY_WINDOW, *pairs) for of in (nearest, with_noise))
    return 100 * (before == after).all(1).double().mean().item()


def patch_purity(nearest: Nearest, parts: Parts) -> float:
    """PIP-Net's, in %: of a prototype's ten nearest patches, the largest share that holds one part; sides as one."""
    parts = parts.without_sides()
    count = min(NEAREST_PATCHES, nearest.distance.shape[1])
    image = nearest.distance.topk(count, 1, largest=False).indices
    prototype = torch.arange(len(image))[:, None].expand_as(image)
    inside = nearest.holds(parts, PURITY_WINDOW, prototype.flatten(), image.flatten())
    return 100 * inside.view(*image.shape, -1).double().mean(1).amax(1).mean().item()
