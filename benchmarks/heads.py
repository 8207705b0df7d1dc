"""What a network's head is, decided by value from every operation it makes; imports nothing of kmex_utils.

y is what the module returns. The head is the linear map whose output is y. The network is pooled-linear where the
head's input is the mean over positions of a tensor h that was there before it, whatever code makes it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

POOLED_LINEAR = (
    "linear",
    "linear after BatchNorm",
    "two linear heads averaged",
    "1x1 convolution before the pool",
)
NORM, MLP, CLASS_MAPS, NOT = "layer norm head", "mlp head", "class maps averaged", "not pooled-linear"

EQUAL = 1e-3  # of the spread over images; rounding stays below 1e-4, another tensor differs by about 1
VIEWS = ("view", "_unsafe_view", "permute", "transpose", "t", "unsqueeze", "squeeze", "clone", "alias")


@dataclass
class Head:
    """What was found: y [N, C]; h [N, D, P], columns c [C, D], bias b [C] and factors s [N] as far as there are any.

    Then y = s (mean over positions of h) c^T + b.
    """

    kind: str
    y: Tensor
    why: str = ""
    h: Tensor | None = None
    c: Tensor | None = None
    b: Tensor | None = None
    s: Tensor | None = None

    @property
    def pooled_linear(self) -> bool:
        """Whether y is linear in the mean of h."""
        return self.kind in POOLED_LINEAR

    @property
    def residual(self) -> float | None:
        """The largest difference of both sides of eq. 5, relative to the largest score; None: there are no columns."""
        if self.h is None or self.c is None or self.b is None:
            return None
        similarity = torch.einsum("ndp,cd->ncp", self.h.double(), self.c.double())
        factor = 1 if self.s is None else self.s.double()[:, None]
        sem = factor * similarity.mean(2) + self.b.double()
        return float((sem - self.y.double()).abs().max() / self.y.abs().max())


def images(height: int, width: int, channels: int = 3, seed: int = 0) -> Tensor:
    """Four images of noise that differ in contrast and coarseness, so that means over positions differ as well."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randn(1, channels, s, s, generator=generator) for s in (64, 8, 3, 24)]
    grown = [F.interpolate(x, (height, width), mode="nearest") for x in noise]
    return torch.cat([contrast * x for contrast, x in zip((1.0, 1.5, 0.6, 2.0), grown, strict=True)])


@torch.no_grad()
def settle(module: nn.Module, x: Tensor) -> None:
    """Batch statistics of x, in place, so that activations neither vanish nor grow."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            part.train()
            part.momentum = 1.0
    module(x)
    module.eval()


@torch.no_grad()
def disturb(module: nn.Module, seed: int = 0) -> None:
    """Noise on parameters that are constant when made, in place: zeros would hide a head, ones a norm's weights."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        if p.min() == p.max():
            p += 0.1 * torch.randn(p.shape, generator=generator)


@dataclass
class Operation:
    """One operation: where its inputs come from and what it gave, by value."""

    name: str
    shape: tuple[int, ...]
    inputs: list[int]
    vector: Tensor | None = None  # [N, D], of an output with one position
    means: dict[int, Tensor] = field(default_factory=dict)  # by axis of channels, of one with several: [N, D]
    linear: tuple[Tensor, Tensor] | None = None  # weight [C, D] and bias [C]

    @property
    def size(self) -> int:
        """How many numbers of an image."""
        return math.prod(self.shape[1:])


class Operations(TorchDispatchMode):
    """Notes every operation; also a copy of the tensor that the operation ``keep`` made."""

    def __init__(self, x: Tensor, keep: int | None = None) -> None:
        super().__init__()
        self.n, self.keep, self.kept = len(x), keep, torch.empty(0)
        self.list = [Operation("image", tuple(x.shape), [])]
        self.maker = WeakIdKeyDictionary({x: 0})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for a in args for t in (a if isinstance(a, list | tuple) else [a]) if isinstance(t, Tensor)]
        inputs = [self.maker[t] for t in given if t in self.maker]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, list | tuple) else [out]:
            if isinstance(t, Tensor):
                self.note(func.overloadpacket.__name__, inputs, args, t)
        return out

    def note(self, name: str, inputs: list[int], args: Any, t: Tensor) -> None:
        """Add an operation's output."""
        made = Operation(name, tuple(t.shape), inputs)
        if len(self.list) == self.keep:
            self.kept = t.clone()
        if self.keep is None and t.is_floating_point() and t.numel() > 0:
            long = [size for size in t.shape if size > 1]
            if long[:1] == [self.n] and len(long) <= 2:
                made.vector = t.reshape(self.n, -1).clone()
            elif len(t.shape) > 2 and t.shape[0] == self.n:
                axes = range(1, t.dim())
                made.means = {axis: t.mean([a for a in axes if a != axis]) for axis in axes}
            made.linear = linear(name, args, t)
        self.maker[t] = len(self.list)
        self.list.append(made)


