"""ProtoPNet (Chen et al. 2019), the paper's baseline: its network, losses, alternating schedule and push.

The equations of h, sim and proj are in :class:`kmex_utils.explainers.ProtoPNet`; here is what trains them. The defaults
are those of the authors' code (github.com/cfchen-duke/ProtoPNet, ``settings.py`` and ``main.py``):

=========  =====================================================  ==========================================
phase      trained                                                when
=========  =====================================================  ==========================================
``warm``   add-on and prototypes                                  the first epochs
``joint``  features, add-on and prototypes                        the epochs after them
``push``   nothing: each prototype becomes the nearest training   after every tenth epoch from the tenth on,
           patch of its class                                     and after the last
``last``   the last layer, with L1 on other classes' weights      20 passes after each push
=========  =====================================================  ==========================================
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .architectures import build
from .backbones import Backbone
from .datasets import Dataset, epoch_generator, shuffled
from .explainers import ProtoPNet
from .hardware import training_dtype
from .runs import Run
from .store import load_tensors, save_tensors


@dataclass(frozen=True)
class Options:
    """Every number of the method, with the authors' default.

    ``depth`` D' and ``size`` s of a prototype [D', s, s]; rates are of Adam; ``weight_decay`` is of the features and
    the add-on; the joint rates are multiplied by ``rate_factor`` at every ``rate_step``-th joint epoch. Epochs count
    from 0 through both phases; a push follows each epoch from ``push_start`` on that ``push_every`` divides, and the
    last.
    ``cross_entropy`` … ``l1`` weigh the terms of the loss. ``frozen_features`` says how the phases that do not train
    the features see them: ``anew``, as the authors do, with augmentation and batch normalisation in training mode; or
    ``once``, computed in evaluation mode and kept in memory. ``affine`` rotates by up to 15° or shears by up to 10°.
    """

    depth: int = 128
    size: int = 1
    epsilon: float = 1e-4
    wrong_class: float = -0.5
    warm_epochs: int = 5
    joint_epochs: int = 16  # authors: up to 1,000, stopped by hand; after 16 the rates have fallen to a thousandth
    push_start: int = 10
    push_every: int = 10
    last_passes: int = 20
    batch_size: int = 80
    features_rate: float = 1e-4
    add_on_rate: float = 3e-3
    prototypes_rate: float = 3e-3
    last_rate: float = 1e-4
    weight_decay: float = 1e-3
    rate_step: int = 5
    rate_factor: float = 0.1
    cross_entropy: float = 1.0
    cluster: float = 0.8
    separation: float = -0.08
    l1: float = 1e-4
    frozen_features: str = "anew"
    affine: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "size", "warm_epochs", "push_every", "batch_size", "rate_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("joint_epochs", "push_start", "last_passes", "weight_decay", "l1"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("epsilon", "features_rate", "add_on_rate", "prototypes_rate", "last_rate", "rate_factor"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if self.frozen_features not in ("anew", "once"):
            raise ValueError(f"frozen_features must be 'anew' or 'once', got {self.frozen_features!r}")

    def joint_rate(self, epoch: int) -> float:
        """The factor of the joint rates in an epoch; the authors count a joint epoch before it is trained."""
        return self.rate_factor ** ((epoch - self.warm_epochs + 1) // self.rate_step)

    def plan(self) -> list[tuple[str, int, int]]:
        """The whole schedule: (phase, epoch, pass)."""
        steps, epochs = [], self.warm_epochs + self.joint_epochs
        for epoch in range(epochs):
            steps.append(("warm" if epoch < self.warm_epochs else "joint", epoch, 0))
            if epoch + 1 == epochs or (epoch >= self.push_start and epoch % self.push_every == 0):
                steps.append(("push", epoch, 0))
                steps += [("last", epoch, i) for i in range(self.last_passes)]
        return steps


OPTIONS = {
    # Seconds on one core instead of hours on a GPU: joint_epochs 1 (16), so one push (2); features kept while they are
    # frozen (authors: anew). Chosen on 2,000 other training digits.
    "mnist-mini": Options(joint_epochs=1, frozen_features="once"),
}


class Network(nn.Module):
    """The trainable ProtoPNet: features, add-on, prototypes, last layer.

    ``labels`` [K] are the prototypes' classes; after a push, ``image`` (index into the training split) and ``position``
    (row-major among the patches of its grid) [K] say which patch each prototype is, before it they are -1.

    Parameters
    ----------
    backbone
        Its blocks become the features; its classifier is not used.
    """

    def __init__(self, backbone: Backbone, classes: int, per_class: int, options: Options, seed: int = 0) -> None:
        super().__init__()
        if per_class < 1:
            raise ValueError(f"prototypes per class (K/C) must be at least 1, got {per_class}")
        count = classes * per_class
        self.blocks = backbone.blocks
        self.epsilon = options.epsilon
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.add_on = nn.Sequential(
                nn.Conv2d(backbone.classifier.in_features, options.depth, 1),
                nn.ReLU(),
                nn.Conv2d(options.depth, options.depth, 1),
                nn.Sigmoid(),
            )
            for layer in (self.add_on[0], self.add_on[2]):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)
            self.prototypes = nn.Parameter(torch.rand(count, options.depth, options.size, options.size))
        self.last = nn.Linear(count, classes, bias=False)
        self.register_buffer("labels", torch.arange(classes).repeat_interleave(per_class))
        self.register_buffer("image", torch.full((count,), -1))
        self.register_buffer("position", torch.full((count,), -1))
        with torch.no_grad():
            self.last.weight.copy_(torch.where(self.own, 1.0, options.wrong_class))

    @property
    def own(self) -> torch.Tensor:
        """Whether prototype k is of class j, [C, K]."""
        return torch.arange(self.last.out_features, device=self.labels.device)[:, None] == self.labels

    @property
    def explainer(self) -> ProtoPNet:
        """h, sim and proj with the present weights."""
        return ProtoPNet(self.add_on, self.prototypes, self.last.weight, self.epsilon)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """x(B) of images, [N, D, H, W]."""
        for block in self.blocks:
            x = block(x)
        return x

    def smallest(self, latent: torch.Tensor) -> torch.Tensor:
        """The squared distance from each prototype to its nearest patch, [N, K]; ``latent`` [N, D', H, W]."""
        explainer = self.explainer
        return explainer.squared_distances(explainer.patches(latent)).min(1).values

    def scores(self, smallest: torch.Tensor) -> torch.Tensor:
        """Class scores y [N, C]: the similarity falls with the distance, so its maximum is at the smallest."""
        return self.last(self.explainer.log_similarity(smallest))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class scores of images, [N, C]."""
        return self.scores(self.smallest(self.add_on(self.features(x))))


def costs(y: torch.Tensor, smallest: torch.Tensor, label: torch.Tensor, network: Network) -> dict[str, torch.Tensor]:
    """The terms of the loss, each a scalar.

    ``cluster`` is the mean squared distance from an image to the nearest prototype of its class, ``separation`` to the
    nearest of any other class, both cut at the number of a prototype's entries; ``l1`` sums the absolute weights that
    join a prototype to other classes.
    """
    own = network.labels == label[:, None]
    largest = smallest.new_tensor(float(network.prototypes[0].numel()))
    return {
        "cross_entropy": F.cross_entropy(y, label),
        "cluster": torch.where(own, smallest, largest).clamp_max(largest).min(1).values.mean(),
        "separation": torch.where(own, largest, smallest).clamp_max(largest).min(1).values.mean(),
        "l1": network.last.weight[~network.own].abs().sum(),
    }


def total(terms: dict[str, torch.Tensor], options: Options) -> torch.Tensor:
    """The loss: the terms weighted by the options of their names."""
    return sum(getattr(options, name) * value for name, value in terms.items())


@torch.no_grad()
def push(network: Network, latents: Iterable[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Replace each prototype by the nearest training patch of its class and record which one that is.

    Only distances between one batch's patches of a class and that class's prototypes are in memory at a time.

    Parameters
    ----------
    latents
        Latent grids of the training images in order, in batches [n, D', H, W].
    labels
        Their classes, [N].

    Returns
    -------
    Tensor
        The squared distance each prototype moved, [K]. Ties go to the first patch.
    """
    vectors = network.prototypes.detach().flatten(1).clone()
    image, position = torch.full_like(network.image, -1), torch.full_like(network.position, -1)
    nearest = torch.full_like(vectors[:, 0], torch.inf)
    of_class = [(network.labels == c).nonzero().flatten() for c in range(network.last.out_features)]
    searching = [
        ProtoPNet(network.add_on, network.prototypes.detach()[k], network.last.weight, network.epsilon)
        for k in of_class
    ]
    start = 0
    for latent in latents:
        h = network.explainer.patches(latent)
        label = labels[start : start + len(h)].to(h.device)
        for c in label.unique().tolist():
            members = (label == c).nonzero().flatten()
            distance = searching[c].squared_distances(h[members]).flatten(0, 1)
            index = distance.argmin(0)
            value = distance.gather(0, index[None])[0]
            closer = value < nearest[of_class[c]]
            k, index = of_class[c][closer], index[closer]
            row, r = index // h.shape[1], index % h.shape[1]
            nearest[k], image[k], position[k] = value[closer], start + members[row], r
            vectors[k] = h[members[row], r]
        start += len(h)
    missing = (image < 0).nonzero().flatten()
    if len(missing):
        raise ValueError(f"class {int(network.labels[missing[0]])} has no training image to push its prototypes to")
    network.prototypes.copy_(vectors.view_as(network.prototypes))
    network.image.copy_(image)
    network.position.copy_(position)
    return nearest


# --- passes over a data set -----------------------------------------------------------------------------------


@torch.no_grad()
def features(
    network: Network, dataset: Dataset, split: str, device: torch.device, batch_size: int = 128
) -> Iterator[torch.Tensor]:
    """x(B) of a split in order, in batches [n, D, H, W], in evaluation mode and float32."""
    from tqdm.auto import tqdm

    network.eval()
    steps = -(-len(dataset.split(split)) // batch_size)
    for x, _ in tqdm(dataset.batches(split, batch_size, device), f"features of {split}", steps, leave=False):
        yield network.features(x)


@torch.no_grad()
def latents(
    network: Network, dataset: Dataset, split: str, device: torch.device, batch_size: int = 128
) -> Iterator[torch.Tensor]:
    """The add-on's output for a split in order, in batches [n, D', H, W], in evaluation mode and float32."""
    for x in features(network, dataset, split, device, batch_size):
        yield network.add_on(x)


def affine(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Every image rotated by up to 15° or sheared by up to 10°, a coin tossed for which, [N, 3, S, S]."""
    angle, shear = torch.rand(2, len(x), generator=generator).mul(2).sub(1) * torch.tensor([[15.0], [10.0]])
    rotated = torch.rand(len(x), generator=generator) < 0.5
    angle, shear = torch.deg2rad(angle * rotated), torch.tan(torch.deg2rad(shear * ~rotated))
    zero = torch.zeros(len(x))
    rows = [torch.stack([angle.cos(), shear - angle.sin(), zero], 1), torch.stack([angle.sin(), angle.cos(), zero], 1)]
    grid = F.affine_grid(torch.stack(rows, 1).to(x), x.shape, align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


# --- training -------------------------------------------------------------------------------------------------


def check(network: Network, dataset: Dataset, options: Options) -> None:
    """Refuse what would fail later.

    Raises
    ------
    ValueError
        A class without training images, fewer images than a batch, or a prototype larger than the latent grid.
    """
    counts = torch.bincount(dataset.train.labels, minlength=len(dataset.classes))
    if (counts == 0).any():
        raise ValueError(f"class {dataset.classes[int(counts.argmin())]!r} has no training images: add some")
    if len(dataset.train) < options.batch_size:
        raise ValueError(
            f"{len(dataset.train)} training images are fewer than one batch of {options.batch_size}; lower batch_size"
        )
    size = network.prototypes.shape[2]
    device = network.prototypes.device
    with torch.no_grad():
        grid = network.eval().features(dataset.normalise(dataset.train.pixels[:1], device)).shape[2:]
    if size > min(grid):
        raise ValueError(
            f"a prototype of {size} x {size} positions does not fit the {grid[0]} x {grid[1]} grid of "
            f"{dataset.recipe.image_size}-pixel images: lower prototype_size or train with a larger image_size"
        )


def train(
    network: Network,
    dataset: Dataset,
    options: Options,
    *,
    seed: int,
    checkpoint: Path,
    made_by: dict[str, Any],
    precision: str = "auto",
    device: torch.device | str = "cpu",
    report: Callable[[str], None] = print,
    save_after: float = 10.0,
) -> list[dict[str, Any]]:
    """Run the schedule in place; returns a record of each step: phase, epoch, pass, the loss's terms, seconds.

    The state goes to ``checkpoint`` after a step when ``save_after`` seconds have passed since it last did, and after
    the last; a call with the same settings continues from there to the same weights as an uninterrupted run. Every
    step draws its own order and augmentation from (seed, step); a last incomplete batch is dropped.

    Parameters
    ----------
    made_by
        Everything else that fixes the run (backbone, data …); a checkpoint of other settings is not resumed.
    precision
        Of the features in the joint phase: ``auto``, ``float32`` or ``bfloat16`` (autocast).

    Raises
    ------
    ValueError
        See :func:`check`; or the loss is no longer finite.
    """
    device = torch.device(device)
    dtype = training_dtype(precision, device)
    network.to(device)
    check(network, dataset, options)
    identity = json.loads(
        json.dumps({**made_by, **asdict(options), "seed": seed, "dtype": str(dtype), "device": device.type})
    )
    optimizers = _optimizers(network, options)
    history = _resume(network, optimizers, checkpoint, identity, report)
    source = _Source(network, dataset, options, seed, device, dtype)
    saved = time.perf_counter()
    plan = options.plan()
    for step in range(len(history), len(plan)):
        phase, epoch, i = plan[step]
        start = time.perf_counter()
        record: dict[str, Any] = {"phase": phase, "epoch": epoch, "pass": i}
        if phase == "push":
            moved = push(network, source.latents(), dataset.train.labels)
            places = torch.stack([network.image, network.position]).unique(dim=1)
            record |= {"moved": moved.mean().item(), "distinct": places.shape[1]}
        else:
            if phase == "joint":
                for group in optimizers[phase].param_groups:
                    group["lr"] = group["initial_rate"] * options.joint_rate(epoch)
            record |= _epoch(network, optimizers[phase], source, phase, step, options)
        record["seconds"] = time.perf_counter() - start
        history.append(record)
        if time.perf_counter() - saved >= save_after or len(history) == len(plan):
            _save(network, optimizers, checkpoint, identity, history)
            saved = time.perf_counter()
        _report(record, options, dataset, seed, report)
    network.eval()
    return history


def _optimizers(network: Network, options: Options) -> dict[str, torch.optim.Adam]:
    """One Adam for each phase, kept through all of its epochs."""
    add_on = {"params": [*network.add_on.parameters()], "lr": options.add_on_rate, "weight_decay": options.weight_decay}
    prototypes = {"params": [network.prototypes], "lr": options.prototypes_rate}
    blocks = {
        "params": [*network.blocks.requires_grad_(True).parameters()],
        "lr": options.features_rate,
        "weight_decay": options.weight_decay,
    }
    last = {"params": [network.last.weight], "lr": options.last_rate}
    groups = {"warm": [add_on, prototypes], "joint": [blocks, add_on, prototypes], "last": [last]}
    return {
        phase: torch.optim.Adam([{**group, "initial_rate": group["lr"]} for group in some])
        for phase, some in groups.items()
    }


class _Source:
    """Batches at the depth where a phase begins to train: images (joint), x(B) (warm), smallest distances (last)."""

    def __init__(self, network, dataset, options, seed, device, dtype) -> None:
        self.network, self.dataset, self.options = network, dataset, options
        self.seed, self.device, self.dtype = seed, device, dtype
        self._phase, self._kept, self._latents = "", None, None

    def latents(self) -> list[torch.Tensor] | Iterator[torch.Tensor]:
        """Of the training split; kept for the last layer's passes where features are computed once."""
        found = latents(self.network, self.dataset, "train", self.device)
        if self.options.frozen_features == "anew":
            return found
        self._latents = list(found)
        self._phase = "push"
        return self._latents

    def batches(self, phase: str, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        size = self.options.batch_size
        if phase != "joint" and self.options.frozen_features == "once":
            kept = self._frozen(phase)
            labels = self.dataset.train.labels
            for index in shuffled(len(labels), size, epoch_generator(self.seed, step)):
                yield kept[index.to(self.device)], labels[index].to(self.device)
            return
        self.network.train()
        self._phase, self._kept, self._latents = phase, None, None
        generator = epoch_generator(self.seed, step + 500_000)
        for x, label in self.dataset.training_batches(size, self.seed, step, self.device):
            if self.options.affine:
                x = affine(x, generator)
            yield self._begin(phase, x), label

    def _begin(self, phase: str, x: torch.Tensor) -> torch.Tensor:
        with (
            torch.set_grad_enabled(phase == "joint"),
            torch.autocast(self.device.type, self.dtype, enabled=phase == "joint" and self.dtype != torch.float32),
        ):
            x = self.network.features(x)
        if phase == "last":
            with torch.no_grad():
                return self.network.smallest(self.network.add_on(x.float()))
        return x.float()

    @torch.no_grad()
    def _frozen(self, phase: str) -> torch.Tensor:
        if self._phase != phase:
            if phase == "warm":
                self._kept = torch.cat(list(features(self.network, self.dataset, "train", self.device)))
            else:
                self._kept = torch.cat([self.network.smallest(x) for x in self._latents or self.latents()])
                self._latents = None
            self._phase = phase
        return self._kept


def _epoch(network, optimizer, source: _Source, phase: str, step: int, options: Options) -> dict[str, float]:
    from tqdm.auto import tqdm

    sums: dict[str, torch.Tensor] = {}
    correct = torch.zeros((), device=network.prototypes.device)
    batches = len(source.dataset.train) // options.batch_size
    for x, label in tqdm(source.batches(phase, step), phase, batches, leave=False):
        smallest = x if phase == "last" else network.smallest(network.add_on(x))
        y = network.scores(smallest)
        terms = costs(y, smallest, label, network)
        loss = total(terms, options)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        for name, value in {"loss": loss, **terms}.items():
            sums[name] = sums.get(name, 0) + value.detach()
        correct += (y.detach().argmax(1) == label).sum()
    record = {name: (value / batches).item() for name, value in sums.items()}
    if not math.isfinite(record["loss"]):
        raise ValueError(f"the loss is {record['loss']} in the {phase} phase: lower its rates")
    record["accuracy"] = 100 * correct.item() / (batches * options.batch_size)
    return record


def _report(record, options: Options, dataset, seed, report) -> None:
    phase, where = record["phase"], f"{dataset.name} seed {seed}: {record['phase']}"
    if phase == "push":
        report(f"{where} after epoch {record['epoch']}, mean squared distance {record['moved']:.3g}, "
               f"{record['distinct']} distinct patches, {record['seconds']:.0f} s")  # fmt: skip
    elif phase != "last" or record["pass"] + 1 == options.last_passes:
        count = f"pass {record['pass'] + 1}" if phase == "last" else f"epoch {record['epoch']}"
        report(f"{where} {count}, cross-entropy {record['cross_entropy']:.4f}, cluster {record['cluster']:.3f}, "
               f"separation {record['separation']:.3f}, running accuracy {record['accuracy']:.1f} %, "
               f"{record['seconds']:.1f} s")  # fmt: skip


def _save(network: Network, optimizers, checkpoint: Path, identity: dict, history: list) -> None:
    names = {parameter: name for name, parameter in network.named_parameters()}
    tensors = {f"network|{name}": value for name, value in network.state_dict().items()}
    for phase, optimizer in optimizers.items():
        for parameter, state in optimizer.state.items():
            tensors |= {f"{phase}|{names[parameter]}|{key}": value for key, value in state.items()}
    save_tensors(checkpoint, tensors, {"identity": identity, "history": history})


def _resume(network: Network, optimizers, checkpoint: Path, identity: dict, report) -> list[dict[str, Any]]:
    if not checkpoint.exists():
        return []
    tensors, settings = load_tensors(checkpoint)
    if settings["identity"] != identity:
        report(f"{checkpoint.name} is of other settings: starting anew")
        return []
    parameters = dict(network.named_parameters())
    state = {}
    for key, value in tensors.items():
        kind, name, *entry = key.split("|")
        if kind == "network":
            state[name] = value
        elif entry == ["step"]:
            optimizers[kind].state[parameters[name]]["step"] = value
        else:
            like = torch.empty_like(parameters[name], requires_grad=False)
            optimizers[kind].state[parameters[name]][entry[0]] = like.copy_(value)
    network.load_state_dict(state)
    report(f"resuming after step {len(settings['history'])}")
    return settings["history"]


# --- what a trained ProtoPNet is used for -----------------------------------------------------------------------


@torch.no_grad()
def evaluate(network: Network, dataset: Dataset, split: str, device: torch.device | str = "cpu"):
    """Predictions [N], and patches h of every image, [N, R, D' s s] on the CPU; float32, evaluation mode."""
    predicted, h = [], []
    for latent in latents(network, dataset, split, torch.device(device)):
        predicted.append(network.scores(network.smallest(latent)).argmax(1).cpu())
        h.append(network.explainer.patches(latent).cpu())
    return torch.cat(predicted), torch.cat(h)


def start(run: Run, features_from: str, per_class: int, options: Options, seed: int) -> Network:
    """A fresh network; its features start from ``imagenet`` weights (the authors) or the run's trained ``backbone``."""
    settings = run.settings()
    if features_from not in ("imagenet", "backbone"):
        raise ValueError(f"features_from must be 'imagenet' or 'backbone', got {features_from!r}")
    if features_from == "imagenet":
        backbone = build(settings["arch"], len(settings["classes"]), "imagenet")
    else:
        backbone = run.backbone()
    return Network(backbone, len(settings["classes"]), per_class, options, seed)


def save(run: Run, network: Network, options: Options, per_class: int, settings: dict[str, Any]) -> None:
    """Weights and everything that made them, as the run's ``ProtoPNet``."""
    run.save_part("ProtoPNet", network.state_dict(), {**settings, "options": asdict(options), "per_class": per_class})


def load(run: Run) -> Network:
    """The trained network of 05_protopnet, on the CPU."""
    tensors, settings = run.part("ProtoPNet", "05_protopnet")
    trained = run.settings()
    options = replace(Options(), **settings["options"])
    backbone = build(trained["arch"], len(trained["classes"]))
    network = Network(backbone, len(trained["classes"]), settings["per_class"], options)
    network.load_state_dict(tensors)
    return network.eval().requires_grad_(False)


@dataclass(frozen=True)
class Activated:
    """A prototype that an image activates, and the training patch it came from.

    ``activation`` [S, S], the similarities upsampled (bicubic), and the ``box`` (top, bottom, left, right) in pixels of
    the most similar patch; ``source`` uint8 [S, S, 3], the training image of the prototype, with its own box;
    ``similarity`` times ``weight`` are the ``points`` the prototype adds to the explained class.
    """

    prototype: int
    class_name: str
    similarity: float
    weight: float
    activation: np.ndarray
    box: tuple[int, int, int, int]
    source: np.ndarray
    source_box: tuple[int, int, int, int]
    image: int

    @property
    def points(self) -> float:
        """What the prototype adds to the class."""
        return self.similarity * self.weight


BOXES = ("patch", "activation")


@torch.no_grad()
def most_activated(
    network: Network,
    dataset: Dataset,
    pixels: np.ndarray,
    count: int = 5,
    target: int | None = None,
    box: str = "patch",
) -> tuple[int, list[Activated]]:
    """The prototypes that an image activates most, as *this looks like that* shows them.

    Parameters
    ----------
    pixels
        uint8 [1 or 3, S, S].
    target
        Class that the points go to; None takes the predicted one.
    box
        What is boxed: the ``patch`` of the latent grid, or ``activation``: the highest 5 % of the upsampled map (the
        authors; on a grid of few positions it falls into a corner).

    Returns
    -------
    (class, prototypes in falling order of similarity)
    """
    maps = _maps(network, dataset, pixels)
    similarity = maps.amax((1, 2))
    j = int((network.last.weight @ similarity).argmax()) if target is None else target
    found = []
    for k in similarity.argsort(descending=True, stable=True)[:count].tolist():
        i, source, source_box = prototype_source(network, dataset, k, box)
        found.append(
            Activated(
                k,
                dataset.classes[int(network.labels[k])],
                float(similarity[k]),
                float(network.last.weight[j, k]),
                _upsampled(maps[k], dataset.recipe.image_size),
                _boxed(maps[k], int(maps[k].argmax()), network, dataset, box),
                source,
                source_box,
                i,
            )
        )
    return j, found


@torch.no_grad()
def prototype_source(
    network: Network, dataset: Dataset, k: int, box: str = "patch"
) -> tuple[int, np.ndarray, tuple[int, int, int, int]]:
    """Where prototype k came from: the training image's index, its pixels [S, S, 3] and the box."""
    if box not in BOXES:
        raise ValueError(f"box must be one of {', '.join(BOXES)}, got {box!r}")
    i = int(network.image[k])
    if i < 0:
        raise ValueError("the prototypes were not pushed to training patches yet: finish the training")
    maps = _maps(network, dataset, dataset.train.pixels[i])
    return i, dataset.train.rgb(i), _boxed(maps[k], int(network.position[k]), network, dataset, box)


def faded(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """An image uint8 [S, S, 3], greyed outside a box."""
    top, bottom, left, right = box
    shown = (0.35 * image + 0.65 * 160).astype(np.uint8)
    shown[top:bottom, left:right] = image[top:bottom, left:right]
    return shown


def _maps(network: Network, dataset: Dataset, pixels: np.ndarray) -> torch.Tensor:
    """Similarity of every patch of an image to every prototype, [K, H - s + 1, W - s + 1], on the CPU."""
    explainer = network.eval().explainer
    latent = network.add_on(network.features(dataset.normalise(pixels[None], network.prototypes.device)))
    height = latent.shape[2] - network.prototypes.shape[2] + 1
    return explainer.sim(explainer.patches(latent))[0].T.unflatten(1, (height, -1)).cpu()


def _boxed(activation: torch.Tensor, position: int, network, dataset, box: str) -> tuple[int, int, int, int]:
    size = dataset.recipe.image_size
    if box == "activation":
        return activated_box(_upsampled(activation, size))
    covers = network.prototypes.shape[2]
    cells = [n + covers - 1 for n in activation.shape]
    ends = []
    for at, count in zip(divmod(position, activation.shape[1]), cells, strict=True):
        ends += [round(at * size / count), round((at + covers) * size / count)]
    return tuple(ends)


def _upsampled(activation: torch.Tensor, size: int) -> np.ndarray:
    return F.interpolate(activation[None, None], (size, size), mode="bicubic", align_corners=False)[0, 0].numpy()


def activated_box(activation: np.ndarray, percentile: float = 95) -> tuple[int, int, int, int]:
    """The smallest box (top, bottom, left, right) that holds all of a map at or above a percentile of it."""
    high = activation >= np.percentile(activation, percentile)
    rows, columns = (np.flatnonzero(high.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
