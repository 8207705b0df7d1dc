"""The reproduction report: the paper's numbers beside ours over data sets, what holds, and what it cost."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from . import paths
from .architectures import channels
from .composite import Normalisation
from .runs import Run, trained_seeds
from .store import save_text
from .tables import TABLE1, TABLE2

PAPER_SEEDS = 5

# accuracies of networks trained from scratch, by others: data set, network, test accuracy (%), source
FROM_SCRATCH = (
    ("mnist", "ResNet20, 28 px, 64,000 iterations", 99.4, "https://github.com/xinzwang/Image-Classification"),
    ("stl10", "WRN-16-8, 96 px, flips and crops", 85.8, "DeVries and Taylor, arXiv:1708.04552, STL-10 table"),
    ("stl10", "WRN-16-8, 96 px, no augmentation", 76.5, "DeVries and Taylor, arXiv:1708.04552, STL-10 table"),
    ("cub200", "ResNet34, all 200 classes", 43.2, "https://github.com/HenryLau7/Midterm (Bird)"),
)


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """A table of :func:`kmex_utils.tables.tidy` with the difference to the paper and whether chance explains it.

    ``margin`` is the half width of a 95 % interval of that difference if the paper's five seeds spread as ours do
    (Student's t), and half a unit of the paper's last digit; ``outside`` says whether the difference lies beyond it,
    and is empty where one seed has no spread. Of what the paper does not print, accuracies of other models stay.
    """
    from scipy.stats import t

    found = table[table.paper.notna() | (table.metric == "accuracy")].copy()
    rounding = np.where(found.metric == "accuracy", 0.05, 0.005)
    n = found.n_seeds.to_numpy()
    some = np.maximum(n, 2)
    margin = t.ppf(0.975, some - 1) * found["std"].to_numpy() * np.sqrt(1 / some + 1 / PAPER_SEEDS)
    found["difference"] = found["mean"] - found.paper
    found["margin"] = np.where((n > 1) & found.paper.notna(), margin + rounding, np.nan)
    outside = np.where(found.difference.abs() > found.margin, "yes", "no")
    found["outside"] = np.where(found.margin.notna(), outside, "")
    return found


@dataclass(frozen=True)
class Relation:
    """A finding of the paper as a number and what it must satisfy.

    ``of`` takes a lookup (model, metric, split) -> value, raising KeyError for what is not there.
    """

    claim: str
    measure: str
    of: Callable[[Callable[[str, str, str], float]], float]
    criterion: str
    holds: Callable[[float], bool]


def relations(own: int) -> list[Relation]:
    """The paper's findings; ``own`` is the data set's K/C."""
    kmex = f"KMEx (K/C={own})"

    def test(model: str, other: str) -> Callable:
        return lambda v: v(model, "accuracy", "test") - v(other, "accuracy", "test")

    return [
        Relation(
            "KMEx keeps the CNN's accuracy", "KMEx - CNN, points", test(kmex, "CNN"), "within 1", lambda d: abs(d) <= 1
        ),
        Relation("B4 stays close to it", "B4 - CNN, points", test("B4", "CNN"), "at least -4", lambda d: d >= -4),
        Relation("B234 gives up more", "B234 - B4, points", test("B234", "B4"), "below 0: its sign", lambda d: d < 0),
        Relation(
            "ProtoPNet is not better than the CNN",
            "ProtoPNet - CNN, points",
            test("ProtoPNet", "CNN"),
            "at most 0",
            lambda d: d <= 0,
        ),
        Relation(
            "centroids point into their class, columns less",
            "cos class, KMEx (K/C=1) - CNN",
            lambda v: v("KMEx (K/C=1)", "cos_class", "train") - v("CNN", "cos_class", "train"),
            "above 0",
            lambda d: d > 0,
        ),
        Relation(
            "columns are orthogonal to other classes",
            "cos out, CNN",
            lambda v: v("CNN", "cos_out", "train"),
            "within 0.1",
            lambda d: abs(d) <= 0.1,
        ),
        Relation(
            "columns are nearly orthogonal to each other",
            "cos between columns, CNN",
            lambda v: v("CNN", "cos_columns", "train"),
            "within 0.15",
            lambda d: abs(d) <= 0.15,
        ),
        Relation(
            "ProtoPNet's cosines do not tell classes apart",
            "cos class - cos out, ProtoPNet",
            lambda v: v("ProtoPNet", "cos_class", "train") - v("ProtoPNet", "cos_out", "train"),
            "at most 0.1",
            lambda d: d <= 0.1,
        ),
    ]


def check_relations(records: pd.DataFrame, dataset: str, own: int) -> pd.DataFrame:
    """Each relation in the paper and in every seed of ours; those of a model that was not run are left out.

    Parameters
    ----------
    records
        The numbers behind both tables, one per seed: model, metric, split, seed, value.

    Returns
    -------
    DataFrame
        dataset, claim, measure, criterion, paper (NaN where it prints no such number), mean, std, seeds, holds_in.
    """
    rows = []
    published = {**TABLE1, **TABLE2}
    by_seed = {seed: some.set_index(["model", "metric", "split"])["value"] for seed, some in records.groupby("seed")}
    for relation in relations(own):
        try:
            paper = relation.of(lambda *key: published[(dataset, *key)])
        except KeyError:
            paper = np.nan
        try:
            values = [relation.of(lambda *key, of=of: of.loc[key]) for of in by_seed.values()]
        except KeyError:  # a model that was not run here
            continue
        rows.append(
            {
                "dataset": dataset,
                "claim": relation.claim,
                "measure": relation.measure,
                "criterion": relation.criterion,
                "paper": paper,
                "mean": np.mean(values),
                "std": np.std(values, ddof=1) if len(values) > 1 else np.nan,
                "seeds": len(values),
                "holds_in": sum(bool(relation.holds(value)) for value in values),
            }
        )
    return pd.DataFrame(rows)


def prices(ledger: pd.DataFrame, records: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What B4 and B234 lose to the CNN on the test images under each reading, beside what they lose in the paper.

    ``ledger`` is that of :func:`kmex_utils.studies.readings`; ``records`` hold accuracies by seed, those of the
    question ``all images``: prototypes of a ledger may come from a part of the training images.

    Returns
    -------
    DataFrame
        dataset, question, option, model, paper, mean, std, seeds.
    """
    cnn = records.query("model == 'CNN' and metric == 'accuracy' and split == 'test'").set_index("seed")["value"]
    some = ledger[ledger.question.isin(["default", "norm", "scale", "align_corners", "grid"])]
    some = some[some.metric.isin(["accuracy", "accuracy_most_frequent"]) & (some.split == "test")]
    some = some[some.model.isin(["B4", "B234"])]
    other = some[(some.question == "default") & (some.metric == "accuracy_most_frequent")]
    other = other.assign(question="prediction", option="most frequent")
    whole = records[(records.metric == "accuracy") & (records.split == "test") & records.model.isin(["B4", "B234"])]
    whole = whole.assign(question="all images", option="")
    some = pd.concat([whole, some[some.metric == "accuracy"], other]).fillna({"option": ""})
    lost = some.assign(lost=some.seed.map(cnn) - some.value)
    found = (
        lost.groupby(["question", "option", "model"], sort=False)["lost"].agg(["mean", "std", "count"]).reset_index()
    )
    in_paper = lambda model: TABLE2.get((dataset, model, "accuracy", "test"), np.nan)  # noqa: E731
    found.insert(0, "dataset", dataset)
    found["paper"] = [in_paper("CNN") - in_paper(model) for model in found.model]
    return found.rename(columns={"count": "seeds"})


def ledger_of_depth(records: pd.DataFrame, own: int) -> pd.DataFrame:
    """The scales in :func:`kmex_utils.studies.depths` as a ledger, for a data set that has no other; ``own`` is K/C."""
    some = records[(records.per_class == own) & records.model.isin(["B4", "B34", "B234"])]
    printed = some.scale == "1/D"
    return some.assign(question=np.where(printed, "default", "scale"), option=some.scale.where(~printed, ""))


def effects(ledger: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What is open beside eq. 7, 8 and 10: pairs of Table 1, start of the attribution, trainings with a thing switched.

    ``ledger`` is notebook 13's. Changes against the default of the same seed, on test images where it is an accuracy,
    and the correlation of both attributions.

    Returns
    -------
    DataFrame
        dataset, question, model, metric, mean, std, seeds.
    """
    from .studies import changes

    found = changes(ledger.fillna({"option": ""}))
    found = found[~found.question.isin(["norm", "scale", "align_corners", "grid", "prediction"])]
    cosine = (found.question == "pairs") & (found.model != "KMEx (K/C=1)")  # whose one prototype is the nearest
    correlation, points = found.metric == "map_correlation", (found.metric == "accuracy") & (found.split == "test")
    found = found[cosine | correlation | points]
    keys = ["question", "model", "metric"]
    table = found.groupby(keys, sort=False)["change"].agg(["mean", "std", "count"]).reset_index()
    table.insert(0, "dataset", dataset)
    return table.rename(columns={"count": "seeds"})


def last_share(network: str, scale: str) -> float:
    """Nominal share of B234's deepest block in the squared distance of eq. 9: as if blocks differed alike unscaled.

    They are unit rows (``norm`` position), so block b weighs factor(D_b)^2: 5 % for a ResNet34 with the printed 1/D_b.
    """
    weights = [Normalisation(scale=scale).factor(d) ** 2 for d in channels(network)[-3:]]
    return weights[-1] / sum(weights)


def weightings(prices: pd.DataFrame, networks: Mapping[str, str]) -> pd.DataFrame:
    """What B234 loses to the CNN with each factor of eq. 8, beside the share of its deepest block.

    Parameters
    ----------
    prices
        Of :func:`prices`.
    networks
        Architecture by data set.

    Returns
    -------
    DataFrame
        dataset, network, scale, last_share, mean, std, seeds, paper.
    """
    some = prices[(prices.model == "B234") & prices.question.isin(["default", "scale"])]
    some = some.assign(scale=some.option.replace("", "1/D"), network=some.dataset.map(networks))
    some["last_share"] = [last_share(row.network, row.scale) for row in some.itertuples()]
    return some[["dataset", "network", "scale", "last_share", "mean", "std", "seeds", "paper"]]


def trainings(runs: str | Path, datasets: Iterable[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What each backbone was trained with, a row each, and the curves: a row for each epoch.

    A data set without runs has no rows, see :func:`with_earlier`.
    """
    rows, curves = [], []
    for dataset in datasets:
        for seed in trained_seeds(runs, dataset) if (paths.resolve(runs) / dataset).is_dir() else ():
            run = Run.of(runs, dataset, seed)
            settings = run.settings()
            stages = [*_before(settings), settings]
            sizes = [len(run.embeddings(split)[1]) for split in ("train", "test")]
            recipe = run.recipe()
            data = settings["data"]
            rows.append(
                {
                    "dataset": dataset,
                    "seed": seed,
                    "classes": len(settings["classes"]),
                    "train": sizes[0],
                    "test": sizes[1],
                    "px": data["image_size"] or recipe.image_size,
                    "network": settings["arch"],
                    "start": stages[0]["weights"],
                    "epochs": " + ".join(str(stage["schedule"]["epochs"]) for stage in stages),
                    "batch": settings["schedule"]["batch_size"],
                    "learning_rate": settings["schedule"]["learning_rate"],
                    "momentum": settings["schedule"]["momentum"],
                    "flip": recipe.flip if data["flip"] == -1 else data["flip"],
                    "padding": recipe.padding if data["padding"] == -1 else data["padding"],
                    "seconds": sum(record["seconds"] for stage in stages for record in stage["history"]),
                    "machine": settings["machine"],
                }
            )
            done = 0
            for stage in stages:
                for record in stage["history"]:
                    done += 1
                    values = {name: record[name] for name in ("loss", "accuracy", "learning_rate", "seconds")}
                    curves.append({"dataset": dataset, "seed": seed, "epoch": done, **values})
    return pd.DataFrame(rows), pd.DataFrame(curves)


def with_earlier(found: pd.DataFrame, path: Path, datasets: Iterable[str], needs: str = "") -> pd.DataFrame:
    """``found`` in the order of the data sets; those it lacks from the table an earlier report left at ``path``.

    So a report can be made anew where only some of its runs lie.

    Raises
    ------
    FileNotFoundError
        A data set is in neither, and ``needs`` names the notebook that makes what is missing.
    """
    earlier = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["dataset"])
    parts = []
    for dataset in datasets:
        some = found[found.dataset == dataset] if len(found) else found
        parts.append(some if len(some) else earlier[earlier.dataset == dataset])
        if needs and not len(parts[-1]):
            raise FileNotFoundError(f"no runs of {dataset}, and none in {path}: run notebook {needs} for it")
    parts = [part for part in parts if len(part)]
    return pd.concat(parts, ignore_index=True) if parts else found


def _before(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    if "before" not in settings:
        return []
    return [*_before(settings["before"]), settings["before"]]


def costs(runs: str | Path, datasets: Iterable[str]) -> pd.DataFrame:
    """What the batch noted of each notebook (Snakemake's benchmark): minutes and peak memory, over seeds.

    Returns
    -------
    DataFrame
        dataset, notebook, runs, minutes (mean), minutes_max, peak_gib (largest, all processes of the notebook).
        Runs made outside the batch have none.
    """
    rows = []
    for dataset in datasets:
        for path in sorted((paths.resolve(runs) / dataset).glob("**/cost/*.tsv")):
            noted = pd.read_csv(path, sep="\t").iloc[0]
            minutes, memory = noted["s"] / 60, pd.to_numeric(noted["max_rss"], errors="coerce") / 1024
            rows.append({"dataset": dataset, "notebook": path.stem, "minutes": minutes, "peak_gib": memory})
    if not rows:
        return pd.DataFrame(columns=["dataset", "notebook", "runs", "minutes", "minutes_max", "peak_gib"])
    grouped = pd.DataFrame(rows).groupby(["dataset", "notebook"])
    return grouped.agg(
        runs=("minutes", "size"),
        minutes=("minutes", "mean"),
        minutes_max=("minutes", "max"),
        peak_gib=("peak_gib", "max"),
    ).reset_index()


def disk(runs: str | Path, datasets: Iterable[str]) -> pd.DataFrame:
    """MiB that a data set's runs take, by kind of file."""
    rows = []
    for dataset in datasets:
        for path in (paths.resolve(runs) / dataset).glob("**/*"):
            if path.is_file():
                rows.append({"dataset": dataset, "file": path.suffix or path.name, "mib": path.stat().st_size / 2**20})
    table = pd.DataFrame(rows, columns=["dataset", "file", "mib"])
    return table.groupby(["dataset", "file"])["mib"].sum().reset_index()


def beside_others(records: Mapping[str, pd.DataFrame], trained: pd.DataFrame) -> pd.DataFrame:
    """The CNN's test accuracy beside :data:`FROM_SCRATCH`; empty where no data set has such a number."""
    rows = []
    for dataset, some in records.items():
        mine = some.query("model == 'CNN' and metric == 'accuracy' and split == 'test'")["value"]
        run = trained[trained.dataset == dataset].iloc[0]
        for name, network, accuracy, source in FROM_SCRATCH:
            if name == dataset and run.start == "scratch":
                ours = f"{run.network}, {run.px} px, {run.epochs} epochs, {run.classes} classes"
                rows.append((dataset, ours, mine.mean(), network, accuracy, source))
    columns = ["dataset", "ours", "test accuracy (%)", "theirs", "their test accuracy (%)", "source"]
    return pd.DataFrame(rows, columns=columns)


def page(
    parts: Mapping[str, pd.DataFrame], figures: Path, datasets: Iterable[str], config: str = "", name: str = "report"
) -> str:
    """The report as Markdown with links to the figures beside it; also written to ``<figures>/<name>/report.md``.

    Parameters
    ----------
    parts
        ``trained``, ``relations``, ``table1``, ``table2``, ``prices``, ``effects``, ``cost``, ``disk`` and ``others``,
        as the functions above give them.
    config
        The batch configuration that made the runs, printed as it is.
    """
    datasets = list(datasets)
    lines = ["# Reproduction report", "", "Paper: Boubekki and Clemmensen, *Post-hoc self-explanation of CNNs*.", ""]
    if (parts["trained"].start != "imagenet").any():
        lines += [
            "**The paper's backbones were pretrained on ImageNet; those below that start from `scratch` were not.** "
            "Differences to the paper's accuracies are therefore expected; what can be compared are the relations "
            "between models. ± is the standard deviation over seeds.",
            "",
        ]
    others = sorted(set(parts["trained"].network) - {"resnet34"})
    if others:
        lines += [f"**The paper's network is a ResNet34; below is {', '.join(others)}.**", ""]
    lines += ["## In short", "", *summary(parts["relations"], parts["prices"]), "", _MODELS, ""]
    trained = parts["trained"].assign(minutes=parts["trained"].seconds / 60).drop(columns="seconds")
    same = [column for column in trained if column not in ("seed", "minutes")]
    grouped = trained.groupby(same, sort=False)
    runs = grouped.agg(seeds=("seed", "size"), minutes=("minutes", "mean")).reset_index()
    runs["minutes"] = runs.minutes.round(1)
    lines += ["## What was run", "", _markdown(runs.drop(columns="machine")), ""]
    lines += ["Minutes are those of training one seed, on " + "; ".join(sorted(set(trained.machine))) + ".", ""]
    if (parts["trained"].px <= 32).any():
        lines += [_ONE_POSITION, ""]
    lines += ["![Training curves](curves.png)", ""]

    found = parts["relations"]
    shown = found.assign(
        paper=_numbers(found.paper),
        ours=_with_spread(found),
        holds=[f"{r.holds_in} of {r.seeds}" for r in found.itertuples()],
    )
    lines += ["## What holds", "", "*holds* counts the seeds in which ours meets the criterion.", ""]
    lines += [_markdown(shown[["dataset", "claim", "measure", "criterion", "paper", "ours", "holds"]]), ""]

    for part, title, digits in (("table1", "Table 1: mean cosines", 2), ("table2", "Table 2: accuracy (%)", 1)):
        table = parts[part]
        shown = table.assign(
            paper=_numbers(table.paper, digits),
            ours=_with_spread(table, digits),
            difference=["–" if pd.isna(value) else f"{value:+.{digits}f}" for value in table.difference],
            margin=_numbers(table.margin, digits),
            seeds=table.n_seeds,
        )
        columns = ["dataset", "model", "metric", "split", "paper", "ours", "difference", "margin", "outside", "seeds"]
        lines += [f"## {title}", ""]
        lines += [
            "*margin* is what chance and rounding allow for the difference at 95 % if the paper's five seeds spread as "
            "ours do (with two seeds, little can be told); *outside* marks what lies beyond, and is empty where one "
            "seed has no spread.",
            "",
            _markdown(shown[columns]),
            "",
        ]
    if "cub200" in datasets:
        lines += [_CUB200, ""]

    prices = parts["prices"]
    if len(prices):
        keys = ["question", "option"]
        shown = prices.assign(cell=_with_spread(prices, 1), column=prices.dataset + ", " + prices.model)
        wide = shown.pivot(index=keys, columns="column", values="cell").reindex(
            pd.MultiIndex.from_frame(prices[keys].drop_duplicates())
        )
        wide = wide[list(dict.fromkeys(shown.column))].reset_index()
        paper = {c: f"{p:.1f}" for c, p in zip(shown.column, prices.paper, strict=True) if pd.notna(p)}
        top = pd.DataFrame([{"question": "the paper", "option": "", **paper}])
        lines += ["## What each open choice is worth", ""]
        lines += [_PRICES, ""]
        lines += [_markdown(pd.concat([top, wide])[wide.columns].fillna("–")), ""]
        lines += _picture(
            figures, name, "weighting", "What B234 loses against the nominal share of B4 in the distance of eq. 9"
        )
    if len(parts["effects"]):
        effects = parts["effects"]
        fine, coarse = _with_spread(effects, 2), _with_spread(effects, 1)
        of_points = effects.metric == "accuracy"
        wide = effects.assign(cell=[c if points else f for f, c, points in zip(fine, coarse, of_points, strict=True)])
        keys = ["question", "model", "metric"]
        wide = wide.pivot(index=keys, columns="dataset", values="cell").reindex(
            pd.MultiIndex.from_frame(effects[keys].drop_duplicates())
        )
        lines += [_EFFECTS, "", _markdown(wide[[d for d in datasets if d in wide]].fillna("–").reset_index()), ""]
    for dataset in datasets:
        for stem, caption in (("ledger", "Open choices"), ("depth", "Depth and K/C")):
            lines += _picture(figures, dataset, stem, f"{caption}: {dataset}")
    lines += ["## Figures 1 and 2", ""]
    for dataset in datasets:
        for stem, caption in (
            ("figure1", "Figure 1"),
            ("figure1-equal", "Figure 1 with equal weights in eq. 8"),
            ("figure2", "Figure 2"),
        ):
            lines += _picture(figures, dataset, stem, f"{caption}: {dataset}")

    cost, disk = parts["cost"], parts["disk"]
    lines += ["## Hours and bytes", ""]
    if len(cost):
        shown = cost.assign(cell=[f"{r.minutes:.1f} min, {r.peak_gib:.1f} GiB" for r in cost.itertuples()])
        wide = shown.pivot(index="notebook", columns="dataset", values="cell")
        lines += ["Mean minutes and largest memory of a notebook's processes, per seed (01 to 05) or in all.", ""]
        lines += [_markdown(wide[[d for d in datasets if d in wide]].fillna("–").reset_index()), ""]
    total = disk.groupby("dataset")["mib"].sum()
    lines += ["Disk of the runs: " + ", ".join(f"{d} {total[d]:.0f} MiB" for d in datasets if d in total) + ".", ""]
    if len(parts["others"]):
        lines += ["## Beside others' networks from scratch", "", _markdown(parts["others"].round(1)), ""]
    if config:
        lines += ["## How it was made", "", "```yaml", config.strip(), "```", ""]
    text = "\n".join(lines)
    save_text(figures / name / "report.md", text)
    return text


_MODELS = """\
*CNN*: the network itself, its classifier's columns c_j as prototypes. *KMEx*: nearest k-means centroid of the pooled
embedding z, K/C per class. *B4*, *B34*, *B234*, *B1234*: every position of the last one to four blocks goes to its
nearest centroid; the class with most positions wins (eq. 7 to 10). *ProtoPNet*: prototypes learned with the network;
*ProtoPNet + KMEx*: KMEx on its embedding. *cos_class*, *cos_out*: mean cosine of a class's prototypes with the training
embeddings of that class, and of all others."""


_CUB200 = """\
The paper's row of KMEx on CUB-200 is printed as K/C=5; its text says ten. It also quotes 79.2 % for ProtoPNet there,
from Chen et al. (2019), whose images are cut to their boxes."""

_ONE_POSITION = """\
At 32 pixels the last block has a single position: B4 is then KMEx on *z* of unit length, its map one colour, both
attributions constant, and ProtoPNet has one patch an image."""

_PRICES = """\
Points of test accuracy that B4 and B234 lose to the CNN. *all images*: prototypes from all training images, as in
Table 2; below it each reading is switched alone, with prototypes from a part of them (`fit_on` below)."""

_EFFECTS = """\
What else is open: each embedding's *nearest* prototype instead of all *pairs* (change of Table 1), eq. 11 as it is
instead of averaged over segments at the *attribution start* (correlation of both maps of an image), and trainings with
one thing switched (points of test accuracy)."""


def summary(relations: pd.DataFrame, prices: pd.DataFrame) -> list[str]:
    """Lines that say which findings hold in which data set, and what the factor of eq. 8 is worth."""
    lines = []
    for claim, some in relations.groupby("claim", sort=False):
        whole = some.holds_in == some.seeds
        where = [f"{r.dataset} ({r.holds_in} of {r.seeds} seeds)" for r in some[~whole].itertuples()]
        everywhere = "holds in every seed of " + ", ".join(some.dataset)
        verdict = everywhere if whole.all() else "does not hold in every seed of " + ", ".join(where)
        lines.append(f"- {claim}: {verdict}.")
    if len(prices):
        mine = prices[prices.model == "B234"].set_index(["dataset", "question", "option"])["mean"]
        published = prices[prices.model == "B234"].groupby("dataset")["paper"].first()
        in_paper = {d: f" (paper {lost:.1f})" if pd.notna(lost) else "" for d, lost in published.items()}
        for dataset in dict.fromkeys(prices.dataset):
            asked = (("all images", ""), ("default", ""), ("scale", "1"))
            whole, printed, equal = (mine[dataset, question, option] for question, option in asked)
            lines.append(
                f"- What B234 loses to the CNN in {dataset}: {whole:.1f} points{in_paper[dataset]}; with prototypes "
                f"from a part of the images {printed:.1f} with the printed 1/D_b, {equal:.1f} with equal weights."
            )
    return lines


def _numbers(values: Iterable[float], digits: int = 2) -> list[str]:
    return ["–" if pd.isna(value) else f"{round(value, digits) + 0.0:.{digits}f}" for value in values]  # no -0.0


def _with_spread(table: pd.DataFrame, digits: int = 2) -> list[str]:
    spread = [f" ± {value:.{digits}f}" if pd.notna(value) else "" for value in table["std"]]
    return [mean + more for mean, more in zip(_numbers(table["mean"], digits), spread, strict=True)]


def _markdown(table: pd.DataFrame) -> str:
    return table.astype(str).to_markdown(index=False, disable_numparse=True)


def _picture(figures: Path, dataset: str, name: str, caption: str) -> list[str]:
    if not (figures / dataset / f"{name}.png").exists():
        return []
    return [f"![{caption}](../{dataset}/{name}.png)", "", f"*{caption}*", ""]
