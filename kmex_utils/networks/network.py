"""Any CNN with average pool and linear head, seen as blocks: torchvision, timm, your own module, your weights.

A network is run once on noise and watched. The *head* is the last linear layer, *h* what the last average pool before
it averages, and the blocks are the last output at each resolution on the way there. Nothing is rebuilt: the network
stays as it is, trained or explained, and its block outputs are read while it runs.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import paths
from ..data import IMAGENET_MEAN, IMAGENET_STD, Input
from ..data.input import name_of, numbers, read_off
from ..hardware import exact
from ..method.explainers import CNNAsSEM
from ..store import load_json, load_tensors, save_json, save_tensors
from .catalogue import Built, build, is_timm, is_torchvision
from .checkpoints import fingerprint, fit_head, load_into, read_state, reason
from .class_names import class_names
from .watch import H, Pools, Tap, Watched, noise

IMAGENET = Input(224, IMAGENET_MEAN, IMAGENET_STD, "crop")
SETTINGS, WEIGHTS = "network.json", "weights.safetensors"
NO_FILES = ("imagenet", "random", "scratch")  # other weights are files; the last two are the same
SCORES = 8  # outputs whose scores on noise are saved
SCORES_DIFFER = 1e-3  # relative to the largest: far above another chip's rounding, far below another forward


class Network(nn.Module):
    """A network with what is needed to explain it, or to train it.

    Parameters
    ----------
    module
        Takes images [N, 3, S, S], with float32 weights. What it returns does not matter: y is read at its head. It is
        used as it is, not copied: put into eval mode, its parameters frozen, and left on the CPU after computations.
        Give ``copy.deepcopy(module)`` to go on training it.
    blocks
        Names of the modules whose outputs are x(1), x(2) …; empty: the last output at each resolution, of the deepest
        four. The last block always ends at h, the input of the average pool. Of a module that is called several times
        ``pool`` is the last output, ``pool#0`` the first.
    head
        Name of the linear layer; empty: the last one called.
    classes
        Names of the head's outputs; empty: their numbers. A name that several outputs bear gets their number:
        ``crane (134)``, ``crane (517)``.
    input, name
        How images enter; a name for tables and messages.
    reference
        How a library makes the module again, see :class:`~kmex_utils.networks.catalogue.Built`; None: it is your own.

    Attributes
    ----------
    between
        What keeps y from being a linear function of avg.pool(h), in words; empty: nothing does.
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
        self.module = module
        self.eval().requires_grad_(False)
        watched = Watched(self.module, input.size, self.name, input.channels)
        self.head = watched.head(head)
        self._pool = watched.pool(self.head)
        named, last = watched.blocks(blocks, self._pool), watched.returning_h(self._pool)
        self.blocks = (*named, watched.encoder(self._pool))
        before = [call.tap for call in named.values()]
        self._taps = [*before, last.tap if last else None, watched.last(self.head).tap]  # of x(1) …, h, y
        self._changed: set[int] = set()  # blocks whose output a later layer changes in place
        self.between = watched.between(self._pool, self.head)
        c = self.classifier.out_features
        if classes and len(classes) != c:
            raise ValueError(f"{len(classes)} class names, but the head {self.head!r} of {self.name} has {c} outputs")
        self.named = bool(classes)
        self.assumed: tuple[str, ...] = ()
        often = Counter(classes)
        told_apart = [f"{name} ({j})" if often[name] > 1 else name for j, name in enumerate(classes)]
        self.classes = tuple(told_apart or map(str, range(c)))

    @property
    def classifier(self) -> nn.Linear:
        """The head."""
        return cast(nn.Linear, self.module.get_submodule(self.head))

    @property
    def pooled_linear(self) -> bool:
        """Whether y is a linear function of avg.pool(h), as eq. 2 says."""
        return not self.between

    @property
    def c(self) -> Tensor:
        """The head's columns c_j, [C, D]; a ValueError where they are no prototypes of h."""
        if self.between:
            raise ValueError(f"Theorem 1 and eq. 11 do not hold for {self.name}: {self.between}; KMEx and B4 … do")
        return self.classifier.weight

    @property
    def b(self) -> Tensor | None:
        """The head's bias, [C], or None."""
        return self.classifier.bias

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
        read: dict[int, Tensor] = {}
        versions: dict[int, int] = {}
        h = len(self.blocks) - 1

        def reading(block: int, tap: Tap) -> Callable[[nn.Module, Any, Tensor], None]:
            calls = count()

            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                if next(calls) != tap.call:
                    return
                copied = block < h and (block in self._changed or output.is_inference())
                read[block] = output.clone() if copied else output
                if block < h and not copied:
                    versions[block] = output._version

            return hook

        with ExitStack() as stack:
            for block, tap in enumerate(self._taps[first:], first):
                if tap is None:  # only h: a function makes it
                    pools = stack.enter_context(Pools())
                else:
                    part = self.module.get_submodule(tap.name)
                    stack.callback(part.register_forward_hook(reading(block, tap)).remove)
            self.module(x)
        if first <= h and self._taps[h] is None:
            read[h] = pools.inputs[self._pool.call]
        changed = {block for block, version in versions.items() if read[block]._version != version}
        if changed:
            self._changed |= changed
            return self._pass(x, first)
        return [read[block] for block in range(first, len(self._taps))]

    def output(self, name: str | int) -> int:
        """Index of the output with this name or index; a ValueError that lists the nearest names if there is none."""
        if isinstance(name, int) and 0 <= name < len(self.classes):
            return name
        if not isinstance(name, str) or name not in self.classes:
            close = get_close_matches(str(name), self.classes, n=4) or self.classes[:8]
            more = " …" if len(close) < len(self.classes) else ""
            raise ValueError(f"target must be a class of {self.name}, got {name!r}: {', '.join(close)}{more}")
        return self.classes.index(name)

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

    def save(self, folder: str | Path) -> None:
        """Write ``network.json``, and ``weights.safetensors`` under the library's own names, for :func:`load`.

        A library's weights that were not changed are not written, nor those of a module of your own. A file of that
        name which this did not write is refused (FileExistsError).
        """
        folder, weights = Path(folder), self.fingerprint
        if (folder / WEIGHTS).exists() and not (folder / SETTINGS).exists():
            raise FileExistsError(f"{folder / WEIGHTS} is not of a network saved here: choose another folder")
        names = ("name", "reference", "blocks", "head", "classes", "named", "assumed")
        saved = {**{name: getattr(self, name) for name in names}, "input": self.input.settings}
        save_json(folder / SETTINGS, {**saved, "fingerprint": weights, "scores": self._scores()})
        if self.reference is None or self.reference["weights"] == weights:
            (folder / WEIGHTS).unlink(missing_ok=True)
        else:
            save_tensors(folder / WEIGHTS, self.module.state_dict(), self.settings())

    def _scores(self) -> list[list[float]]:
        """Of the first outputs on two images of noise."""
        with exact(), torch.no_grad():
            y = self.eval()(noise(self.input.size, self.classifier.weight, self.input.channels))
        return y[:, :SCORES].tolist()


