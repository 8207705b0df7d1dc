"""Training by KMEx's recipe (Gautam et al. 2024): SGD, a cosine per step, cross-entropy; resumable epoch by epoch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.dataset import Batches, Dataset
from ..hardware import exact
from ..networks import Network
from .loop import Record, Training


@dataclass(frozen=True)
class Schedule:
    """Numbers of the optimisation; the defaults are KMEx's (there is no weight decay)."""

    epochs: int
    batch_size: int = 128
    learning_rate: float = 0.01
    final_learning_rate: float = 1e-4
    momentum: float = 0.5

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(f"epochs must be at least 1 and batch_size at least 2, got {self}")
        if not self.learning_rate > 0 or not 0 <= self.momentum < 1:
            raise ValueError(f"learning_rate must be positive and momentum in [0, 1), got {self}")

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: a half cosine from ``learning_rate`` to ``final_learning_rate``."""
        fall = (1 + math.cos(math.pi * step / steps)) / 2
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * fall


@exact()
def train(network: Network, dataset: Dataset, schedule: Schedule, **how: Any) -> list[Record]:
    """Train in place; returns one record per epoch: epoch, loss, accuracy (running, in %), learning_rate, seconds.

    ``how`` are the other parameters of :class:`~kmex_utils.training.loop.Training`. A ValueError says that the training
    set is smaller than a batch, or that the loss is no longer finite.
    """
    training = Training(network, dataset, schedule, **how)
    optimizer = torch.optim.SGD(network.parameters(), lr=schedule.learning_rate, momentum=schedule.momentum)

    def batches(epoch: int) -> Batches:
        """The batches of an epoch, the learning rate set for each."""
        for step, batch in enumerate(training.batches(epoch), epoch * training.count):
            optimizer.param_groups[0]["lr"] = schedule.rate(step, schedule.epochs * training.count)
            yield batch

    def forward(x: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with training.autocast():
            y = network(x)
        return y, {"loss": F.cross_entropy(y.float(), label)}

    def epoch(i: int) -> Record:
        rates = f"learning_rate ({schedule.learning_rate})"
        means = training.optimise(batches(i), forward, optimizer, f"epoch {i + 1}", rates)
        return {"epoch": i + 1, **means, "learning_rate": optimizer.param_groups[0]["lr"]}

    titles = [f"{dataset.name} seed {training.seed}, epoch {i + 1}/{schedule.epochs}" for i in range(schedule.epochs)]
    return training.run({"sgd": optimizer}, titles, epoch, unit="epoch")
