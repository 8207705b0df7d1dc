"""A network run once on noise and watched: which layer is the head, what is averaged before it, where blocks end."""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..method.explainers import avg_pool

_POOLS = ("adaptive_avg_pool2d", "avg_pool2d", "adaptive_avg_pool1d", "mean")
_FLATTENINGS = ("flatten", "view", "reshape")
_QUIET = (nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity, nn.AdaptiveAvgPool2d, nn.AvgPool2d)
AT_MOST = 4  # blocks chosen automatically: the deepest, as the paper's B1 … B4
H = "h"  # as the last of blocks given by name: what the average pool averages


class Tap(NamedTuple):
    """The ``call``-th output of a module."""

    name: str
    call: int


@dataclass(frozen=True)
class Pool:
    """The ``call``-th average pool of a pass, made at time ``at``, its output (H, W) ``size``."""

    call: int
    at: int
    global_: bool
    size: tuple[int, ...]


@dataclass
class Call:
    """One call of a module: when, and the sizes (H, W) of the maps that went in and came out, if maps they were."""

    name: str
    call: int
    start: int
    size_in: tuple[int, ...]
    children: list["Call"] = field(default_factory=list)
    end: int = 0
    size_out: tuple[int, ...] = ()
    channels: int = 0
    output: Callable[[], Any] = lambda: None  # a weak reference

    @property
    def tap(self) -> Tap:
        """Where to read its output in later passes."""
        return Tap(self.name, self.call)

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

    def __init__(self, clock: Callable[[], int] = lambda: 0) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []
        self.made: list[Pool] = []
        self._clock = clock
        self._flat = self._map = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in _FLATTENINGS and args and _is_map(args[0]) and _is_flat(args[0], out):
            self._flat, self._map = out, args[0]
        elif name in _POOLS and args and isinstance(args[0], Tensor):
            # the mean over [N, C, H W] is over the map [N, C, H, W]
            x = self._map if args[0] is self._flat else args[0]
            if _is_map(x) and _is_pool(x, out):
                size = tuple(out.shape[2:]) if out.dim() == 4 else (1, 1)
                self.made.append(Pool(len(self.inputs), self._clock(), size == (1, 1), size))
                self.inputs.append(x)
        return out


def _is_map(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def _is_pool(x: Tensor, out: Any) -> bool:
    if not isinstance(out, Tensor) or out.shape[:2] != x.shape[:2]:
        return False
    return out.dim() in (2, 4) or out.shape[2:] == (1,)


def _is_flat(x: Tensor, out: Any) -> bool:
    return isinstance(out, Tensor) and out.shape == (*x.shape[:2], x.shape[2] * x.shape[3])


def noise(image_size: int | tuple[int, int], like: Tensor | None = None, channels: int = 3) -> Tensor:
    """Two images, always the same, [2, C, H, W]."""
    size = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(0))
    return x if like is None else x.to(like)


