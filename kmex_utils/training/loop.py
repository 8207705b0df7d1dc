"""The one loop of every training: step by step, with a record of each, resumable from a checkpoint file."""

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..data.dataset import Batches, Dataset
from ..hardware import training_dtype
from ..store import load_tensors, save_tensors, writable
from .batches import training_batches

CPU = torch.device("cpu")
Record = dict[str, Any]
Forward = Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]]
Optimizers = dict[str, Optimizer]


@dataclass
class Training:
    """What is trained (``network``, in place) on which images, by which numbers, and the file that keeps it.

    A training that was killed continues from its ``checkpoint`` (weights and the optimizers' state) to the same weights
    as an uninterrupted one, bit for bit: what a step draws, it draws from the seed and its number. One that had
    finished is not repeated, unless the package's code has changed. A checkpoint of other settings is not resumed: of
    ``options`` (a dataclass with a ``batch_size``), augmentation (``flip`` and
    ``padding``, see :class:`~kmex_utils.training.recipe.Recipe`), or ``made_by``, everything else that fixes the run
    (data, architecture …), as JSON. ``precision`` is ``auto``, ``float32`` or ``bfloat16`` (autocast). The state is
    written after a step when ``save_after`` seconds have passed since it last was, and after the last step.
    """

    network: nn.Module
    dataset: Dataset
    options: Any
    _: KW_ONLY
    seed: int
    checkpoint: Path
    made_by: dict[str, Any]
    flip: float = 0.0
    padding: int = 0
    precision: str = "auto"
    device: torch.device = CPU
    log: Callable[[str], None] = print
    save_after: float = 0.0

    def __post_init__(self) -> None:
        images, batch_size = len(self.dataset.train), self.options.batch_size
        if images < batch_size:
            raise ValueError(f"{images} training images are fewer than one batch of {batch_size}; lower batch_size")
        side = max(self.dataset.input.size)
        if not 0 <= self.flip <= 1 or not 0 <= self.padding <= side:
            what = f"flip must be a probability and padding pixels, at most the image's {side}"
            raise ValueError(f"{what}; got {self.flip} and {self.padding}")
        writable(self.checkpoint.parent)
        self.count = images // batch_size  # batches of a pass
        self.dtype = training_dtype(self.precision, self.device)
        self.network.to(self.device).train().requires_grad_(True)

    def batches(self, epoch: int) -> Batches:
        """The augmented batches (x, labels [n]) of an epoch."""
        order = self.options.batch_size, self.seed, epoch
        return training_batches(self.dataset, *order, self.flip, self.padding, self.device)

    def autocast(self, enabled: bool = True) -> torch.autocast:
        """Computes in the chosen precision."""
        return torch.autocast(self.device.type, self.dtype, enabled=enabled and self.dtype != torch.float32)

    def optimise(self, batches: Batches, forward: Forward, optimizer: Optimizer, title: str, rates: str) -> Record:
        """One pass over the batches (x, labels [n]): the mean of each term, and the running accuracy in %.

        ``forward`` gives a batch's class scores y [n, C] and the terms by name, of which ``loss`` is minimised. A
        ValueError says in which ``title`` its mean is not finite and which ``rates`` to lower.
        """
        sums: defaultdict[str, Any] = defaultdict(float)
        correct, seen = torch.tensor(0), 0
        for x, label in tqdm(batches, title, self.count, leave=False):
            y, terms = forward(x, label)
            optimizer.zero_grad(set_to_none=True)
            terms["loss"].backward()
            optimizer.step()
            for name, value in terms.items():
                sums[name] += value.detach()
            correct = correct + (y.detach().argmax(1) == label).sum()
            seen += len(label)
        means = {name: (value / self.count).item() for name, value in sums.items()}
        if not math.isfinite(means["loss"]):
            raise ValueError(f"the loss is {means['loss']} in {title}: lower {rates}")
        return {**means, "accuracy": 100 * correct.item() / seen}

    def run(
        self, optimizers: Optimizers, titles: Sequence[str], step: Callable[[int], Record], unit: str = "step"
    ) -> list[Record]:
        """Take every step i that the checkpoint lacks; returns the records of all, each with its ``seconds``.

        ``titles`` name the steps whose numbers are logged (empty: they are not); ``unit`` is what a step is.
        """
        history = self._resume(optimizers, unit, len(titles))
        saved = time.perf_counter()
        for i in range(len(history), len(titles)):
            start = time.perf_counter()
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(1_000_003 * self.seed + i)  # of dropout: a resumed step draws as it would have
                record = step(i)
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            if time.perf_counter() - saved >= self.save_after or len(history) == len(titles):
                self._save(optimizers, history)
                saved = time.perf_counter()
            if titles[i]:
                numbers = (f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float))
                self.log(f"{titles[i]}: {', '.join(numbers)}")
        self.network.eval().requires_grad_(False)
        return history

    def _identity(self) -> dict[str, Any]:
        """Everything that fixes the run."""
        fixed = {"flip": self.flip, "padding": self.padding, "seed": self.seed}
        return {**self.made_by, **asdict(self.options), **fixed, "dtype": str(self.dtype), "device": self.device.type}

    def _save(self, optimizers: Optimizers, history: list[Record]) -> None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.network.named_parameters()}
        tensors = {f"model|{name}": value for name, value in self.network.state_dict().items()}
        for kind, optimizer in optimizers.items():
            for parameter, entries in optimizer.state.items():
                kept = {key: value for key, value in entries.items() if value is not None}
                tensors |= {f"{kind}|{names[parameter]}|{key}": value for key, value in kept.items()}
        settings = {"identity": self._identity(), "history": history, "code": _code()}
        save_tensors(self.checkpoint, tensors, settings)

    def _resume(self, optimizers: Optimizers, unit: str, steps: int) -> list[Record]:
        if not self.checkpoint.exists():
            return []
        tensors, settings = load_tensors(self.checkpoint)
        if settings["identity"] != json.loads(json.dumps(self._identity())):
            self.log(f"{self.checkpoint.name} is of other settings: starting anew")
            return []
        if len(settings["history"]) >= steps and settings.get("code") != _code():
            self.log(f"{self.checkpoint.name} is of a finished training by other code: starting anew")
            return []
        parameters = dict(self.network.named_parameters())
        model = {}
        for key, value in tensors.items():
            kind, name, *entry = key.split("|")
            if kind == "model":
                model[name] = value
            else:
                if value.shape == parameters[name].shape:  # not Adam's count: on the device, in the memory format
                    value = torch.empty_like(parameters[name], requires_grad=False).copy_(value)
                optimizers[kind].state[parameters[name]][entry[0]] = value
        self.network.load_state_dict(model)
        self.log(f"resuming after {unit} {len(settings['history'])}")
        return list(settings["history"])


@cache
def _code() -> str:
    """A hash of what computes: this package and the library."""
    files = sorted(Path(__file__).parents[1].rglob("*.py"))
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content + torch.__version__.encode()).hexdigest()[:16]
