"""The one loop of every training: step by step, with a record of each, resumable from a checkpoint file."""

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..store import load_tensors, save_tensors

Record = dict[str, Any]
Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Training:
    """What a training changes, and the file that keeps it.

    ``identity`` is everything that fixes the run, as JSON; a checkpoint of another identity is not resumed. Of the
    ``optimizers``, the state is kept by the name of the parameter; so is the random state that dropout draws from.
    """

    module: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    checkpoint: Path
    identity: dict[str, Any]
    log: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def run(
        self, titles: Sequence[str], step: Callable[[int], Record], *, unit: str, save_after: float = 0.0
    ) -> list[Record]:
        """Take every step i, or those that the checkpoint lacks; returns the records, each with its ``seconds``.

        ``titles`` say what each step is called when its numbers are logged (empty: they are not), ``unit`` what a step
        is. The state is written after a step when ``save_after`` seconds have passed since it last was, and after the
        last. Started again after an interruption, training ends with the same weights, bit for bit.
        """
        history = self._resume(unit)
        saved = time.perf_counter()
        for i in range(len(history), len(titles)):
            start = time.perf_counter()
            record = step(i)
            record["seconds"] = time.perf_counter() - start
            history.append(record)
            if time.perf_counter() - saved >= save_after or len(history) == len(titles):
                self._save(history)
                saved = time.perf_counter()
            if titles[i]:
                numbers = (f"{name} {value:.4g}" for name, value in record.items() if isinstance(value, float))
                self.log(f"{titles[i]}: {', '.join(numbers)}")
        return history

    def _save(self, history: list[Record]) -> None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.module.named_parameters()}
        tensors = {f"model|{name}": value for name, value in self.module.state_dict().items()}
        for kind, optimizer in self.optimizers.items():
            for parameter, entries in optimizer.state.items():
                kept = {key: value for key, value in entries.items() if value is not None}
                tensors |= {f"{kind}|{names[parameter]}|{key}": value for key, value in kept.items()}
        tensors["random|cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random|cuda"] = torch.cuda.get_rng_state(self.device)
        save_tensors(self.checkpoint, tensors, {"identity": self.identity, "history": history})

    def _resume(self, unit: str) -> list[Record]:
        if not self.checkpoint.exists():
            return []
        tensors, settings = load_tensors(self.checkpoint)
        if settings["identity"] != json.loads(json.dumps(self.identity)):
            self.log(f"{self.checkpoint.name} is of other settings: starting anew")
            return []
        parameters = dict(self.module.named_parameters())
        model = {}
        for key, value in tensors.items():
            kind, name, *entry = key.split("|")
            if kind == "model":
                model[name] = value
            elif key == "random|cpu":
                torch.set_rng_state(value)
            elif key == "random|cuda":
                torch.cuda.set_rng_state(value, self.device)
            else:
                if value.shape == parameters[name].shape:  # not Adam's count: on the device, in the memory format
                    value = torch.empty_like(parameters[name], requires_grad=False).copy_(value)
                self.optimizers[kind].state[parameters[name]][entry[0]] = value
        self.module.load_state_dict(model)
        self.log(f"resuming after {unit} {len(settings['history'])}")
        return list(settings["history"])


def optimise(
    batches: Batches,
    forward: Callable[[Tensor, Tensor], tuple[Tensor, dict[str, Tensor]]],
    optimizer: torch.optim.Optimizer,
    *,
    count: int,
    title: str,
    diverged: str,
) -> Record:
    """One pass over ``count`` batches (x, labels [n]): the mean of each term, and the running accuracy in %.

    ``forward`` gives a batch's class scores y [n, C] and the terms by name, of which ``loss`` is minimised. If its mean
    is not finite, a ValueError says so; ``diverged`` says where and what to change.
    """
    sums: defaultdict[str, Tensor] = defaultdict(lambda: torch.tensor(0.0))
    correct, seen = torch.tensor(0), 0
    for x, label in tqdm(batches, title, count, leave=False):
        y, terms = forward(x, label)
        optimizer.zero_grad(set_to_none=True)
        terms["loss"].backward()
        optimizer.step()
        for name, value in terms.items():
            sums[name] = sums[name] + value.detach()
        correct = correct + (y.detach().argmax(1) == label).sum()
        seen += len(label)
    means = {name: (value / count).item() for name, value in sums.items()}
    if not math.isfinite(means["loss"]):
        raise ValueError(f"the loss is {means['loss']} in {diverged}")
    return {**means, "accuracy": 100 * correct.item() / seen}
