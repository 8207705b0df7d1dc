"""Any CNN with average pool and linear head, seen as blocks: torchvision, timm, your own module, your weights.

A network is run once on noise and watched. The *head* is the last linear layer, *h* what the last average pool before
it averages, and the blocks are the last output at each resolution on the way there. Nothing is rebuilt: the network
stays as it is and its block outputs are read while it runs.
"""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from . import paths
from .backbones import Backbone
from .checkpoints import AUXILIARY, fit_head, is_timm, load_into, of_timm, of_torchvision, read_state
from .datasets import RECIPES, Recipe
from .explainers import CNNAsSEM
from .runs import Run, fingerprint
from .store import replacing
from .watch import Pools, Tap, Watched

IMAGENET = {name: getattr(RECIPES["folder"], name) for name in ("mean", "std")}
FITS = ("crop", "stretch")


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
        watched = Watched(self.module, image_size, self.name)
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
        found: dict[Tap, torch.Tensor] = {}
        calls: dict[str, int] = {}
        y = None

        def keep_block(name):
            def hook(module, args, output):
                tap = Tap(name, calls.get(name, 0))
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
            pools = stack.enter_context(Pools())
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
            load_into(model, read_state(weights), name, weights)
        elif weights:
            raise ValueError(f"weights={weights!r} goes with a model's name; your module comes with its own")
        return _assuming(Network(model, classes=names, **given, **_in_force(options, {})), options)
    if str(model).endswith(".safetensors"):
        return _of_run(paths.resolve(model), names, given, options)
    weights = weights or "imagenet"
    known = of_timm if is_timm(str(model)) else of_torchvision
    from_file = weights not in ("imagenet", "random")
    state = read_state(weights) if from_file else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module, defaults = known(str(model), weights)
    if from_file:
        if str(model) in ("googlenet", "inception_v3"):
            state = {key: value for key, value in state.items() if not key.startswith(AUXILIARY)}
        size = options["image_size"] or defaults["image_size"]
        fit_head(module, state, head or Watched(module, size, str(model)).head(""), names, weights)
        load_into(module, state, str(model), weights)
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


def _of_run(path: Path, names: tuple[str, ...], given: dict, options: dict) -> Network:
    """The network of notebook 1, with the classes, size and normalisation it was trained with."""
    run = Run.of_weights(path)
    settings = run.settings()
    recipe = run.recipe()
    size = settings["data"].get("image_size") or recipe.image_size
    defaults = {"image_size": size, "mean": recipe.mean, "std": recipe.std, "fit": "stretch"}
    classes = names or settings["classes"]
    return Network(run.backbone(), classes=classes, name=settings["arch"], **given, **_in_force(options, defaults))


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
