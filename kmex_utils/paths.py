"""Every path, once. Relative paths given by a user are relative to the repository's root."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

NOTEBOOKS = ROOT / "notebooks"  # 01_train.py/.ipynb … in the paper's order
DATA = ROOT / "data"  # the embedded digits; downloads and decoded images land here
MNIST_MINI = DATA / "mnist-mini.npz"
FIGURES = ROOT / "figures"  # <dataset>/table1.csv, figure1.png …
RUNS = ROOT / "runs"  # <dataset>/seed-<seed>/: weights, embeddings, prototypes, executed notebooks


def resolve(path: str | Path) -> Path:
    """An absolute path; ``~`` is expanded and relative paths start at the repository's root."""
    return ROOT / Path(path).expanduser()
