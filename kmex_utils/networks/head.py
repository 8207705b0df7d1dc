"""What lies between h and y, found by value: Theorem 1 and what holds of it beyond the paper.

========  ===========================================  ==================================================
form      y_j                                          heads
========  ===========================================  ==================================================
linear    avg_r(h_r · c_j) + b_j                       linear, 1x1 convolution, batch normalisation before
scaled    s(x) (avg_r(h_r · c_j) + b_j) + t_j          layer normalisation, cosine: one factor an image
gated     avg_r(h_r · c_j(x)) + b_j(x)                 linear, gate, linear: columns of the image's own
========  ===========================================  ==================================================

Columns are gradients of y by h, with each gate and each norm held: ReLU(a) = a · gate. That y is no more than this is
tried with an h that has nothing to do with the images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .trace import QUIET, Call, Layout, Pass, Tap, Trace, Value, equal

_GATES = {"relu", "relu_", "relu6", "gelu", "silu", "silu_", "hardswish", "mish", "elu", "elu_", "selu", "celu"}
_GATES |= {
    "leaky_relu",
    "leaky_relu_",
    "prelu",
    "tanh",
    "hardtanh",
    "sigmoid",
    "hardsigmoid",
    "softplus",
    "square",
    "pow",
}
_NORMS = {"norm", "vector_norm", "std", "var", "sqrt", "rsqrt"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: y.log_softmax(1),
    "sigmoid": torch.sigmoid,
}
_AT_ONCE = 2**25  # numbers that a gradient of many classes holds: 128 MiB
_KEPT = 2**27  # numbers that convolutions before h may leave to the next pass: 512 MiB
_MIXTURES = 4
_POOLS_TRIED = 4  # the last ones: those of gates within the network are not the head's
Before = dict[Any, tuple[Tensor, int]]  # what convolutions gave, by call, and the version of the tensor


class Tail(Pass):
    """A pass from another h on.

    ``change`` makes it of the network's own, [N, D, H, W]. ``delta`` [N, D] is added to all its positions and has a
    gradient. ``factors`` are the gates and norms met; those of another pass, if given, are used in their place.
    ``mix`` [M, C]: y are so many mixtures of the scores. Passes of the same images may share ``before``, what
    convolutions before h gave: there they are alike, and most of the time goes there.
    """

    def __init__(
        self,
        h: tuple[Tap, Layout],
        y: Tap,
        change: Callable[[Tensor], Tensor],
        factors: Sequence[Tensor] | None = None,
        mix: Tensor | None = None,
        before: Before | None = None,
    ) -> None:
        super().__init__()
        self.tap, self.layout, self.at_y, self.change, self.mix = *h, y, change, mix
        self.before = before
        self.factors: list[Tensor] = []
        self.scales: list[Tensor] = []  # one number an image each
        self._given: Iterator[Tensor] | None = None if factors is None else iter(factors)
        self._old: Tensor | None = None
        self._past = False  # y: what the module makes of it does not matter
        self.h = self.delta = self.y = torch.empty(0)

    def see(self, tap: Tap, x: Tensor) -> Tensor:
        """Another h in the place of h; y."""
        if tap == self.tap:
            self._old = x
            self.h = self.change(self.layout.to_maps(x).float()).detach()
            self.delta = torch.zeros(self.h.shape[:2], device=x.device, requires_grad=True)
            with torch.enable_grad():
                new = self.h + self.delta[:, :, None, None]
                self._new = self.layout.from_maps(new, x).to(x.dtype).reshape(x.shape)
        if x is self._old:
            x = self._new
        if tap == self.at_y:
            y, self._past = x.reshape(len(self.delta), -1).float(), True
            self.y = y if self.mix is None else y @ self.mix.T
        return x

    def run(self, module: nn.Module, x: Tensor) -> Any:
        """With gradients from h on."""
        with torch.enable_grad():
            return super().run(module, x)

    def hold(self, factor: Tensor) -> Tensor:
        """A factor of this pass, or the one given in its place."""
        factor = factor.detach() if self._given is None else next(self._given)
        self.factors.append(factor)
        return factor

    def perform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Gates and norms as factors, all else as it is."""
        a, name = (args[0] if args else None), func.__name__
        if self._old is None and self.before is not None and name == "conv2d":
            return self._convolved(self.before, func, args, kwargs)
        if self._past or not (isinstance(a, Tensor) and a.requires_grad):
            return func(*args, **kwargs)
        if name in _GATES:
            with torch.no_grad():
                out, rest = (func(t, *args[1:], **kwargs) for t in (a.detach().clone(), torch.zeros_like(a)))
            return a * self.hold(torch.where(a == 0, 0, (out - rest) / a)) + rest
        if name == "layer_norm":
            shape, weight, bias, eps = _arguments(("normalized_shape", "weight", "bias", "eps"), args, kwargs)
            axes = list(range(-len(shape), 0))
            out = self._scaled(a - a.mean(axes, keepdim=True), axes, 1e-5 if eps is None else eps)
            return (out if weight is None else out * weight) + (0 if bias is None else bias)
        if name == "rms_norm":
            shape, weight, eps = _arguments(("normalized_shape", "weight", "eps"), args, kwargs)
            out = self._scaled(a, list(range(-len(shape), 0)), torch.finfo(a.dtype).eps if eps is None else eps)
            return out if weight is None else out * weight
        if name == "normalize":
            p, axis, eps = _arguments(("p", "dim", "eps"), args, kwargs)
            norm = a.detach().norm(2 if p is None else p, 1 if axis is None else axis, keepdim=True)
            return a * self._scale(1 / norm.clamp_min(1e-12 if eps is None else eps))
        if name in _NORMS:
            return 1 / self._scale(1 / func(a.detach(), *args[1:], **kwargs))
        return func(*args, **kwargs)

    def _convolved(self, before: Before, func: Any, args: Any, kwargs: Any) -> Tensor:
        """What the same call gave in an earlier pass, unless it was changed in place since."""
        call = func, self._counts[func]
        out, version = before.get(call, (None, 0))
        if out is None or out._version != version:
            out = cast(Tensor, func(*args, **kwargs))
            if not out.is_inference() and sum(kept.numel() for kept, _ in before.values()) < _KEPT:
                before[call] = out, out._version
        return out

    def _scaled(self, a: Tensor, axes: list[int], eps: float) -> Tensor:
        return a * self._scale((a.detach().square().mean(axes, keepdim=True) + eps).rsqrt())

    def _scale(self, scale: Tensor) -> Tensor:
        if scale.numel() == len(self.delta):
            self.scales.append(scale.detach().flatten())
        return self.hold(scale)

    # after the pass

    def fixed(self, affine: "Affine") -> Tensor:
        """s(x) (z · c_j + b_j) + t_j, [N, C]."""
        c, b, t = affine
        return self.scale[:, None] * (self.z @ c.T + b) + t

    def own_columns(self, z: Tensor) -> Tensor:
        """Scores of other z [N, D] by the columns of this pass, [N, C]."""
        return self.y.detach() + torch.einsum("cnd,nd->nc", self.columns(), z - self.z)

    @property
    def z(self) -> Tensor:
        """avg.pool(h), [N, D]."""
        return self.h.mean((2, 3))

    @property
    def scale(self) -> Tensor:
        """s(x), [N]."""
        return torch.stack(self.scales).prod(0) if self.scales else self.delta.new_ones(len(self.delta))

    def columns(self) -> Tensor:
        """c_j(x), [C, N, D]."""
        n, c = self.y.shape
        eye = torch.eye(c, device=self.y.device)
        parts: list[Tensor] = []
        for rows in eye.split(max(1, _AT_ONCE // max(self.h.numel(), 1))):
            weights = rows[:, None].expand(-1, n, -1)
            parts += torch.autograd.grad(self.y, self.delta, weights, retain_graph=True, is_grads_batched=True)
        return torch.cat(parts)

    def column(self, j: Tensor) -> Tensor:
        """c_j(x) for a class j of each image [N], [N, D]."""
        return torch.autograd.grad(self.y.gather(1, j[:, None]).sum(), self.delta)[0]


Change = Callable[[Tensor], Tensor]
Affine = tuple[Tensor, Tensor, Tensor]  # c [C, D], b [C] and t [C]


def same(h: Tensor) -> Tensor:
    """The network's own h."""
    return h


def another(h: Tensor) -> Tensor:
    """Maps of the same shape and of no image: each a random mixture of those there are, of size 1, 2 …"""
    generator = torch.Generator().manual_seed(1)
    h = h.flip(0) * (0.5 + torch.rand(h.shape, generator=generator)).to(h)
    size = torch.arange(1, len(h) + 1).to(h)[:, None, None, None]
    return size * h / h.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    return [given.get(name) for name in names]


@dataclass(frozen=True)
class Head:
    """h, the scores y, and what lies between.

    Attributes
    ----------
    h, y
        Where they are read; ``h`` with its layout.
    form, between
        See the module's table; empty, and why there is none.
    layer, name
        The linear layer whose weights are c, empty if there is none; the module that gives y.
    activation, note
        What the network makes of y, of ``ACTIVATIONS``; what is to be said about it.
    time, cuts
        When h is averaged; the calls that every path to it goes through.
    """

    h: tuple[Tap, Layout]
    y: Tap
    form: str
    between: str
    layer: str
    name: str
    activation: str
    note: str
    time: int
    cuts: frozenset[int]

    def tail(self, module: nn.Module, x: Tensor, change: Change, factors: Sequence[Tensor] | None = None) -> Tail:
        """A pass from another h on."""
        tail = Tail(self.h, self.y, change, factors)
        tail.run(module, x)
        return tail

    def affine(self, module: nn.Module, x: Tensor) -> Affine:
        """c, b and t of the forms with fixed columns."""
        return _affine(self.tail, module, x)

    def residual(self, module: nn.Module, x: Tensor, affine: Affine | None) -> float:
        """The largest difference between y and its form, relative to the largest score.

        Gated: y from maps of no image, with the gates of x, against the columns of x.
        """
        own = self.tail(module, x, same)
        y = own.y.detach()
        if affine:
            ours = own.fixed(affine)
        else:
            other = self.tail(module, x, another, own.factors)
            y, ours = other.y.detach(), own.own_columns(other.z)
        return float((y - ours).abs().max() / y.abs().max().clamp_min(torch.finfo(y.dtype).tiny))


def head_of(trace: Trace, name: str = "") -> Head:
    """The head of the scores that a network returns, or of those that a module of this name gives.

    A ValueError where that is not clear, or where the scores come from no feature maps.
    """
    returned = [(path, value) for path, value in trace.returned if value and value.vector is not None]
    behind = [(path, kind, y) for path, value in returned for kind, y in _behind(trace, value)]
    note = ""
    if name:
        y = _given(trace, name)
        kinds = [kind for _, kind, other in behind if equal(other.means[0], y.means[0])]
        note = "" if kinds else f"what its head {name!r} gives is explained, {trace.name} returns something else"
        candidates = [(kinds[0] if kinds else "", y)]
    elif returned:
        candidates = [(kind, y) for _, kind, y in behind]
    else:
        raise ValueError(f"{trace.name} returns no scores [N, C]: wrap it in a module that does")
    found = [(kind, y, _pooled(trace, y)) for kind, y in candidates]
    fit = [candidate for candidate in found if candidate[2]]  # what is no scores, as features beside them, has no head
    if len(returned) > 1 and not name and len(fit) != 1:
        places = ", ".join(f"output{path} ({y.means[0].shape[1]} values)" for path, _, y in behind)
        which = f"say by head= which is explained, {_linear(trace)}"
        raise ValueError(f"{trace.name} returns several: {places}; {which}")
    kind, y, pooled = (fit or found)[0]
    if y.means[0].shape[1] == 1:
        note = note or "one score, whose sign decides between two classes: classes=[negative, positive] names them"
    between = "" if pooled else _why(trace, y)
    h, value, form, layer, time = pooled or _last_maps(trace, y, between)
    known = name or layer or trace.module_of(y)
    return Head(h, _tap(y), form, between, layer, known, kind, note, time, value.cuts)


# --- y --------------------------------------------------------------------------------------------------------------


def _given(trace: Trace, name: str) -> Value:
    """What a module gave last."""
    try:
        trace.module.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{trace.name} has no head {name!r}; {_linear(trace)}") from None
    at = [v for v in trace.values if any(t.source == name and not t.taken for t in v.taps)]
    if not at or at[-1].vector is None:
        what = "gives no scores [N, C]" if at else "is never called"
        raise ValueError(f"the head {name!r} of {trace.name} {what}; {_linear(trace)}")
    return at[-1]


def _behind(trace: Trace, value: Value) -> list[tuple[str, Value]]:
    """What may be the scores behind something returned, with what makes it of them."""
    out = value.means[0]
    kinds = []
    if bool((out >= 0).all() and (out <= 1 + 1e-6).all()):
        kinds = ["softmax"] if out.shape[1] > 1 and equal(out.sum(1), torch.ones_like(out[:, 0]), 1e-3) else ["sigmoid"]
    elif out.shape[1] > 1 and bool((out.exp().sum(1) - 1).abs().max() < 1e-3):
        kinds = ["log_softmax"]
    before = [v for v in trace.vectors(value.time) if v is not value and v.means[0].shape == out.shape]
    behind = [(kind, v) for kind in kinds for v in before if equal(ACTIVATIONS[kind](v.means[0]), out, value.close)]
    return behind[:2] or [("", value)]


def _linear(trace: Trace) -> str:
    linear = [call.name for call in trace.calls if issubclass(trace.kind(call), nn.Linear)]
    return f"its linear layers: {', '.join(dict.fromkeys(linear[-5:])) or 'none'}"


# --- h, by value ----------------------------------------------------------------------------------------------------

Pooled = tuple[tuple[Tap, Layout], Value, str, str, int]  # h, its value, form, layer, the time of the pool


def _tap(value: Value) -> Tap:
    """Where to read it: what a module returns, else what a function returns, else what it takes."""
    return next((t for t in reversed(value.taps) if isinstance(t.source, str)), value.taps[0])


@torch.no_grad()
def _pooled(trace: Trace, y: Value) -> Pooled | None:
    """The maps whose average the scores are made of; None if there are none."""
    vectors = [v for v in trace.vectors(y.time) if v.means[0].shape[1] > 1]
    for maps_of in (trace.averaged, trace.one_position):
        pools: list[Value] = []  # of different values, the last first
        for vector in reversed(vectors):
            maps = [] if any(equal(vector.means[0], other.means[0]) for other in pools) else maps_of(vector)
            if not maps:
                continue
            pools.append(vector)
            if len(pools) > _POOLS_TRIED:
                break
            if equal(vector.means[0], y.means[0]):  # the head comes before the pool
                maps = [taken for value, _ in maps for taken in trace.taken_for(value)]
            for value, found in maps[:3]:
                if named := _form(trace, (_tap(value), found), y):
                    later = [v.time for v in vectors if v.time > value.time and equal(v.means[0], vector.means[0])]
                    return (_tap(value), found), value, *named, min([*later, y.time])
    return None


def _form(trace: Trace, h: tuple[Tap, Layout], y: Value) -> tuple[str, str] | None:
    """How the scores follow from maps, and the layer whose weights are the columns; None, if in none of the forms.

    A few random mixtures of the scores stand for all: what holds for them holds for each, and 20,000 take no longer.
    """
    close, scores = max(y.close, 1e-4), y.means[0]
    mix = torch.randn(_MIXTURES, scores.shape[1], generator=torch.Generator().manual_seed(2)).to(scores)
    before: Before = {}

    def tail(module: nn.Module, x: Tensor, change: Change, factors: Sequence[Tensor] | None = None) -> Tail:
        tail = Tail(h, _tap(y), change, factors, mix, before)
        tail.run(module, x)
        return tail

    through = trace.module, trace.x
    try:
        own = tail(*through, same)
        if not (own.y.requires_grad and equal(own.y.detach(), scores @ mix.T, close)):
            return None
        other = tail(*through, another)
        if len(own.scales) == len(own.factors):
            affine = _affine(tail, *through, own)
            if equal(affine[0], mix, close):  # the maps of the scores themselves
                return None
            if all(equal(one.y.detach(), one.fixed(affine), close) for one in (own, other)):
                return ("scaled", "") if own.factors else ("linear", _layer(trace, affine, mix, y.close))
        # gated: linear with the gates of other maps held, and made of h alone, whatever else the images are
        third = tail(*through, lambda h: another(another(h)), other.factors)
        swapped = tail(*through, lambda h: h.flip(0))
        gated = equal(third.y.detach(), other.own_columns(third.z), close)
        alone = equal(swapped.y.detach(), own.y.detach().flip(0), close)
        return ("gated", "") if own.factors and gated and alone else None
    except (RuntimeError, StopIteration, IndexError, TypeError):  # maps of no image are more than some modules bear
        return None


def _affine(tail: Callable[..., Tail], module: nn.Module, x: Tensor, own: Tail | None = None) -> Affine:
    own = own or tail(module, x, same)
    scale = own.scale[0]
    c = own.columns()[:, 0] / scale
    # at h = 0 y is s b + t, without what a difference of y and z · c would round away
    at_zero = tail(module, x, torch.zeros_like, own.factors).y.detach()[0]
    no_factors = [0 * factor for factor in own.factors]
    t = tail(module, x, torch.zeros_like, no_factors).y.detach()[0] if own.factors else torch.zeros_like(at_zero)
    return c, (at_zero - t) / scale, t


def _layer(trace: Trace, affine: Affine, mix: Tensor, close: float) -> str:
    """The linear layer or 1x1 convolution whose weights, mixed, are the columns, empty if there is none."""
    c, b, _ = affine
    called = {call.name for call in trace.calls}
    for name, part in trace.module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and name in called and len(part.weight) == mix.shape[1]:
            own = torch.zeros_like(b) if part.bias is None else mix @ part.bias
            if equal(mix @ part.weight.flatten(1), c, close) and torch.allclose(own, b, rtol=close, atol=1e-5):
                return name
    return ""


# --- where no form holds --------------------------------------------------------------------------------------------


def _maps(trace: Trace, y: Value) -> list[Call]:
    """The calls along the trunk whose maps all scores come from."""
    trunk = trace.trunk(y.time)
    return [c for c in trunk if c.end in y.cuts and max(c.size_out) > 1 and not issubclass(trace.kind(c), QUIET)]


def _why(trace: Trace, y: Value) -> str:
    """Why y is no function of an average of maps in any of the forms, in words."""
    start = next((call.end for call in reversed(_maps(trace, y))), 0)
    after = {name for at, name in trace.names if start < at < y.time}
    if any("attention" in name or name == "softmax" for name in after):
        return "attention lies between its feature maps and its scores"
    if any("max" in name for name in after):
        return "a maximum over positions lies between its feature maps and its scores"
    return trace.between(start, y.time) or "no linear map of the average of its feature maps gives its scores"


def _last_maps(trace: Trace, y: Value, why: str) -> Pooled:
    """The last maps that all scores come from."""
    last = _maps(trace, y)
    if not last or "attention" in why:
        why = why if last else "its scores are not made of one encoder's feature maps"
        raise ValueError(f"{trace.name} is not a CNN of eq. 1: {why}; head= names another head, {_linear(trace)}")
    call = last[-1]
    assert call.layout
    return (call.tap, call.layout), next(v for v in trace.values if call.tap in v.taps), "", "", call.end + 1
