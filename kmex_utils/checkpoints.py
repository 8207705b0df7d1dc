"""Networks by name with their library's preprocessing, and state dicts from files."""

from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from .backbones import imagenet_weights, weights_entry

AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3 that serve training only


def is_timm(name: str) -> bool:
    """Whether a name asks for timm."""
    return name.startswith(("timm/", "timm:"))


def of_torchvision(name: str, weights: str | Path) -> tuple[nn.Module, dict]:
    """A network of torchvision and what its weights were trained with: image_size, mean, std, classes."""
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


def of_timm(name: str, weights: str | Path) -> tuple[nn.Module, dict]:
    """A network of timm and what its weights were trained with: image_size, mean, std, classes."""
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
        "classes": timm_classes(module) if pretrained else (),
    }


def timm_classes(module: nn.Module) -> tuple[str, ...]:
    """Names of ImageNet's classes as the network orders them; empty where timm does not know."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(module)
    if not subset:
        return ()
    info = ImageNetInfo(subset)
    return tuple(info.index_to_description(i) for i in range(info.num_classes()))


def read_state(path: str | Path) -> dict[str, torch.Tensor]:
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


def fit_head(module: nn.Module, state: dict, head: str, names: tuple[str, ...], path) -> None:
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


def load_into(module: nn.Module, state: dict, name: str, path) -> None:
    """Load weights that fit and are finite; one line says what does not."""
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
