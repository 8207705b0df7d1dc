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
from typing import Any

import torch
from torch import Tensor, nn

from .trace import Layout, Pass, Tap, Trace, Value, equal, tensors

_GATES = {"relu", "relu_", "relu6", "gelu", "silu", "silu_", "hardswish", "mish", "elu", "elu_", "selu", "celu"}
_GATES |= {"leaky_relu", "leaky_relu_", "prelu", "tanh", "hardtanh", "sigmoid", "hardsigmoid", "softplus"}
_NORMS = {"norm", "vector_norm", "std", "var", "sqrt", "rsqrt"}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda y: y,
    "softmax": lambda y: y.softmax(1),
    "log_softmax": lambda y: y.log_softmax(1),
    "sigmoid": torch.sigmoid,
}
_AT_ONCE = 2**25  # numbers that a gradient of many classes holds: 128 MiB
_POOLS_TRIED = 4  # the last ones: those of gates within the network are not the head's


class Tail(Pass):
    """A pass from another h on.

    ``change`` makes it of the network's own, [N, D, H, W]. ``delta`` [N, D] is added to all its positions and has a
    gradient. ``factors`` are the gates and norms met; those of another pass, if given, are used in their place.
    """

    def __init__(
        self, h: tuple[Tap, Layout], y: Tap, change: Callable[[Tensor], Tensor], factors: Sequence[Tensor] | None = None
    ) -> None:
        super().__init__()
        self.tap, self.layout, self.at_y, self.change = *h, y, change
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
            self.y, self._past = x.reshape(len(self.delta), -1).float(), True
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
        if name == "group_norm":
            groups, weight, bias, eps = _arguments(("num_groups", "weight", "bias", "eps"), args, kwargs)
            grouped = a.unflatten(1, (groups, -1))
            axes = list(range(2, grouped.dim()))
            out = self._scaled(grouped - grouped.mean(axes, keepdim=True), axes, 1e-5 if eps is None else eps)
            out, wide = out.flatten(1, 2), (1, -1, *[1] * (a.dim() - 2))
            return (out if weight is None else out * weight.view(wide)) + (0 if bias is None else bias.view(wide))
        if name == "normalize":
            p, axis, eps = _arguments(("p", "dim", "eps"), args, kwargs)
            norm = a.detach().norm(2 if p is None else p, 1 if axis is None else axis, keepdim=True)
            return a * self._scale(1 / norm.clamp_min(1e-12 if eps is None else eps))
        if name in _NORMS:
            return 1 / self._scale(1 / func(a.detach(), *args[1:], **kwargs))
        return func(*args, **kwargs)

    def _scaled(self, a: Tensor, axes: list[int], eps: float) -> Tensor:
        return a * self._scale((a.detach().square().mean(axes, keepdim=True) + eps).rsqrt())

    def _scale(self, scale: Tensor) -> Tensor:
        if scale.numel() == len(self.delta):
            self.scales.append(scale.detach().flatten())
        return self.hold(scale)

    # after the pass

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


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    given = dict(zip(names, args[1:], strict=False)) | kwargs
    return [given.get(name) for name in names]


