"""A network run once on noise and watched: which layer is the head, what is averaged before it, where blocks end."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .backbones import avg_pool

_POOLS = ("adaptive_avg_pool2d", "avg_pool2d", "adaptive_avg_pool1d", "mean")
_FLATTENINGS = ("flatten", "view", "reshape")
_QUIET = (nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity, nn.AdaptiveAvgPool2d, nn.AvgPool2d)
AT_MOST = 4  # blocks chosen automatically: the deepest, as the paper's B1 … B4


@dataclass(frozen=True)
class Tap:
    """The ``call``-th output of a module."""

    name: str
    call: int


@dataclass(frozen=True)
class Pool:
    """The ``call``-th average pool of a pass, made at time ``at``."""

    call: int
    at: int
    global_: bool
    size: tuple[int, int]


@dataclass
class Call:
    """One call of a module: when, and the sizes (H, W) of the maps that went in and came out, if maps they were."""

    name: str
    call: int
    start: int
    size_in: tuple[int, int] | None
    children: list["Call"] = field(default_factory=list)
    end: int = 0
    size_out: tuple[int, int] | None = None

    def halvings(self) -> int:
        """How often the map was halved from input to output; 2 where either is no map."""
        if not (self.size_in and self.size_out):
            return 2
        return round(math.log2(max(self.size_in[0], 1) / max(self.size_out[0], 1)))

    def steps(self) -> Iterator["Call"]:
        """The calls along the trunk: a module that halves the resolution more than once is looked into."""
        if self.size_out and (self.halvings() < 2 or not self.children):
            yield self
        else:
            for child in self.children:
                yield from child.steps()


class Pools(TorchFunctionMode):
    """Notes the input of every average pool, whichever module or function makes it."""

    def __init__(self, clock=None) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []
        self.made: list[Pool] = []
        self._clock = clock or (lambda: 0)
        self._flat = self._map = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _FLATTENINGS and args and _maps(args[0]) and _is_flat(args[0], out):
            self._flat, self._map = out, args[0]
        elif name in _POOLS and args and isinstance(args[0], torch.Tensor):
            x = (
                self._map if args[0] is self._flat else args[0]
            )  # the mean over [N, C, H W] is over the map [N, C, H, W]
            if _maps(x) and _is_pool(x, out):
                size = tuple(out.shape[2:]) if out.dim() == 4 else (1, 1)
                self.made.append(Pool(len(self.inputs), self._clock(), size == (1, 1), size))
                self.inputs.append(x)
        return out


def _maps(x) -> bool:
    return isinstance(x, torch.Tensor) and x.dim() == 4


def _is_pool(x: torch.Tensor, out) -> bool:
    if not isinstance(out, torch.Tensor) or out.shape[:2] != x.shape[:2]:
        return False
    return out.dim() in (2, 4) or out.shape[2:] == (1,)


def _is_flat(x: torch.Tensor, out) -> bool:
    return isinstance(out, torch.Tensor) and out.shape == (*x.shape[:2], x.shape[2] * x.shape[3])


class Watched:
    """What happened while a network ran on noise."""

    def __init__(self, module: nn.Module, image_size: int, name: str) -> None:
        self.module, self.name, self.image_size = module, name, image_size
        self.time = 0
        self.calls: list[Call] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        open_calls: list[Call] = []
        counts: dict[str, int] = {}

        def before(name):
            def hook(module, args, kwargs):
                first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
                size = tuple(first.shape[2:]) if _maps(first) else None
                call = Call(name, counts.get(name, 0), self.tick(), size)
                counts[name] = call.call + 1
                if open_calls:
                    open_calls[-1].children.append(call)
                open_calls.append(call)
                if isinstance(module, nn.Linear):
                    self.inputs[name] = first

            return hook

        def after(name):
            def hook(module, args, kwargs, output):
                call = open_calls.pop()
                call.end, call.size_out = self.tick(), tuple(output.shape[2:]) if _maps(output) else None
                self.calls.append(call)
                if isinstance(module, nn.Linear):
                    self.outputs[name] = output

            return hook

        parameter = next(module.parameters(), torch.zeros(()))
        x = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
        with ExitStack() as stack:
            for key, part in module.named_modules():
                handles = (
                    part.register_forward_pre_hook(before(key), with_kwargs=True),
                    part.register_forward_hook(after(key), with_kwargs=True),
                )
                for handle in handles:
                    stack.callback(handle.remove)
            stack.enter_context(torch.no_grad())
            self.pools = stack.enter_context(Pools(self.tick))
            try:
                module(x.to(parameter))
            except Exception as error:  # whatever a foreign forward raises
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"{name} does not run on 3 x {image_size} x {image_size} images: {reason}") from None

    def tick(self) -> int:
        """The next point in time."""
        self.time += 1
        return self.time

    def last(self, name: str) -> Call:
        """The last call of a module."""
        return max((call for call in self.calls if call.name == name), key=lambda call: call.end)

    def head(self, name: str) -> str:
        """The name of the linear head: the last linear layer, or the one asked for."""
        linear = sorted(self.outputs, key=lambda key: self.last(key).end)
        if not name:
            if not linear:
                raise ValueError(f"{self.name} has no linear layer: the paper's form is average pool + linear head")
            return linear[-1]
        try:
            part = self.module.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{self.name} has no head {name!r}; its linear layers: {', '.join(linear[-5:])}") from None
        if not isinstance(part, nn.Linear):
            kind = type(part).__name__
            raise ValueError(
                f"the head {name!r} of {self.name} is a {kind}, not one linear layer; its linear layers: "
                + (", ".join(linear[-5:]) or "none")
            )
        if name not in linear:
            raise ValueError(f"the head {name!r} of {self.name} is never called; its linear layers: {linear[-5:]}")
        return name

    def pool(self, head: str) -> Pool:
        """The average pool before the head."""
        before = [pool for pool in self.pools.made if pool.at < self.last(head).start]
        if not before:
            raise ValueError(
                f"{self.name} has no average pool between its feature maps and its head {head!r}: not a CNN of eq. 1"
            )
        pool = before[-1]
        for call in sorted(self.calls, key=lambda call: call.start):
            is_map = call.size_out and call.size_out != (1, 1)
            around = call.start < pool.at and call.size_out == pool.size
            kind = type(self.module.get_submodule(call.name))
            if pool.at < call.end < self.last(head).start and is_map and not around and not issubclass(kind, _QUIET):
                raise ValueError(
                    f"{call.name} ({kind.__name__}) of {self.name} makes maps after the last average pool seen: "
                    "that before the head is not recognised; write it as x.mean((2, 3)) or nn.AdaptiveAvgPool2d(1)"
                )
        return pool

    def trunk(self, pool: Pool) -> list[Call]:
        """Calls along the trunk that ended before the pool, by time."""
        root = self.last("")
        steps = [call for child in root.children for call in child.steps()]
        return [s for s in steps if s.end < pool.at and s.size_out[0] == s.size_out[1]]

    def stride(self, size: tuple[int, int]) -> int:
        """The resolution as the power of two that divides the image's."""
        return 2 ** max(0, round(math.log2(self.image_size / size[0])))

    def blocks(self, names: Sequence[str], pool: Pool) -> tuple[Tap, ...]:
        """Everything before h: by name, or the last output at each stride."""
        h = self.pools.inputs[pool.call]
        deepest = self.stride(tuple(h.shape[2:]))
        if names:
            chosen = [self.named(name, pool) for name in names]
            if [call.end for call in chosen] != sorted(call.end for call in chosen):
                raise ValueError(f"the blocks {', '.join(names)} of {self.name} are not in the order they are computed")
            if self.stride(chosen[-1].size_out) == deepest:
                chosen = chosen[:-1]  # the last block ends at h
        else:
            at_stride = {self.stride(call.size_out): call for call in self.trunk(pool)}
            chosen = [call for stride, call in sorted(at_stride.items()) if stride < deepest][-(AT_MOST - 1) :]
        return tuple(Tap(call.name, call.call) for call in chosen)

    def named(self, name: str, pool: Pool) -> Call:
        """The last call of a module whose maps come before the pool; an unknown name is refused."""
        mapped = {call.name: call for call in self.calls if call.size_out and call.end < pool.at}
        if name not in mapped:
            close = get_close_matches(name, mapped, n=4, cutoff=0.5) or [call.name for call in self.trunk(pool)][-4:]
            raise ValueError(f"{self.name} has no block {name!r} with feature maps; the nearest: {', '.join(close)}")
        return mapped[name]

    def encoder(self, pool: Pool) -> str:
        """A name for what ends at h."""
        trunk = self.trunk(pool)
        return trunk[-1].name if trunk else "h"

    def between(self, pool: Pool, head: str) -> str:
        """What keeps y from being linear in avg.pool(h), in words; empty if nothing does."""
        h, z = self.pools.inputs[pool.call], self.inputs[head]
        if pool.global_ and z.dim() == 2 and z.shape == h.shape[:2]:
            difference = (avg_pool(h) - z).abs().max()
            if difference <= 1e-4 * z.abs().max():
                return ""
        start = self.last(head).start
        found = [
            f"{call.name} ({type(self.module.get_submodule(call.name)).__name__})"
            for call in sorted(self.calls, key=lambda call: call.start)
            if pool.at < call.start < start
            and not call.children
            and call.name != head
            and not isinstance(self.module.get_submodule(call.name), _QUIET)
        ]
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            lie = "lies" if len(found) == 1 else "lie"
            return f"{', '.join(found[:3])}{more} {lie} between average pool and linear head"
        if not pool.global_:
            return "its average pool leaves several positions, which the head tells apart"
        return "the input of its head is not the average of its feature maps"
