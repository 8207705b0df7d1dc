"""What the points the paper leaves open are worth: arithmetic on the numbers of notebooks 13 and 14.

A ledger is a table of numbers, one per seed: question, option, seed, model, metric, split, value. ``default`` is the
default reading, ``as trained`` the training that one with something ``switched`` is compared with.
"""

import json
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from ..method.composite import Normalisation
from ..networks.catalogue import channels
from .published import TABLE2, over_seeds

READINGS = (  # question, option, what it switches
    ("default", "", Normalisation()),
    ("norm", "channel", Normalisation(norm="channel")),
    ("norm", "image", Normalisation(norm="image")),
    ("scale", "1/sqrt(D)", Normalisation(scale="1/sqrt(D)")),
    ("scale", "1", Normalisation(scale="1")),
    ("align_corners", "True", Normalisation(align_corners=True)),
    ("grid", "deepest", Normalisation(grid="deepest")),
    ("grid", "double", Normalisation(grid="double")),
)
_QUESTIONS = [question for question, _, _ in READINGS]


def map_correlation(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Correlation of each image's two maps [N, H, W] over positions, [N]; 1 where neither varies."""
    one, other = (maps.flatten(1).double() for maps in (one, other))
    one, other = (maps - maps.mean(1, keepdim=True) for maps in (one, other))
    constant = (one.abs().amax(1) < 1e-9) & (other.abs().amax(1) < 1e-9)  # but for the means' rounding
    return torch.where(constant, 1.0, F.cosine_similarity(one, other, dim=1))


def changes(ledger: pd.DataFrame) -> pd.DataFrame:
    """What each option changes against the default of the same seed: a column ``change`` beside the ledger's.

    ``accuracy_most_frequent`` of the default reading is an option of the question ``prediction``; trainings with
    something switched are compared with those ``as trained``; ``map_correlation`` has no default and is itself.
    """
    key = ["question", "model", "metric", "split", "seed"]
    references = ledger[ledger.question.isin(["default", "as trained"])].set_index(key)["value"]
    table = ledger.reset_index(drop=True)
    prediction = (table.question == "default") & (table.metric == "accuracy_most_frequent")
    table.loc[prediction, ["question", "option", "metric"]] = ["prediction", "most frequent", "accuracy"]
    table = table[~table.question.isin(["default", "as trained"]) & (table.metric != "accuracy_most_frequent")]
    compared = table[table.metric != "map_correlation"]
    reference = np.where(compared.option == "switched", "as trained", "default")
    before = references.loc[pd.MultiIndex.from_frame(compared.assign(question=reference)[key])]
    change = table["value"].copy()
    change[compared.index] -= before.to_numpy()
    return table.assign(change=change)


def prices(ledger: pd.DataFrame, records: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What B4 and B234 lose to the CNN on the test images under each reading, beside what they lose in the paper.

    ``records`` hold accuracies by seed, those of the question ``all images``: prototypes of a ledger may come from a
    part of the training images. The columns are dataset, question, option, model, mean, std, seeds, paper.
    """
    tested = records[(records.metric == "accuracy") & (records.split == "test")]
    cnn = tested[tested.model == "CNN"].set_index("seed")["value"]
    whole = tested.assign(question="all images", option="")
    readings = ledger[ledger.question.isin(_QUESTIONS) & (ledger.split == "test")]
    printed = readings[(readings.question == "default") & (readings.metric == "accuracy_most_frequent")]
    printed = printed.assign(question="prediction", option="most frequent")
    table = pd.concat([whole, readings[readings.metric == "accuracy"], printed]).fillna({"option": ""})
    table = table[table.model.isin(["B4", "B234"])]
    lost = table.assign(lost=table.seed.map(cnn) - table.value)
    priced = over_seeds(lost.assign(dataset=dataset), ["dataset", "question", "option", "model"], "lost")
    paper = {model: TABLE2.get((dataset, model, "accuracy", "test"), np.nan) for model in ("CNN", "B4", "B234")}
    return priced.assign(paper=[paper["CNN"] - paper[model] for model in priced.model])


def ledger_of_depth(records: pd.DataFrame, prototypes_per_class: int) -> pd.DataFrame:
    """Notebook 14's scales as a ledger, for a data set that has no other; of one K/C."""
    same = records[records.prototypes_per_class == prototypes_per_class]
    same = same[same.model.isin(["B4", "B34", "B234"])]
    printed = same.scale == "1/D"
    return same.assign(question=np.where(printed, "default", "scale"), option=same.scale.where(~printed, ""))


def effects(ledger: pd.DataFrame, dataset: str) -> pd.DataFrame:
    """What is open beside eq. 7, 8 and 10: pairs of Table 1, start of the attribution, trainings with a thing switched.

    Changes against the default of the same seed, on test images where it is an accuracy, and the correlation of both
    attributions. The columns are dataset, question, model, metric, mean, std, seeds.
    """
    table = changes(ledger.fillna({"option": ""})).assign(dataset=dataset)
    table = table[~table.question.isin([*_QUESTIONS, "prediction"])]
    cosine = (table.question == "pairs") & (table.model != "KMEx (K/C=1)")  # whose one prototype is the nearest
    correlation, points = table.metric == "map_correlation", (table.metric == "accuracy") & (table.split == "test")
    return over_seeds(table[cosine | correlation | points], ["dataset", "question", "model", "metric"], "change")


def last_share(network: str, scale: str) -> float:
    """Nominal share of B234's deepest block in the squared distance of eq. 9: as if blocks differed alike unscaled.

    They are unit rows (``norm`` position), so block b weighs factor(D_b)^2: 5 % for a ResNet34 with the printed 1/D_b.
    ``network`` is a name, with its arguments as JSON behind it where it has any.
    """
    arch, _, arguments = network.partition(" ")
    of_blocks = channels(arch, json.loads(arguments or "{}"))[-3:]
    weights = [factor**2 for factor in Normalisation(scale=scale).factors(of_blocks)]
    return weights[-1] / sum(weights)


def weightings(prices: pd.DataFrame, networks: Mapping[str, str]) -> pd.DataFrame:
    """What B234 loses to the CNN with each factor of eq. 8, beside the share of its deepest block.

    ``prices`` of :func:`prices`, ``networks`` by data set. The columns are dataset, network, scale, last_share, mean,
    std, seeds, paper.
    """
    table = prices[(prices.model == "B234") & prices.question.isin(["default", "scale"])]
    table = table.assign(scale=table.option.replace("", "1/D"), network=table.dataset.map(networks))
    table["last_share"] = [last_share(*pair) for pair in zip(table.network, table.scale, strict=True)]
    return table[["dataset", "network", "scale", "last_share", "mean", "std", "seeds", "paper"]]
