"""Training by KMEx's recipe (Gautam et al. 2024): SGD, a cosine per step, cross-entropy; resumable epoch by epoch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Dataset
from ..hardware import exact, training_dtype
from ..networks import Network
from .batches import check_batch, training_batches
from .loop import Batches, Record, Training, optimise


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
            raise ValueError(
                f"epochs must be at least 1 and batch_size at least 2, got {self.epochs} and {self.batch_size}"
            )
        if not self.learning_rate > 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"learning_rate must be positive and momentum in [0, 1), got {self.learning_rate} and {self.momentum}"
            )

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of a step: a half cosine from ``learning_rate`` to ``final_learning_rate``."""
        fall = (1 + math.cos(math.pi * step / steps)) / 2
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * fall


@exact()
def train(
    network: Network,
    dataset: Dataset,
    schedule: Schedule,
    *,
    flip: float = 0.0,
    padding: int = 0,
    seed: int,
    checkpoint: Path,
    made_by: dict[str, Any],
    precision: str = "auto",
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Train in place; returns one record per epoch: epoch, loss, accuracy (running, in %), learning_rate, seconds.

    After every epoch the state goes to ``checkpoint``; a call with the same settings continues from there, with the
    same batches, to the same weights as an uninterrupted run. The network is frozen and in evaluation mode afterwards.

    Parameters
    ----------
    flip, padding
        Augmentation, see :class:`~kmex_utils.training.recipe.Recipe`.
    made_by
        Everything else that fixes the run (data, architecture …); a checkpoint of other settings is not resumed.
    precision
        ``auto``, ``float32`` or ``bfloat16`` (autocast).

    Raises
    ------
    ValueError
        The training set is smaller than a batch, or the loss is no longer finite.
    """
    check_batch(dataset, schedule.batch_size)
    device = torch.device(device)
    dtype = training_dtype(precision, device)
    network.to(device).train().requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), lr=schedule.learning_rate, momentum=schedule.momentum)
    count = len(dataset.train) // schedule.batch_size
    augmentation: dict[str, Any] = {"flip": flip, "padding": padding}

    def batches(epoch: int) -> Batches:
        """The batches of an epoch, the learning rate set for each."""
        augmented = training_batches(dataset, schedule.batch_size, seed, epoch, **augmentation, device=device)
        for step, batch in enumerate(augmented, epoch * count):
            optimizer.param_groups[0]["lr"] = schedule.rate(step, schedule.epochs * count)
            yield batch

    def forward(x: Tensor, label: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = network(x)
        return y, {"loss": F.cross_entropy(y.float(), label)}

    def epoch(i: int) -> Record:
        title, diverged = f"epoch {i + 1}", f"epoch {i + 1}: lower learning_rate ({schedule.learning_rate})"
        means = optimise(batches(i), forward, optimizer, count=count, title=title, diverged=diverged)
        return {"epoch": i + 1, **means, "learning_rate": optimizer.param_groups[0]["lr"]}

    identity = {**made_by, **asdict(schedule), **augmentation, "seed": seed, "dtype": str(dtype), "device": device.type}
    titles = [f"{dataset.name} seed {seed}, epoch {i + 1}/{schedule.epochs}" for i in range(schedule.epochs)]
    history = Training(network, {"sgd": optimizer}, checkpoint, identity, log).run(titles, epoch, unit="epoch")
    network.eval().requires_grad_(False)
    return history
