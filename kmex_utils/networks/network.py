"""Any CNN with average pool and linear head, seen as blocks: torchvision, timm, your own module, your weights.

A network is run on noise and watched. y are the scores it returns, *h* is the map whose mean over positions they are
made of, found by value, and the blocks are the last output at each resolution on the way there. Nothing is rebuilt:
the network stays as it is, trained or explained, and its block outputs are read while it runs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from .. import paths
from ..data import IMAGENET_MEAN, IMAGENET_STD, Input
from ..data.input import name_of, numbers, read_off
from ..hardware import exact
from ..store import load_json, load_tensors, save_json, save_tensors
from .catalogue import Built, build, is_timm, is_torchvision
from .checkpoints import fingerprint, fit_head, fitting, load_into, read, reason
from .class_names import class_names
from .head import Affine, head_of, same
from .trace import H, Layout, Pass, Tap, Trace, noise

IMAGENET = Input(224, IMAGENET_MEAN, IMAGENET_STD, "crop")
Target = str | int | None | Sequence[str | int | None]  # a class, or two; empty or None: the predicted one
SETTINGS, WEIGHTS, HEAD = "network.json", "weights.safetensors", "head.safetensors"
NO_FILES = ("imagenet", "random", "scratch")  # other weights are files; the last two are the same
SCORES = 8  # outputs whose scores on noise are saved
SCORES_DIFFER = 1e-3  # relative to the largest: far above another chip's rounding, far below another forward
# of architectures for training, found once: head, blocks at the library's size, where resolutions are far apart, D
_FOUND: dict[tuple[str, str, bool], tuple[str, tuple[str, ...], int]] = {}


class Network(nn.Module):
    """A network with what is needed to explain it, or to train it.

    Parameters
    ----------
    module
        Takes images [N, 3, S, S], with float32 weights; returns scores [N, C], or a tuple or dictionary with them,
        maybe as probabilities. It is used as it is, not copied: put into eval mode, its parameters frozen, and left on
        the CPU after computations.
        Give ``copy.deepcopy(module)`` to go on training it.
    blocks
        Names of the modules whose outputs are x(1), x(2) …; empty: the last output at each resolution, of the deepest
        four. The last block always ends at h, the input of the average pool. Of a module that is called several times
        ``pool`` is the last output, ``pool#0`` the first.
    head
        Name of the module whose output are the scores y; empty: what the network returns.
    classes
        Names of the head's outputs; empty: their numbers. A name that several outputs bear gets their number:
        ``crane (134)``, ``crane (517)``.
    input, name
        How images enter; a name for tables and messages.
    reference
        How a library makes the module again, see :class:`~kmex_utils.networks.catalogue.Built`; None: it is your own.

    Attributes
    ----------
    form
        How y follows from h: ``linear`` (Theorem 1), ``scaled`` or ``gated``, see :mod:`kmex_utils.networks.head`;
        empty: in no such way, and ``between`` says why.
    activation
        What the network makes of y: ``softmax``, ``log_softmax``, ``sigmoid``; empty: it returns y.
    binary
        Whether it has one score, whose sign decides: the classes' scores are then its negative half and its half, whose
        softmax is its sigmoid.
    note
        What is not as one may think, in one line; empty: nothing.
    named, assumed
        Whether the names of the outputs are known; which of ``image_size``, ``mean`` and ``std`` nobody said.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        blocks: Sequence[str] = (),
        head: str = "",
        classes: Sequence[str] = (),
        input: Input = IMAGENET,
        name: str = "",
        reference: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.input, self.reference = name or type(module).__name__, input, reference
        kinds = {p.dtype for p in module.parameters()} - {torch.float32}
        if kinds:
            kind = str(kinds.pop()).removeprefix("torch.")
            raise ValueError(f"{self.name} has {kind} weights, explanations are float32: give module.float()")
        for key, parameter in module.named_parameters():
            if parameter.is_meta or parameter.layout != torch.strided:
                what = "without values (meta)" if parameter.is_meta else f"of layout {parameter.layout}"
                raise ValueError(f"{self.name} has weights {what} ({key} …): give a module with dense weights")
            if not torch.isfinite(parameter).all():
                raise ValueError(f"{self.name} holds NaN or infinite weights ({key} …): give other weights")
        self.module = module
        self.eval().requires_grad_(False)
        trace = Trace(self.module, input, self.name)
        self._head = head_of(trace, head)
        self.head, self.form, self.between = self._head.name, self._head.form, self._head.between
        self.activation, self.note = self._head.activation, self._head.note
        named = trace.blocks(
            [blocks] if isinstance(blocks, str) else blocks,
            self._head.cuts,
            self._head.h[1].grid,
            self._head.time,
        )
        self.blocks = (*named, trace.encoder(self._head.time))
        before = [(call.tap, call.layout) for call in named.values()]
        self._places: list[tuple[Tap, Layout | None]] = [*before, self._head.h, (self._head.y, None)]  # x(1) …, h, y
        self._changed: set[int] = set()  # blocks whose output a later layer changes in place
        self._alone = any(name in ("squeeze", "squeeze_") for _, name in trace.names)
        self._columns: tuple[Any, Affine] | None = None
        c = next(v for v in trace.values if self._head.y in v.taps).means[0].shape[1]
        self.binary = c == 1
        c += self.binary
        if classes and len(classes) != c:
            raise ValueError(f"{len(classes)} class names, but the head {self.head!r} of {self.name} has {c} outputs")
        self.named = bool(classes)
        self.assumed: tuple[str, ...] = ()
        often = Counter(classes)
        told_apart = [f"{name} ({j})" if often[name] > 1 else name for j, name in enumerate(classes)]
        self.classes = tuple(told_apart or map(str, range(c)))

    @property
    def classifier(self) -> nn.Linear | nn.Conv2d:
        """The one layer whose weights are the columns; a ValueError where there is none."""
        if not self._head.layer:
            raise ValueError(f"{self.name} has no one linear layer whose weights are its columns")
        return cast(nn.Linear, self.module.get_submodule(self._head.layer))

    def _affine(self) -> Affine:
        """c, b and t of :mod:`kmex_utils.networks.head`, made again where weights have changed."""
        if self.form not in ("linear", "scaled"):
            why = self.between or "its columns are each image's own"
            raise ValueError(f"Theorem 1 and eq. 11 do not hold for {self.name}: {why}; KMEx and B4 … do")
        if self._head.layer:
            weight, bias = self.classifier.weight, self.classifier.bias
            zero = weight.new_zeros(len(weight))
            return weight.flatten(1), zero if bias is None else bias, zero
        state = [(id(p), p._version) for p in (*self.module.parameters(), *self.module.buffers())]
        if not self._columns or self._columns[0] != state:
            with exact():
                x = noise(self.input, next(self.module.parameters()))
                self._columns = state, self._head.affine(self.module, x)
        return self._columns[1]

    @property
    def c(self) -> Tensor:
        """The columns c_j, [C, D]; a ValueError where they are no prototypes of h."""
        c = self._affine()[0]
        return _both(c) if self.binary else c

    @property
    def b(self) -> Tensor | None:
        """The bias, [C], or None."""
        if self._head.layer and self.classifier.bias is None:
            return None
        b = self._affine()[1]
        return _both(b) if self.binary else b

    def columns(self, x: Tensor, j: Tensor) -> Tensor:
        """The column of class j of each image x [N, 3, S, S], [N, D]: c_j, or where they are gated c_j(x)."""
        if self.form != "gated":
            return self.c[j]
        tail = self._head.tail(self.module, self._paired(x), same)
        if self.binary:
            return tail.column(torch.zeros_like(j))[: len(x)] * (j - 0.5)[:, None]
        return tail.column(torch.cat([j] * (len(tail.y) // len(j))))[: len(x)]

    def _paired(self, x: Tensor) -> Tensor:
        """Where the module squeezes, one image goes in twice: alone it would lose its axis."""
        return torch.cat([x, x]) if self._alone and len(x) == 1 else x

    def outputs(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """x(1) … x(B), each [N, D_b, H_b, W_b], and the prediction y [N, C] of one pass."""
        *activations, y = self._pass(x, 0)
        return activations, y

    def activations(self, x: Tensor) -> list[Tensor]:
        """x(1) … x(B), each [N, D_b, H_b, W_b]; the last is h."""
        return self.outputs(x)[0]

    def encode(self, x: Tensor) -> Tensor:
        """h, [N, D, H, W], in training mode as in evaluation."""
        return self._pass(x, len(self.blocks) - 1)[0]

    def forward(self, x: Tensor) -> Tensor:
        """The prediction y, [N, C]."""
        return self._pass(x, len(self.blocks))[0]

    def _pass(self, x: Tensor, first: int) -> list[Tensor]:
        """What is read at the taps from index ``first`` on, in one pass of the module as it is.

        h is what its tensor holds in the end. The blocks before it are wanted as they were returned: where a later
        layer changed one in place, the pass is made again with a copy of it, and every later pass copies it.
        """
        h, images = len(self.blocks) - 1, len(x)
        wanted = {self._places[block][0]: block for block in range(first, len(self._places))}
        reading = _Reading(wanted, h, self._changed)
        reading.run(self.module, self._paired(x))
        read = reading.read
        changed = {block for block, version in reading.versions.items() if read[block]._version != version}
        if changed:
            self._changed |= changed
            return self._pass(x, first)
        outputs = []
        for block in range(first, len(self._places)):
            found = self._places[block][1]
            u = read[block]
            u = found.to_maps(u) if found else u.reshape(-1, len(self.classes) - self.binary)
            outputs.append((u if len(u) == images else u[:images]).float())
        if self.binary:
            outputs[-1] = _both(outputs[-1].T).T
        return outputs

    def probabilities(self, y: Tensor) -> Tensor:
        """Of scores y [N, C]: of each output alone where the network returns a sigmoid of several, else of all."""
        return y.sigmoid() if self.activation == "sigmoid" and not self.binary else y.softmax(1)

    def output(self, name: str | int) -> int:
        """Index of the output with this name or index; a ValueError that lists the nearest names if there is none.

        Digits that are no name are an index.
        """
        if isinstance(name, str) and name in self.classes:
            return self.classes.index(name)
        is_index = isinstance(name, int | np.integer) or (isinstance(name, str) and name.isdecimal())
        if is_index and 0 <= int(name) < len(self.classes):
            return int(name)
        close = get_close_matches(str(name), self.classes, n=4) or self.classes[:8]
        more = " …" if len(close) < len(self.classes) else ""
        raise ValueError(f"target must be a class of {self.name}, got {name!r}: {', '.join(close)}{more}")

    def targets(self, target: Target) -> list[int | None]:
        """Outputs that an attribution is to, by name or index: one, or two of which the second is subtracted.

        None stands for the class predicted for an image, which an empty name or None asks for.
        """
        names = list(target) if isinstance(target, Sequence) and not isinstance(target, str) else [target]
        if len(names) not in (1, 2):
            raise ValueError(f"target must be a class, or two of which the second is subtracted, got {len(names)}")
        outputs = [None if name is None or name == "" else self.output(name) for name in names]
        if len(outputs) == 2 and outputs[0] == outputs[1]:
            raise ValueError(f"target must be two different classes, got {names[0]!r} twice")
        return outputs

    def preprocessing(self) -> str:
        """Input size and normalisation in a few words, with what is assumed."""
        input = self.input
        how = name_of(input.transform) if input.transform else input.fit
        words = f"{' x '.join(map(str, input.size))} pixels ({how}), mean {input.mean}, std {input.std}"
        words += f", window {input.window}" if input.window else ""
        if not self.assumed:
            return words
        given = ", ".join(f"{name}=" for name in self.assumed)
        return f"{words}; {', '.join(self.assumed)} assumed: give {given} if the network was trained with others"

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that stand for the weights."""
        return fingerprint(self.module.state_dict())

    def settings(self) -> dict[str, Any]:
        """What fixes the explanation, to be saved with it."""
        settings = {name: getattr(self, name) for name in ("name", "blocks", "head", "between")}
        return {"network": {**settings, **self.input.settings, "weights": self.fingerprint}}

    def save(self, folder: str | Path, *, head_only: bool = False) -> None:
        """Write ``network.json``, and ``weights.safetensors`` under the library's own names, for :func:`load`.

        A library's weights that were not changed are not written, nor those of a module of your own. With ``head_only``
        ``head.safetensors`` takes the place of the weights, and :func:`load` needs the file they come from. A file of
        those names which this did not write is refused (FileExistsError).
        """
        folder, weights = Path(folder), self.fingerprint
        for name in (WEIGHTS, HEAD):
            if (folder / name).exists() and not (folder / SETTINGS).exists():
                raise FileExistsError(f"{folder / name} is not of a network saved here: choose another folder")
        names = ("name", "reference", "blocks", "head", "classes", "named", "assumed")
        saved = {**{name: getattr(self, name) for name in names}, "input": self.input.settings}
        save_json(folder / SETTINGS, {**saved, "fingerprint": weights, "scores": self._scores()})
        file, state = WEIGHTS, self.module.state_dict()
        if head_only:
            file, state = HEAD, {key: value for key, value in state.items() if key.startswith(f"{self.head}.")}
        for name in {WEIGHTS, HEAD} - {file}:
            (folder / name).unlink(missing_ok=True)
        if self.reference is None or self.reference["weights"] == weights:
            (folder / file).unlink(missing_ok=True)
        else:
            save_tensors(folder / file, state, self.settings())

    def _scores(self) -> list[list[float]]:
        """Of the first outputs on two images of noise."""
        with exact(), torch.no_grad():
            y = self.eval()(noise(self.input, next(self.module.parameters())))
        return y[:, :SCORES].tolist()


class _Reading(Pass):
    """Reads what is at taps, as :meth:`Network._pass` says."""

    def __init__(self, wanted: dict[Tap, int], h: int, changed: set[int]) -> None:
        sources = {tap.source for tap in wanted}
        modules = [source for source in sources if isinstance(source, str)]
        super().__init__(modules, {source for source in sources if not isinstance(source, str)})
        self.wanted, self.last, self.changed = wanted, h, changed
        self.read: dict[int, Tensor] = {}
        self.versions: dict[int, int] = {}

    def see(self, tap: Tap, x: Tensor) -> Tensor:
        block = self.wanted.get(tap)
        if block is not None:
            copied = block < self.last and (block in self.changed or x.is_inference())
            self.read[block] = x.clone() if copied else x
            if block < self.last and not copied:
                self.versions[block] = x._version
        return x


def _both(y: Tensor) -> Tensor:
    """Of one score, [1, …], those of two classes."""
    return torch.cat([-y / 2, y / 2])


def theorem1_residual(network: Network, x: Tensor) -> float:
    """How far y is from its form in h (eq. 5, or beyond the paper), relative to the largest score.

    A ValueError where no form holds.
    """
    if not network.form:
        raise ValueError(f"Theorem 1 and eq. 11 do not hold for {network.name}: {network.between}; KMEx and B4 … do")
    return network._head.residual(network.module, x, None if network.form == "gated" else network._affine())


# --- by name, to explain or to train ------------------------------------------------------------------------------


def network(
    model: str | Path | nn.Module,
    weights: str | Path | Mapping[str, Any] = "",
    *,
    arch_args: Mapping[str, Any] | None = None,
    classes: Iterable[str] | Mapping[Any, Any] | str | Path = (),
    blocks: Sequence[str] = (),
    head: str = "",
    image_size: int | Sequence[int] = 0,
    mean: float | Sequence[float] | Any = (),
    std: float | Sequence[float] | Any = (),
    fit: str = "",
    window: Sequence[float] = (),
    transform: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
) -> Network:
    """A network to explain, from a name and weights; nothing is trained.

    Parameters
    ----------
    model
        A name of torchvision (``resnet50``) or timm (``timm/resnet50.a1_in1k``), your own ``nn.Module`` (used as it is
        and frozen, see :class:`Network`), or the folder of a run or of a saved explanation.
    weights
        ``imagenet`` (the library's, downloaded on first use), ``random``, a state dict or a file with one (safetensors,
        or PyTorch's without pickled objects). Empty: ``imagenet`` for a name; your module as it is. A checkpoint is
        searched for what fits, see :func:`~kmex_utils.networks.checkpoints.fitting`: prefixes are taken off, a loss and
        an optimizer left, and weights taken rather than their average; give the average's state dict for that.
    arch_args
        Arguments of the library's class, plain data: ``{"layers": [2, 2, 2, 3]}`` of ``timm/resnet18``.
    classes, blocks, head
        As in :class:`Network`; ``classes`` in any form that :func:`~kmex_utils.networks.class_names.class_names` takes,
        or empty: known from the weights.
    image_size, mean, std, fit
        ``image_size`` a number or (H, W), ``mean`` and ``std`` numbers, arrays or tensors, one value or one a channel.
        0 or empty: those of the library's weights for that name, else 224, ImageNet's and ``crop``. What weights from a
        file or your module were trained with is not known: :func:`kmex_utils.explain` says what it assumes.
    window, transform
        As in :class:`~kmex_utils.data.Input`. What is not given beside a ``transform`` is read off what it makes of a
        black and a white image: size, mean and std.
    seed
        Of random weights.

    What cannot be had or does not fit is one line of ValueError, FileNotFoundError, ConnectionError or ImportError.
    """
    given: dict[str, Any] = {"fit": fit, "window": numbers("window", window), "transform": transform}
    given |= {"image_size": image_size, "mean": numbers("mean", mean), "std": numbers("std", std)}
    if transform:
        given = read_off(transform) | {key: value for key, value in given.items() if value}
        if not ("mean" in given and "std" in given):
            raise ValueError(f"mean and std of {name_of(transform)} cannot be read off it: give mean= and std=")
    if not isinstance(model, str | Path | nn.Module):
        raise TypeError(f"model is a name, a folder or an nn.Module, got {model!r}")
    names, name = class_names(classes), ""
    weights = str(weights) if isinstance(weights, Path) else weights
    path = weights if isinstance(weights, str) else "the given mapping"
    assumed: tuple[str, ...] = ("image_size", "mean", "std")
    if isinstance(model, nn.Module):
        if weights in NO_FILES or arch_args:
            what = "arch_args" if arch_args else f"weights={weights!r}"
            raise ValueError(f"{what} goes with a model's name; your module comes with its own")
        made = Built(model, None, IMAGENET)
        if weights != "":
            load_into(model, read(weights), type(model).__name__, path)
    elif folder := _saved_at(model):
        if (weights != "" and not (folder / HEAD).is_file()) or arch_args:
            raise ValueError(f"weights and arch_args go with a model's name; the network in {folder} has its own")
        saved = load(folder, transform=transform, weights=weights)
        made = Built(saved.module, saved.reference, saved.input, saved.classes if saved.named else ())
        name, assumed, blocks, head = saved.name, saved.assumed, blocks or (*saved.blocks[:-1], H), head or saved.head
    else:
        name, weights = str(model), "imagenet" if weights == "" else weights
        content = None if weights in NO_FILES else read(weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformed = content is not None or weights == "imagenet"
            made = build(name, arch_args, imagenet=weights == "imagenet", transform_input=transformed)
        if content is not None:
            input = _taken_in(made, given)
            state = fitting(made.module, content, path)
            fit_head(made.module, state, head or Network(made.module, input=input, name=name).head, names, path)
            load_into(made.module, state, name, path)
        else:
            assumed = ()
        _channels_last(made.module)
    input = _taken_in(made, given)
    names = names or made.classes
    network = Network(
        made.module, blocks=blocks, head=head, classes=names, input=input, name=name, reference=made.reference
    )
    network.assumed = tuple(key for key in assumed if not given.get(key))
    return network


def _channels_last(module: nn.Module) -> nn.Module:
    """Weights of two axes of positions so; ``nn.Module.to`` refuses others."""
    for parameter in module.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return module


def _taken_in(made: Built, given: Mapping[str, Any]) -> Input:
    """As given, else as the library says; a first convolution of one channel takes grey, by RGB's average."""
    input, convolution = made.input, next((m for m in made.module.modules() if isinstance(m, nn.Conv2d)), None)
    if convolution is not None and convolution.in_channels == 1 and input.channels == 3:
        mean, std = ((round(sum(values) / 3, 6),) for values in (input.mean, input.std))
        input = replace(input, channels=1, mean=mean, std=std)
    return replace(input, **{key: value for key, value in given.items() if value})


def _saved_at(model: str | Path) -> Path | None:
    """The folder of a saved network, from where one is or from the repository's root; None for a library's name."""
    if is_timm(str(model)) or is_torchvision(str(model)):
        return None
    folder = paths.located(model)
    return folder if (folder / SETTINGS).is_file() else None


def for_training(
    arch: str,
    classes: Sequence[str],
    weights: str,
    input: Input,
    *,
    arch_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    bias: bool = False,
) -> Network:
    """A network by name with a fresh head, frozen like any: ``.train().requires_grad_(True)`` makes it trainable.

    ``weights`` are as in :func:`network`, ``scratch`` for random ones; of a file, as another training left it, the head
    is taken too where the shapes agree. ``seed`` is that of the random initialisation, which leaves the caller's random
    state. Eq. 2 has no ``bias``.
    """
    content = None if weights in NO_FILES else read(paths.resolve(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build(arch, arch_args, imagenet=weights == "imagenet", transform_input=False)
        which = arch, repr(arch_args), weights == "imagenet"
        if which not in _FOUND:
            whole = Network(made.module, input=made.input, name=arch)
            if whole.form != "linear" or not isinstance(whole.classifier, nn.Linear):
                why = whole.between or f"its head is {whole.form}, not one linear layer"
                raise ValueError(f"{arch} is not of the paper's form (eq. 1, 2): {why}")
            _FOUND[which] = whole.head, (*whole.blocks[:-1], H), whole.c.shape[1]
        where, blocks, depth = _FOUND[which]
        head = nn.Linear(depth, len(classes), bias=bias)
    made.module.set_submodule(where, head)
    if content is not None:
        state = fitting(made.module, content, weights)
        shapes = {key: value.shape for key, value in state.items() if key.rpartition(".")[0] == where}
        if shapes != {f"{where}.{key}": value.shape for key, value in head.state_dict().items()}:
            state = {key: value for key, value in state.items() if key not in shapes}
        load_into(made.module, state, arch, weights, without=where)
    _channels_last(made.module)
    return Network(
        made.module, blocks=blocks, head=where, classes=classes, input=input, name=arch, reference=made.reference
    )


# --- from a folder ------------------------------------------------------------------------------------------------


def load(
    folder: str | Path,
    module: nn.Module | None = None,
    transform: Callable[[Any], Tensor] | None = None,
    weights: str | Path | Mapping[str, Any] = "",
) -> Network:
    """The network that :meth:`Network.save` wrote, frozen; checked by the fingerprint of its weights and by its scores.

    ``module`` is your own, where it is not one of torchvision or timm, and so is ``transform``. ``weights``, a file, a
    state dict or ``imagenet``, are those of a network saved with its head alone. What is missing, damaged or differs is
    one line of FileNotFoundError, ValueError or ConnectionError.
    """
    folder = paths.located(folder)
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no saved network: give the folder of a run or of a saved explanation")
    saved = load_json(path)
    ours = module is None
    try:
        input = Input.of(saved["input"], transform)
        module = _made_again(folder, saved, weights) if module is None else module
        how = {name: saved[name] for name in ("head", "classes", "name", "reference")}
        network = Network(module, blocks=[*saved["blocks"][:-1], H], input=input, **how)
        network.named, network.assumed = bool(saved["named"]), tuple(saved["assumed"])
        same_weights = network.fingerprint == saved["fingerprint"]
        expected = torch.tensor(saved["scores"], dtype=torch.float32)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{path} is not of a saved network ({reason(error)}): save it again") from None
    if not same_weights:
        whose = network.name if ours else "your module"
        raise ValueError(f"the weights of {whose} are not those that {path} was saved with")
    scores = torch.tensor(network._scores())
    tolerance = SCORES_DIFFER * float(scores.abs().max())
    if scores.shape != expected.shape or not torch.allclose(scores, expected, 0, tolerance, equal_nan=True):
        what = f"{network.name} has the weights saved in {folder} but gives other scores"
        raise ValueError(f"{what}: its forward differs")
    return network


def _made_again(folder: Path, saved: dict[str, Any], weights: str | Path | Mapping[str, Any]) -> nn.Module:
    """A network by its reference, with its library's weights, those beside it, or the given ones and its head."""
    reference, head = saved["reference"], saved["head"]
    if reference is None:
        raise ValueError(f"{saved['name']} in {folder} is a module of your own: give it, as load(folder, module)")
    apart = (folder / HEAD).is_file()
    if apart and weights == "":
        raise ValueError(
            f"{folder} holds no weights but the head's: give weights=, the file {saved['name']} was made of"
        )
    if not apart and weights != "":
        raise ValueError(f"weights= goes with what was saved without them; the network in {folder} has its own")
    imagenet = weights == "imagenet" if apart else reference["weights"] == saved["fingerprint"]
    with torch.random.fork_rng(devices=[]):
        module = build(reference["arch"], reference["arch_args"], imagenet=imagenet).module
        if apart or not imagenet:
            path = folder / (HEAD if apart else WEIGHTS)
            state, _ = load_tensors(path)
            if apart:
                given = module.state_dict() if imagenet else fitting(module, read(weights), str(weights)[:200])
                state |= {key: value for key, value in given.items() if not key.startswith(f"{head}.")}
            fit_head(module, state, head, (), path)
            fix = "" if apart else ": train again with a lower learning_rate"
            load_into(module, state, reference["arch"], path, fix=fix)
    return _channels_last(module)
