"""State dicts from files, matched to a network name by name."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import paths

State = dict[str, Tensor]
_WRAPPINGS = ("state_dict", "model_state_dict", "model")
_PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3 that serve training only
_COUNTER = "num_batches_tracked"  # of batch normalisation: changes nothing


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that stand for the names and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_state(path: str | Path) -> State:
    """A state dict from a file, without its wrappings; never unpickles objects. One line says what is wrong with it."""
    path = paths.located(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: weights is 'imagenet', 'random' or a file with a state dict")
    try:
        safe = path.suffix == ".safetensors"
        state: Any = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise many kinds
        if "Unsupported global" in str(error):
            message = f"{path} holds pickled objects, which may run code: save model.state_dict() alone"
            raise ValueError(message) from None
        raise ValueError(f"{path} is not a readable state dict ({reason(error)})") from None
    for wrapping in _WRAPPINGS:
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path} is not a state dict: names with tensors, as model.state_dict() gives")
    while prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def reason(error: Exception) -> str:
    """The first line of an error."""
    return (str(error) or type(error).__name__).splitlines()[0]


def fit_head(module: nn.Module, state: State, head: str, classes: Sequence[str], path: str | Path) -> None:
    """Give a network by name the file's number of classes, and a bias only if the file has one."""
    weight, linear = state.get(f"{head}.weight"), dict(module.named_modules()).get(head)
    if isinstance(linear, nn.Conv2d) and weight is not None and weight.shape[2:] == (1, 1):
        if len(weight) != linear.out_channels:
            module.set_submodule(head, nn.Conv2d(linear.in_channels, len(weight), 1, bias=f"{head}.bias" in state))
        return
    if weight is None or weight.dim() != 2 or not isinstance(linear, nn.Linear):
        return
    if classes and len(classes) != len(weight):
        raise ValueError(f"{len(classes)} class names, but the head {head!r} in {path} has {len(weight)} outputs")
    bias, shape = f"{head}.bias" in state, (linear.out_features, linear.in_features)
    if weight.shape[1] == linear.in_features and (weight.shape != shape or bias != (linear.bias is not None)):
        module.set_submodule(head, nn.Linear(linear.in_features, len(weight), bias=bias))


def load_into(module: nn.Module, state: State, name: str, path: str | Path, without: str = "", fix: str = "") -> None:
    """Load weights that are finite and match the module's one to one by name; a ValueError says what does not.

    The file may lack the part ``without``. ``fix`` says what to do about weights that are not finite.
    """
    expected = module.state_dict()
    shapes = [key for key in state if key in expected and state[key].shape != expected[key].shape]
    missing = [key for key in expected if key not in state and not (without and key.startswith(f"{without}."))]
    unknown = [key for key in state if key not in expected and not key.startswith(_AUXILIARY)]
    differences = [f"{key} is {list(state[key].shape)}, not {list(expected[key].shape)}" for key in shapes[:1]]
    if len(shapes) > 1:
        differences.append(f"{len(shapes) - 1} more of another shape")
    for kind, keys in (("missing", missing), ("unknown", unknown)):
        if keys := [key for key in keys if not key.endswith(_COUNTER)]:
            differences.append(f"{len(keys)} {kind} ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''})")
    if differences:
        raise ValueError(f"the weights in {path} do not fit {name}: {', '.join(differences)}")
    broken = [key for key, value in state.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if broken:
        raise ValueError(f"{path} holds NaN or infinite weights ({broken[0]} …){fix}")
    module.load_state_dict(state, strict=False)
