"""State dicts from files, or as they are given, matched to a module name by name."""

import hashlib
import re
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import paths
from ..store import load_json

State = dict[str, Tensor]
# parts of names that wrappers add: DataParallel and averages, torch.compile, FSDP, activation checkpointing
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_AVERAGE = re.compile(r"(?<![A-Za-z])([Ee]ma|EMA|swa|SWA|avg|averaged?)(?![a-z])")
_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.(?=[12]\.)")  # norm.1 of torchvision's files is norm1
_AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads of googlenet and inception_v3 that serve training only
_COUNTER = "num_batches_tracked"  # of batch normalisation: changes nothing

_SAVE = "save model.state_dict() alone, in PyTorch or as safetensors"
_PORT = "give the state dict of the same network in PyTorch"
_BEGINNINGS = {  # of files that are no state dict: what they are and what to do
    rb"version https://git-lfs": "is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`",
    rb"(\xef\xbb\xbf)?\s*<[!?a-z]": "is a web page, not the file itself: download it again",
    rb"\s*[{\[]\s*\"": "is JSON: give the file with the tensors, or a name that ends in .index.json",
    rb"\x89HDF": f"is HDF5, as Keras writes it: {_PORT}",
    rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]": f"is ONNX or a TensorFlow graph: {_SAVE}",
    rb"GGUF": f"is GGUF: {_PORT}",
    rb"\x93NUMPY": f"is a NumPy array: {_SAVE}",
    rb"\x1f\x8b|BZh|\xfd7zXZ|7z\xbc\xaf|\x28\xb5\x2f\xfd": "is compressed: unpack it and give the file in it",
}
_ENTRIES = {  # how names in zip archives that are no state dict end
    "constants.pkl": f"is a TorchScript archive: {_SAVE}",
    "models/model.json": f"is a program of torch.export: {_SAVE}",
    "model.weights.h5": f"is of Keras: {_PORT}",
    ".npy": f"is a NumPy archive: {_SAVE}",
}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """16 hexadecimal digits that stand for the names and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read(weights: str | Path | Mapping[Any, Any]) -> Mapping[Any, Any]:
    """What a file with a state dict holds, nested as it is; a mapping as it is. Never unpickles objects.

    The file is PyTorch's, safetensors, or ``*.index.json`` beside the files it names. One line of FileNotFoundError,
    ValueError or TypeError says what is wrong with it.
    """
    if isinstance(weights, Mapping):
        return weights
    if not isinstance(weights, str | Path):
        kind = type(weights).__name__
        raise TypeError(f"weights is a name, a file or a state dict, got {kind}: give model.state_dict()")
    path = paths.located(weights)
    if path.is_file() and path.name.endswith(".index.json"):
        return _sharded(path)
    return _held(path)


def _sharded(path: Path) -> Mapping[Any, Any]:
    """What the files beside an index hold together."""
    try:
        files = sorted(set(load_json(path)["weight_map"].values()))
        outside = [file for file in files if Path(file).name != file]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is no index of a state dict: give the file with the tensors") from None
    if outside:
        raise ValueError(f"{path} names {outside[0]}, which is not beside it: only files of its folder are read")
    return {key: value for file in files for key, value in _held(path.with_name(file)).items()}


def _held(path: Path) -> Mapping[Any, Any]:
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the file with the state dict in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: weights is 'imagenet', 'random' or a file with a state dict")
    with path.open("rb") as file:
        start = file.read(64)
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols and TorchScript
            if start[8:9] == b"{":  # safetensors, whatever it is called: a header after its length
                return load_file(path)
            with path.open("rb") as file:  # by its path torch.load goes by the name's ending
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load and safetensors raise many kinds
        raise ValueError(f"{path} {_unreadable(path, start, error)}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is not a state dict: names with tensors, as model.state_dict() gives")
    return content


def _unreadable(path: Path, start: bytes, error: Exception) -> str:
    """What a file is that could not be read, and what to do."""
    if not start:
        return "is empty: download or save it again"
    for pattern, what in _BEGINNINGS.items():
        if re.match(pattern, start, re.IGNORECASE):
            return what
    if re.search(r"\.(data-\d+-of-\d+|index|meta)$", path.name):
        return f"is of a TensorFlow checkpoint: {_PORT}"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except Exception:  # zipfile raises many kinds
            return "is cut short or damaged: download or save it again"
        for ending, what in _ENTRIES.items():
            if any(name.endswith(ending) for name in names):
                return what
        if not any(name.endswith("data.pkl") for name in names):
            return (
                f"is a zip archive ({', '.join(map(repr, names[:3]))}): unpack it and give the file with the state dict"
            )
    name = re.search(r"GLOBAL (\S+)", str(error))
    if name or re.match(rb"\x80[\x03-\x05]", start):  # PyTorch's own begin with \x80\x02
        which = f" ({name[1]})" if name else ""
        return f"holds pickled objects, which may run code{which}: {_SAVE}"
    return f"is not a readable state dict ({reason(error)}): download or save it again"


def reason(error: Exception) -> str:
    """The first line of an error, without PyTorch's advice to unpickle what it refused."""
    lines = (line.strip() for line in str(error).splitlines() if not re.search("weights.only", line, re.IGNORECASE))
    return next(filter(None, lines), type(error).__name__).partition(" Please use `torch.serialization")[0]


