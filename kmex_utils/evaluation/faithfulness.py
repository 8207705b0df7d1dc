"""Does an attribution point at what the network uses? Measures that treat pixels of equal attribution as one.

Attributions of maps are constant on every segment, so most pixels tie. Everything here lets ties go together: an
attribution that is constant scores the same whatever the order of its pixels in memory. ``att`` is [N, H, W], high
where it speaks for the class; ``x`` [N, 3, S, S] is what enters the network; ``y`` gives scores [n, C] of such images
(:func:`probabilities` of a network); ``target`` [N] is a class of each image.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..hardware import exact
from ..method.attribution import segment_mean, upsample
from ..networks import Network
from . import certainty

if TYPE_CHECKING:
    import pandas as pd

    from ..explanation.explained import AnyImage, Explained

Scores = Callable[[torch.Tensor], torch.Tensor]
BATCH = 64  # images of one pass
ROAD_LEVELS = 4  # shares of pixels removed: 20, 40, 60 and 80 %


def probabilities(network: Network) -> Scores:
    """The function from network inputs [n, 3, S, S] to probabilities [n, C]."""

    @torch.no_grad()
    @exact()
    def y(x: torch.Tensor) -> torch.Tensor:
        return network.probabilities(network(x))

    return y


# --- deletion and insertion (Petsiuk et al. 2018), ROAD (Rong et al. 2022) --------------------------------------------


def steps_of(att: torch.Tensor, steps: int) -> torch.Tensor:
    """The step, 1 … ``steps``, at which each pixel goes, int64 [N, H, W].

    The highest go first. By step k at most the share k / steps has gone; pixels of equal attribution go together, at
    the first step at which all of them fit.
    """
    flat = att.flatten(1).contiguous()
    as_high = flat.shape[1] - torch.searchsorted(flat.sort(1).values, flat)  # pixels with that much or more
    return -(-as_high * steps // flat.shape[1]).view_as(att)


def shuffled_ties(att: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The ranks of pixels where ties are broken at random, [N, H, W]: what a metric sees that ranks single pixels."""
    flat = att.flatten(1).cpu()
    shuffled = torch.rand(flat.shape, generator=generator).argsort(1)
    ascending = shuffled.gather(1, flat.gather(1, shuffled).argsort(dim=1, stable=True))
    return ascending.argsort(1).to(att).view_as(att)


