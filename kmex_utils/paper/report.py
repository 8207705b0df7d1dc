"""The reproduction report: what was run, what of the paper holds and what it cost, put together from saved tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from .. import paths
from ..store import save_text
from ..training.recipe import recipe
from .published import as_markdown, numbers, with_spread
from .runs import Run, trained_seeds

TEMPLATE = Path(__file__).with_name("report.md.j2")

# accuracies of networks trained from scratch, by others: data set, network, test accuracy (%), source
FROM_SCRATCH = (
    ("mnist", "ResNet20, 28 px, 64,000 iterations", 99.4, "https://github.com/xinzwang/Image-Classification"),
    ("stl10", "WRN-16-8, 96 px, flips and crops", 85.8, "DeVries and Taylor, arXiv:1708.04552, STL-10 table"),
    ("stl10", "WRN-16-8, 96 px, no augmentation", 76.5, "DeVries and Taylor, arXiv:1708.04552, STL-10 table"),
    ("cub200", "ResNet34, all 200 classes", 43.2, "https://github.com/HenryLau7/Midterm (Bird)"),
)


def _runs(runs: str | Path, dataset: str) -> list[Run]:
    """Those of a data set; none where it has no folder."""
    there = (paths.resolve(runs) / dataset).is_dir()
    return [Run.of(runs, dataset, seed) for seed in trained_seeds(runs, dataset)] if there else []


def own_prototypes_per_class(runs: str | Path, dataset: str) -> int:
    """K/C of a data set as its runs have it, or the recipe's where no run is here."""
    for run in _runs(runs, dataset):
        return int(run.settings()["prototypes_per_class"])
    return recipe(dataset).prototypes_per_class


