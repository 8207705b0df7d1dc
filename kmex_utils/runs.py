"""What one training run leaves behind, and the checks that its parts belong together.

``runs/<dataset>/seed-<seed>/`` holds ``backbone.safetensors``, ``embeddings.safetensors``, the prototypes of each
explainer (``KMEx-5.safetensors``, ``B234.safetensors`` …) and ``results-*.json``. Every part names the backbone it was
made from, so prototypes of an earlier training are refused instead of silently mixed in.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import datasets, paths
from .architectures import unloaded
from .backbones import Backbone
from .kmeans import Prototypes
from .store import load_json, load_settings, load_tensors, save_json, save_tensors


@dataclass(frozen=True)
class Run:
    """One data set and seed under a folder of runs."""

    runs: Path
    dataset: str
    seed: int

    @classmethod
    def of(cls, runs: str | Path, dataset: str, seed: int) -> "Run":
        """A run by names; relative ``runs`` start at the repository's root."""
        if not dataset or "/" in dataset or dataset.startswith("."):
            raise ValueError(f"dataset {dataset!r} cannot name a folder: use letters, digits, - and _")
        return cls(paths.resolve(runs), dataset, seed)

    @classmethod
    def of_weights(cls, path: Path) -> "Run":
        """The run that a ``backbone.safetensors`` belongs to."""
        seed = path.parent.name.removeprefix("seed-")
        if path.name != "backbone.safetensors" or not seed.isdigit():
            raise ValueError(f"{path} is not of notebook 1: name the model and give this file as its weights")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: run notebook 01_train, or give a model's name and weights")
        return cls(path.parents[2], path.parents[1].name, int(seed))

    @property
    def folder(self) -> Path:
        """Where the parts lie."""
        return self.runs / self.dataset / f"seed-{self.seed}"

    @property
    def training_state(self) -> Path:
        """The checkpoint an interrupted training continues from."""
        return self.folder / "training.safetensors"

    # backbone

    def save_backbone(self, backbone: Backbone, settings: dict[str, Any]) -> None:
        """Weights and everything that made them."""
        state = backbone.state_dict()
        save_tensors(self.folder / "backbone.safetensors", state, {**settings, "backbone": fingerprint(state)})

    def settings(self) -> dict[str, Any]:
        """Settings of the training, with ``classes`` and the ``backbone`` fingerprint."""
        path = self.folder / "backbone.safetensors"
        if not path.exists():
            raise FileNotFoundError(
                f"no trained backbone at {path}: run notebook 01_train with dataset={self.dataset} and seed={self.seed}"
            )
        return load_settings(path)

    def backbone(self) -> Backbone:
        """The frozen backbone.

        Raises
        ------
        FileNotFoundError, ValueError
            No training yet; a damaged file; weights of another network; weights that are not finite.
        """
        settings = self.settings()
        path = self.folder / "backbone.safetensors"
        state, _ = load_tensors(path)
        broken = [name for name, value in state.items() if not torch.isfinite(value).all()]
        if broken:
            raise ValueError(
                f"{path} holds NaN or infinite weights ({broken[0]} …): train again with a lower learning_rate"
            )
        arch, classes = settings["arch"], len(settings["classes"])
        backbone = unloaded(arch, classes, settings.get("bias", False))
        try:
            backbone.load_state_dict(state, assign=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise ValueError(f"{path} does not fit {arch} with {classes} classes ({reason}): train again") from None
        return backbone.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def c(self) -> torch.Tensor:
        """The classifier's columns c_j, [C, D]."""
        tensors, _ = load_tensors(self.folder / "backbone.safetensors")
        return tensors["classifier.weight"]

    def recipe(self) -> datasets.Recipe:
        """The data set's recipe."""
        return datasets.RECIPES.get(self.dataset, datasets.RECIPES["folder"])

    def load_dataset(self) -> datasets.Dataset:
        """The data set as it was for training."""
        options = self.settings()["data"]
        return datasets.load(self.dataset, **options)

    # embeddings

    def save_embeddings(self, name: str = "embeddings", **splits: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Embeddings [N, D] and labels [N] by split name."""
        tensors = {}
        for split, (z, labels) in splits.items():
            tensors[f"z_{split}"], tensors[f"labels_{split}"] = z, labels
        self.save_part(name, tensors, {})

    def embeddings(
        self, split: str, name: str = "embeddings", notebook: str = "01_train"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [N, D] and labels [N] of ``train`` or ``test``: z, or others saved by ``notebook``."""
        tensors, _ = self.part(name, notebook)
        return tensors[f"z_{split}"], tensors[f"labels_{split}"]

    # any tensors

    def save_part(self, name: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
        """Tensors made from the backbone, with their settings."""
        save_tensors(
            self.folder / f"{name}.safetensors", tensors, {**settings, "backbone": self.settings()["backbone"]}
        )

    def part(self, name: str, notebook: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Tensors and settings of :meth:`save_part`, saved by ``notebook``."""
        tensors, settings = load_tensors(self._existing(f"{name}.safetensors", notebook))
        self._check_origin(f"{name}.safetensors", settings, notebook)
        return tensors, settings

    # prototypes

    def save_prototypes(self, name: str, prototypes: Prototypes, settings: dict[str, Any]) -> None:
        """Prototypes of an explainer, with its settings and the backbone they came from."""
        path = self.folder / f"{name}.safetensors"
        prototypes.save(path, {**settings, "backbone": self.settings()["backbone"]})

    def prototypes(self, name: str, notebook: str) -> tuple[Prototypes, dict[str, Any]]:
        """Prototypes and settings saved by ``notebook``."""
        prototypes, settings = Prototypes.load(self._existing(f"{name}.safetensors", notebook))
        self._check_origin(f"{name}.safetensors", settings, notebook)
        return prototypes, settings

    # results

    def save_results(self, stage: str, values: Iterable[tuple[str, str, str, float]], **settings: Any) -> None:
        """Numbers (model, metric, split, value) of a notebook, with the settings that made them."""
        records = [
            {
                "dataset": self.dataset,
                "model": model,
                "metric": metric,
                "split": split,
                "seed": self.seed,
                "value": value,
            }
            for model, metric, split, value in values
        ]
        content = {"backbone": self.settings()["backbone"], "settings": settings, "records": records}
        save_json(self.folder / f"results-{stage}.json", content)

    def results(self, stage: str, notebook: str) -> list[dict[str, Any]]:
        """The records of :meth:`save_results`."""
        content = load_json(self._existing(f"results-{stage}.json", notebook))
        self._check_origin(f"results-{stage}.json", content, notebook)
        return content["records"]

    def _existing(self, name: str, notebook: str) -> Path:
        path = self.folder / name
        if not path.exists():
            raise FileNotFoundError(
                f"{path} does not exist: run notebook {notebook} with dataset={self.dataset} and seed={self.seed}"
            )
        return path

    def _check_origin(self, name: str, settings: dict[str, Any], notebook: str) -> None:
        if settings.get("backbone") != self.settings()["backbone"]:
            raise ValueError(f"{self.folder / name} was made from another backbone: run notebook {notebook} again")


def trained_seeds(runs: str | Path, dataset: str) -> list[int]:
    """Seeds with a trained backbone.

    Raises
    ------
    FileNotFoundError
        There is none.
    """
    folder = paths.resolve(runs) / dataset
    seeds = sorted(int(path.parent.name.removeprefix("seed-")) for path in folder.glob("seed-*/backbone.safetensors"))
    if not seeds:
        raise FileNotFoundError(f"no trained backbone under {folder}: run notebook 01_train with dataset={dataset}")
    return seeds


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """16 hexadecimal digits that stand for the names and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