@torch.no_grad()
def theorem1_residual(network: Network, x: Tensor) -> float:
    """The largest difference of both sides of eq. 5, relative to the largest score of clf(avg.pool(enc(x))).

    A ValueError where something lies between average pool and head.
    """
    activations, y = network.outputs(x)
    sem = CNNAsSEM(network.c, network.b)(activations)
    return ((y - sem).abs().max() / y.abs().max()).item()


# --- by name, to explain or to train ------------------------------------------------------------------------------


def network(
    model: str | Path | nn.Module,
    weights: str | Path = "",
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
        ``imagenet`` (the library's, downloaded on first use), ``random``, or a file with a state dict (safetensors, or
        PyTorch's with tensors only). Empty: ``imagenet`` for a name; your module as it is.
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
    names, weights, name = class_names(classes), str(weights), ""
    assumed: tuple[str, ...] = ("image_size", "mean", "std")
    if isinstance(model, nn.Module):
        if weights in NO_FILES or arch_args:
            what = "arch_args" if arch_args else f"weights={weights!r}"
            raise ValueError(f"{what} goes with a model's name; your module comes with its own")
        made = Built(model, None, IMAGENET)
        if weights:
            load_into(model, read_state(weights), type(model).__name__, weights)
    elif folder := _saved_at(model):
        if weights or arch_args:
            raise ValueError(f"weights and arch_args go with a model's name; the network in {folder} has its own")
        saved = load(folder, transform=transform)
        made = Built(saved.module, saved.reference, saved.input, saved.classes if saved.named else ())
        name, assumed, blocks, head = saved.name, saved.assumed, blocks or (*saved.blocks[:-1], H), head or saved.head
    else:
        name, weights = str(model), weights or "imagenet"
        state = {} if weights in NO_FILES else read_state(weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformed = bool(state) or weights == "imagenet"
            made = build(name, arch_args, imagenet=weights == "imagenet", transform_input=transformed)
        if state:
            input = _taken_in(made, given)
            watched = Watched(made.module.eval(), input.size, name, input.channels)
            fit_head(made.module, state, head or watched.head(""), names, weights)
            load_into(made.module, state, name, weights)
        else:
            assumed = ()
        made.module.to(memory_format=torch.channels_last)
    input = _taken_in(made, given)
    names = names or made.classes
    network = Network(
        made.module, blocks=blocks, head=head, classes=names, input=input, name=name, reference=made.reference
    )
    network.assumed = tuple(key for key in assumed if not given.get(key))
    return network


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
    state = {} if weights in NO_FILES else read_state(paths.resolve(weights))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = build(arch, arch_args, imagenet=weights == "imagenet", transform_input=False)
        whole = Network(made.module, input=made.input, name=arch)
        if whole.between:
            raise ValueError(f"{arch} is not of the paper's form (eq. 1, 2): {whole.between}")
        head = nn.Linear(whole.classifier.in_features, len(classes), bias=bias)
    made.module.set_submodule(whole.head, head)
    if state:
        shapes = {key: value.shape for key, value in state.items() if key.rpartition(".")[0] == whole.head}
        if shapes != {f"{whole.head}.{key}": value.shape for key, value in head.state_dict().items()}:
            state = {key: value for key, value in state.items() if key not in shapes}
        load_into(made.module, state, arch, weights, without=whole.head)
    made.module.to(memory_format=torch.channels_last)
    # blocks as they are at the library's size, where resolutions are far apart
    blocks, where = (*whole.blocks[:-1], H), whole.head
    return Network(
        made.module, blocks=blocks, head=where, classes=classes, input=input, name=arch, reference=made.reference
    )


# --- from a folder ------------------------------------------------------------------------------------------------


def load(
    folder: str | Path, module: nn.Module | None = None, transform: Callable[[Any], Tensor] | None = None
) -> Network:
    """The network that :meth:`Network.save` wrote, frozen; checked by the fingerprint of its weights and by its scores.

    ``module`` is your own, where it is not one of torchvision or timm, and so is ``transform``. What is missing,
    damaged or differs is one line
    of FileNotFoundError, ValueError or ConnectionError.
    """
    folder = paths.located(folder)
    path = folder / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no saved network: give the folder of a run or of a saved explanation")
    saved = load_json(path)
    ours = module is None
    try:
        input = Input.of(saved["input"], transform)
        module = _made_again(folder, saved) if module is None else module
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


def _made_again(folder: Path, saved: dict[str, Any]) -> nn.Module:
    """A network by its reference, with its library's weights or those beside it."""
    reference = saved["reference"]
    if reference is None:
        raise ValueError(f"{saved['name']} in {folder} is a module of your own: give it, as load(folder, module)")
    imagenet = reference["weights"] == saved["fingerprint"]
    with torch.random.fork_rng(devices=[]):
        module = build(reference["arch"], reference["arch_args"], imagenet=imagenet).module
        if not imagenet:
            state, _ = load_tensors(folder / WEIGHTS)
            fit_head(module, state, saved["head"], (), folder / WEIGHTS)
            fix = ": train again with a lower learning_rate"
            load_into(module, state, reference["arch"], folder / WEIGHTS, fix=fix)
    return module.to(memory_format=torch.channels_last)
