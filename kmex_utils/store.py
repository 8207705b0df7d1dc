"""Artefacts on disk: complete or absent, never half-written, never pickled."""

import errno
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

if TYPE_CHECKING:
    import torch

if sys.platform != "win32":
    import fcntl

TEMPORARY = re.compile(r"\..+-[0-9a-f]{8}(\.\w+)?")


def short(name: str) -> str:
    """A file's name with room for an ending: of more than 200 bytes the first 150 and a hash of all."""
    encoded = os.fsencode(name)
    if len(encoded) <= 200:
        return name
    return f"{encoded[:150].decode(errors='ignore')}-{hashlib.sha256(encoded).hexdigest()[:12]}"


def writable(folder: Path) -> None:
    """A ValueError unless files can be written into a folder, or into the one where it would be made."""
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}): choose another folder") from None


def new_file(path: Path, overwrite: bool) -> None:
    """Refuse before the computation what could not be written after it: a FileExistsError or ValueError."""
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder: choose another name")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or give overwrite=True")
    writable(path.parent)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Make a folder and hold it against other processes that ask the same; if it stays empty, it goes again.

    A ValueError where it cannot be written, or another process holds it. Systems without file locks hold nothing.
    """
    writable(folder)
    new = [path for path in (folder.absolute(), *folder.absolute().parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        if sys.platform != "win32":
            handle = os.open(folder, os.O_RDONLY)
            held.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                message = f"{folder} is being written by another process: wait for its end, or choose another folder"
                raise ValueError(message) from None
            except OSError:  # a file system without locks
                pass
        try:
            yield
        finally:
            with suppress(OSError):
                for path in new:
                    path.rmdir()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; it becomes ``path`` on success and is removed on error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:20]}-{uuid4().hex[:8]}{path.suffix}")  # a name has 255 bytes at most
    with ExitStack() as held:
        if sys.platform != "win32":
            with suppress(OSError):
                held.enter_context(lock(temporary))  # see clean()
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def lock(path: Path, *, shared: bool = False, seconds: float = 0.0) -> IO[bytes]:
    """Open and lock a file, which is made if it is absent; closing it, or the end of all who hold it, releases it.

    The lock goes to children that inherit the open file. A BlockingIOError where others have it for ``seconds``. File
    systems without locks hold nothing.
    """
    file = path.open("a+b")  # NFS locks only what can be read and written
    end = time.monotonic() + seconds
    while True:
        try:
            return relock(file, shared=shared)
        except BlockingIOError:
            if time.monotonic() >= end:
                file.close()
                raise
            time.sleep(0.1)


def relock(file: IO[bytes], *, shared: bool) -> IO[bytes]:
    """The file locked otherwise; a BlockingIOError where others have it by then."""
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    return file


def clean(folder: Path) -> None:
    """Remove what killed processes left of :func:`replacing` below a folder; what is being written stays."""
    for path in folder.rglob(".*") if sys.platform != "win32" else ():
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            with suppress(OSError), lock(path):
                path.unlink()


def reserve(file: IO[bytes], needed: int, folder: Path) -> None:
    """Give a file so many bytes of the disk: where one fills up under a memory map, the process dies without a word.

    An OSError, one line, where they are not there.
    """
    if hasattr(os, "posix_fallocate"):  # not on macOS
        try:
            os.posix_fallocate(file.fileno(), 0, needed)
        except OSError as error:
            room = f"{needed / 2**30:.2g} GiB do not fit into {folder} ({error.strerror})"
            raise OSError(f"{room}: free some space, or choose a folder on another disk") from None


def room(folder: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """An empty array in a file of ``folder`` that has no name and ends with it; OSError as :func:`reserve`."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        reserve(file, int(np.prod(shape)) * np.dtype(dtype).itemsize, folder)
        return np.memmap(file, dtype, "w+", shape=shape)


def save_tensors(path: Path, tensors: Mapping[str, "torch.Tensor"], settings: Mapping[str, Any]) -> None:
    """Write tensors and the settings that made them into one safetensors file."""
    with replacing(path) as temporary:
        temporary.write_bytes(_packed(tensors, settings))  # save_file's is for its owner alone


def holds(path: Path, tensors: Mapping[str, "torch.Tensor"], settings: Mapping[str, Any]) -> bool:
    """Whether a file is what :func:`save_tensors` would write."""
    return path.is_file() and path.read_bytes() == _packed(tensors, settings)


def _packed(tensors: Mapping[str, "torch.Tensor"], settings: Mapping[str, Any]) -> bytes:
    import torch
    from safetensors.torch import save

    copies = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    return save(copies, {"settings": json.dumps(settings)})


def load_tensors(path: Path) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
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
    made_by = _parsed(path, settings)
    if not isinstance(made_by, dict):
        raise ValueError(f"{path} carries no settings: it was not written by this project")
    return tensors, made_by


def save_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def save_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    save_text(path, json.dumps(content, indent=1) + "\n")


def load_json(path: Path) -> Any:
    """Read JSON; a file that is not JSON is named in the error."""
    return _parsed(path, path.read_bytes())


def _parsed(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not readable JSON ({error}); delete it and make it again") from None
