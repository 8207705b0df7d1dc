"""Fits that differ in one point: the readings eq. 7 to 10 leave open, the depth, the number of prototypes."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from .activations import Activations, keep
from .attribution import attributions
from .backbones import Backbone, avg_pool
from .composite import Normalisation
from .datasets import Dataset
from .explainers import EncoderKMeans, KMEx, block_name
from .hardware import float64_device
from .kmeans import DenseRows, Prototypes, check_enough, classwise
from .measures import accuracy

if TYPE_CHECKING:
    import pandas as pd

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


@dataclass(frozen=True)
class Kept:
    """What a trained network makes of a data set, kept to be clustered in several ways.

    ``some`` [n] are the training images prototypes come from; accuracies are those of all images.
    """

    x: dict[str, Activations]
    labels: dict[str, torch.Tensor]
    classes: tuple[str, ...]
    some: torch.Tensor
    blocks: int
    device: torch.device

    @classmethod
    def of(
        cls,
        backbone: Backbone,
        dataset: Dataset,
        first_block: int,
        images_per_class: int = 0,
        *,
        device: torch.device | str = "cpu",
    ) -> "Kept":
        """One pass over both splits; prototypes from the first ``images_per_class`` of each class (0: from all)."""
        labels = {split: dataset.split(split).labels for split in ("train", "test")}
        members = [(labels["train"] == c).nonzero().flatten() for c in range(len(dataset.classes))]
        some = torch.cat([index[: images_per_class or None] for index in members]).sort().values
        x = {split: keep(backbone, dataset, split, first_block, device=device) for split in labels}
        where = float64_device(torch.device(device))
        return cls(x, labels, dataset.classes, some, len(backbone.blocks), where)

    def fit(
        self, start_block: int, normalisation: Normalisation, per_class: int, *, seed: int, restarts: int
    ) -> EncoderKMeans:
        """B4, B34 … of ``some``."""

        def rows_of(index: torch.Tensor):
            return self.x["train"].rows(self.some[index], start_block, normalisation, device=self.device)

        prototypes = self._classwise(rows_of, per_class, seed, restarts, block_name(start_block))
        return EncoderKMeans(prototypes, len(self.classes), start_block, normalisation)

    def fit_kmex(self, per_class: int, *, seed: int, restarts: int) -> KMEx:
        """KMEx of ``some``."""
        z = self.z("train", self.some)
        prototypes = self._classwise(lambda index: DenseRows(z[index]), per_class, seed, restarts, "KMEx")
        return KMEx(prototypes, len(self.classes))

    def _classwise(self, rows_of, per_class: int, seed: int, restarts: int, progress: str) -> Prototypes:
        labels = self.labels["train"][self.some]
        return classwise(rows_of, labels, self.classes, per_class, seed=seed, restarts=restarts, progress=progress)

    def z(self, split: str, index: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings of a split, or of some of its images, [N, D]."""
        x = self.x[split]
        index = torch.arange(len(x)) if index is None else index
        return torch.cat([avg_pool(x.read(some, self.blocks)[-1]) for some in index.split(512)])

    def map(self, explainer: EncoderKMeans, split: str) -> torch.Tensor:
        """q_s(b:) of a split, [N, H', W']."""
        x, options = self.x[split], {"device": self.device, "keep": False}
        rows = x.rows(torch.arange(len(x)), explainer.start_block, explainer.normalisation, **options)
        return explainer.sim(rows).cpu()

    def accuracies(
        self, explainer: EncoderKMeans, splits: Sequence[str] = ("train", "test")
    ) -> Iterator[tuple[str, str, float]]:
        """(metric, split, %): both readings of the prediction of eq. 10."""
        for split in splits:
            truth = self.labels[split]
            q_s = self.map(explainer, split)
            yield "accuracy", split, accuracy(explainer.proj(q_s).argmax(1), truth)
            yield "accuracy_most_frequent", split, accuracy(explainer.most_frequent(q_s), truth)


def readings(
    kept: Kept, per_class: int, *, seed: int, restarts: int = 10, start_blocks: Sequence[int] = (4, 3, 2)
) -> tuple[list[dict[str, Any]], dict[int, EncoderKMeans]]:
    """Each of :data:`READINGS` for each start block.

    Returns
    -------
    (records, explainers)
        A record for each number: question, option, seed, model, metric, split, value, seconds of the fit; and the
        default reading's explainers by start block.
    """
    records, default = [], {}
    for question, option, normalisation in READINGS:
        for b in start_blocks:
            start = time.perf_counter()
            explainer = kept.fit(b, normalisation, per_class, seed=seed, restarts=restarts)
            seconds = time.perf_counter() - start
            if question == "default":
                default[b] = explainer
            for metric, split, value in kept.accuracies(explainer):
                values = {"model": block_name(b), "metric": metric, "split": split, "value": value, "seconds": seconds}
                records.append({"question": question, "option": option, "seed": seed, **values})
    return records, default