@dataclass(frozen=True)
class Head:
    """h, y and what lies between: see the module's table. ``module`` is the layer whose weight is c, or empty."""

    h: tuple[Tap, Layout]
    y: Tap
    form: str
    module: str
    time: int  # of the pool

    def affine(self, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c [C, D], b [C] and t [C] of the forms with fixed columns."""
        as_it_is = Tail(self.h, self.y, lambda h: h)
        as_it_is.run(module, x)
        columns = as_it_is.columns()[:, 0]
        scale = as_it_is.scale[0]
        c = columns / scale
        if self.form == "linear":
            b = (as_it_is.y - as_it_is.z @ c.T).detach()[0]
            return c, b, torch.zeros_like(b)
        held = as_it_is.factors
        nothing, no_scale = (
            Tail(self.h, self.y, torch.zeros_like, factors) for factors in (held, [0 * factor for factor in held])
        )
        nothing.run(module, x)
        no_scale.run(module, x)
        t = no_scale.y.detach()[0]
        return c, (nothing.y.detach()[0] - t) / scale, t


def another(h: Tensor) -> Tensor:
    """Maps of the same shape and of no image: each a random mixture of those there are, of size one."""
    generator = torch.Generator().manual_seed(1)
    h = h.flip(0) * (0.5 + torch.rand(h.shape, generator=generator)).to(h)
    return (
        h
        / h.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
        * torch.arange(1, len(h) + 1).to(h)[:, None, None, None]
    )


def _tap(value: Value) -> Tap:
    """Where to read it: what a module returns, else what a function returns, else what it takes."""
    return next((t for t in reversed(value.taps) if isinstance(t.source, str)), value.taps[0])


def scores(trace: Trace, value: Value) -> list[tuple[str, Value]]:
    """What may be the scores y behind something returned, with what makes it of them: ``ACTIVATIONS``."""
    out = value.means[0]
    kinds = []
    if bool((out >= 0).all() and (out <= 1 + 1e-6).all()):
        kinds = ["softmax"] if out.shape[1] > 1 and equal(out.sum(1), torch.ones_like(out[:, 0]), 1e-3) else ["sigmoid"]
    elif out.shape[1] > 1 and bool((out.exp().sum(1) - 1).abs().max() < 1e-3):
        kinds = ["log_softmax"]
    before = [v for v in trace.values if v.vector is not None and v.means[0].shape == out.shape and v.time < value.time]
    behind = [(kind, v) for kind in kinds for v in before if equal(ACTIVATIONS[kind](v.means[0]), out, value.close)]
    return behind[:2] or [("", value)]


@torch.no_grad()
def find(trace: Trace, y: Value) -> Head | None:
    """The head between some average of maps and the scores y; None where they are no function of one in these forms."""
    vectors = [v for v in trace.values if v.vector is not None and v.time <= y.time and v.means[0].shape[1] > 1]
    return _find(trace, y, vectors, trace.averaged) or _find(trace, y, vectors, trace.one_position)


def _find(
    trace: Trace, y: Value, vectors: list[Value], maps_of: Callable[[Value], list[tuple[Value, Layout]]]
) -> Head | None:
    tried: list[Value] = []
    pools = 0
    for vector in reversed(vectors):
        if any(equal(vector.means[0], other.means[0]) for other in tried):
            continue
        tried.append(vector)
        maps = maps_of(vector)
        if not maps:
            continue
        pools += 1
        if equal(vector.means[0], y.means[0]):  # the head comes before the pool
            maps = [taken for value, _ in maps for taken in trace.taken_for(value)]
        for value, found in maps[:3]:
            at = (_tap(value), found)
            if form := _form(trace, at, _tap(y), y):
                later = [v.time for v in vectors if v.time > value.time and equal(v.means[0], vector.means[0])]
                first = min([*later, y.time])
                return Head(at, _tap(y), form, _layer(trace, at, y) if form == "linear" else "", first)
        if pools == _POOLS_TRIED:
            break
    return None


def _layer(trace: Trace, at: tuple[Tap, Layout], y: Value) -> str:
    """The linear layer whose weights are the columns, empty if there is none."""
    head = Head(at, _tap(y), "linear", "", 0)
    c, b, _ = head.affine(trace.module, trace.x)
    for name, part in trace.module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d) and part.weight[:, 0].numel() == len(c):
            zero = torch.zeros_like(b) if part.bias is None else part.bias
            same = equal(part.weight.flatten(1), c, y.close) and (zero - b).abs().max() <= 1e-3 * c.abs().max() + 1e-5
            if same and any(t.source == name for v in trace.values for t in v.taps):
                return name
    return ""


def _form(trace: Trace, at: tuple[Tap, Layout], y_tap: Tap, y: Value) -> str:
    close = max(y.close, 1e-4)

    def tail(change: Callable[[Tensor], Tensor], factors: Sequence[Tensor] | None = None) -> Tail:
        one = Tail(at, y_tap, change, factors)
        one.run(trace.module, trace.x)
        return one

    try:
        own = tail(lambda h: h)
        if not (own.y.requires_grad and equal(own.y.detach(), y.means[0], 10 * close)):
            return ""
        other = tail(another)
        columns = other.columns()
        rest = other.y.detach() - torch.einsum("cnd,nd->nc", columns, other.z)
        # any other maps, with the gates and norms as they were
        third = tail(lambda h: another(another(h)), other.factors)
        expected = torch.einsum("cnd,nd->nc", columns, third.z) + rest
        if not equal(third.y.detach(), expected, close):
            return ""
        if not other.factors:
            c = columns[:, 0]
            b = rest[0]
            # of b, made from other maps, the rounding is theirs
            difference = (own.y.detach() - own.z @ c.T - b).abs().max()
            same = difference <= close * max(own.y.abs().max(), other.y.abs().max()) and equal(columns[:, 1], c, close)
            return "linear" if same and equal(other.y.detach(), other.z @ c.T + b, close) else ""
        # of h alone: nothing else of the images matters
        swapped = tail(lambda h: h.flip(0))
        if not equal(swapped.y.detach(), own.y.detach().flip(0), close):
            return ""
        if len(other.scales) == len(other.factors):
            c, b, t = Head(at, y_tap, "scaled", "", 0).affine(trace.module, trace.x)
            if equal(other.y.detach(), other.scale[:, None] * (other.z @ c.T + b) + t, close):
                return "scaled"
        return "gated"
    except (RuntimeError, StopIteration, IndexError, TypeError):
        return ""


def residual(module: nn.Module, head: Head, x: Tensor) -> float:
    """The largest difference between y and its form, relative to the largest score.

    Gated: y from maps of no image, with the gates of x, against the columns of x.
    """
    own = Tail(head.h, head.y, lambda h: h)
    own.run(module, x)
    y = own.y.detach()
    if head.form == "gated":
        columns = own.columns()
        rest = y - torch.einsum("cnd,nd->nc", columns, own.z)
        held = Tail(head.h, head.y, another, own.factors)
        held.run(module, x)
        y, ours = held.y.detach(), torch.einsum("cnd,nd->nc", columns, held.z) + rest
    else:
        c, b, t = head.affine(module, x)
        ours = own.scale[:, None] * (own.z @ c.T + b) + t
    return float((y - ours).abs().max() / y.abs().max())


def several(trace: Trace) -> list[tuple[str, Value]]:
    """What is returned that may be scores: [N, C] by where it lies in the output."""
    return [(path, value) for path, value in trace.returned if value and value.vector is not None]


__all__ = ["ACTIVATIONS", "Head", "Tail", "find", "residual", "scores", "several", "tensors"]