def random_order(att: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same pieces in random order, [N, H, W]: pixels that tie still do. The null of an attribution."""
    pixels = att[0].numel()
    values = torch.rand(len(att), pixels + 1, generator=generator).to(att.device)
    return values.gather(1, steps_of(att, pixels).flatten(1)).view_as(att)


def mean_colour(x: torch.Tensor) -> torch.Tensor:
    """Every pixel the mean of its image."""
    return x.mean((2, 3), keepdim=True).expand_as(x)


def blurred(x: torch.Tensor) -> torch.Tensor:
    """Gaussian blur as in RISE's code, 11 pixels with σ = 5 at 224, in proportion at other sizes."""
    from torchvision.transforms.functional import gaussian_blur

    sigma = [5 * side / 224 for side in (x.shape[3], x.shape[2])]
    return gaussian_blur(x, [2 * max(1, round(s)) + 1 for s in sigma], sigma)


def imputed(x: torch.Tensor, removed: torch.Tensor, noise: float = 0.01, seed: int = 0) -> torch.Tensor:
    """ROAD's noisy linear imputation of the ``removed`` pixels, bool [N, S, S].

    Each is the mean of its eight neighbours, those beside it weighted twice those across a corner, removed ones by
    their own imputed value; then normal noise is added. Where nothing is left it is the image's mean.
    """
    from scipy.sparse.linalg import splu

    generator, filled = torch.Generator().manual_seed(seed), x.clone()
    laplacian = _laplacian(*removed.shape[1:])
    for image, hole in zip(filled, removed, strict=True):
        if not hole.any():
            continue
        values, gone = image.flatten(1).double().cpu().numpy(), hole.flatten().cpu().numpy()
        if gone.all():
            solved = torch.from_numpy(values.mean(1, keepdims=True)).expand(-1, len(gone))
        else:
            rows = laplacian[gone]
            known = -(rows[:, ~gone] @ values[:, ~gone].T)
            # positive definite: no pivots. With them the same order took 27 s for 80 % of 224 x 224 scattered pixels
            factors = splu(rows[:, gone].tocsc(), "MMD_AT_PLUS_A", 0.0, options={"SymmetricMode": True})  # 0.2 s
            solved = torch.from_numpy(factors.solve(known)).T
        image[:, hole] = (solved + noise * torch.randn(solved.shape, generator=generator)).to(x)
    return filled


@lru_cache(maxsize=4)
def _laplacian(height: int, width: int) -> Any:
    """Of the pixels' weights to their neighbours, sparse [S S, S S]; at the border the weights of those there are."""
    from scipy import sparse

    same = [sparse.eye_array(n) for n in (height, width)]
    beside = [sparse.diags_array([1.0, 1.0], offsets=[-1, 1], shape=(n, n)) for n in (height, width)]
    straight = sparse.kron(same[0], beside[1]) + sparse.kron(beside[0], same[1])
    weights = straight / 6 + sparse.kron(*beside) / 12
    return (sparse.diags_array(weights.sum(1)) - weights).tocsr()


def area(
    y: Scores,
    x: torch.Tensor,
    target: torch.Tensor,
    step: torch.Tensor,
    fill: torch.Tensor | None,
    *,
    insertion: bool = False,
    seed: int = 0,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """The area under y_target while pixels are removed, step by step, [N]; the mean of the curve.

    ``step`` as of :func:`steps_of`. Removed pixels become those of ``fill``, like x, or are ``imputed`` (None). With
    ``insertion`` nothing but the fill is there at first and pixels come. By the trapezoidal rule over the share of
    pixels that have actually gone, from none to all; ``ends`` [N, 2] are y_target at both, if they are known.
    """
    steps = torch.arange(int(step.max()) + 1)
    share = torch.stack([(step <= k).float().mean((1, 2)) for k in steps.tolist()], 1).cpu().double()
    moved = share.diff(dim=1, prepend=share.new_full((len(x), 1), -1)) > 0
    value, unknown = torch.zeros_like(share), moved.clone()
    if ends is not None:
        value[:, [0, -1]], unknown[:, [0, -1]] = ends.double(), False
    for i, k in zip(*(index.split(BATCH) for index in unknown.nonzero(as_tuple=True)), strict=True):
        removed = (step[i] <= k[:, None, None].to(step.device)) != insertion
        filled = imputed(x[i], removed, seed=seed) if fill is None else fill[i]
        images = torch.where(removed[:, None], filled, x[i])
        value[i, k] = y(images).gather(1, target[i, None])[:, 0].cpu().double()
    last = torch.where(moved, steps, 0).cummax(1).values  # a step at which nothing went keeps the value before
    return torch.trapezoid(value.gather(1, last), share, dim=1)


# --- where it is, and what the head makes of it -----------------------------------------------------------------------


def localisation(att: torch.Tensor, boxes: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pointing game and energy inside boxes [N, 4] (y0, x0, y1, x1 as shares), with the box's share of the image.

    ``pointing game``: the share of the highest pixels inside; ``energy inside``: the share of positive attribution
    there, NaN where nothing is positive. A pixel is where its centre is. Without a tolerance around the box. [N] each,
    NaN where the box is.
    """
    y0, x0, y1, x1 = boxes.T[:, :, None]
    rows, columns = ((torch.arange(n) + 0.5) / n for n in att.shape[1:])
    inside = ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None]
    top = att == att.amax((1, 2), keepdim=True)
    positive = att.double().clamp_min(0)
    found = {
        "pointing game": (top & inside).sum((1, 2)) / top.sum((1, 2)),
        "energy inside": (positive * inside).sum((1, 2)) / positive.sum((1, 2)),
        "box": inside.double().mean((1, 2)),
    }
    return {name: share.masked_fill(boxes.isnan().any(1), torch.nan) for name, share in found.items()}


def effects(h: torch.Tensor, c_j: torch.Tensor, mean: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """How much y_j falls when a position of a grid gives way to the mean row, exactly, float64 [N, H', W'].

    Pool and head are linear (eq. 2), so replacing the share w_r of row h_r changes y_j by -1/R w_r (h_r - mean) · c_j,
    and positions add up. On a grid finer than that of ``h`` [N, D, H, W] the positions of a set S cover
    w = Aᵀ 1_S / Aᵀ 1 of the rows, with A the interpolation of eq. 7. ``c_j`` [N, D], ``mean`` [D].
    """
    fall = torch.einsum("ndhw,nd->nhw", (h - mean[:, None, None]).double(), c_j.double()) / h[0, 0].numel()
    sizes = zip(h.shape[2:], grid, strict=True)
    taken = [F.interpolate(torch.eye(n)[None], m, mode="linear")[0].sum(1).to(fall) for n, m in sizes]  # Aᵀ 1
    return upsample(fall / (taken[0][:, None] * taken[1]), (grid[0], grid[1]))


def exact_deletion(att: torch.Tensor, effect: torch.Tensor) -> torch.Tensor:
    """Area under y_j while the rows of h give way to the mean row, highest ``att`` first, [N].

    ½, the straight line of an attribution that is constant, plus what the curve's area differs from that, in shares of
    the mean fall of y_j over the images; low is good. ``effect`` as of :func:`effects`, on the grid of ``att``.
    """
    order, fall = steps_of(att, att[0].numel()), effect.sum((1, 2))
    each = segment_mean(effect, order).flatten(1).gather(1, order.flatten(1).argsort(1))
    left = F.pad(each.flip(1).cumsum(1).flip(1), (0, 1))  # what has not been removed, from all to nothing
    return 0.5 + (torch.trapezoid(left, dx=1 / each.shape[1], dim=1) - fall / 2) / fall.mean()


# --- sanity check (Adebayo et al. 2018) -------------------------------------------------------------------------------


def randomised(network: Network, block: int, seed: int = 0) -> Network:
    """A copy with new random weights in the head and in the blocks from ``block`` on (one more than there are: none).

    Layers are in the order they are registered in, drawn as PyTorch does when they are made (``reset_parameters``).
    """
    copied = copy.deepcopy(network)
    layers = [name for name, layer in copied.module.named_modules() if hasattr(layer, "reset_parameters")]
    first = 0
    if block > 1:
        name = network.blocks[block - 2].partition("#")[0]
        if name not in dict(copied.module.named_modules()):
            raise ValueError(f"block {block - 1} of {network.name} ends at no module, its weights cannot be told apart")
        first = 1 + max((i for i, layer in enumerate(layers) if f"{layer}.".startswith(f"{name}.")), default=-1)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for name in layers[first:]:
            copied.module.get_submodule(name).reset_parameters()  # type: ignore[operator]
    return copied


def adjusted_rand(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adjusted Rand index of the segments of two maps [N, H, W] of the same images, [N]; NaN where both have one."""
    a, b = a.flatten(1), b.flatten(1)
    one = (a == a[:, :1]).all(1) & (b == b[:, :1]).all(1)
    return certainty.adjusted_rand(a, b).masked_fill(one, torch.nan)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's correlation of two attributions [N, H, W] of the same images, [N]; NaN where one is constant."""
    ranks = []
    for values in (a.flatten(1).contiguous(), b.flatten(1).contiguous()):
        in_order = values.sort(1).values
        rank = torch.searchsorted(in_order, values) + torch.searchsorted(in_order, values, right=True)  # ties: the mean
        ranks.append(rank.double() - values.shape[1])
    product, squares = (ranks[0] * ranks[1]).sum(1), ranks[0].square().sum(1) * ranks[1].square().sum(1)
    return product / squares.sqrt()


# --- beside what it is compared with ----------------------------------------------------------------------------------


def rise(
    y: Scores,
    x: torch.Tensor,
    target: torch.Tensor,
    masks: int = 1000,
    *,
    cells: int = 7,
    share: float = 0.5,
    seed: int = 0,
) -> torch.Tensor:
    """RISE (Petsiuk et al. 2018): the mean of random masks weighted by y_target of the image behind them, [N, S, S].

    Masks of ``cells`` x ``cells`` cells, each open with probability ``share``, are enlarged bilinearly and shifted by
    up to a cell; what is closed is zero, the mean colour of normalised inputs. Number of cells, share: the paper's.
    """
    generator, size = torch.Generator().manual_seed(seed), x.shape[2:]
    cell = [-(-n // cells) for n in size]
    total = torch.zeros(len(x), *size, device=x.device)
    for count in torch.arange(masks).split(BATCH):
        grid = (torch.rand(len(count), 1, cells, cells, generator=generator) < share).float()
        large = F.interpolate(grid, [(cells + 1) * n for n in cell], mode="bilinear")
        shifts = [torch.randint(n, (len(count),), generator=generator).tolist() for n in cell]
        cut = [m[:, i : i + size[0], j : j + size[1]] for m, i, j in zip(large, *shifts, strict=True)]
        mask = torch.stack(cut).to(x.device)
        for i in range(len(x)):
            total[i] += torch.einsum("n,nhw->hw", y(x[i] * mask)[:, target[i]], mask[:, 0])
    return total / (masks * share)


def centre(x: torch.Tensor) -> torch.Tensor:
    """A control that sees no image: a Gaussian in the middle, σ a quarter of the side, [N, S, S]."""
    rows, columns = (torch.linspace(-2, 2, n, device=x.device) for n in x.shape[2:])
    return torch.exp(-(rows[:, None].square() + columns.square()) / 2).expand(len(x), -1, -1)


def edges(x: torch.Tensor) -> torch.Tensor:
    """A control that sees no network: the length of Sobel's gradient of the mean over channels, [N, S, S]."""
    sobel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=x.device)
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    return F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).square().sum(1).sqrt()


def at_pixels(att: torch.Tensor, size: Sequence[int], smooth: bool = False) -> torch.Tensor:
    """An attribution [N, H, W] at the images' size: each position a block of pixels, or ``smooth``: bilinear."""
    if smooth:
        return upsample(att, (size[0], size[1]))
    return F.interpolate(att[:, None], tuple(size), mode="nearest")[:, 0]


# --- all of it on some images ---------------------------------------------------------------------------------------


class Bench:
    """Images of one network on which attributions are measured, with what does not depend on the attribution.

    Parameters
    ----------
    network, x
        Both on one device, where the network runs.
    target
        Classes [N]; None: the predicted ones.
    steps, seed
        Of deletion and insertion; the seed of every random draw.
    mean
        The mean row of h over training images, [D], for exact deletion; None: without. Refused (ValueError) where the
        head is not linear.
    boxes
        [N, 4] as :func:`localisation` takes them, NaN where unknown; None: without.

    Attributes
    ----------
    target, h
        Classes [N] and encoder outputs [N, D, H, W].
    ends
        By fill y_target of the images as they are and with nothing but the fill, [N, 2].
    """

    def __init__(
        self,
        network: Network,
        x: torch.Tensor,
        target: torch.Tensor | None = None,
        *,
        steps: int = 20,
        seed: int = 0,
        mean: torch.Tensor | None = None,
        boxes: torch.Tensor | None = None,
    ) -> None:
        if mean is not None and network.form != "linear":
            raise ValueError(f"exact deletion needs a linear head, {network.name} has none: leave mean out")
        self.network, self.x, self.steps, self.seed, self.mean, self.boxes = network.eval(), x, steps, seed, mean, boxes
        with torch.no_grad(), exact():
            passes = [network.outputs(part) for part in x.split(BATCH)]
        self.h = torch.cat([activations[-1] for activations, _ in passes]).cpu()
        self.target = torch.cat([y for _, y in passes]).argmax(1) if target is None else target.to(x.device)
        self.y, self.fills = probabilities(network), {"mean colour": mean_colour(x), "blur": blurred(x)}
        self.generator = torch.Generator().manual_seed(seed)
        nothing_left = {**self.fills, "ROAD": imputed(x, torch.ones_like(x[:, 0], dtype=torch.bool), seed=seed)}
        whole, *filled = (self._y_target(images) for images in (x, *nothing_left.values()))
        self.ends = {name: torch.stack([whole, y], 1) for name, y in zip(nothing_left, filled, strict=True)}

    def measure(self, att: torch.Tensor, smooth: bool = False) -> dict[str, torch.Tensor]:
        """Every measure of an attribution on a grid of its own, by name, [N] each.

        ``deletion`` and ``ROAD`` are good where low, ``insertion`` where high, all between 0 and 1; ``smooth`` as in
        :func:`at_pixels`. ROAD's area takes in both ends, as deletion's does.
        """
        att = att.to(self.x.device)
        values = self._areas(att, smooth)
        if self.mean is not None:
            c_j = self.network.c.detach().cpu()[self.target.cpu()]
            values["exact deletion"] = exact_deletion(att.cpu(), effects(self.h, c_j, self.mean, att.shape[1:]))
        if self.boxes is not None:
            inside = localisation(at_pixels(att, self.x.shape[2:], smooth).cpu(), self.boxes)
            values |= {name: inside[name] for name in ("pointing game", "energy inside")}
        return values

    def null(self, att: torch.Tensor, smooth: bool = False) -> dict[str, torch.Tensor]:
        """The same pieces in random order; of localisation the box's share, of exact deletion ½, their means."""
        values = self._areas(random_order(att.to(self.x.device), self.generator), smooth)
        if self.mean is not None:
            values["exact deletion"] = torch.full((len(att),), 0.5)
        if self.boxes is not None:
            share = localisation(torch.ones(self.x[:, 0].shape), self.boxes)["box"]
            values |= {"pointing game": share, "energy inside": share}
        return values

    def with_ties_broken(self, att: torch.Tensor) -> torch.Tensor:
        """Deletion with the mean colour in one random order of tied pixels, [N]."""
        ranks = shuffled_ties(at_pixels(att.to(self.x.device), self.x.shape[2:]), self.generator)
        fill, ends = (of["mean colour"] for of in (self.fills, self.ends))
        return area(self.y, self.x, self.target, steps_of(ranks, self.steps), fill, ends=ends)

    def _y_target(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.y(part) for part in images.split(BATCH)]).gather(1, self.target[:, None])[:, 0].cpu()

    def _areas(self, att: torch.Tensor, smooth: bool) -> dict[str, torch.Tensor]:
        sized = at_pixels(att, self.x.shape[2:], smooth)
        step, on = steps_of(sized, self.steps), (self.y, self.x, self.target)
        values = {}
        for name, insertion in (("deletion", False), ("insertion", True)):
            for of, fill in self.fills.items():
                ends = self.ends[of].flip(1) if insertion else self.ends[of]
                values[f"{name}, {of}"] = area(*on, step, fill, insertion=insertion, ends=ends)
        road = area(*on, steps_of(sized, ROAD_LEVELS + 1), None, seed=self.seed, ends=self.ends["ROAD"])
        return values | {"ROAD": road}


def summary(values: Mapping[str, torch.Tensor], null: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
    """A record for each measure from its values [N] of the images and those of a null.

    ``value`` and ``null`` are means, ``spread`` is the standard error of the mean over images, ``margin_spread`` that
    of the difference from the null, image by image. NaN are left out.
    """

    def error(of_images: torch.Tensor) -> float:
        there = of_images[~of_images.isnan()]
        return float(there.std() / len(there) ** 0.5)

    records = []
    for measure in values:
        of_images, of_null = values[measure].double().cpu(), null[measure].double().cpu()
        record = {"measure": measure, "value": float(of_images.nanmean()), "spread": error(of_images)}
        records.append({**record, "null": float(of_null.nanmean()), "margin_spread": error(of_images - of_null)})
    return records


def table(
    explained: "Explained",
    images: Sequence["AnyImage"],
    *,
    boxes: torch.Tensor | None = None,
    steps: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> "pd.DataFrame":
    """Deletion, insertion and ROAD of the predicted class, for att(b:) of every start block, CAM and controls.

    ``images`` as :meth:`Explained.picture` takes them; with their ``boxes`` localisation too. Columns: ``method``, then
    those of :func:`summary`; the null of att(b:) and CAM are their own pieces in random order, of the controls random
    pixels. A ValueError where eq. 11 does not hold.
    """
    import pandas as pd

    network = explained.network.eval().to(device)
    x = torch.cat([network.input(explained.picture(image).pixels[None], device) for image in images])
    seen = explained.see_inputs(x)
    by_block, raw = (explained.attributions(seen, start=start) for start in ("segments", "raw"))
    if by_block is None or raw is None:
        raise ValueError(f"there are no attributions, as eq. 11 does not hold for {network.name}: {network.between}")
    bench = Bench(network, x, steps=steps, seed=seed, boxes=boxes)
    random = bench.null(torch.rand(x[:, 0].shape, generator=bench.generator))
    on_grids = {explained.name(b): att for b, att in by_block.items()} | {"CAM": raw[explained.start_blocks[0]]}
    found = {}
    for name, att in on_grids.items():
        smooth = name == "CAM"
        found[name] = bench.measure(att, smooth), bench.null(att, smooth)
    found |= {name: (bench.measure(att), random) for name, att in (("centre", centre(x)), ("edges", edges(x)))}
    network.cpu()
    found["random pixels"] = random, random
    return pd.DataFrame([{"method": name, **record} for name in found for record in summary(*found[name])])
