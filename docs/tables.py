"""Tables of the site's pages, from the CSV files beside the figures."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from IPython.display import Markdown

FIGURES = Path(__file__).parent.parent / "figures"
DATA_SETS = {"mnist": "MNIST", "stl10": "STL-10", "cub200": "CUB-200"}


def read(name: str) -> pd.DataFrame:
    """``figures/<name>.csv``."""
    return pd.read_csv(FIGURES / f"{name}.csv")


def table(rows: pd.DataFrame | Sequence[Sequence[object]], columns: Sequence[str] = ()) -> Markdown:
    """As a table of the page; what is missing is a dash."""
    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows, columns=list(columns))
    lines = [list(map(str, frame.columns)), ["---"] + ["--:"] * (len(frame.columns) - 1)]
    lines += [["–" if pd.isna(cell) else str(cell) for cell in row] for row in frame.itertuples(index=False)]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def number(mean: float, std: float = 0.0, digits: int = 1, seeds: int = 2) -> str:
    """Mean ± standard deviation; one seed has none."""
    return f"{mean:z.{digits}f}" + (f" ± {std:.{digits}f}" if seeds > 1 and pd.notna(std) else "")
