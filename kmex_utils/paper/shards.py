"""Notebook 4 in shards, each by a process of its own, on any machine that sees the folder of runs.

k-means is class-wise, and an image's map needs that image and all prototypes alone: both divide without approximation.
``fit`` clusters a shard's classes; ``maps``, when all prototypes are there, assigns the positions of its images.
:class:`Gathered` answers what notebook 4 asks of :class:`~kmex_utils.explanation.passed.Passed`, to the last bit, from
what the shards have left.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeVar

import torch

from .. import hardware, parameters, paths
from ..data import Dataset
from ..explanation.nearest import Nearest
from ..explanation.passed import SPLITS, Passed, Shard
from ..method.composite import Normalisation
from ..method.explainers import EncoderKMeans, block_names
from ..method.products import index_type
from ..method.prototypes import Prototypes
from .runs import Run

NOTEBOOK = "04_encoder"
OF_EQ_8 = [field.name for field in fields(Normalisation)]
T = TypeVar("T", Prototypes, Nearest)


def work(stage: str, number: int, given: Mapping[str, Any]) -> None:
    """Do shard ``number`` of ``fit`` or ``maps`` by notebook 4's parameters, and leave the result in the run's folder.

    Raises what notebook 4 does.
    """
    source = (paths.ROOT / "notebooks" / f"{NOTEBOOK}.py").read_text(encoding="utf-8")
    settings = parameters.resolved(source, given)
    run = Run.of(settings["runs"], settings["dataset"], settings["seed"])
    dataset, names = run.dataset(), block_names(settings["start_blocks"], run.blocks)
    shard = Shard(number, settings["shards"])
    if shard.of > len(dataset.classes):
        raise ValueError(f"{run.name} has {len(dataset.classes)} classes: at most as many shards, got {shard.of}")
    hardware.set_threads(settings["threads"])
    where = {"store": settings["store"], "folder": paths.scratch(None)}
    where["device"] = hardware.pick_device(settings["device"])
    splits = ["train"] if stage == "fit" else [*SPLITS]
    passed = Passed.of(run.network(), dataset, min(names), shard=shard, splits=splits, **where)
    made_by = _made_by(run, settings)
    if stage == "fit":
        tensors = _fit(passed, names, made_by)
    else:
        gathered = Gathered(run, dataset, settings)
        tensors = _maps(passed, names, gathered)
        made_by["fit"] = gathered.fit
    run.save_part(_part(stage, shard), tensors, made_by)


def _fit(passed: Passed, names: Mapping[int, str], made_by: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Prototypes of the classes passed."""
    tensors: dict[str, torch.Tensor] = {}
    normalisation = Normalisation(*(made_by[key] for key in OF_EQ_8))
    how = {"seed": made_by["seed"], "restarts": made_by["restarts"]}
    for b, name in names.items():
        explainer = passed.fit_encoder(b, normalisation, made_by["prototypes_per_class"], **how)
        tensors |= {f"{name}_{key}": value for key, value in vars(explainer.prototypes).items()}
    return tensors


def _maps(passed: Passed, names: Mapping[int, str], gathered: "Gathered") -> dict[str, torch.Tensor]:
    """Maps of the images passed, and the patches nearest to the prototypes of their classes."""
    tensors = {f"index_{split}": x.index for split, x in passed.x.items()}
    for b, name in names.items():
        explainer = gathered.explainer(b)
        maps = {split: passed.map(explainer, split) for split in passed.x}
        small = index_type(len(explainer.prototypes))
        tensors |= {f"{name}_map_{split}": of_split.to(small) for split, of_split in maps.items()}
        here = torch.isin(explainer.prototypes.labels, torch.tensor(passed.classes_here))
        nearest = passed.nearest(explainer, maps["train"])
        tensors |= {f"{name}_nearest_{key}": value[here] for key, value in vars(nearest).items()}
    return tensors


