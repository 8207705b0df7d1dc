"""What one training run leaves behind, and the checks that its parts belong together.

``runs/<dataset>/seed-<seed>/`` is a folder of :class:`~kmex_utils.explanation.explained.Explained`: the network and
the prototypes of notebooks 3 and 4. Beside it lie ``training.json`` (everything that made the network, as resolved),
``embeddings.safetensors``, ``results-*.json`` and the baseline. Every part names the network it was made from, so parts
of an earlier training are refused instead of silently mixed in.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import data, networks, paths
from ..data import Dataset
from ..explanation.explained import Explained
from ..networks import Network
from ..parameters import whole
from ..store import load_json, load_tensors, save_json, save_tensors


@dataclass(frozen=True)
class Run:
    """One data set and seed under a folder of runs."""

    runs: Path
    name: str
    seed: int

    @classmethod
    def of(cls, runs: str | Path, dataset: str, seed: int) -> "Run":
        """A run by names; relative ``runs`` start at the repository's root."""
        whole(seed=seed)
        return cls(paths.resolve(runs), paths.folder_name(dataset), seed)

    @classmethod
    def at(cls, folder: Path) -> "Run":
        """The run in a folder ``<runs>/<dataset>/seed-<seed>``."""
        seed = folder.name.removeprefix("seed-")
        if not (folder / "training.json").is_file() or not seed.isdigit():
            raise FileNotFoundError(f"{folder} is not the folder of a run: run notebook 01_train")
        return cls(folder.parents[1], folder.parent.name, int(seed))

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return self.runs / self.name / f"seed-{self.seed}"

    @property
    def _given(self) -> str:
        return f"with dataset={self.name} and seed={self.seed}"

    @property
    def training_state(self) -> Path:
        """The checkpoint an interrupted training continues from."""
        return self.folder / "training.safetensors"

    def save_training(self, network: Network, dataset: Dataset, settings: dict[str, Any]) -> None:
        """The trained network, without prototypes yet, and everything that made it."""
        what = {"dataset": self.name, "data": dataset.settings, "folder": "", "seed": self.seed}
        Explained(network, dataset, {**network.settings(), **what}).save(self.folder)
        save_json(self.folder / "training.json", {**settings, "network": network.fingerprint})

    def settings(self) -> dict[str, Any]:
        """Settings of the training, with ``classes`` and the ``network``'s fingerprint."""
        path = self.folder / "training.json"
        if not path.exists():
            again = f"run notebook 01_train {self._given}"
            if (self.folder / "backbone.safetensors").exists():
                raise ValueError(f"{self.folder} is a run of version 0.1, which is no longer read: {again} again")
            raise FileNotFoundError(f"no trained network in {self.folder}: {again}")
        return load_json(path)

    def network(self) -> Network:
        """The frozen network."""
        self.settings()
        return networks.load(self.folder)

    @property
    def blocks(self) -> int:
        """How many blocks the network has."""
        self.settings()
        return len(load_json(self.folder / "network.json")["blocks"])

    def dataset(self, images_per_class: int = 0) -> Dataset:
        """The data set as it was for training, or of that at most the first so many images of each class."""
        given = self.settings()["data"]
        most = min(filter(None, (given["images_per_class"], images_per_class)), default=0)
        return data.reopen({**given, "images_per_class": most})

    def explained(self, dataset: Dataset | None = None, needs: dict[str, str] | None = None) -> Explained:
        """The network with the prototypes that notebooks 3 and 4 have left so far.

        ``needs`` names explainers that must be there, each with the notebook that makes it.
        """
        self.settings()
        for name, notebook in (needs or {}).items():
            self._existing(f"{name}.safetensors", notebook)
        return Explained.load(self.folder, images=dataset)

    def save_embeddings(self, name: str = "embeddings", **splits: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Embeddings [N, D] and labels [N] by split name."""
        tensors = {f"z_{split}": z for split, (z, _) in splits.items()}
        self.save_part(name, tensors | {f"labels_{split}": labels for split, (_, labels) in splits.items()}, {})

    def embeddings(
        self, split: str, name: str = "embeddings", notebook: str = "01_train"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, D] and labels [N] of ``train`` or ``test``: z, or others saved by ``notebook``."""
        tensors, _ = self.part(name, notebook)
        return tensors[f"z_{split}"], tensors[f"labels_{split}"]

    def save_part(self, name: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
        """Tensors made from the network, with their settings."""
        path = self.folder / f"{name}.safetensors"
        save_tensors(path, tensors, {**settings, "network": self.settings()["network"]})

    def part(self, name: str, notebook: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and settings of :meth:`save_part`, saved by ``notebook``."""
        return self._read(f"{name}.safetensors", notebook)

    def save_results(self, stage: str, values: Iterable[tuple[str, str, str, float]], **settings: Any) -> None:
        """Numbers (model, metric, split, value) of a notebook, with the settings that made them."""
        of = {"dataset": self.name}
        records = [
            {**of, "model": model, "metric": metric, "split": split, "seed": self.seed, "value": value}
            for model, metric, split, value in values
        ]
        content = {"network": self.settings()["network"], "settings": settings, "records": records}
        save_json(self.folder / f"results-{stage}.json", content)

    def results(self, stage: str, notebook: str) -> list[dict[str, Any]]:
        """The records of :meth:`save_results`."""
        _, content = self._read(f"results-{stage}.json", notebook)
        return content["records"]

    def _existing(self, file: str, notebook: str) -> Path:
        path = self.folder / file
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist: run notebook {notebook} {self._given}")
        return path

    def _read(self, file: str, notebook: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        path = self._existing(file, notebook)
        tensors, content = ({}, load_json(path)) if path.suffix == ".json" else load_tensors(path)
        if content.get("network") != self.settings()["network"]:
            raise ValueError(f"{path} was made from another network: run notebook {notebook} again")
        return tensors, content


def trained_seeds(runs: str | Path, dataset: str) -> list[int]:
    """Seeds with a trained network; a FileNotFoundError where there is none."""
    folder = paths.resolve(runs) / dataset
    seeds = sorted(int(path.parent.name.removeprefix("seed-")) for path in folder.glob("seed-*/training.json"))
    if not seeds:
        raise FileNotFoundError(f"no trained network under {folder}: run notebook 01_train with dataset={dataset}")
    return seeds
