"""A network run on noise and noted: every tensor that a module returns or a function of PyTorch takes or returns.

Heads, pools and activations are as often functions (``F.relu``, ``x.mean((2, 3))``, ``x @ w``) as modules, and hooks
see modules only. A ``TorchFunctionMode`` sees every call, with gradients as without, whichever module makes it, and can
hand out another tensor in place of one. Tensors are known by their values: h is what has the mean z, whatever made it.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map_only

from ..data import Input

QUIET = (nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity, nn.AdaptiveAvgPool2d, nn.AvgPool2d)
AT_MOST = 4  # blocks chosen automatically: the deepest, as the paper's B1 … B4
H = "h"  # as the last of blocks given by name: what the average pool averages


class Tap(NamedTuple):
    """Where a tensor is read: the ``which``-th of those that the ``call``-th call of ``source`` returns (or takes)."""

    source: Any  # a module's name, or a function of PyTorch
    call: int
    which: int = 0
    taken: bool = False


class Layout(NamedTuple):
    """Where channels and positions of a map lie: ``axis`` of the channels, ``grid`` (H, W) of the positions."""

    axis: int
    grid: tuple[int, int]

    def to_maps(self, x: Tensor) -> Tensor:
        """[N, D, H, W]."""
        x = x if self.axis == 1 else x.movedim(self.axis, 1)
        return x if x.dim() == 4 else x.unflatten(2, self.grid)

    def from_maps(self, x: Tensor, like: Tensor) -> Tensor:
        """[N, D, H, W] in the form of ``like``."""
        if like.dim() == 3:
            x = x.flatten(2)
        return x.movedim(1, self.axis)


def layout(shape: Sequence[int], size: tuple[int, int], axis: int = 0) -> Layout | None:
    """How a tensor of this shape [N, …] is a map of images of ``size`` (H, W), with channels along ``axis`` if given.

    Positions have the images' proportions to within one: channels first, channels last, or tokens row by row.
    """
    height, width = size

    def grid(h: int, w: int) -> tuple[int, int] | None:
        fits = abs(h * width - w * height) < max(size) and h <= height and w <= width
        return (h, w) if fits else None

    def tokens(length: int) -> tuple[int, int] | None:
        h = round(math.sqrt(length * height / width))
        return grid(h, length // h) if h and length % h == 0 else None

    if len(shape) == 4:
        grids = {1: grid(shape[2], shape[3]), 3: grid(shape[1], shape[2])}
    elif len(shape) == 3:
        grids = {1: tokens(shape[2])} if axis == 1 else {2: tokens(shape[1])}
    else:
        return None
    return next((Layout(a, grid) for a, grid in grids.items() if grid and axis in (0, a)), None)


def tensors(tree: Any) -> list[tuple[str, Tensor]]:
    """The tensors in tuples, lists, dictionaries, and where they lie."""
    return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(tree)[0] if isinstance(leaf, Tensor)]


class Pass(TorchFunctionMode):
    """A pass of a module whose tensors :meth:`see` sees and may replace.

    ``modules`` and ``functions`` are those to watch; None: all.
    """

    def __init__(self, modules: Sequence[str] | None = None, functions: set[Any] | None = None) -> None:
        super().__init__()
        self.modules, self.functions = modules, functions
        self._counts: Counter[Any] = Counter()
        self._busy = False  # with what is this class's own: a module's hook runs within the mode

    def see(self, tap: Tap, x: Tensor) -> Tensor:
        """A tensor on its way."""
        return x

    def perform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A function's call."""
        return func(*args, **kwargs)

    def entered(self, tap: Tap, args: Any) -> None:
        """A module's call begins."""

    def left(self, tap: Tap, output: Any) -> None:
        """A module's call has ended."""

    def _each(self, source: Any, call: int, taken: bool, tree: Any) -> Any:
        index = count()
        with self._own_matter():
            return tree_map_only(Tensor, lambda x: self.see(Tap(source, call, next(index), taken), x), tree)

    @contextmanager
    def _own_matter(self) -> Iterator[None]:
        busy, self._busy = self._busy, True
        try:
            yield
        finally:
            self._busy = busy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        unwatched = self._busy or (self.functions is not None and func not in self.functions)
        if unwatched or func.__name__ in ("__get__", "__set__"):
            return func(*args, **kwargs)
        call = self._counts[func]
        self._counts[func] += 1
        args, kwargs = self._each(func, call, True, (args, kwargs))
        return self._each(func, call, False, self.perform(func, args, kwargs))

    def run(self, module: nn.Module, x: Tensor) -> Any:
        """What the module returns."""
        calls: Counter[str] = Counter()
        running: list[Tap] = []

        def before(name: str) -> Callable[..., None]:
            def hook(part: nn.Module, args: Any, kwargs: Any) -> None:
                running.append(Tap(name, calls[name]))
                calls[name] += 1
                with self._own_matter():
                    self.entered(running[-1], (*args, *kwargs.values()))

            return hook

        def after(part: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            tap = running.pop()
            output = self._each(*tap[:2], False, output)
            with self._own_matter():
                self.left(tap, output)
            return output

        parts = dict(module.named_modules())
        with ExitStack() as stack:
            for name in parts if self.modules is None else self.modules:
                stack.callback(parts[name].register_forward_pre_hook(before(name), with_kwargs=True).remove)
                stack.callback(parts[name].register_forward_hook(after, with_kwargs=True).remove)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            if self.functions is None or self.functions:
                stack.enter_context(self)
            return module(x)


@dataclass(eq=False)
class Value:
    """A tensor noted: when and where it can be read, and its mean over positions by channel axis, [N, D] each.

    ``cuts``: the module calls whose outputs every path from the images to it goes through.
    """

    time: int
    shape: tuple[int, ...]
    close: float  # how close its equals are, relative to the largest entry
    means: dict[int, Tensor]
    cuts: frozenset[int]
    taps: list[Tap] = field(default_factory=list)

    @property
    def vector(self) -> Tensor | None:
        """Itself, [N, D], where it has one position."""
        return self.means.get(0)


@dataclass(eq=False)
class Call:
    """One call of a module: when, its maps' sizes (H, W) before and after, if maps they are."""

    name: str
    call: int
    start: int
    size_in: tuple[int, ...]
    children: list["Call"] = field(default_factory=list)
    end: int = 0
    size_out: tuple[int, ...] = ()
    tap: Tap = field(default_factory=lambda: Tap("", 0))
    layout: Layout | None = None

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


class _Flow(TorchDispatchMode):
    """What every path from the images to a tensor goes through, by its storage: views and changes in place share it.

    A storage that is free again is the next result's, whose entry replaces it.
    """

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.cuts = {self.key(x): frozenset[int]()}

    @staticmethod
    def key(x: Tensor) -> int:
        return x.untyped_storage().data_ptr()

    def of(self, x: Tensor) -> frozenset[int]:
        return self.cuts.get(self.key(x), frozenset())

    def mark(self, x: Tensor, call: int) -> None:
        part = x.numel() * x.element_size() < x.untyped_storage().nbytes()  # as tokens without their class token
        if self.key(x) in self.cuts and not part:
            self.cuts[self.key(x)] |= {call}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        taken, given = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        inputs = [self.cuts[k] for t in taken if (k := self.key(t)) in self.cuts]
        for t in given:
            if inputs:
                self.cuts[self.key(t)] = frozenset.intersection(*inputs)
            else:
                self.cuts.pop(self.key(t), None)
        return out


def noise(input: Input, like: Tensor | None = None) -> Tensor:
    """Two images, always the same, [2, 1 or 3, H, W]."""
    x = torch.randn(2, input.channels, *input.size, generator=torch.Generator().manual_seed(0))
    return x if like is None else x.to(like)


class Trace(Pass):
    """What happened while a network ran on noise.

    Raises
    ------
    ValueError
        One line: the network does not run on images of this size, or is none that can be watched.
    """

    def __init__(self, module: nn.Module, input: Input, name: str) -> None:
        if isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            kind = "a TorchScript" if isinstance(module, torch.jit.ScriptModule) else "an exported"
            raise ValueError(f"{name} is {kind} module, which cannot be watched: give the nn.Module it was made of")
        super().__init__()
        self.module, self.name, self.size = module, name, input.size
        self.x = noise(input, next(module.parameters(), None))
        self.values: list[Value] = []
        self.calls: list[Call] = []  # in the order they end
        self.names: list[tuple[int, str]] = []  # of functions, with the time
        self.time = 0
        self._known: dict[int, tuple[Any, int, Value]] = {}
        self._own = {id(t) for t in (*module.parameters(), *module.buffers())}
        self._open: list[Call] = []
        self._flow = _Flow(self.x)
        with torch.no_grad(), self._flow:
            try:
                output = self.run(module, self.x)
            except Exception as error:  # whatever a foreign forward raises
                reason = (str(error) or type(error).__name__).splitlines()[0]
                height, width = self.size
                what = f"{name} does not run on {self.x.shape[1]} x {height} x {width} images: {reason}"
                if "positional argument" in reason:
                    what += "; wrap it in a module whose forward takes the images alone"
                raise ValueError(what) from None
            self.returned = [(path, self._value(t)) for path, t in tensors(output)]
        self._known.clear()

    def entered(self, tap: Tap, args: Any) -> None:
        """Its size before."""
        first = next((t for _, t in tensors(args)), None)
        found = None if first is None else layout(first.shape, self.size)
        call = Call(tap.source, tap.call, self.tick(), found.grid if found else ())
        if self._open:
            self._open[-1].children.append(call)
        self._open.append(call)

    def left(self, tap: Tap, output: Any) -> None:
        """Its size after."""
        call = self._open.pop()
        call.end = self.tick()
        for index, (_, t) in enumerate(tensors(output)):
            if found := layout(t.shape, self.size):
                call.layout, call.size_out = found, found.grid
                call.tap = Tap(call.name, call.call, index)
                self._flow.mark(t, call.end)
                break
        self.calls.append(call)

    def perform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """As it is; its name is noted."""
        self.names.append((self.tick(), func.__name__))
        return func(*args, **kwargs)

    def see(self, tap: Tap, x: Tensor) -> Tensor:
        """As it is; its value is noted."""
        value = self._value(x)
        if value:
            value.taps.append(tap)
        return x

    def tick(self) -> int:
        """The next point in time."""
        self.time += 1
        return self.time

    def _value(self, x: Tensor) -> Value | None:
        """What is noted of a tensor [N, …]; None where that is no vector or map of floating-point numbers."""
        if not (x.is_floating_point() and 1 <= x.dim() <= 4 and len(x) == len(self.x)) or id(x) in self._own:
            return None
        version = -1 if x.is_inference() else x._version
        reference, at, value = self._known.get(id(x), (lambda: None, 0, None))
        if value and reference() is x and at == version:
            return value
        sides = [axis for axis in range(1, x.dim()) if x.shape[axis] != 1]
        y = x.detach().float()
        if len(sides) < 2:
            means = {0: y.reshape(len(y), -1).clone()}
        else:
            axes = (1, x.dim() - 1)
            means = {axis: y.mean([a for a in range(1, x.dim()) if a != axis]) for axis in axes}
        close = 1e-4 if x.dtype in (torch.float32, torch.float64) else 2e-2  # another order of summation; 8 bits
        value = Value(self.tick(), tuple(x.shape), close, means, self._flow.of(x))
        self.values.append(value)
        self._known[id(x)] = (weakref.ref(x), version, value)
        return value

    # what has which value

    def vectors(self, until: int) -> list[Value]:
        """What has one position, [N, D], and was there at a time."""
        return [value for value in self.values if value.vector is not None and value.time <= until]

    def averaged(self, vector: Value) -> list[tuple[Value, Layout]]:
        """The maps whose mean over positions it is: those of two axes before tokens, the latest first."""
        z = vector.means[0]
        alike = [
            (value, found)
            for value in self.values
            for axis, mean in value.means.items()
            if axis and equal(mean, z, max(value.close, vector.close))
            if (found := layout(value.shape, self.size, axis))
        ]
        return sorted(alike, key=lambda m: (len(m[0].shape), m[0].time), reverse=True)

    def one_position(self, vector: Value) -> list[tuple[Value, Layout]]:
        """The first map of one position that is this value: it is its own mean.

        A step from more than 3 x 3 positions to one is a pool of another kind, or a layer that tells them apart.
        """
        z = vector.means[0]
        for value in self.values:
            if len(value.shape) == 4 and value.vector is not None and equal(value.means[0], z, value.close):
                before = [call.size_out for call in self.trunk(value.time) if max(call.size_out) > 1]
                axis = 1 if value.shape[2:] == (1, 1) else 3
                return [(value, Layout(axis, (1, 1)))] if not before or max(before[-1]) <= 3 else []
        return []

    def taken_for(self, value: Value) -> list[tuple[Value, Layout]]:
        """The maps, on the same grid, that the call which first gave this value took."""
        tap = value.taps[0]
        maps = [v for v in self.values if v.vector is None and v is not value]
        taken = [v for v in maps if any(t.taken and t[:2] == tap[:2] for t in v.taps)]
        return [(v, found) for v in taken if (found := layout(v.shape, self.size)) and math.prod(found.grid) > 1]

    def module_of(self, value: Value) -> str:
        """The innermost module that returned it last; empty if none did."""
        names = [tap.source for tap in value.taps if isinstance(tap.source, str) and tap.source and not tap.taken]
        return max(names, key=lambda name: name.count(".")) if names else ""

    # blocks

    def kind(self, call: Call) -> type[nn.Module]:
        """The class of the module called."""
        return type(self.module.get_submodule(call.name))

    def trunk(self, before: int) -> list[Call]:
        """Calls along the trunk that ended before a time."""
        steps = [call for child in self.calls[-1].children for call in child.steps()]
        return [s for s in steps if s.end < before and s.size_out]

    def encoder(self, before: int) -> str:
        """A name for what ends at h, averaged at a time: the part of the trunk in which the last layer lies, or it."""
        layers = [c for c in self.calls if c.end < before and not c.children and not issubclass(self.kind(c), QUIET)]
        last = layers[-1].name if layers else H
        return next((c.name for c in reversed(self.trunk(before)) if f"{last}.".startswith(f"{c.name}.")), last)

    def stride(self, size: Sequence[int]) -> int:
        """The resolution as the power of two that divides the image's."""
        return 2 ** max(0, round(math.log2(self.size[0] / size[0])))

    def blocks(self, names: Sequence[str], cuts: frozenset[int], grid: tuple[int, int], before: int) -> dict[str, Call]:
        """Everything before h: by name, or the last output at each stride that every path to h goes through."""
        deepest = self.stride(grid)
        calls = self._named(before)
        if names:
            to_h = names[-1] == H
            chosen = [self._call(name, calls, before) for name in (names[:-1] if to_h else names)]
            ends = [call.end for call in chosen]
            if ends != sorted(set(ends)):
                raise ValueError(f"the blocks {', '.join(names)} of {self.name} are not in the order they are computed")
            if not to_h and self.stride(chosen[-1].size_out) == deepest:
                chosen = chosen[:-1]  # the last block ends at h
        else:
            at_stride: dict[int, Call] = {}
            trunk = self.trunk(before)
            for call in [*trunk, *(call for call in trunk if call.end in cuts)]:
                at_stride[self.stride(call.size_out)] = call
            chosen = [call for stride, call in sorted(at_stride.items()) if stride < deepest][-(AT_MOST - 1) :]
        names_of = {call.end: name for name, call in calls.items()}
        return {names_of[call.end]: call for call in chosen}

    def _named(self, before: int) -> dict[str, Call]:
        """Calls whose maps come before the pool; of a module called several times all but the last get a number."""
        calls = [call for call in self.calls if call.size_out and call.end < before]
        last = {call.name: call for call in calls}
        return {call.name if call is last[call.name] else f"{call.name}#{call.call}": call for call in calls}

    def _call(self, name: str, calls: dict[str, Call], before: int) -> Call:
        if name not in calls:
            close = (
                get_close_matches(str(name), calls, n=4, cutoff=0.5) or [call.name for call in self.trunk(before)][-4:]
            )
            raise ValueError(f"{self.name} has no block {name!r} with feature maps; the nearest: {', '.join(close)}")
        return calls[name]

    def between(self, start: int, end: int) -> str:
        """The layers called between two times, in words; empty if there are none."""
        layers = [
            f"{call.name} ({self.kind(call).__name__})"
            for call in sorted(self.calls, key=lambda call: call.start)
            if start < call.start and call.end < end and not call.children and not issubclass(self.kind(call), QUIET)
        ]
        if not layers:
            return ""
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        lie = "lies" if len(layers) == 1 else "lie"
        return f"{', '.join(layers[:3])}{more} {lie} between its feature maps and its scores"


def equal(a: Tensor, b: Tensor, close: float = 1e-4) -> bool:
    """Whether two tensors are equal, relative to the largest entry of the second."""
    return a.shape == b.shape and bool((a - b).abs().max() <= close * b.abs().max())