def linear(name: str, args: Any, out: Tensor) -> tuple[Tensor, Tensor] | None:
    """Weight [C, D] and bias [C] of a linear map over channels; None for any other operation."""
    weight: Tensor | None = None
    bias = None
    if name == "addmm":
        bias, weight = args[0], args[2].T
    elif name == "mm":
        weight = args[1].T
    elif name == "bmm" and args[1].shape[0] == 1:
        weight = args[1][0].T
    elif name == "linear":
        weight, bias = args[1], args[2] if len(args) > 2 else None
    elif name == "convolution":
        x, w, bias, stride, padding, groups = args[0], args[1], args[2], args[3], args[4], args[8]
        if groups == 1 and set(w.shape[2:]) == {1} and set(stride) == {1} and set(padding) == {0} and x.dim() == 4:
            weight = w[:, :, 0, 0]
    if weight is None:
        return None
    return weight, torch.zeros(len(weight)) if bias is None else bias.expand(len(weight))


def equal(a: Tensor, b: Tensor) -> bool:
    """Whether a is b [N, D], up to rounding beside its spread over images."""
    return a.shape == b.shape and bool((a - b).abs().max() <= EQUAL * (b - b.mean(0)).abs().max())


def affine(m: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Least squares a [D], d [D] of z = a m + d, and the fit [N, D]: more images than unknowns."""
    m, z = m.double(), z.double()
    centred = m - m.mean(0)
    a = (centred * z).sum(0) / centred.square().sum(0).clamp_min(1e-30)
    d = z.mean(0) - a * m.mean(0)
    return a, d, a * m + d


def normed(m: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """What norms over channels make of m [N, D], a positive factor an image [N], and whether the mean is taken off."""
    for centred in (True, False):
        x = m.double() - m.double().mean(1, keepdim=True) * centred
        for eps in (1e-6, 1e-5, 0.0):
            s = (x.square().mean(1) + eps).rsqrt()
            yield s[:, None] * x, s, centred


class Run:
    """A module run once on x [N, …] under :class:`Operations`."""

    def __init__(self, module: nn.Module, x: Tensor) -> None:
        self.module, self.x = module, x
        with torch.no_grad():
            module(x)  # some keep what they computed, so that only later runs are alike
            with Operations(x) as noted:
                out = module(x)
        self.list = noted.list
        self.returns = "" if isinstance(out, Tensor) else f"returns a {type(out).__name__}"
        while not isinstance(out, Tensor):
            out = next(iter(out.values() if isinstance(out, dict) else out))
        self.y = out.flatten(1)

    def tensor(self, k: int) -> Tensor:
        """What operation k made, [N, …], in another run."""
        with torch.no_grad(), Operations(self.x, keep=k) as noted:
            self.module(self.x)
        return noted.kept

    def h(self, k: int, axis: int) -> Tensor:
        """What operation k made as [N, D, P]."""
        return self.tensor(k).movedim(axis, 1).flatten(2)

    def input(self, k: int) -> int:
        """The operation that made the input of linear map k, never its weight."""
        return next(i for i in self.list[k].inputs if self.depends(i))

    def depends(self, k: int) -> bool:
        """Whether operation k depends on the image."""
        todo, seen = [k], set[int]()
        while todo:
            i = todo.pop()
            if i == 0:
                return True
            if i not in seen:
                seen.add(i)
                todo += self.list[i].inputs
        return False

    def pooled(self, z: Tensor) -> list[tuple[int, int]]:
        """Operation and axis of channels of each tensor whose mean over positions may be z: of D channels."""
        return [(k, a) for k, op in enumerate(self.list) for a, m in op.means.items() if m.shape == z.shape]

    def averaged(self, z: Tensor) -> tuple[int, int] | None:
        """The tensor whose mean over positions is z: of several the finest, of these the last."""
        fits = [(k, axis) for k, axis in self.pooled(z) if equal(self.list[k].means[axis], z)]
        return max(fits, key=lambda fit: (self.list[fit[0]].size, fit[0]), default=None)

    def ends(self, k: int) -> set[int]:
        """The operations on the way to vector k where several positions become one."""
        todo, seen, ends = [k], set[int](), set[int]()
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            for j in self.list[i].inputs:
                if self.list[j].vector is not None:
                    todo.append(j)
                elif self.depends(j):
                    ends.add(i)
        return ends

    def why(self, k: int) -> tuple[tuple[int, int] | None, str]:
        """What the vector k is made of: the one tensor averaged, or what else is taken of which tensor, in words."""
        averaged, words = set(), []
        for i in sorted(self.ends(k), reverse=True):
            vector = self.list[i].vector
            found = None if vector is None else self.averaged(vector)
            if found:
                averaged.add(found)
            else:
                source = next(j for j in self.list[i].inputs if self.list[j].vector is None)
                words.append(f"{self.list[i].name} of {list(self.list[source].shape[1:])}")
        if len(averaged) > 1:
            words.append(f"means of {len(averaged)} tensors")
        return (None if words else next(iter(averaged), None)), ", ".join(words[:3])


def head_of(module: nn.Module, x: Tensor) -> Head:
    """The head of a module in eval mode, from its outputs on x [N, …], N at least 4."""
    run = Run(module, x)
    head = find(run)
    head.why = ", ".join(filter(None, (run.returns, head.why)))
    return head


def find(run: Run) -> Head:
    """The head of a run: the linear map, or two, that make y; what makes it without one."""
    y = run.y
    if (y - y.mean(0)).abs().max() <= 1e-4 * y.abs().max():
        return Head(NOT, y, "scores do not depend on the image")
    maps = [k for k, op in enumerate(run.list) if op.linear and op.vector is not None and op.vector.shape == y.shape]
    for k in reversed(maps):
        if is_shifted(run.list[k].vector, y):
            return one(run, k, y - run.list[k].vector)
    for k, other in reversed(list(combinations(maps[-8:], 2))):
        shift = y - (run.list[k].vector + run.list[other].vector) / 2
        if is_shifted(y - shift, y):
            return averaged(y, one(run, k, shift), one(run, other, shift))
    if found := run.averaged(y):
        k = found[0]
        while run.list[k].name in (*VIEWS, "add"):
            k = run.input(k)
        if run.list[k].linear:
            c, x = run.list[k].linear[0], run.tensor(run.input(k))
            h = x.flatten(2) if run.list[k].name == "convolution" else x.reshape(len(y), -1, x.shape[-1]).mT
            shift = y - h.mean(2) @ c.T
            if is_shifted(y - shift, y):
                return Head(POOLED_LINEAR[3], y, h=h, c=c, b=shift.mean(0))
        return Head(CLASS_MAPS, y, h=run.h(*found))
    return Head(NOT, y, "no linear map makes the scores")


def is_shifted(scores: Tensor, y: Tensor) -> bool:
    """Whether scores are y [N, C] up to a bias that is added elsewhere."""
    return equal(scores - scores.mean(0), y - y.mean(0))


def averaged(y: Tensor, first: Head, second: Head) -> Head:
    """Two heads whose average is y."""
    for head in (first, second):
        if not head.pooled_linear:
            return head
    if not torch.equal(first.h, second.h):
        return Head(NOT, y, "two heads of two tensors")
    return Head(POOLED_LINEAR[2], y, h=first.h, c=(first.c + second.c) / 2, b=(first.b + second.b) / 2)


def one(run: Run, k: int, shift: Tensor) -> Head:
    """What the input of linear map k is; ``shift`` [N, C] is added to its output elsewhere."""
    y, (w, b), source = run.y, run.list[k].linear, run.input(k)
    b = b + shift.mean(0)
    z = run.list[source].vector
    if z is None:
        return Head(NOT, y, f"the head's input is {list(run.list[source].shape)}")
    if found := run.averaged(z):
        return Head(POOLED_LINEAR[0], y, h=run.h(*found), c=w, b=b)
    candidates = run.pooled(z)[::-1]
    for at, axis in candidates:
        a, d, fit = affine(run.list[at].means[axis], z)
        if equal(fit, z):
            summed = equal(fit, a.mean() * run.list[at].means[axis])  # or weighted alike
            return Head(POOLED_LINEAR[0 if summed else 1], y, h=run.h(at, axis), c=w * a, b=b + w.double() @ d)
    for at, axis in candidates:
        fits = [(*affine(x, z), s, centred) for x, s, centred in normed(run.list[at].means[axis])]
        a, d, fit, s, centred = min(fits, key=lambda fit: float((fit[2] - z).abs().max()))
        if equal(fit, z):
            c = w * a
            return Head(NORM, y, h=run.h(at, axis), c=c - c.mean(1, keepdim=True) * centred, b=b + w.double() @ d, s=s)
    found, words = run.why(source)
    return Head(MLP, y, h=run.h(*found)) if found else Head(NOT, y, words)
