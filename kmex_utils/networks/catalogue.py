"""Networks of torchvision and timm by name, with their library's weights, preprocessing and class names."""

import inspect
import json
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..data import Input
from .checkpoints import State, fingerprint, load_into, reason
from .trace import noise

_WITH_AUXILIARY = ("googlenet", "inception_v3")  # heads that serve training only: ours have none
_NO_ARCHITECTURE = {"aux_logits", "device", "dtype", "init_weights"}  # constructors take these, too


class Built(NamedTuple):
    """A network and what is known of it: of one by name what its library's weights were trained with.

    ``reference`` says how to build it again: ``arch``, ``arch_args`` and ``weights``, the fingerprint of the library's
    if they were taken; None: it has no name in a library.
    """

    module: nn.Module
    reference: dict[str, Any] | None
    input: Input
    classes: tuple[str, ...] = ()


def is_timm(arch: str) -> bool:
    """Whether a name asks for timm."""
    return arch.startswith(("timm/", "timm:"))


def is_torchvision(arch: str) -> bool:
    """Whether torchvision has a network of this name."""
    from torchvision import models

    return arch in models.list_models(module=models)


def build(
    arch: str,
    arch_args: Mapping[str, Any] | None = None,
    *,
    imagenet: bool = False,
    transform_input: bool = True,
) -> Built:
    """A network of torchvision, or ``timm/<name>``; initial weights are drawn from PyTorch's random state.

    ``arch_args`` are of the network's class, plain data. ``imagenet``: with the library's weights and class names.
    ``transform_input``: googlenet and inception_v3 take ImageNet's normalisation and make their own of it. One line of
    ValueError, ConnectionError or ImportError says which name or argument is unknown, or which weights cannot be had.
    """
    try:
        arguments = json.loads(json.dumps(arch_args or {}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"arch_args must be plain data: {reason(error)}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"arch_args must be names and values, as {{'layers': [2, 2, 2, 3]}}, got {arch_args!r}")
    if arch in _WITH_AUXILIARY:
        arguments = {"transform_input": transform_input, **arguments}
    module, taken, classes = (_timm if is_timm(arch) else _torchvision)(arch, arguments, imagenet)
    weights = fingerprint(module.state_dict()) if imagenet else ""
    reference = {"arch": arch, "arch_args": arguments, "weights": weights}
    return Built(module, reference, taken, tuple(classes) if imagenet else ())


def _torchvision(arch: str, arguments: dict[str, Any], imagenet: bool) -> tuple[nn.Module, Input, list[str]]:
    from torchvision import models

    if not is_torchvision(arch):
        known = models.list_models(module=models)
        nearest = ", ".join(get_close_matches(arch, known, n=4) or known[:4])
        advice = "For timm's give timm/<name>, for a saved network its folder"
        raise ValueError(f"torchvision has no model {arch!r}; the nearest: {nearest}. {advice}")
    # the initialisation of their own is slow
    fixed = {"init_weights": False, "aux_logits": False} if arch in _WITH_AUXILIARY else {}
    module = _made(arch, partial(models.get_model, arch, weights=None, **fixed), arguments, {})
    entry = weights_entry(arch)
    if imagenet:
        load_into(module, imagenet_weights(arch), arch, entry.url)
    transform = entry.transforms()
    return module, Input(transform.crop_size[0], transform.mean, transform.std, "crop"), entry.meta["categories"]


def _timm(arch: str, arguments: dict[str, Any], imagenet: bool) -> tuple[nn.Module, Input, list[str]]:
    try:
        import timm
        from timm.data.config import resolve_model_data_config
        from timm.data.imagenet_info import ImageNetInfo, infer_imagenet_subset
    except ImportError:
        raise ImportError(f"{arch!r} needs timm, which is not installed: pip install 'kmex-utils[timm]'") from None
    name = arch[len("timm/") :]
    if not timm.is_model(name):
        close = get_close_matches(name.split(".")[0], timm.list_models(), n=4)
        raise ValueError(f"timm has no model {name!r}; the nearest: {', '.join(close) or 'none'}")
    module = _made(arch, partial(timm.create_model, name), arguments, {"pretrained": True} if imagenet else {})
    config = resolve_model_data_config(module)
    subset = infer_imagenet_subset(module)  # which classes, in the network's order
    info = ImageNetInfo(subset) if subset else None
    classes = [info.index_to_description(i) for i in range(info.num_classes())] if info else []
    return module, Input(config["input_size"][1:], config["mean"], config["std"], "crop"), classes


def _made(
    arch: str, make: Callable[..., nn.Module], arguments: dict[str, Any], download: Mapping[str, bool]
) -> nn.Module:
    """Made with arguments of the network's class, and no others: those of the library's own load, fetch or wrap."""
    if arguments:
        with torch.random.fork_rng(devices=[]):
            parameters = inspect.signature(type(make())).parameters.values()
        plain = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} - _NO_ARCHITECTURE
        for name in arguments:
            if name not in plain:
                raise ValueError(f"{arch} takes no {name!r} in arch_args, but any of {', '.join(sorted(plain))}")
    try:
        return make(**arguments, **download)
    except Exception as error:  # of values a constructor does not expect, or the hub's many kinds of "no network"
        if download:
            message = f"timm cannot load {arch[len('timm/') :]!r} ({reason(error)}); give weights, a file, instead"
            raise ConnectionError(message) from None
        raise ValueError(f"{arch} cannot be made with arch_args {arguments}: {reason(error)}") from None


def weights_entry(arch: str) -> Any:
    """Torchvision's entry of a network's IMAGENET1K_V1 weights; of its default ones where there is no V1."""
    from torchvision.models import get_model_weights

    known = get_model_weights(arch)
    return known.__members__.get("IMAGENET1K_V1") or known.DEFAULT


def imagenet_weights(arch: str) -> State:
    """The state dict of :func:`weights_entry`; one line names the file to put in place without a network."""
    entry, (file, _) = weights_entry(arch), weights_file(arch)
    try:
        return entry.get_state_dict(check_hash=True, weights_only=True, map_location="cpu")
    except OSError as error:
        instead = f"put {entry.url} at {file}, or train from scratch with weights='scratch'"
        raise ConnectionError(f"ImageNet weights of {arch} cannot be downloaded ({error}); {instead}") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise ValueError(f"{file} is damaged ({reason(error)}); delete it and run again") from None


def weights_file(arch: str) -> tuple[Path, float]:
    """Where the library keeps a network's ImageNet weights once they are downloaded, and about how many bytes."""
    if not is_timm(arch):
        entry = weights_entry(arch)
        return Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[1], entry.meta["_file_size"] * 2**20
    with torch.random.fork_rng(devices=[]):
        module = build(arch).module
    from huggingface_hub.constants import HF_HUB_CACHE  # comes with timm

    name = cast(Any, module).pretrained_cfg.get("hf_hub_id") or arch
    folder = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    return folder, 4.0 * sum(value.numel() for value in module.state_dict().values())


def channels(arch: str, arch_args: Mapping[str, Any] | None = None) -> tuple[int, ...]:
    """D_1 … D_B of a network by name."""
    with torch.random.fork_rng(devices=[]):
        built = build(arch, arch_args=arch_args)
    from .network import Network

    network = Network(built.module, input=built.input, name=arch)
    return tuple(x.shape[1] for x in network.activations(noise(built.input)))
