"""What the paper finds, as numbers with a criterion each, and what counts as different from its tables."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

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
    from scipy.stats import t

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


CRITERIA: dict[str, Callable[[float], bool]] = {
    "within 1": lambda d: abs(d) <= 1,
    "at least -4": lambda d: d >= -4,
    "below 0: its sign": lambda d: d < 0,
    "above 0": lambda d: d > 0,
    "at most 0": lambda d: d <= 0,
    "at most 0.1": lambda d: d <= 0.1,
    "within 0.1": lambda d: abs(d) <= 0.1,
    "within 0.15": lambda d: abs(d) <= 0.15,
}


class Relation(NamedTuple):
    """A finding of the paper as a number and what it must satisfy: the first of ``terms``, less the second if any."""

    claim: str
    measure: str
    criterion: str
    terms: tuple[Key, ...]

    def value(self, numbers: Mapping[Key, float]) -> float:
        """The number; KeyError where a term is not there."""
        first, *second = (numbers[term] for term in self.terms)
        return first - sum(second)

    def holds(self, value: float) -> bool:
        """Whether the number satisfies the criterion."""
        return CRITERIA[self.criterion](value)


def relations(prototypes_per_class: int) -> list[Relation]:
    """The paper's findings, for a data set's K/C."""
    models = ("CNN", f"KMEx (K/C={prototypes_per_class})", "B4", "B234", "ProtoPNet")
    cnn, kmex, b4, b234, protopnet = ((model, "accuracy", "test") for model in models)
    inside, outside, columns = (("CNN", f"cos_{what}", "train") for what in ("class", "out", "columns"))
    protopnet_inside, protopnet_outside = (("ProtoPNet", f"cos_{what}", "train") for what in ("class", "out"))
    centroids = ("KMEx (K/C=1)", "cos_class", "train")
    to_centroids, apart = "cos class, KMEx (K/C=1) - CNN", "cos class - cos out, ProtoPNet"
    rows: list[tuple[str, str, str, tuple[Key, ...]]] = [
        ("KMEx keeps the CNN's accuracy", "KMEx - CNN, points", "within 1", (kmex, cnn)),
        ("B4 stays close to it", "B4 - CNN, points", "at least -4", (b4, cnn)),
        ("B234 gives up more", "B234 - B4, points", "below 0: its sign", (b234, b4)),
        ("ProtoPNet is not better than the CNN", "ProtoPNet - CNN, points", "at most 0", (protopnet, cnn)),
        ("centroids point into their class, columns less", to_centroids, "above 0", (centroids, inside)),
        ("columns are orthogonal to other classes", "cos out, CNN", "within 0.1", (outside,)),
        ("columns are nearly orthogonal to each other", "cos between columns, CNN", "within 0.15", (columns,)),
        ("ProtoPNet's cosines do not tell classes apart", apart, "at most 0.1", (protopnet_inside, protopnet_outside)),
    ]
    return [Relation(*row) for row in rows]


def check_relations(records: pd.DataFrame, dataset: str, prototypes_per_class: int) -> pd.DataFrame:
    """Each relation in the paper and in every seed of ours; those of a model that was not run are left out.

    ``records`` are the numbers behind both tables, one per seed: model, metric, split, seed, value. The columns are
    dataset, claim, measure, criterion, paper (NaN where it prints no such number), mean, std, seeds and holds_in.
    """
    published = {key[1:]: value for key, value in {**TABLE1, **TABLE2}.items() if key[0] == dataset}
    key = ["model", "metric", "split"]
    seeds = [dict(part.set_index(key)["value"]) for _, part in records.groupby("seed")]
    rows = []
    for relation in relations(prototypes_per_class):
        if not all({*relation.terms} <= {*numbers} for numbers in seeds):
            continue
        values = [relation.value(numbers) for numbers in seeds]
        rows.append(
            {
                "dataset": dataset,
                "claim": relation.claim,
                "measure": relation.measure,
                "criterion": relation.criterion,
                "paper": relation.value(published) if {*relation.terms} <= {*published} else np.nan,
                "mean": np.mean(values),
                "std": np.std(values, ddof=1) if len(values) > 1 else np.nan,
                "seeds": len(values),
                "holds_in": sum(relation.holds(value) for value in values),
            }
        )
    return pd.DataFrame(rows)


def check_fidelity(differences: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What depth buys: the pairs of notebook 16's ``differences`` with a shallower start, as :func:`check_relations`.

    It holds in a seed where the interval of the difference in NMI_m lies above zero. The paper has no such number.
    """
    shallower = differences[(differences.metric == "nmi") & (differences.than != "ProtoPNet")]
    rows = []
    for (more, than), part in shallower.groupby(["more", "than"], sort=False):
        rows.append(
            {
                "dataset": dataset,
                "claim": "shallower blocks raise semantic fidelity",
                "measure": f"NMI_m, {more} - {than}, points",
                "criterion": "its 95 % interval above 0",
                "paper": np.nan,
                "mean": part["difference"].mean(),
                "std": part["difference"].std(),
                "seeds": len(part),
                "holds_in": int((part["low"] > 0).sum()),
            }
        )
    return pd.DataFrame(rows)


def check_section5(table: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What the paper's section 5 says of other methods: notebook 18's ``section5.csv`` as :func:`check_relations`."""
    return pd.DataFrame(
        {
            "dataset": dataset,
            "claim": "section 5: " + table.claim,
            "measure": table.measure,
            "criterion": table["holds if"],
            "paper": np.nan,
            "mean": table.value,
            "std": np.nan,
            "seeds": 1,
            "holds_in": table.holds.astype(int),
        }
    )
