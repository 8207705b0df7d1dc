"""What trains ProtoPNet: the terms of its loss, the push, and the alternating schedule."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Dataset
from ...hardware import exact, training_dtype
from ...method.explainers import ProtoPNet
from ..batches import affine, check_batch, epoch_generator, shuffled, training_batches
from ..loop import Batches, Record, Training, optimise
from .model import TrainableProtoPNet, features, latents
from .options import Options

AFFINE_STEP = 500_000  # added to the step, so that rotations are drawn apart from order and flips


def costs(y: Tensor, smallest: Tensor, label: Tensor, network: TrainableProtoPNet) -> dict[str, Tensor]:
    """The terms of the loss, each a scalar.

    ``cluster`` is the mean squared distance from an image to the nearest prototype of its class, ``separation`` to the
    nearest of any other class, both cut at the number of a prototype's entries; ``l1`` sums the absolute weights that
    join a prototype to other classes.
    """
    of_class = network.labels == label[:, None]
    largest = smallest.new_tensor(float(network.prototypes[0].numel()))
    return {
        "cross_entropy": F.cross_entropy(y, label),
        "cluster": torch.where(of_class, smallest, largest).clamp_max(largest).min(1).values.mean(),
        "separation": torch.where(of_class, largest, smallest).clamp_max(largest).min(1).values.mean(),
        "l1": network.last.weight[~network.of_class].abs().sum(),
    }


def total(terms: dict[str, Tensor], options: Options) -> Tensor:
    """The loss: the terms weighted by the options of their names."""
    return sum((getattr(options, name) * value for name, value in terms.items()), torch.tensor(0))


@torch.no_grad()
def push(network: TrainableProtoPNet, latents: Iterable[Tensor], labels: Tensor) -> Tensor:
    """Replace each prototype by the nearest training patch of its class and record which one that is.

    ``latents`` are the grids of the training images in order, in batches [n, D', H, W], ``labels`` [N] their classes.
    Returns the squared distance each prototype moved, [K]; ties go to the first patch. Only distances between one
    batch's patches of a class and that class's prototypes are in memory at a time.
    """
    vectors = network.prototypes.detach().flatten(1).clone()
    image, position = torch.full_like(network.image, -1), torch.full_like(network.position, -1)
    nearest = torch.full_like(vectors[:, 0], torch.inf)
    of_class = [row.nonzero().flatten() for row in network.of_class]
    start = 0
    for latent in latents:
        h = network.explainer.patches(latent)
        label = labels[start : start + len(h)].to(h.device)
        for c in label.unique().tolist():
            members = (label == c).nonzero().flatten()
            prototypes = network.prototypes.detach()[of_class[c]]
            explainer = ProtoPNet(network.add_on, prototypes, network.last.weight, network.epsilon)
            distance = explainer.squared_distances(h[members]).flatten(0, 1)
            row = distance.argmin(0)
            value = distance.gather(0, row[None])[0]
            closer = value < nearest[of_class[c]]
            k, row = of_class[c][closer], row[closer]
            i, r = members[row // h.shape[1]], row % h.shape[1]
            nearest[k], image[k], position[k], vectors[k] = value[closer], start + i, r, h[i, r]
        start += len(h)
    missing = (image < 0).nonzero().flatten()
    if len(missing):
        raise ValueError(f"class {int(network.labels[missing[0]])} has no training image to push its prototypes to")
    network.prototypes.copy_(vectors.view_as(network.prototypes))
    network.image.copy_(image)
    network.position.copy_(position)
    return nearest


def optimizers(network: TrainableProtoPNet, options: Options) -> dict[str, torch.optim.Optimizer]:
    """An Adam for each phase that trains, kept through its epochs; a group's first rate stays as ``initial_rate``."""
    decay = options.weight_decay
    head = {id(parameter) for parameter in network.network.classifier.parameters()}
    encoder = [parameter for parameter in network.network.parameters() if id(parameter) not in head]
    joint = {"params": encoder, "lr": options.features_rate, "weight_decay": decay}
    add_on = {"params": [*network.add_on.parameters()], "lr": options.add_on_rate, "weight_decay": decay}
    prototypes = {"params": [network.prototypes], "lr": options.prototypes_rate}
    last = {"params": [network.last.weight], "lr": options.last_rate}
    phases = {"warm": [add_on, prototypes], "joint": [joint, add_on, prototypes], "last": [last]}
    return {
        phase: torch.optim.Adam([{**group, "initial_rate": group["lr"]} for group in groups])
        for phase, groups in phases.items()
    }


@exact()
def train(
    network: TrainableProtoPNet,
    dataset: Dataset,
    options: Options,
    *,
    flip: float = 0.0,
    padding: int = 0,
    seed: int,
    checkpoint: Path,
    made_by: dict[str, Any],
    precision: str = "auto",
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
    save_after: float = 10.0,
) -> list[Record]:
    """Run the schedule in place; returns a record of each step: phase, epoch, pass, the loss's terms, seconds.

    Parameters are those of :func:`kmex_utils.training.sgd.train`, and it is resumed likewise; every step draws its
    order and augmentation from (seed, step). The state goes to ``checkpoint`` when ``save_after`` seconds have passed
    since it last did, and after the last step. ``precision`` is of the features in the joint phase. A ValueError says
    what :func:`check` refuses, or that the loss is no longer finite.
    """
    device = torch.device(device)
    dtype = training_dtype(precision, device)
    check(network.to(device), dataset, options)
    augmentation: dict[str, Any] = {"flip": flip, "padding": padding}
    network.requires_grad_(True)
    phases = _Phases(network, dataset, options, augmentation, seed, dtype)
    adam, plan = optimizers(network, options), options.plan()

    def step(i: int) -> Record:
        phase, epoch, count = plan[i]
        numbers = phases.push() if phase == "push" else phases.train(adam[phase], phase, epoch, i)
        return {"phase": phase, "epoch": epoch, "pass": count, **numbers}

    identity = {**made_by, **asdict(options), **augmentation, "seed": seed, "dtype": str(dtype), "device": device.type}
    quiet = [phase == "last" and count + 1 < options.last_passes for phase, _, count in plan]  # one line for all passes
    of = f"{dataset.name} seed {seed}"
    titles = ["" if q else f"{of}, epoch {epoch}, {phase}" for q, (phase, epoch, _) in zip(quiet, plan, strict=True)]
    training = Training(network, adam, checkpoint, identity, log)
    history = training.run(titles, step, unit="step", save_after=save_after)
    network.eval().requires_grad_(False)
    return history


def check(network: TrainableProtoPNet, dataset: Dataset, options: Options) -> None:
    """A ValueError for a class without training images, fewer images than a batch, or a prototype beyond the grid."""
    counts = torch.bincount(dataset.train.labels, minlength=len(dataset.classes))
    if (counts == 0).any():
        raise ValueError(f"class {dataset.classes[int(counts.argmin())]!r} has no training images: add some")
    check_batch(dataset, options.batch_size)
    size, device = network.prototypes.shape[2], network.prototypes.device
    with torch.no_grad():
        grid = network.eval().features(dataset.input(dataset.train.pixels[:1], device)).shape[2:]
    if size > min(grid):
        raise ValueError(
            f"a prototype of {size} x {size} positions does not fit the {grid[0]} x {grid[1]} grid of "
            f"{dataset.input.image_size}-pixel images: lower prototype_size or train with a larger image_size"
        )


@dataclass
class _Phases:
    """The steps of the schedule."""

    network: TrainableProtoPNet
    dataset: Dataset
    options: Options
    augmentation: dict[str, Any]
    seed: int
    dtype: torch.dtype
    kept: dict[str, Tensor] = field(default_factory=dict)  # what the present phase sees of features computed once

    def train(self, optimizer: torch.optim.Optimizer, phase: str, epoch: int, step: int) -> Record:
        """One pass over the training images."""
        if phase == "joint":
            for group in optimizer.param_groups:
                group["lr"] = group["initial_rate"] * self.options.joint_rate(epoch)

        def forward(x: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            smallest = x if phase == "last" else self.network.smallest(self.network.add_on(x))
            y = self.network.scores(smallest)
            terms = costs(y, smallest, label, self.network)
            return y, {"loss": total(terms, self.options), **terms}

        count, diverged = len(self.dataset.train) // self.options.batch_size, f"the {phase} phase: lower its rates"
        return optimise(self._batches(phase, step), forward, optimizer, count=count, title=phase, diverged=diverged)

    def push(self) -> Record:
        """Push; where features are computed once, the last layer's passes see those of the push."""
        grids: Iterable[Tensor] = latents(self.network, self.dataset, "train")
        if self.options.frozen_features == "once":
            grids = list(grids)
        moved = push(self.network, grids, self.dataset.train.labels)
        if self.options.frozen_features == "once":
            self.kept = {"last": self._smallest(grids)}
        places = torch.stack([self.network.image, self.network.position]).unique(dim=1)
        return {"moved": moved.mean().item(), "distinct": places.shape[1]}

    def _batches(self, phase: str, step: int) -> Batches:
        """Batches at the depth where a phase begins to train: x(B) (warm, joint) or smallest distances (last)."""
        batch_size = self.options.batch_size
        if phase != "joint" and self.options.frozen_features == "once":
            kept, labels = self._once(phase), self.dataset.train.labels
            for index in shuffled(len(labels), batch_size, epoch_generator(self.seed, step)):
                yield kept[index.to(kept.device)], labels[index].to(kept.device)
            return
        self.kept = {}
        device = self.network.train().prototypes.device
        generator = epoch_generator(self.seed, step + AFFINE_STEP)
        autocast = phase == "joint" and self.dtype != torch.float32
        for x, label in training_batches(self.dataset, batch_size, self.seed, step, **self.augmentation, device=device):
            if self.options.affine:
                x = affine(x, generator)
            with torch.set_grad_enabled(phase == "joint"), torch.autocast(device.type, self.dtype, enabled=autocast):
                x = self.network.features(x)
            x = x.float()
            if phase == "last":
                with torch.no_grad():
                    x = self.network.smallest(self.network.add_on(x))
            yield x, label

    @torch.no_grad()
    def _once(self, phase: str) -> Tensor:
        if phase not in self.kept and phase == "warm":
            self.kept = {phase: torch.cat(list(features(self.network, self.dataset, "train")))}
        elif phase not in self.kept:  # resumed after the push
            self.kept = {phase: self._smallest(latents(self.network, self.dataset, "train"))}
        return self.kept[phase]

    @torch.no_grad()
    def _smallest(self, grids: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.network.smallest(latent) for latent in grids])