def trainings(runs: str | Path, datasets: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each network was trained with, a row each, and the curves: a row for each epoch.

    A data set without runs has no rows, see :func:`with_earlier`.
    """
    rows, curves = [], []
    for run in (run for dataset in datasets for run in _runs(runs, dataset)):
        settings = run.settings()
        stages, schedule, shared = _stages(settings), settings["schedule"], {"dataset": run.name, "seed": run.seed}
        history = [record for stage in stages for record in stage["history"]]
        for epoch, record in enumerate(history, 1):
            values = {name: record[name] for name in ("loss", "accuracy", "learning_rate", "seconds")}
            curves.append({**shared, "epoch": epoch, **values})
        rows.append(
            {
                **shared,
                "classes": len(settings["classes"]),
                **{split: len(run.embeddings(split)[1]) for split in ("train", "test")},
                "px": settings["data"]["input"]["image_size"],
                "network": " ".join([settings["arch"], *map(json.dumps, filter(None, [settings.get("arch_args")]))]),
                "start": stages[0]["weights"],
                "epochs": " + ".join(str(stage["schedule"]["epochs"]) for stage in stages),
                "batch": schedule["batch_size"],
                **{name: schedule[name] for name in ("learning_rate", "momentum")},
                **{name: settings[name] for name in ("flip", "padding")},
                "seconds": sum(record["seconds"] for record in history),
                "machine": settings["machine"],
            }
        )
    return pd.DataFrame(rows), pd.DataFrame(curves)


def _stages(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Settings of the trainings a network went through, the first one first."""
    return [*(_stages(settings["before"]) if settings.get("before") else []), settings]


def with_earlier(table: pd.DataFrame, path: Path, datasets: Iterable[str], needs: str = "") -> pd.DataFrame:
    """The table in the order of the data sets; those it lacks from the table an earlier report left at ``path``.

    So a report can be made anew where only some of its runs lie. A data set in neither is a FileNotFoundError where
    ``needs`` names the notebook that makes what is missing.
    """
    sources = [part for part in (table, pd.read_csv(path) if path.exists() else table) if len(part)]
    parts = []
    for dataset in datasets:
        rows = [source[source.dataset == dataset] for source in sources if (source.dataset == dataset).any()]
        if needs and not rows:
            raise FileNotFoundError(f"no runs of {dataset}, and none in {path}: run notebook {needs} for it")
        parts += rows[:1]
    return pd.concat(parts, ignore_index=True) if parts else table


def costs(runs: str | Path, datasets: Iterable[str]) -> pd.DataFrame:
    """What the batch noted of each notebook (Snakemake's benchmark), over seeds; of runs outside the batch nothing.

    dataset, notebook, runs, minutes (mean), minutes_max and peak_gib, the largest, of all processes of the notebook.
    """
    rows = []
    for dataset in datasets:
        for path in sorted((paths.resolve(runs) / dataset).glob("**/cost/*.tsv")):
            noted = pd.read_csv(path, sep="\t").iloc[0]
            memory = pd.to_numeric(noted["max_rss"], errors="coerce") / 1024
            rows.append((dataset, path.stem, noted["s"] / 60, memory))
    table = pd.DataFrame(rows, columns=["dataset", "notebook", "minutes", "peak_gib"])
    minutes = {"runs": ("minutes", "size"), "minutes": ("minutes", "mean"), "minutes_max": ("minutes", "max")}
    return table.groupby(["dataset", "notebook"]).agg(**minutes, peak_gib=("peak_gib", "max")).reset_index()


def disk(runs: str | Path, datasets: Iterable[str]) -> pd.DataFrame:
    """MiB that a data set's runs take, by kind of file."""
    rows = []
    for dataset in datasets:
        for path in (paths.resolve(runs) / dataset).glob("**/*"):
            if path.is_file():
                rows.append((dataset, path.suffix or path.name, path.stat().st_size / 2**20))
    table = pd.DataFrame(rows, columns=["dataset", "file", "mib"])
    return table.groupby(["dataset", "file"])["mib"].sum().reset_index()


def beside_others(records: Mapping[str, pd.DataFrame], trained: pd.DataFrame) -> pd.DataFrame:
    """The CNN's test accuracy beside :data:`FROM_SCRATCH`; empty where no data set has such a number.

    ``records`` of Table 2 by data set, ``trained`` of :func:`trainings`.
    """
    rows = []
    for dataset, numbers_of in records.items():
        accuracy = numbers_of.query("model == 'CNN' and metric == 'accuracy' and split == 'test'")["value"].mean()
        run = trained[trained.dataset == dataset].iloc[0]
        ours = f"{run.network}, {run.px} px, {run.epochs} epochs, {run.classes} classes"
        for name, network, theirs, source in FROM_SCRATCH:
            if name == dataset and run.start == "scratch":
                rows.append((dataset, ours, accuracy, network, theirs, source))
    columns = ["dataset", "ours", "test accuracy (%)", "theirs", "their test accuracy (%)", "source"]
    return pd.DataFrame(rows, columns=columns)


def page(
    parts: Mapping[str, pd.DataFrame], figures: Path, datasets: Sequence[str], config: str = "", name: str = "report"
) -> str:
    """The report as Markdown with links to the figures beside it; also written to ``<figures>/<name>/report.md``.

    Its parts are ``trained``, ``cost``, ``disk`` and ``others`` of this module, ``relations``, ``table1`` and
    ``table2`` of :mod:`~kmex_utils.paper.claims`, ``prices`` and ``effects`` of :mod:`~kmex_utils.paper.ledger`; the
    ``config`` that made the runs is printed as it is.
    """
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    views = (_by_setting, _relations, _beside_paper, _prices, _effects, _costs)
    environment.filters |= {"markdown": as_markdown, **{view.__name__.lstrip("_"): view for view in views}}
    environment.globals |= {"summary": summary, "exists": lambda picture: (figures / picture).exists()}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        **parts, datasets=datasets, config=config.strip(), name=name
    )
    text = text.rstrip() + "\n"
    save_text(figures / name / "report.md", text)
    return text