def attribution_starts(
    kept: Kept, backbone: Backbone, explainers: dict[int, EncoderKMeans], images: int = 1000
) -> dict[str, float]:
    """How far the two starts of the attribution's recursion agree, by model.

    The mean over test images (the first ``images``) of the correlation between both maps of the predicted class; 1
    where neither varies.
    """
    first = min(explainers)
    index = torch.arange(min(images, len(kept.x["test"])))
    x = kept.x["test"].read(index, first)
    target = backbone.classifier(avg_pool(x[-1])).argmax(1)
    blocks = [x[0]] * (first - 1) + x  # those before the first are not looked at
    maps = {start: attributions(blocks, backbone.c, target, explainers, start=start) for start in ("segments", "raw")}
    found = {}
    for b in sorted(explainers, reverse=True):
        one, other = (maps[start][b].flatten(1).double() for start in maps)
        one, other = one - one.mean(1, keepdim=True), other - other.mean(1, keepdim=True)
        agreement = F.cosine_similarity(one, other, dim=1)
        constant = (one.abs().amax(1) < 1e-9) & (other.abs().amax(1) < 1e-9)
        found[block_name(b)] = torch.where(constant, 1.0, agreement).mean().item()
    return found


def depths(
    kept: Kept,
    per_class: Sequence[int],
    start_blocks: Sequence[int],
    scales: Sequence[str],
    *,
    seed: int,
    restarts: int = 3,
) -> list[dict[str, Any]]:
    """Test accuracy from prototype counts for each start block, K/C and scale of eq. 8; KMEx beside them.

    One record for each number: model, scale, per_class, seed, metric, split, value, seconds of the fit.
    """
    members = [(kept.labels["train"][kept.some] == c).nonzero().flatten() for c in range(len(kept.classes))]
    check_enough(members, kept.classes, max(per_class), lambda index: index)
    records = []
    z, truth = kept.z("test"), kept.labels["test"]
    for k in per_class:
        start = time.perf_counter()
        kmex = kept.fit_kmex(k, seed=seed, restarts=restarts)
        shared = {"per_class": k, "seed": seed, "seconds": time.perf_counter() - start}
        values = {"metric": "accuracy", "split": "test", "value": accuracy(kmex.predict(z), truth)}
        records.append({"model": "KMEx", "scale": "", **values, **shared})
        for b in start_blocks:
            for scale in scales if b < max(start_blocks) else scales[:1]:  # one block alone has one scale
                start = time.perf_counter()
                explainer = kept.fit(b, Normalisation(scale=scale), k, seed=seed, restarts=restarts)
                shared["seconds"] = time.perf_counter() - start
                for metric, split, value in kept.accuracies(explainer, ["test"]):
                    values = {"metric": metric, "split": split, "value": value}
                    records.append({"model": block_name(b), "scale": scale, **values, **shared})
    return records


def changes(records: "pd.DataFrame") -> "pd.DataFrame":
    """What each option changes against the default of the same seed: a column ``change`` beside the records'.

    ``accuracy_most_frequent`` of the default reading is an option of the question ``prediction``; trainings with
    something switched are compared with those ``as trained``; ``map_correlation`` has no default and is itself.
    """
    import pandas as pd

    key = ["model", "metric", "split", "seed"]
    default = records[records.question == "default"].set_index(key)["value"]
    trained = records[records.question == "as trained"].set_index(key)["value"]
    rows = []
    for record in records.to_dict("records"):
        question, at = record["question"], tuple(record[name] for name in key)
        if question == "default" and record["metric"] == "accuracy_most_frequent":
            record |= {"question": "prediction", "option": "most frequent", "metric": "accuracy"}
            rows.append({**record, "change": record["value"] - default[at[0], "accuracy", at[2], at[3]]})
        elif question in ("default", "as trained") or record["metric"] == "accuracy_most_frequent":
            continue
        elif record["metric"] == "map_correlation":
            rows.append({**record, "change": record["value"]})
        else:
            before = trained if record["option"] == "switched" else default
            rows.append({**record, "change": record["value"] - before[at]})
    return pd.DataFrame(rows)
