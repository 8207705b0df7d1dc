"""Every path, once. Relative paths given by a user are relative to the repository's root."""

import re
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

DATA = ROOT / "data"  # the embedded digits; downloads and decoded images land here
MNIST_MINI = DATA / "mnist-mini.npz"
FIGURES = ROOT / "figures"  # <dataset>/table1.csv, figure1.png …
RUNS = ROOT / "runs"  # <dataset>/seed-<seed>/: weights, embeddings, prototypes, executed notebooks


def expanded(path: str | Path) -> Path:
    """The path with ``~`` expanded; a ValueError where that is nobody's home."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{path} begins with the home of a user who is not known here: give the whole path") from None


def scratch(folder: str | Path | None) -> Path:
    """Where temporary files go: the folder, or the system's; a FileNotFoundError where it is none."""
    path = expanded(folder or tempfile.gettempdir())
    if not path.is_dir():
        raise FileNotFoundError(f"scratch must be a folder that exists, got {folder}")
    return path


def resolve(path: str | Path) -> Path:
    """An absolute path; ``~`` is expanded and relative paths start at the repository's root."""
    return ROOT / expanded(path)


def located(path: str | Path) -> Path:
    """The absolute path: seen from the working directory or, if nothing is there, from the repository's root."""
    here, in_repository = expanded(path), resolve(path)
    return in_repository if in_repository.exists() and not here.exists() else here.absolute()


def unnumbered(name: str) -> str:
    """A class folder's name without the number that CUB (``001.``) and ImageNet (``n01440764-``) put before it."""
    return re.sub(r"^(\d+\.|n\d{8}[-_])(?=\D)", "", name)


def folder_name(name: str, what: str = "dataset") -> str:
    """The name, which becomes a folder's; a ValueError where it holds what a path, a shell or a workflow would read."""
    if not isinstance(name, str):
        raise ValueError(f"{what} {name!r} is not text but {type(name).__name__} to YAML: write it in quotes")
    if not re.fullmatch(r"\w([\w .+-]{0,98}[\w+-])?", name):
        raise ValueError(
            f"{what} {name!r} cannot name a folder: use letters, digits, - and _, and within it . + and spaces"
        )
    return name