def summary(relations: pd.DataFrame, prices: pd.DataFrame) -> list[str]:
    """Lines that say which findings hold in which data set, and what the factor of eq. 8 is worth."""
    lines = []
    for claim, rows in relations.groupby("claim", sort=False):
        if rows.dataset.duplicated().any():  # several comparisons make the claim
            held = (rows.holds_in == rows.seeds).groupby(rows.dataset, sort=False).agg(["sum", "size"])
            counts = [f"{n} of {of} comparisons in {dataset}" for dataset, n, of in held.itertuples()]
            lines.append(f"{claim}: holds in every seed in {', '.join(counts)}.")
            continue
        missed = rows[rows.holds_in != rows.seeds]
        counts = [f"{row.dataset} ({row.holds_in} of {row.seeds} seeds)" for row in missed.itertuples()]
        holds, data_sets = ("does not hold", counts) if counts else ("holds", rows.dataset)
        lines.append(f"{claim}: {holds} in every seed of {', '.join(data_sets)}.")
    for dataset, rows in prices[prices.model == "B234"].groupby("dataset", sort=False) if len(prices) else ():
        lost = rows.set_index(["question", "option"])["mean"]
        paper = rows.paper.iloc[0]
        in_paper = "" if pd.isna(paper) else f" (paper {paper:.1f})"
        lines.append(
            f"What B234 loses to the CNN in {dataset}: {lost['all images', '']:.1f} points{in_paper}; "
            f"with prototypes from a part of the images {lost['default', '']:.1f} with the printed 1/D_b, "
            f"{lost['scale', '1']:.1f} with equal weights."
        )
    return lines


def _by_setting(trained: pd.DataFrame) -> pd.DataFrame:
    trained = trained.assign(minutes=trained.seconds / 60)
    keys = [column for column in trained if column not in ("seed", "minutes", "seconds")]
    runs = trained.groupby(keys, sort=False).agg(seeds=("seed", "size"), minutes=("minutes", "mean")).reset_index()
    return runs.round({"minutes": 1}).drop(columns="machine")


def _relations(relations: pd.DataFrame) -> pd.DataFrame:
    counts = [f"{n} of {of}" for n, of in zip(relations.holds_in, relations.seeds, strict=True)]
    shown = relations.assign(paper=numbers(relations.paper, 2), ours=with_spread(relations, 2), holds=counts)
    return shown[["dataset", "claim", "measure", "criterion", "paper", "ours", "holds"]]


def _beside_paper(table: pd.DataFrame, digits: int) -> pd.DataFrame:
    shown = table.assign(
        paper=numbers(table.paper, digits),
        ours=with_spread(table, digits),
        difference=numbers(table.difference, digits, sign="+"),
        margin=numbers(table.margin, digits),
        seeds=table.n_seeds,
    )
    return shown[["dataset", "model", "metric", "split", "paper", "ours", "difference", "margin", "outside", "seeds"]]


def _prices(prices: pd.DataFrame) -> pd.DataFrame:
    prices = prices.assign(column=prices.dataset + ", " + prices.model)
    paper = prices.drop_duplicates("column")
    paper = paper.assign(question="the paper", option="", mean=paper.paper, std=float("nan"))
    table = pd.concat([paper, prices], ignore_index=True)
    return _wide(table, ["question", "option"], "column", with_spread(table, 1))


def _effects(effects: pd.DataFrame) -> pd.DataFrame:
    cosines, points = with_spread(effects, 2), with_spread(effects, 1)
    pairs = zip(effects.metric, cosines, points, strict=True)
    cells = [point if metric == "accuracy" else cosine for metric, cosine, point in pairs]
    return _wide(effects, ["question", "model", "metric"], "dataset", cells)


def _costs(cost: pd.DataFrame) -> pd.DataFrame:
    cells = [f"{minutes:.1f} min, {gib:.1f} GiB" for minutes, gib in zip(cost.minutes, cost.peak_gib, strict=True)]
    return _wide(cost, ["notebook"], "dataset", cells).sort_values("notebook")


def _wide(table: pd.DataFrame, keys: list[str], column: str, cells: list[str]) -> pd.DataFrame:
    """A row for each of some keys, a column for each value of another, both as they first appear; – for no cell."""
    wide = table.assign(cell=cells).pivot(index=keys, columns=column, values="cell")
    rows = table[keys].drop_duplicates().merge(wide.reset_index(), how="left")
    return rows[[*keys, *table[column].unique()]].fillna("–")
