"""Any CNN with average pool and linear head, seen as blocks: torchvision, timm, your own module, your weights.

A network is run once on noise and watched. The *head* is the last linear layer, *h* what the last average pool before
it averages, and the blocks are the last output at each resolution on the way there. Nothing is rebuilt: the network
stays as it is and its block outputs are read while it runs.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from . import paths
from .backbones import Backbone, avg_pool, imagenet_weights, weights_entry
from .datasets import RECIPES, Recipe
from .explainers import CNNAsSEM
from .runs import Run, fingerprint
from .store import replacing

IMAGENET = {name: getattr(RECIPES["folder"], name) for name in ("mean", "std")}
FITS = ("crop", "stretch")
AT_MOST = 4  # blocks chosen automatically: the deepest, as the paper's B1 … B4
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3 that serve training only
_POOLS = ("adaptive_avg_pool2d", "avg_pool2d", "adaptive_avg_pool1d", "mean")
_FLATTENINGS = ("flatten", "view", "reshape")
_QUIET = (nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity, nn.AdaptiveAvgPool2d, nn.AvgPool2d)


class Network(nn.Module):
    """A frozen network with what is needed to explain it; stands wherever a :class:`Backbone` does.

    Parameters
    ----------
    module
        Takes images [N, 3, S, S], with float32 weights. What it returns does not matter: y is read at its head. It is
        used as it is, not copied: put into eval mode, its parameters frozen, and left on the CPU after computations.
        Give ``copy.deepcopy(module)`` to go on training it.
    blocks
        Names of the modules whose outputs are x(1), x(2) …; empty: the last output at each resolution, of the deepest
        four. The last block always ends at h, the input of the average pool.
    head
        Name of the linear layer; empty: the last one called.
    classes
        Names of the head's outputs; empty: their numbers. A name that several outputs bear gets their number:
        ``crane (134)``, ``crane (517)``.
    image_size, mean, std
        Of the input: pixels, and normalisation of RGB values in [0, 1].
    fit
        How images become square: ``crop`` (shorter side to ``image_size``, then the centre) or ``stretch``.
    name
        For tables and messages.

    Raises
    ------
    ValueError
        One line: a head that is not linear, no average pool, an unknown block, a wrong number of class names, weights
        that are not float32.

    Attributes
    ----------
    named
        Whether the names of the outputs are known.
    assumed
        Which of ``image_size``, ``mean`` and ``std`` nobody said (set by :func:`network`).
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        blocks: Sequence[str] = (),
        head: str = "",
        classes: Sequence[str] = (),
        image_size: int = 224,
        mean: Sequence[float] = IMAGENET["mean"],
        std: Sequence[float] = IMAGENET["std"],
        fit: str = "crop",
        name: str = "",
    ) -> None:
        super().__init__()
        if fit not in FITS:
            raise ValueError(f"fit must be one of {', '.join(FITS)}, got {fit!r}")
        self.name = name or type(module).__name__
        kinds = {p.dtype for p in module.parameters()} - {torch.float32}
        if kinds:
            kind = str(kinds.pop()).removeprefix("torch.")
            raise ValueError(f"{self.name} has {kind} weights, explanations are float32: give module.float()")
        self.module = module.eval().requires_grad_(False)
        self.image_size, self.fit = image_size, fit
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        watched = _Watched(self.module, image_size, self.name)
        self.head = watched.head(head)
        self._pool = watched.pool(self.head)
        self._taps = watched.blocks(blocks, self._pool)
        self.blocks = (*(tap.name for tap in self._taps), watched.encoder(self._pool))
        self.between = watched.between(self._pool, self.head)
        c = self.classifier.out_features
        if classes and len(classes) != c:
            raise ValueError(f"{len(classes)} class names, but the head {self.head!r} of {self.name} has {c} outputs")
        self.named = bool(classes)
        self.assumed: tuple[str, ...] = ()
        self.classes = _told_apart(classes) or tuple(map(str, range(c)))

    @property
    def classifier(self) -> nn.Linear:
        """The head."""
        return self.module.get_submodule(self.head)

    @property
    def pooled_linear(self) -> bool:
        """Whether y is a linear function of avg.pool(h), as eq. 2 says."""
        return not self.between

    @property
    def c(self) -> torch.Tensor:
        """The head's columns c_j, [C, D]; a ValueError where they are no prototypes of h."""
        if self.between:
            raise ValueError(f"Theorem 1 and eq. 11 do not hold for {self.name}: {self.between}; KMEx and B4 … do")
        return self.classifier.weight

    @property
    def b(self) -> torch.Tensor | None:
        """The head's bias, [C], or None."""
        return self.classifier.bias

    def outputs(self, x: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """x(1) … x(B), each [N, D_b, H_b, W_b], and the prediction y [N, C] of one pass."""
        found: dict[_Tap, torch.Tensor] = {}
        calls: dict[str, int] = {}
        y = None

        def keep_block(name):
            def hook(module, args, output):
                tap = _Tap(name, calls.get(name, 0))
                calls[name] = tap.call + 1
                if tap in self._taps:
                    found[tap] = output.clone()  # a later layer may work in place

            return hook

        def keep_y(module, args, output):
            nonlocal y
            y = output

        with ExitStack() as stack:
            for name in {tap.name for tap in self._taps}:
                handle = self.module.get_submodule(name).register_forward_hook(keep_block(name))
                stack.callback(handle.remove)
            stack.callback(self.classifier.register_forward_hook(keep_y).remove)
            pools = stack.enter_context(_Pools())
            self.module(x)
        h = pools.inputs[self._pool.call]
        return [*(found[tap] for tap in self._taps), h], y

    def activations(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x(1) … x(B), each [N, D_b, H_b, W_b]; the last is h."""
        return self.outputs(x)[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The prediction y, [N, C]."""
        return self.outputs(x)[1]

    def output(self, name: str) -> int:
        """Index of the output with this name; a ValueError that lists the nearest names if there is none."""
        if name not in self.classes:
            close = get_close_matches(name, self.classes, n=4) or self.classes[:8]
            more = " …" if len(close) < len(self.classes) else ""
            raise ValueError(f"target must be a class of {self.name}, got {name!r}: {', '.join(close)}{more}")
        return self.classes.index(name)

    def preprocessing(self) -> str:
        """Input size and normalisation in a few words, with what is assumed."""
        size = f"{self.image_size} x {self.image_size} pixels ({self.fit}), mean {self.mean}, std {self.std}"
        if not self.assumed:
            return size
        given = ", ".join(f"{name}=" for name in self.assumed)
        return f"{size}; {', '.join(self.assumed)} assumed: give {given} if the network was trained with others"

    def recipe(self, prototypes_per_class: int = 5) -> Recipe:
        """Input size and normalisation in the form a data set carries."""
        return Recipe(self.image_size, prototypes_per_class, 0, self.mean, self.std)

    def settings(self) -> dict:
        """What fixes the explanation, to be saved with it."""
        names = ("name", "blocks", "head", "between", "image_size", "mean", "std", "fit")
        found = {name: getattr(self, name) for name in names}
        return {"network": {**found, "weights": fingerprint(self.module.state_dict())}}


def _told_apart(classes: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(classes)
    return tuple(f"{name} ({j})" if counts[name] > 1 else name for j, name in enumerate(classes))


@torch.no_grad()
def theorem1_residual(network: Network | Backbone, x: torch.Tensor) -> float:
    """The largest difference of both sides of eq. 5, relative to the largest score of clf(avg.pool(enc(x))).

    Raises
    ------
    ValueError
        Something lies between average pool and head.
    """
    activations, y = network.outputs(x)
    sem = CNNAsSEM(network.c, network.b)(activations)
    return ((y - sem).abs().max() / y.abs().max()).item()


# --- watching a network run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tap:
    """The ``call``-th output of a module."""

    name: str
    call: int


@dataclass(frozen=True)
class _Pool:
    """The ``call``-th average pool of a pass, made at time ``at``."""

    call: int
    at: int
    global_: bool
    size: tuple[int, int]


@dataclass
class _Call:
    """One call of a module: when, and the sizes (H, W) of the maps that went in and came out, if maps they were."""

    name: str
    call: int
    start: int
    size_in: tuple[int, int] | None
    children: list["_Call"] = field(default_factory=list)
    end: int = 0
    size_out: tuple[int, int] | None = None

    def halvings(self) -> int:
        if not (self.size_in and self.size_out):
            return 2
        return round(math.log2(max(self.size_in[0], 1) / max(self.size_out[0], 1)))

    def steps(self) -> Iterator["_Call"]:
        """The calls along the trunk: a module that halves the resolution more than once is looked into."""
        if self.size_out and (self.halvings() < 2 or not self.children):
            yield self
        else:
            for child in self.children:
                yield from child.steps()


class _Pools(TorchFunctionMode):
    """Notes the input of every average pool, whichever module or function makes it."""

    def __init__(self, clock=None) -> None:
        super().__init__()
        self.inputs: list[torch.Tensor] = []
        self.made: list[_Pool] = []
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
                self.made.append(_Pool(len(self.inputs), self._clock(), size == (1, 1), size))
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


class _Watched:
    """What happened while a network ran on noise."""

    def __init__(self, module: nn.Module, image_size: int, name: str) -> None:
        self.module, self.name, self.image_size = module, name, image_size
        self.time = 0
        self.calls: list[_Call] = []
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        open_calls: list[_Call] = []
        counts: dict[str, int] = {}

        def before(name):
            def hook(module, args, kwargs):
                first = next((x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)), None)
                size = tuple(first.shape[2:]) if _maps(first) else None
                call = _Call(name, counts.get(name, 0), self.tick(), size)
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
            self.pools = stack.enter_context(_Pools(self.tick))
            try:
                module(x.to(parameter))
            except Exception as error:  # whatever a foreign forward raises
                reason = (str(error) or type(error).__name__).splitlines()[0]
                raise ValueError(f"{name} does not run on 3 x {image_size} x {image_size} images: {reason}") from None

    def tick(self) -> int:
        self.time += 1
        return self.time

    def last(self, name: str) -> _Call:
        return max((call for call in self.calls if call.name == name), key=lambda call: call.end)

    def head(self, name: str) -> str:
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

    def pool(self, head: str) -> _Pool:
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

    def trunk(self, pool: _Pool) -> list[_Call]:
        """Calls along the trunk that ended before the pool, by time."""
        root = self.last("")
        steps = [call for child in root.children for call in child.steps()]
        return [s for s in steps if s.end < pool.at and s.size_out[0] == s.size_out[1]]

    def stride(self, size: tuple[int, int]) -> int:
        """The resolution as the power of two that divides the image's."""
        return 2 ** max(0, round(math.log2(self.image_size / size[0])))

    def blocks(self, names: Sequence[str], pool: _Pool) -> tuple[_Tap, ...]:
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
        return tuple(_Tap(call.name, call.call) for call in chosen)

    def named(self, name: str, pool: _Pool) -> _Call:
        mapped = {call.name: call for call in self.calls if call.size_out and call.end < pool.at}
        if name not in mapped:
            close = get_close_matches(name, mapped, n=4, cutoff=0.5) or [call.name for call in self.trunk(pool)][-4:]
            raise ValueError(f"{self.name} has no block {name!r} with feature maps; the nearest: {', '.join(close)}")
        return mapped[name]

    def encoder(self, pool: _Pool) -> str:
        """A name for what ends at h."""
        trunk = self.trunk(pool)
        return trunk[-1].name if trunk else "h"

    def between(self, pool: _Pool, head: str) -> str:
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


# --- networks by name, and weights ------------------------------------------------------------------------------


def network(
    model: str | Path | nn.Module,
    weights: str | Path = "",
    *,
    classes: Sequence[str] | str | Path = (),
    blocks: Sequence[str] = (),
    head: str = "",
    image_size: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    fit: str = "",
    seed: int = 0,
) -> Network:
    """A network to explain, from a name and weights; nothing is trained.

    Parameters
    ----------
    model
        A name of torchvision (``resnet50``) or timm (``timm/resnet50.a1_in1k``), your own ``nn.Module`` (used as it is
        and frozen, see :class:`Network`), or the ``backbone.safetensors`` that notebook 1 left.
    weights
        ``imagenet`` (the library's, downloaded on first use), ``random``, or a file with a state dict (safetensors, or
        PyTorch's with tensors only). Empty: ``imagenet`` for a name; your module as it is.
    classes
        Names of the head's outputs: a list, or a text file with one a line. Empty: known from the weights, or numbers.
    blocks, head, fit
        As in :class:`Network`.
    image_size, mean, std
        0 or empty: those of the library's weights for that name, else 224 and ImageNet's. What weights from a file or
        your module were trained with is not known: :func:`kmex_utils.posthoc.explain` says what it assumes.
    seed
        Of random weights.

    Raises
    ------
    ValueError, FileNotFoundError, ConnectionError, ImportError
        One line that says what to change.
    """
    given = {"blocks": tuple(blocks), "head": head}
    weights = "random" if weights == "scratch" else weights  # notebook 1's word
    options = {"image_size": image_size, "mean": tuple(mean), "std": tuple(std), "fit": fit}
    names = _class_names(classes)
    if isinstance(model, nn.Module):
        if weights not in ("", "imagenet", "random"):
            name = type(model).__name__
            _load(model, _state(weights), name, weights)
        elif weights:
            raise ValueError(f"weights={weights!r} goes with a model's name; your module comes with its own")
        return _assuming(Network(model, classes=names, **given, **_in_force(options, {})), options)
    if str(model).endswith(".safetensors"):
        return _of_run(paths.resolve(model), names, given, options)
    weights = weights or "imagenet"
    known = _timm if _is_timm(str(model)) else _torchvision
    from_file = weights not in ("imagenet", "random")
    state = _state(weights) if from_file else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, defaults = known(str(model), weights)
    if from_file:
        if str(model) in ("googlenet", "inception_v3"):
            state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
        size = options["image_size"] or defaults["image_size"]
        _fit_head(module, state, head or _Watched(module, size, str(model)).head(""), names, weights)
        _load(module, state, str(model), weights)
        defaults["classes"] = ()
    if not names and len(defaults["classes"]):
        names = defaults["classes"]
    module.to(memory_format=torch.channels_last)
    found = Network(module, classes=names, name=str(model), **given, **_in_force(options, defaults))
    return _assuming(found, options) if from_file else found


def _assuming(found: Network, options: dict) -> Network:
    found.assumed = tuple(name for name in ("image_size", "mean", "std") if not options[name])
    return found


def _in_force(options: dict, defaults: dict) -> dict:
    """What was given, else the weights' own, else ImageNet's."""
    general = {"image_size": 224, **IMAGENET, "fit": "crop"}
    return {name: value or defaults.get(name) or general[name] for name, value in options.items()}


def _class_names(classes: Sequence[str] | str | Path) -> tuple[str, ...]:
    if not isinstance(classes, str | Path):
        return tuple(classes)
    path = Path(classes).expanduser()
    if not str(classes):
        return ()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: `classes` is a list of names or a text file with one a line")
    return tuple(line.strip() for line in path.read_text().splitlines() if line.strip())


def _is_timm(name: str) -> bool:
    return name.startswith(("timm/", "timm:"))


def _torchvision(name: str, weights: str | Path) -> tuple[nn.Module, dict]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        close = get_close_matches(name, known, n=4) or known[:4]
        raise ValueError(
            f"torchvision has no model {name!r}; the nearest: {', '.join(close)}. For timm's give timm/<name>"
        )
    more = {}
    if name in (
        "googlenet",
        "inception_v3",
    ):  # their own initialisation is slow; ImageNet's weights transform the input
        more = {"init_weights": False, "aux_logits": False, "transform_input": weights != "random"}
    module = models.get_model(name, weights=None, **more)
    entry = weights_entry(name)
    pretrained = weights == "imagenet"
    if pretrained:
        state = imagenet_weights(name)
        module.load_state_dict({key: v for key, v in state.items() if not (more and key.startswith(AUXILIARY))})
    transform = entry.transforms()
    defaults = {"image_size": transform.crop_size[0], "mean": transform.mean, "std": transform.std}
    return module, {**defaults, "classes": tuple(entry.meta["categories"]) if pretrained else ()}


def _timm(name: str, weights: str | Path) -> tuple[nn.Module, dict]:
    try:
        import timm
    except ImportError:
        raise ImportError(f"{name!r} needs timm, which is not installed: pip install timm") from None
    pretrained = weights == "imagenet"
    name = name[len("timm/") :]
    if not timm.is_model(name):
        close = get_close_matches(name.split(".")[0], timm.list_models(), n=4)
        raise ValueError(f"timm has no model {name!r}; the nearest: {', '.join(close) or 'none'}")
    try:
        module = timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # the hub's many kinds of "no network"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConnectionError(f"timm cannot load {name!r} ({reason}); give weights, a file, instead") from None
    config = timm.data.resolve_model_data_config(module)
    return module, {
        "image_size": config["input_size"][-1],
        "mean": config["mean"],
        "std": config["std"],
        "classes": _timm_classes(module) if pretrained else (),
    }


def _timm_classes(module: nn.Module) -> tuple[str, ...]:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


def _of_run(path: Path, names: tuple[str, ...], given: dict, options: dict) -> Network:
    """The network of notebook 1, with the classes, size and normalisation it was trained with."""
    run = Run.of_weights(path)
    settings = run.settings()
    recipe = run.recipe()
    size = settings["data"].get("image_size") or recipe.image_size
    defaults = {"image_size": size, "mean": recipe.mean, "std": recipe.std, "fit": "stretch"}
    classes = names or settings["classes"]
    return Network(run.backbone(), classes=classes, name=settings["arch"], **given, **_in_force(options, defaults))


def _state(path: str | Path) -> dict[str, torch.Tensor]:
    """A state dict from a file, without its wrappings; never unpickles objects."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: weights is 'imagenet', 'random' or a file with a state dict")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise many kinds
        if "Unsupported global" in str(error):
            raise ValueError(
                f"{path} holds pickled objects, which may run code: save model.state_dict() alone"
            ) from None
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is not a readable state dict ({reason})") from None
    for wrapping in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict: names with tensors, as model.state_dict() gives")
    prefixes = ("module.", "model.", "backbone.", "_orig_mod.")
    while prefix := next((p for p in prefixes if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _fit_head(module: nn.Module, state: dict, head: str, names: tuple[str, ...], path) -> None:
    """Give a network by name the file's number of classes, and a bias only if the file has one."""
    weight = state.get(f"{head}.weight")
    if weight is None or weight.dim() != 2:
        return
    if names and len(names) != len(weight):
        raise ValueError(f"{len(names)} class names, but the head {head!r} in {path} has {len(weight)} outputs")
    old = module.get_submodule(head)
    bias = f"{head}.bias" in state
    if weight.shape[1] == old.in_features and (len(weight) != old.out_features or bias != (old.bias is not None)):
        parent, _, name = head.rpartition(".")
        setattr(module.get_submodule(parent), name, nn.Linear(old.in_features, len(weight), bias=bias))


def _load(module: nn.Module, state: dict, name: str, path) -> None:
    own = module.state_dict()
    shapes = [key for key in state if key in own and state[key].shape != own[key].shape]
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    said = [f"{key} is {list(state[key].shape)}, not {list(own[key].shape)}" for key in shapes[:1]]
    if len(shapes) > 1:
        said.append(f"{len(shapes) - 1} more of another shape")
    for kind, keys in (("missing", missing), ("unknown", extra)):
        if keys:
            said.append(f"{len(keys)} {kind} ({keys[0]} …)")
    if said:
        raise ValueError(f"the weights in {path} do not fit {name}: {', '.join(said)}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{path} holds NaN or infinite weights ({broken[0]} …)")
    module.load_state_dict(state, strict=False)


# --- which networks fit ---------------------------------------------------------------------------------------------

ARCHITECTURES = (
    *("resnet18", "resnet34", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "googlenet"),
    *("efficientnet_b0", "efficientnet_v2_s", "mobilenet_v2", "regnet_x_400mf", "regnet_y_400mf"),
    *("shufflenet_v2_x1_0", "mnasnet1_0", "inception_v3"),
    *("convnext_tiny", "mobilenet_v3_small", "vgg11", "alexnet"),
)


def summary(name: str, weights: str = "random", seed: int = 0) -> dict[str, str]:
    """Blocks and Theorem 1 residual of a network by name, as a row of the README's table.

    With random weights the batch statistics are those of noise, so that activations neither vanish nor grow.
    """
    found = network(name, weights, seed=seed)
    size = found.image_size
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(seed))
    if weights == "random":
        _settle(found.module, x)
    activations, _ = found.outputs(x)
    grids = [f"{u.shape[1]} at {u.shape[2]} x {u.shape[3]}" for u in activations]
    residual = f"{theorem1_residual(found, x):.0e}" if found.pooled_linear else f"does not hold: {found.between}"
    return {
        "network": name,
        "blocks end at": ", ".join(found.blocks),
        "channels and positions": ", ".join(grids),
        "head": found.head + (" (bias)" if found.b is not None else ""),
        "Theorem 1 residual": residual,
    }


@torch.no_grad()
def _settle(module: nn.Module, x: torch.Tensor) -> None:
    """Batch statistics of x, in place."""
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for part in norms:
        part.train()
        part.momentum = 1.0
    module(x)
    module.eval()


def main(arguments: list[str] | None = None) -> int:
    """Table of networks: their blocks, head and Theorem 1 residual."""
    import argparse
    import sys

    import pandas as pd

    parser = argparse.ArgumentParser(prog="python -m kmex_utils.networks", description=main.__doc__)
    parser.add_argument("names", nargs="*", default=ARCHITECTURES, help="torchvision's, or timm/<name>")
    parser.add_argument("--weights", default="random", help="random (default) or imagenet")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    options = parser.parse_args(arguments)
    rows = []
    for name in options.names:
        try:
            rows.append(summary(name, options.weights))
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    table = pd.DataFrame(rows)
    if options.csv:
        with replacing(options.csv) as temporary:
            table.to_csv(temporary, index=False)
    print(table.to_markdown(index=False, disable_numparse=True))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
