"""Training by KMEx's recipe (Gautam et al. 2024): SGD, a cosine per step, cross-entropy; resumable epoch by epoch."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .backbones import Backbone
from .datasets import Dataset
from .hardware import training_dtype
from .store import load_tensors, save_tensors


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


def train(
    backbone: Backbone,
    dataset: Dataset,
    schedule: Schedule,
    *,
    seed: int,
    checkpoint: Path,
    made_by: dict[str, Any],
    precision: str = "auto",
    device: torch.device | str = "cpu",
    report: Callable[[str], None] = print,
) -> list[dict[str, float]]:
    """Train in place; returns one record per epoch: epoch, loss, accuracy (running, in %), learning_rate, seconds.

    After every epoch the state goes to ``checkpoint``; a call with the same settings continues from there, with
    the same batches, to the same weights as an uninterrupted run.

    Parameters
    ----------
    made_by
        Everything that fixes the run (data, seed, architecture …); a checkpoint of other settings is not resumed.
    precision
        ``auto``, ``float32`` or ``bfloat16`` (autocast).

    Raises
    ------
    ValueError
        The training set is smaller than a batch, or the loss is no longer finite.
    """
    if len(dataset.train) < schedule.batch_size:
        raise ValueError(
            f"{len(dataset.train)} training images are fewer than one batch of {schedule.batch_size}; lower batch_size"
        )
    device = torch.device(device)
    dtype = training_dtype(precision, device)
    identity = json.loads(json.dumps({**made_by, **asdict(schedule), "dtype": str(dtype), "device": device.type}))
    backbone.to(device)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=schedule.learning_rate, momentum=schedule.momentum)
    steps_per_epoch = len(dataset.train) // schedule.batch_size
    steps = schedule.epochs * steps_per_epoch
    history = _resume(backbone, optimizer, checkpoint, identity, report)

    backbone.train()
    for epoch in range(len(history), schedule.epochs):
        start = time.perf_counter()
        loss_sum = torch.zeros((), device=device)
        correct = torch.zeros((), device=device)
        step = epoch * steps_per_epoch
        for x, label in _progress(
            dataset.training_batches(schedule.batch_size, seed, epoch, device), steps_per_epoch, epoch, schedule.epochs
        ):
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step, steps)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                y = backbone(x)
            loss = F.cross_entropy(y.float(), label)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += loss.detach()
            correct += (y.detach().argmax(1) == label).sum()
            step += 1
        mean_loss = (loss_sum / steps_per_epoch).item()
        if not math.isfinite(mean_loss):
            raise ValueError(
                f"the loss is {mean_loss} in epoch {epoch + 1}: lower learning_rate ({schedule.learning_rate})"
            )
        accuracy = 100 * correct.item() / (steps_per_epoch * schedule.batch_size)
        record = {
            "epoch": epoch + 1,
            "loss": mean_loss,
            "accuracy": accuracy,
            "learning_rate": schedule.rate(step - 1, steps),
            "seconds": time.perf_counter() - start,
        }
        history.append(record)
        _save(backbone, optimizer, checkpoint, identity, history)
        report(
            f"{dataset.name} seed {seed}: epoch {epoch + 1}/{schedule.epochs}, loss {mean_loss:.4f}, "
            f"running accuracy {accuracy:.1f} %, {record['seconds']:.0f} s"
        )
    backbone.eval()
    return history


def _progress(batches, steps: int, epoch: int, epochs: int):
    from tqdm.auto import tqdm

    return tqdm(batches, f"epoch {epoch + 1}/{epochs}", steps, leave=False)


def _save(backbone, optimizer, checkpoint: Path, identity: dict, history: list) -> None:
    names = {parameter: name for name, parameter in backbone.named_parameters()}
    tensors = {f"model.{name}": value for name, value in backbone.state_dict().items()}
    for parameter, state in optimizer.state.items():
        if state.get("momentum_buffer") is not None:
            tensors[f"momentum.{names[parameter]}"] = state["momentum_buffer"]
    save_tensors(checkpoint, tensors, {"identity": identity, "history": history})


def _resume(backbone, optimizer, checkpoint: Path, identity: dict, report) -> list[dict[str, float]]:
    if not checkpoint.exists():
        return []
    tensors, settings = load_tensors(checkpoint)
    if settings["identity"] != identity:
        report(f"{checkpoint.name} is of other settings: starting anew")
        return []
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}  # noqa: E731
    backbone.load_state_dict(part("model."))
    momentum = part("momentum.")
    for name, parameter in backbone.named_parameters():
        if name in momentum:
            buffer = torch.empty_like(parameter)
            optimizer.state[parameter]["momentum_buffer"] = buffer.copy_(momentum[name])
    report(f"resuming after epoch {len(settings['history'])}")
    return settings["history"]
