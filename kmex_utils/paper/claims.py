"""What the paper finds, as numbers with a criterion each, and what counts as different from its tables."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from .published import TABLE1, TABLE2

PAPER_SEEDS = 5

Key = tuple[str, str, str]  # model, metric, split


def compare(table: pd.DataFrame) -> pd.DataFrame:
    """A table of :func:`~kmex_utils.paper.published.tidy` with the difference to the paper, and if chance explains it.

    ``margin`` is the half width of a 95 % interval of that difference if the paper's five seeds spread as ours do
    (Student's t), and half a unit of the paper's last digit; ``outside`` says whether the difference lies beyond it,
    and is empty where one seed has no spread. Of what the paper does not print, accuracies of other models stay.
    """
    from scipy.stats import t  # type: ignore[import-untyped]

    table = table[table.paper.notna() | (table.metric == "accuracy")].copy()
    rounding = np.where(table.metric == "accuracy", 0.05, 0.005)
    n = table.n_seeds.to_numpy()
    spread_of = np.maximum(n, 2)  # one seed has no degree of freedom; its margin is emptied below
    margin = t.ppf(0.975, spread_of - 1) * table["std"].to_numpy() * np.sqrt(1 / spread_of + 1 / PAPER_SEEDS)
    table["difference"] = table["mean"] - table.paper
    table["margin"] = np.where((n > 1) & table.paper.notna(), margin + rounding, np.nan)
    outside = np.where(table.difference.abs() > table.margin, "yes", "no")
    table["outside"] = np.where(table.margin.notna(), outside, "")
    return table


@dataclass(frozen=True)
class Relation:
    """A finding of the paper as a number and what it must satisfy: the first of ``terms``, less the second if any."""

    claim: str
    measure: str
    terms: tuple[Key, ...]
    criterion: str
    holds: Callable[[float], bool]

    def value(self, numbers: Mapping[Key, float]) -> float:
        """The number; KeyError where a term is not there."""
        first, *second = (numbers[term] for term in self.terms)
        return first - sum(second)


def relations(prototypes_per_class: int) -> list[Relation]:
    """The paper's findings, for a data set's K/C."""
    cnn, b4, b234, protopnet = ((model, "accuracy", "test") for model in ("CNN", "B4", "B234", "ProtoPNet"))
    kmex = (f"KMEx (K/C={prototypes_per_class})", "accuracy", "test")
    own, others, columns = (("CNN", f"cos_{what}", "train") for what in ("class", "out", "columns"))
    protopnet_own, protopnet_others = (("ProtoPNet", f"cos_{what}", "train") for what in ("class", "out"))
    centroids_own = ("KMEx (K/C=1)", "cos_class", "train")

    def within(limit: float) -> Callable[[float], bool]:
        return lambda value: abs(value) <= limit

    return [
        Relation("KMEx keeps the CNN's accuracy", "KMEx - CNN, points", (kmex, cnn), "within 1", within(1)),
        Relation("B4 stays close to it", "B4 - CNN, points", (b4, cnn), "at least -4", lambda d: d >= -4),
        Relation("B234 gives up more", "B234 - B4, points", (b234, b4), "below 0: its sign", lambda d: d < 0),
        Relation(
            "ProtoPNet is not better than the CNN",
            "ProtoPNet - CNN, points",
            (protopnet, cnn),
            "at most 0",
            lambda d: d <= 0,
        ),
        Relation(
            "centroids point into their class, columns less",
            "cos class, KMEx (K/C=1) - CNN",
            (centroids_own, own),
            "above 0",
            lambda d: d > 0,
        ),
        Relation("columns are orthogonal to other classes", "cos out, CNN", (others,), "within 0.1", within(0.1)),
        Relation(
            "columns are nearly orthogonal to each other",
            "cos between columns, CNN",
            (columns,),
            "within 0.15",
            within(0.15),
        ),
        Relation(
            "ProtoPNet's cosines do not tell classes apart",
            "cos class - cos out, ProtoPNet",
            (protopnet_own, protopnet_others),
            "at most 0.1",
            lambda d: d <= 0.1,
        ),
    ]


def check_relations(records: pd.DataFrame, dataset: str, prototypes_per_class: int) -> pd.DataFrame:
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
    published = {key[1:]: value for key, value in {**TABLE1, **TABLE2}.items() if key[0] == dataset}
    seeds = [
        dict(zip(zip(part.model, part.metric, part.split, strict=True), part.value, strict=True))
        for _, part in records.groupby("seed")
    ]
    rows = []
    for relation in relations(prototypes_per_class):
        if any(term not in numbers for term in relation.terms for numbers in seeds):
            continue
        printed = all(term in published for term in relation.terms)
        values = [relation.value(numbers) for numbers in seeds]
        rows.append(
            {
                "dataset": dataset,
                "claim": relation.claim,
                "measure": relation.measure,
                "criterion": relation.criterion,
                "paper": relation.value(published) if printed else np.nan,
                "mean": np.mean(values),
                "std": np.std(values, ddof=1) if len(values) > 1 else np.nan,
                "seeds": len(values),
                "holds_in": sum(relation.holds(value) for value in values),
            }
        )
    return pd.DataFrame(rows)
