"""Artefacts on disk: complete or absent, never half-written, never pickled."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; it becomes ``path`` on success and is removed on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid4().hex[:8]}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors and the settings that made them into one safetensors file."""
    from safetensors.torch import save

    copies = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    with replacing(path) as temporary:
        temporary.write_bytes(save(copies, {"settings": json.dumps(settings)}))  # save_file's is for its owner alone


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of a file written by :func:`save_tensors`.

    FileNotFoundError where it is absent, ValueError where it is no safetensors or not written by this package.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            settings = (file.metadata() or {}).get("settings")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); delete it and make it again") from None
    if settings is None:
        raise ValueError(f"{path} carries no settings: it was not written by this project")
    return tensors, json.loads(settings)


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def save_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    save_text(path, json.dumps(content, indent=1) + "\n")


def load_json(path: Path) -> Any:
    """Read JSON; a file that is not JSON is named in the error."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable JSON ({error}); delete it and make it again") from None
