"""Tables 1 and 2: the published numbers, ours over seeds, and the difference."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..data import own_input
from ..store import save_text

Key = tuple[str, str, str, str]  # data set, model, metric, split

_DATASETS = ("mnist", "stl10", "cub200")
_PUBLISHED_AS = {"mnist-mini": "mnist"}  # the embedded digits stand beside MNIST's numbers


def _published(metrics: tuple[tuple[str, str], ...], rows: dict[str, tuple[float | None, ...]]) -> dict[Key, float]:
    """(dataset, model, metric, split) -> value, from rows printed as the paper prints them."""
    columns = [(dataset, *metric) for dataset in _DATASETS for metric in metrics]
    return {
        (dataset, model, metric, split): value
        for model, values in rows.items()
        for (dataset, metric, split), value in zip(columns, values, strict=True)
        if value is not None
    }


TABLE1 = _published(
    (("cos_class", "train"), ("cos_out", "train")),
    {
        "CNN": (0.48, -0.05, 0.46, -0.04, 0.51, 0.00),
        "KMEx (K/C=1)": (0.88, 0.32, 0.79, 0.42, 0.93, 0.47),
        "KMEx (K/C=5)": (0.83, 0.30, 0.84, 0.34, 0.87, 0.45),
        "ProtoPNet": (1.00, 1.00, 0.95, 0.92, 0.98, 0.97),
    },
)

TABLE2 = _published(
    (("accuracy", "train"), ("accuracy", "test")),
    {
        "CNN": (100.0, 99.4, 95.6, 86.1, 100.0, 79.1),
        # printed as K/C=5 for all three; the text says ten for CUB-200
        "KMEx (K/C=5)": (100.0, 99.4, 94.9, 85.6, None, None),
        "KMEx (K/C=10)": (None, None, None, None, 100.0, 78.6),
        "ProtoPNet": (100.0, 99.4, 74.2, 72.7, 99.4, 66.4),
        "B4": (100.0, 99.4, 94.0, 85.5, 100.0, 75.2),
        "B234": (98.9, 98.5, 83.5, 77.9, 85.5, 52.8),
    },
)

COLUMNS = ["dataset", "model", "metric", "split", "mean", "std", "n_seeds", "paper"]


def note(training: Mapping[str, Any]) -> str:
    """What separates our numbers from the paper's, from a training's settings."""
    started = _started(training)
    arguments = "".join(f", {name} {value}" for name, value in (training.get("arch_args") or {}).items())
    parts = [f"Ours: {training['arch']}{arguments}, {started}."]
    if started.startswith("weights scratch"):
        parts.append("The paper's backbone was pretrained on ImageNet; ours was trained from scratch.")
    if training["arch"] != "resnet34":
        parts.append("The paper's is a ResNet34.")
    if training["dataset"] == "mnist-mini":
        parts.append("`paper` is the paper's value for MNIST in full; ours are 2,500 training and 1,500 test digits.")
    return " ".join(parts)


def _started(training: Mapping[str, Any]) -> str:
    """First weights and epochs, of the trainings before it too; pixels where they are not the paper's."""
    epochs = "frozen but for its head" if training.get("frozen") else f"{training['schedule']['epochs']} epochs"
    size = training["data"]["input"]["image_size"]
    if size != own_input(training["dataset"]).image_size:
        epochs += f" at {size} px"
    if training.get("before"):
        return f"{_started(training['before'])}, then {epochs}"
    return f"weights {training['weights']}, {epochs}"


def over_seeds(table: pd.DataFrame, keys: list[str], column: str) -> pd.DataFrame:
    """mean, std (n - 1; empty for one seed) and seeds of a column for each of some keys, in the order they appear."""
    summed = table.groupby(keys, sort=False)[column].agg(["mean", "std", "count"])
    return summed.reset_index().rename(columns={"count": "seeds"})


def tidy(records: Iterable[Mapping[str, Any]], published: Mapping[Key, float]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, beside the published value.

    ``records``, one per seed and number, have dataset, model, metric, split, seed and value; ``published`` is
    :data:`TABLE1` or :data:`TABLE2`. Of the :data:`COLUMNS`, ``paper`` is empty where nothing is published.
    """
    key = ["dataset", "model", "metric", "split"]
    frame = pd.DataFrame(list(records))
    if frame.duplicated([*key, "seed"]).any():
        raise ValueError("two records for one dataset, model, metric, split and seed")
    table = over_seeds(frame, key, "value").rename(columns={"seeds": "n_seeds"})
    names = [(_PUBLISHED_AS.get(dataset, dataset), *rest) for dataset, *rest in table[key].values.tolist()]
    table["paper"] = pd.Series([published.get(name) for name in names], dtype=float)
    return table[COLUMNS]


def markdown(table: pd.DataFrame, digits: int) -> str:
    """Paper, ours ± standard deviation and the difference, one line each, as Markdown."""
    shown = {
        "data": table.dataset,
        "model": table.model,
        "measure": table.metric + ", " + table.split,
        "paper": numbers(table.paper, digits),
        "ours": with_spread(table, digits),
        "difference": numbers(table["mean"] - table.paper, digits, sign="+"),
        "seeds": table.n_seeds,
    }
    return as_markdown(pd.DataFrame(shown))


def as_markdown(table: pd.DataFrame) -> str:
    """A table whose cells are texts already."""
    return table.astype(str).to_markdown(index=False, disable_numparse=True)


def numbers(values: Iterable[float], digits: int, sign: str = "") -> list[str]:
    """Numbers for a table, – for what is not there, never -0.0; ``sign`` "+" shows that of positive ones too."""
    return ["–" if pd.isna(value) else f"{value:{sign}z.{digits}f}" for value in values]


def with_spread(table: pd.DataFrame, digits: int) -> list[str]:
    """mean ± std for a table; only the mean where one seed has no spread."""
    spread = ["" if pd.isna(value) else f" ± {value:.{digits}f}" for value in table["std"]]
    return [mean + more for mean, more in zip(numbers(table["mean"], digits), spread, strict=True)]


def save(table: pd.DataFrame, path: Path, digits: int, note: str, records: list[dict[str, Any]]) -> None:
    """The tidy table as CSV at ``path``, as Markdown beside it, and its ``records`` as ``<name>-seeds.csv``."""
    for name, content in ((path.name, table), (f"{path.stem}-seeds.csv", pd.DataFrame(records))):
        save_text(path.with_name(name), content.to_csv(index=False, float_format="%.6g"))
    save_text(path.with_suffix(".md"), f"{markdown(table, digits)}\n\n{note}\n")