class Watched:
    """What happened while a network ran on noise.

    Raises
    ------
    ValueError
        One line: the network does not run on images of this size.
    """

    def __init__(self, module: nn.Module, image_size: int | tuple[int, int], name: str, channels: int = 3) -> None:
        self.module, self.name = module, name
        self.time = 0
        self.calls: list[Call] = []  # in the order they end
        self.inputs: dict[str, Tensor] = {}  # of linear layers
        self.pools = Pools(self.tick)
        open_calls: list[Call] = []
        counts: Counter[str] = Counter()

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
                size = tuple(first.shape[2:]) if first is not None and _is_map(first) else ()
                call = Call(name, counts[name], self.tick(), size)
                counts[name] += 1
                if open_calls:
                    open_calls[-1].children.append(call)
                open_calls.append(call)
                if isinstance(module, nn.Linear) and first is not None:
                    self.inputs[name] = first

            return hook

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            call = open_calls.pop()
            call.end = self.tick()
            if _is_map(output):
                call.channels, call.size_out = output.shape[1], tuple(output.shape[2:])
                call.output = weakref.ref(output)
            self.calls.append(call)

        with ExitStack() as stack:
            for key, part in module.named_modules():
                stack.callback(part.register_forward_pre_hook(before(key), with_kwargs=True).remove)
                stack.callback(part.register_forward_hook(after, with_kwargs=True).remove)
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.pools)
            x = noise(image_size, next(module.parameters(), None), channels)
            self.size = tuple(x.shape[2:])
            try:
                module(x)
            except Exception as error:  # whatever a foreign forward raises
                reason = (str(error) or type(error).__name__).splitlines()[0]
                shape = " x ".join(map(str, x.shape[1:]))
                raise ValueError(f"{name} does not run on {shape} images: {reason}") from None

    def tick(self) -> int:
        """The next point in time."""
        self.time += 1
        return self.time

    def last(self, name: str) -> Call:
        """The last call of a module."""
        return next(call for call in reversed(self.calls) if call.name == name)

    def kind(self, call: Call) -> type[nn.Module]:
        """The class of the module called."""
        return type(self.module.get_submodule(call.name))

    def head(self, name: str) -> str:
        """The name of the linear head: the last linear layer, or the one asked for."""
        linear = sorted(self.inputs, key=lambda key: self.last(key).end)
        if not name:
            if not linear:
                raise ValueError(f"{self.name} has no linear layer: the paper's form is average pool + linear head")
            return linear[-1]
        layers = f"its linear layers: {', '.join(linear[-5:]) or 'none'}"
        try:
            part = self.module.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{self.name} has no head {name!r}; {layers}") from None
        if not isinstance(part, nn.Linear):
            kind = type(part).__name__
            raise ValueError(f"the head {name!r} of {self.name} is a {kind}, not one linear layer; {layers}")
        if name not in linear:
            raise ValueError(f"the head {name!r} of {self.name} is never called; {layers}")
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
            after = pool.at < call.end < self.last(head).start
            if after and is_map and not around and not issubclass(self.kind(call), _QUIET):
                raise ValueError(
                    f"{call.name} ({self.kind(call).__name__}) of {self.name} makes maps after the last average pool "
                    "seen: the one before the head is not recognised; write x.mean((2, 3)) or nn.AdaptiveAvgPool2d(1)"
                )
        return pool

    def h(self, pool: Pool) -> Tensor:
        """What the pool averages, [2, D, H, W]."""
        return self.pools.inputs[pool.call]

    def returning_h(self, pool: Pool) -> Call | None:
        """The last call that returns h itself, the very tensor; None if a function makes it."""
        calls = [call for call in self.calls if call.end < pool.at and call.output() is self.h(pool)]
        return calls[-1] if calls else None

    def trunk(self, pool: Pool) -> list[Call]:
        """Calls along the trunk that ended before the pool, by time."""
        steps = [call for child in self.last("").children for call in child.steps()]
        return [s for s in steps if s.end < pool.at and s.size_out and self._proportional(s.size_out)]

    def _proportional(self, size: Sequence[int]) -> bool:
        """Whether a map has the image's proportions, but for what was rounded at each halving."""
        if self.size[0] == self.size[1]:
            return size[0] == size[1]
        return abs(size[0] * self.size[1] / self.size[0] - size[1]) < 2 + self.size[1] / self.size[0]

    def stride(self, size: Sequence[int]) -> int:
        """The resolution as the power of two that divides the image's."""
        return 2 ** max(0, round(math.log2(self.size[0] / size[0])))

    def blocks(self, names: Sequence[str], pool: Pool) -> dict[str, Call]:
        """Everything before h: by name, or the last output at each stride."""
        deepest = self.stride(self.h(pool).shape[2:])
        calls = self._named(pool)
        if names:
            to_h = names[-1] == H
            chosen = [self._call(name, calls, pool) for name in (names[:-1] if to_h else names)]
            ends = [call.end for call in chosen]
            if ends != sorted(set(ends)):
                raise ValueError(f"the blocks {', '.join(names)} of {self.name} are not in the order they are computed")
            if not to_h and self.stride(chosen[-1].size_out) == deepest:
                chosen = chosen[:-1]  # the last block ends at h
        else:
            at_stride = {self.stride(call.size_out): call for call in self.trunk(pool)}
            chosen = [call for stride, call in sorted(at_stride.items()) if stride < deepest][-(AT_MOST - 1) :]
        names_of = {call.end: name for name, call in calls.items()}
        return {names_of[call.end]: call for call in chosen}

    def _named(self, pool: Pool) -> dict[str, Call]:
        """Calls whose maps come before the pool; of a module called several times all but the last get a number."""
        calls = [call for call in self.calls if call.size_out and call.end < pool.at]
        last = {call.name: call for call in calls}
        return {call.name if call is last[call.name] else f"{call.name}#{call.call}": call for call in calls}

    def _call(self, name: str, calls: dict[str, Call], pool: Pool) -> Call:
        if name not in calls:
            close = get_close_matches(name, calls, n=4, cutoff=0.5) or [call.name for call in self.trunk(pool)][-4:]
            raise ValueError(f"{self.name} has no block {name!r} with feature maps; the nearest: {', '.join(close)}")
        return calls[name]

    def encoder(self, pool: Pool) -> str:
        """A name for what ends at h."""
        trunk = self.trunk(pool)
        return trunk[-1].name if trunk else H

    def between(self, pool: Pool, head: str) -> str:
        """What keeps y from being linear in avg.pool(h), in words; empty if nothing does."""
        h, z = self.h(pool), self.inputs[head]
        if pool.global_ and z.dim() == 2 and z.shape == h.shape[:2]:
            difference = (avg_pool(h) - z).abs().max()
            if difference <= 1e-4 * z.abs().max():  # the same mean, summed in another order
                return ""
        start = self.last(head).start
        layers = [
            f"{call.name} ({self.kind(call).__name__})"
            for call in sorted(self.calls, key=lambda call: call.start)
            if pool.at < call.start < start
            and not call.children
            and call.name != head
            and not issubclass(self.kind(call), _QUIET)
        ]
        if layers:
            more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
            lie = "lies" if len(layers) == 1 else "lie"
            return f"{', '.join(layers[:3])}{more} {lie} between average pool and linear head"
        if not pool.global_:
            return "its average pool leaves several positions, which the head tells apart"
        return "the input of its head is not the average of its feature maps"