class Gathered:
    """What the shards of a run have left, asked as :class:`~kmex_utils.explanation.passed.Passed` is.

    A FileNotFoundError or ValueError where a shard is missing, or was made with other ``settings`` of notebook 4.
    """

    def __init__(self, run: Run, dataset: Dataset, settings: Mapping[str, Any]) -> None:
        self._run, self._made_by = run, _made_by(run, settings)
        self._classes = len(dataset.classes)
        self._read: dict[str, list[dict[str, torch.Tensor]]] = {}
        self.labels = {split: dataset.split(split).labels for split in SPLITS}

    def fit_encoder(
        self, start_block: int, normalisation: Normalisation, prototypes_per_class: int, **options: Any
    ) -> EncoderKMeans:
        """The prototypes that the shards have fitted; they must have been asked for the same."""
        explainer = self.explainer(start_block)
        asked = (normalisation, prototypes_per_class * self._classes, options)
        if asked != (explainer.normalisation, len(explainer.prototypes), {k: self._made_by[k] for k in options}):
            raise ValueError("the shards were asked for other prototypes than these: start `kmex batch` again")
        return explainer

    def explainer(self, start_block: int) -> EncoderKMeans:
        """B4, B34 … of the prototypes that the shards have fitted."""
        of_shards = self._of_shards("fit")
        prototypes = _together(Prototypes, of_shards, f"{self._name(start_block)}_")
        normalisation = Normalisation(*(self._made_by[key] for key in OF_EQ_8))
        return EncoderKMeans(prototypes, self._classes, start_block, normalisation)

    def map(self, explainer: EncoderKMeans, split: str) -> torch.Tensor:
        """q_s(b:) of a split, [N, H', W']."""
        of_shards, key = self._of_shards("maps"), f"{self._name(explainer.start_block)}_map_{split}"
        order = torch.cat([part[f"index_{split}"] for part in of_shards]).argsort()
        return torch.cat([part[key] for part in of_shards])[order].int()

    def nearest(self, explainer: EncoderKMeans, maps: torch.Tensor) -> Nearest:
        """The training patches nearest to the prototypes."""
        return _together(Nearest, self._of_shards("maps"), f"{self._name(explainer.start_block)}_nearest_")

    def _name(self, start_block: int) -> str:
        return block_names([start_block], self._run.blocks)[start_block]

    @cached_property
    def fit(self) -> str:
        """A hash of the prototypes, which maps were made by."""
        of_shards = self._of_shards("fit")
        tensors = (part[key] for part in of_shards for key in sorted(part))
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in tensors)).hexdigest()

    def _of_shards(self, stage: str) -> list[dict[str, torch.Tensor]]:
        """The tensors of each shard, read once."""
        if stage in self._read:
            return self._read[stage]
        expected = self._made_by | ({"fit": self.fit} if stage == "maps" else {})
        parts = []
        for number in range(1, self._made_by["shards"] + 1):
            name = _part(stage, Shard(number, self._made_by["shards"]))
            tensors, made_by = self._run.part(name, f"{NOTEBOOK} by `kmex batch`, or without shards,")
            if other := [key for key, value in expected.items() if made_by.get(key) != value]:
                raise ValueError(
                    f"{self._run.folder / name} was made with other settings ({', '.join(other)}): "
                    "start `kmex batch` again"
                )
            parts.append(tensors)
        self._read[stage] = parts  # of all shards or of none
        return parts


def _together(kind: type[T], parts: list[dict[str, torch.Tensor]], prefix: str) -> T:
    return kind(*(torch.cat([part[prefix + field.name] for part in parts]) for field in fields(kind)))


def _part(stage: str, shard: Shard) -> str:
    return f"shards/{stage}-{shard.number}-of-{shard.of}"


def _made_by(run: Run, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What of notebook 4's parameters decides the numbers, as resolved."""
    kept = ("shards", "seed", "restarts", "store", *OF_EQ_8)
    own = run.settings()["prototypes_per_class"]
    made_by = {"prototypes_per_class": settings["prototypes_per_class"] or own}
    return made_by | {key: settings[key] for key in kept} | {"start_blocks": sorted(settings["start_blocks"])}