def fitting(module: nn.Module, content: Mapping[Any, Any], path: str | Path) -> State:
    """The state dict inside nested mappings with the most names of a module, under the module's names.

    A prefix of the names is taken off where that makes more of them fit, what wrappers add between them always. Names
    fit if the shapes agree in all but the first dimension: a head may have other classes. What lies outside is left:
    it is of a loss or an optimizer. Weights go before their average (``ema``, ``swa``) where both fit; a ValueError
    names others that fit as well, or says that there are no tensors.
    """
    names = {_plain(name): name for name in module.state_dict()}
    shapes = {name: value.shape[1:] for name, value in module.state_dict().items()}
    unmatched: State = {}
    candidates: list[tuple[int, str, State]] = []
    for where, tensors in _tensors(content):
        unmatched = max(unmatched, tensors, key=len)
        fits: Counter[str] = Counter()
        for key, value in tensors.items():
            parts = key.split(".")
            for i, part in enumerate(parts):
                name = "" if part in _WRAPPERS else names.get(_plain(".".join(parts[i:])), "")
                if name and value.shape[1:] == shapes[name]:
                    fits[key[: len(key) - len(".".join(parts[i:]))]] += 1
        for prefix, count in fits.items():
            inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            state = {names.get(_plain(key), key): value for key, value in inside.items()}
            candidates.append((count, where + prefix, state))
    if not unmatched:
        raise ValueError(f"{path} is not a state dict: names with tensors, as model.state_dict() gives")
    if not candidates:
        return unmatched
    most = max(count for count, _, _ in candidates)
    best = {where: state for count, where, state in candidates if count == most}
    best = {where: state for where, state in best.items() if not _AVERAGE.search(where)} or best
    (chosen, state), *others = best.items()
    differing = [where for where, other in others if not _same(state, other)]
    if differing and most > len(names) / 2:
        which = ", ".join(map(repr, (chosen, *differing[:2])))
        raise ValueError(f"{path} holds several state dicts that fit equally ({which}): save or give one of them alone")
    return state


def _plain(name: str) -> str:
    """A name without what wrappers add to it."""
    return _OLD_DENSENET.sub(r"\1", ".".join(part for part in name.split(".") if part not in _WRAPPERS))


def _tensors(content: Mapping[Any, Any]) -> Iterator[tuple[str, State]]:
    """The tensors of nested mappings, each after the keys that lead to it, the outer first."""
    mappings, seen = [("", content)], set[int]()
    for where, mapping in mappings:
        if id(mapping) not in seen:
            seen.add(id(mapping))
            yield where, {k: v for k, v in mapping.items() if isinstance(k, str) and isinstance(v, Tensor)}
            mappings += [(f"{where}{k}.", v) for k, v in mapping.items() if isinstance(v, Mapping)]


def _same(a: State, b: State) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a.keys() & b.keys())


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
    if len(weight) == 0:
        raise ValueError(f"the head {head!r} in {path} has no outputs: give weights of a network with classes")
    if weight.shape[1] == linear.in_features and (weight.shape != shape or bias != (linear.bias is not None)):
        module.set_submodule(head, nn.Linear(linear.in_features, len(weight), bias=bias))


def load_into(
    module: nn.Module, content: Mapping[Any, Any], name: str, path: str | Path, without: str = "", fix: str = ""
) -> None:
    """Load the :func:`fitting` weights; a ValueError says which do not match by name and shape, or are not finite.

    The file may lack the part ``without``. ``fix`` says what to do about weights that are not finite.
    """
    expected, state = module.state_dict(), fitting(module, content, path)
    differences = []
    for key, value in state.items():
        if value.is_meta or value.layout != torch.strided:
            what = "a meta tensor, without values" if value.is_meta else f"of layout {value.layout}"
            raise ValueError(f"{path} holds no dense weights ({key} is {what}): save the dense state dict")
        if key in expected and value.shape != expected[key].shape:
            differences.append(f"{key} is {list(value.shape)}, not {list(expected[key].shape)}")
        elif key in expected and expected[key].is_floating_point() and not value.is_floating_point():
            differences.append(f"{key} is {value.dtype}, not {expected[key].dtype}")
    if len(differences) > 1:
        differences[1:] = [f"{len(differences) - 1} more of another shape or type"]
    missing = [key for key in expected if key not in state and not (without and key.startswith(f"{without}."))]
    unknown = [key for key in state if key not in expected and not key.startswith(_AUXILIARY)]
    for kind, keys in (("missing", missing), ("unknown", unknown)):
        if keys := [key for key in keys if not key.endswith(_COUNTER)]:
            differences.append(f"{len(keys)} {kind} ({', '.join(keys[:3])}{' …' if len(keys) > 3 else ''})")
    if differences:
        headless = without == "" and missing and all(key.startswith(("fc.", "classifier.", "head.")) for key in missing)
        hint = "; these are of an encoder without its head: train one, as notebook 1 does" if headless else ""
        raise ValueError(f"the weights in {path} do not fit {name}: {', '.join(differences)}{hint}")
    for key, value in state.items():
        if key in expected and not torch.isfinite(value.to(expected[key].dtype)).all():
            raise ValueError(f"{path} holds NaN or infinite weights ({key} …){fix}")
    versioned = OrderedDict(state)
    cast(Any, versioned)._metadata = cast(Any, expected)._metadata  # mnasnet asks for it, and not all files carry it
    module.load_state_dict(versioned, strict=False)
