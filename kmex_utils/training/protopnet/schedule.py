"""What trains ProtoPNet: the terms of its loss, the push, and the alternating schedule."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.dataset import Batches, Dataset
from ...hardware import exact
from ...method.explainers import ProtoPNet
from ..batches import affine, epoch_generator, shuffled
from ..loop import Optimizers, Record, Training
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

    ``latents`` are the grids of the training images in order, in batches [n, D', H, W], ``labels`` [N] their classes,
    of which none is missing.
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
    network.prototypes.copy_(vectors.view_as(network.prototypes))
    network.image.copy_(image)
    network.position.copy_(position)
    return nearest


def optimizers(network: TrainableProtoPNet, options: Options) -> Optimizers:
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
    network: TrainableProtoPNet, dataset: Dataset, options: Options, *, save_after: float = 10.0, **how: Any
) -> list[Record]:
    """Run the schedule in place; returns a record of each step: phase, epoch, pass, the loss's terms, seconds.

    ``how`` are the other parameters of :class:`~kmex_utils.training.loop.Training`; its ``precision`` is of the
    features in the joint phase. Every step draws its order and augmentation from (seed, step). A ValueError names a
    class without training images or a prototype beyond the grid, or says that the loss is no longer finite.
    """
    phases = _Phases(network, dataset, options, save_after=save_after, **how)
    phases.check()
    adam, plan = optimizers(network, options), options.plan()

    def step(i: int) -> Record:
        phase, epoch, count = plan[i]
        numbers = phases.push() if phase == "push" else phases.train(adam[phase], phase, epoch, i)
        return {"phase": phase, "epoch": epoch, "pass": count, **numbers}

    of = f"{dataset.name} seed {phases.seed}"
    quiet = [phase == "last" and count + 1 < options.last_passes for phase, _, count in plan]  # one line for all passes
    titles = ["" if q else f"{of}, epoch {epoch}, {phase}" for q, (phase, epoch, _) in zip(quiet, plan, strict=True)]
    return phases.run(adam, titles, step)


@dataclass
class _Phases(Training):
    """The steps of the schedule."""

    network: TrainableProtoPNet
    options: Options
    kept: dict[str, Tensor] = field(default_factory=dict)  # what the present phase sees of features computed once

    def check(self) -> None:
        """A ValueError for a class without training images or a prototype beyond the grid."""
        counts = torch.bincount(self.dataset.train.labels, minlength=len(self.dataset.classes))
        if (counts == 0).any():
            raise ValueError(f"class {self.dataset.classes[int(counts.argmin())]!r} has no training images: add some")
        with torch.no_grad():
            x = self.network.eval().features(self.dataset.input(self.dataset.train.pixels[:1], self.device))
        size, (height, width) = self.network.prototypes.shape[2], x.shape[2:]
        if size > min(height, width):
            raise ValueError(
                f"a prototype of {size} x {size} positions does not fit the {height} x {width} grid of "
                f"{self.dataset.input.image_size}-pixel images: lower prototype_size or train with a larger image_size"
            )

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

        once = phase != "joint" and self.options.frozen_features == "once"
        batches = self._once(phase, step) if once else self._anew(phase, step)
        return self.optimise(batches, forward, optimizer, f"the {phase} phase", "its rates")

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

    def _anew(self, phase: str, step: int) -> Batches:
        """Batches at the depth where a phase begins to train: x(B) (warm, joint) or smallest distances (last)."""
        self.kept = {}
        self.network.train()
        generator = epoch_generator(self.seed, step + AFFINE_STEP)
        joint = phase == "joint"
        for x, label in self.batches(step):
            if self.options.affine:
                x = affine(x, generator)
            with torch.set_grad_enabled(joint):
                with self.autocast(joint):
                    x = self.network.features(x)
                x = x.float()
                if phase == "last":
                    x = self.network.smallest(self.network.add_on(x))
            yield x, label

    def _once(self, phase: str, step: int) -> Batches:
        """The same in another order, kept since the phase began."""
        if phase not in self.kept and phase == "warm":
            self.kept = {phase: torch.cat(list(features(self.network, self.dataset, "train")))}
        elif phase not in self.kept:  # resumed after the push
            self.kept = {phase: self._smallest(latents(self.network, self.dataset, "train"))}
        kept, labels = self.kept[phase], self.dataset.train.labels
        for index in shuffled(len(labels), self.options.batch_size, epoch_generator(self.seed, step)):
            yield kept[index.to(kept.device)], labels[index].to(kept.device)

    @torch.no_grad()
    def _smallest(self, grids: Iterable[Tensor]) -> Tensor:
        return torch.cat([self.network.smallest(latent) for latent in grids])
