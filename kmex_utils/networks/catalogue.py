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
from .checkpoints import State, load_into, reason
from .watch import Watched

_WITH_AUXILIARY = ("googlenet", "inception_v3")  # heads that serve training only: ours have none
_NO_ARCHITECTURE = {"device", "dtype"}  # constructors take these, too


class Built(NamedTuple):
    """A network by name, and what its library's weights were trained with; classes are known with these alone.

    ``reference`` says how to build it again: ``arch``, ``arch_args`` and ``weights``, the fingerprint of the library's
    weights where the network is to be explained with them.
    """

    module: nn.Module
    reference: dict[str, Any]
    input: Input
    classes: tuple[str, ...]


def is_timm(arch: str) -> bool:
    """Whether a name asks for timm."""
    return arch.startswith(("timm/", "timm:"))


def is_torchvision(arch: str) -> bool:
    """Whether torchvision has a network of this name."""
    from torchvision import models

    return arch in models.list_models(module=models)


def build(
    arch: str, weights: str = "random", arch_args: Mapping[str, Any] | None = None, *, to_train: bool = False
) -> Built:
    """A network of torchvision, or ``timm/<name>``; initial weights are drawn from PyTorch's random state.

    ``weights`` are ``imagenet``, ``random``, or anything else: a file's, loaded by the caller. ``arch_args`` are of the
    network's class, plain data. ``to_train``: googlenet and inception_v3 do not transform what enters. One line of
    ValueError, ConnectionError or ImportError says which name or argument is unknown, or which weights cannot be had.
    """
    try:
        arguments = json.loads(json.dumps(arch_args or {}, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"arch_args must be plain data: {reason(error)}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"arch_args must be names and values, as {{'layers': [2, 2, 2, 3]}}, got {arch_args!r}")
    if is_timm(arch):
        return _timm(arch, weights == "imagenet", arguments)
    return _torchvision(arch, weights == "imagenet", arguments, weights != "random" and not to_train)


def _torchvision(arch: str, imagenet: bool, arguments: dict[str, Any], transform_input: bool) -> Built:
    from torchvision import models

    if not is_torchvision(arch):
        known = models.list_models(module=models)
        close = get_close_matches(arch, known, n=4) or known[:4]
        raise ValueError(
            f"torchvision has no model {arch!r}; the nearest: {', '.join(close)}. For timm's give timm/<name>, for a "
            "saved network its folder"
        )
    fixed: dict[str, Any] = {}
    if arch in _WITH_AUXILIARY:
        fixed = {"init_weights": False, "aux_logits": False}  # their own initialisation is slow
        arguments = {"transform_input": transform_input, **arguments}
    constructor = partial(models.get_model, arch, weights=None, **fixed)
    _check(arch, constructor, arguments, frozenset(fixed))
    try:
        module = constructor(**arguments)
    except Exception as error:  # whatever a constructor makes of values it does not expect
        raise ValueError(f"{arch} cannot be made with arch_args {arguments}: {reason(error)}") from None
    entry = weights_entry(arch)
    if imagenet:
        load_into(module, imagenet_weights(arch), arch, entry.url)
    transform = entry.transforms()
    taken = Input(transform.crop_size[0], transform.mean, transform.std, "crop")
    classes = tuple(entry.meta["categories"]) if imagenet else ()
    return Built(module, {"arch": arch, "arch_args": arguments, "weights": ""}, taken, classes)


def _timm(arch: str, imagenet: bool, arguments: dict[str, Any]) -> Built:
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
    _check(arch, partial(timm.create_model, name), arguments)
    try:
        module = timm.create_model(name, pretrained=imagenet, **arguments)
    except Exception as error:  # the hub's many kinds of "no network", or as in _torchvision
        if imagenet:
            raise ConnectionError(
                f"timm cannot load {name!r} ({reason(error)}); give weights, a file, instead"
            ) from None
        raise ValueError(f"{arch} cannot be made with arch_args {arguments}: {reason(error)}") from None
    config = resolve_model_data_config(module)
    taken = Input(config["input_size"][-1], config["mean"], config["std"], "crop")
    subset = infer_imagenet_subset(module) if imagenet else None  # which classes, in the network's order
    info = ImageNetInfo(subset) if subset else None
    classes = tuple(info.index_to_description(i) for i in range(info.num_classes())) if info else ()
    return Built(module, {"arch": arch, "arch_args": arguments, "weights": ""}, taken, classes)


def _check(
    arch: str, make: Callable[[], nn.Module], arguments: dict[str, Any], fixed: frozenset[str] = frozenset()
) -> None:
    """Let arguments of the network's class pass, and no others: those of the library's own load, fetch or wrap."""
    if not arguments:
        return
    with torch.random.fork_rng(devices=[]):
        parameters = inspect.signature(type(make())).parameters.values()
    plain = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    known = sorted(plain - _NO_ARCHITECTURE - fixed)
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(f"{arch} takes no {unknown[0]!r} in arch_args, but any of {', '.join(known)}")


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
        raise ConnectionError(
            f"ImageNet weights of {arch} cannot be downloaded ({error}); put {entry.url} at {file}, "
            "or train from scratch with weights='scratch'"
        ) from None
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
    watched = Watched(built.module.eval(), built.input.image_size, arch)
    pool = watched.pool(watched.head(""))
    return (*(call.channels for call in watched.blocks((), pool).values()), watched.h(pool).shape[1])
