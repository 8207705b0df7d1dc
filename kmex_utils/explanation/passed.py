"""A data set passed once through a frozen network and kept: what prototypes are clustered from, again and again."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..data import Dataset
from ..method.composite import Normalisation
from ..method.explainers import EncoderKMeans, KMEx, avg_pool, block_name
from ..method.kmex import fit_kmex
from ..method.measures import accuracy
from ..method.operator import CompositeRows
from ..method.products import double_device
from ..method.prototypes import classwise
from ..networks import Network
from ..parameters import whole
from .activations import Activations, keep
from .nearest import Nearest

SPLITS = {"train": "images of the prototypes", "test": "held out"}  # as tables say it
IN_MEMORY = 2 * 2**30  # bytes of activations that `store="auto"` and the rows of one class may take in memory


@dataclass(frozen=True)
class Shard:
    """Part ``number`` (from 1) of the work on a data set, ``of`` so many: whole classes and whole batches.

    Batches do not depend on ``of``: training images of one class each, test images in order. So a network computes
    the same of an image, whatever the number of shards.
    """

    number: int = 1
    of: int = 1

    def __post_init__(self) -> None:
        whole(1, shards=self.of)
        whole(1, self.of, shard=self.number)

    def batches(self, labels: dict[str, torch.Tensor], batch_size: int) -> dict[str, list[torch.Tensor]]:
        """Index of the images of each batch, [n], by split; ``labels`` [N] of all images."""
        classes = self._part([(labels["train"] == c).nonzero().flatten() for c in labels["train"].unique()])
        test = self._part(torch.arange(len(labels["test"])).split(batch_size)) if len(labels["test"]) else []
        return {"train": [batch for index in classes for batch in index.split(batch_size)], "test": list(test)}

    def _part(self, work: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return work[len(work) * (self.number - 1) // self.of : len(work) * self.number // self.of]


WHOLE = Shard()


@dataclass(frozen=True)
class Passed:
    """x(b) of a data set's images, or a shard of them, for the blocks from the first passed on; the network's scores.

    By split: ``x`` of the images of ``batches`` (an index [n] each) and ``labels`` [N] of all (-1: no class).
    ``classes`` are the C names that labels count. Fits are of all training images passed or of those of an ``index``;
    their options are ``seed`` and ``restarts`` of k-means.
    """

    x: dict[str, Activations]
    batches: dict[str, list[torch.Tensor]]
    labels: dict[str, torch.Tensor]
    classes: tuple[str, ...]
    blocks: int
    device: torch.device

    @classmethod
    def of(
        cls,
        network: Network,
        dataset: Dataset,
        first_block: int,
        *,
        store: str = "memory",
        folder: Path | None = None,
        device: torch.device | str = "cpu",
        batch_size: int = 128,
        shard: Shard = WHOLE,
        splits: Sequence[str] = tuple(SPLITS),
        log: Callable[[str], None] = print,
    ) -> "Passed":
        """One pass over the ``splits``, or over a shard of them.

        ``store`` and ``folder`` as in :func:`~kmex_utils.explanation.activations.keep`; ``auto`` takes memory up to
        2 GiB, then the disk of ``folder``, then nowhere, and says so.
        """
        blocks = len(network.blocks)
        block_name(first_block, blocks)  # refuses a block that is not there
        labels = {split: dataset.split(split).labels for split in SPLITS}
        batches = {s: of if s in splits else [] for s, of in shard.batches(labels, batch_size).items()}
        if store == "auto":
            with torch.no_grad():
                probe = network.eval().to(device).activations(dataset.input(dataset.train.pixels[:1], device))
            images = sum(len(batch) for of_split in batches.values() for batch in of_split)
            store = _place(images * sum(x.nbytes for x in probe[first_block - 1 :]), folder, log)
        where: dict[str, Any] = {"folder": folder, "device": device}
        x = {s: keep(network, dataset, s, first_block, store, batches=batches[s], **where) for s in SPLITS}
        return cls(x, batches, labels, dataset.classes, blocks, double_device(torch.device(device)))

    @property
    def y(self) -> dict[str, torch.Tensor]:
        """The network's scores of the images passed by split, [N, C']."""
        return {split: x.y for split, x in self.x.items()}

    @property
    def classes_here(self) -> list[int]:
        """Those whose training images were passed: all, or a shard's."""
        index, labels = self.x["train"].index, self.labels["train"]
        return list(range(len(self.classes))) if len(index) == len(labels) else labels[index].unique().tolist()

    def rows(self, index: torch.Tensor, start_block: int, normalisation: Normalisation) -> CompositeRows:
        """Rows of q(b:) of some training images, in memory where they fit."""
        x = self.x["train"]
        fits = x.in_memory or len(index) * x.bytes_of(start_block) <= IN_MEMORY
        return x.rows(index, start_block, normalisation, keep=fits, device=self.device)

    def fit_encoder(
        self,
        start_block: int,
        normalisation: Normalisation,
        prototypes_per_class: int,
        *,
        index: torch.Tensor | None = None,
        **options: Any,
    ) -> EncoderKMeans:
        """B4, B34 …: class-wise k-means on the rows of q(b:)."""
        index = self.x["train"].index if index is None else index

        def rows_of(members: torch.Tensor) -> CompositeRows:
            return self.rows(index[members], start_block, normalisation)

        labels, name = self.labels["train"][index], block_name(start_block, self.blocks)
        options |= {"among": self.classes_here, "progress": name}
        prototypes = classwise(rows_of, labels, self.classes, prototypes_per_class, **options)
        prototypes = replace(prototypes, image=index[prototypes.image])  # of the training split, not of ``index``
        return EncoderKMeans(prototypes, len(self.classes), start_block, normalisation)

    def fit_kmex(self, prototypes_per_class: int, *, index: torch.Tensor | None = None, **options: Any) -> KMEx:
        """KMEx: class-wise k-means on z."""
        index = self.x["train"].index if index is None else index
        z, labels = self.z("train", index), self.labels["train"][index]
        kmex = fit_kmex(z, labels, self.classes, prototypes_per_class, **options)
        return KMEx(replace(kmex.prototypes, image=index[kmex.prototypes.image]), len(self.classes))

    def first_of_each_class(self, images_per_class: int) -> torch.Tensor:
        """Index of the first so many training images of each class (0: of all), ascending, [n]."""
        members = [(self.labels["train"] == c).nonzero().flatten() for c in range(len(self.classes))]
        return torch.cat([index[: images_per_class or None] for index in members]).sort().values

    def some_of_each_class(self, images_per_class: int, seed: int) -> torch.Tensor:
        """Index of so many training images of each class, drawn without replacement (0: all), ascending, [n]."""
        generator = torch.Generator().manual_seed(seed)
        members = [(self.labels["train"] == c).nonzero().flatten() for c in range(len(self.classes))]
        drawn = [of[torch.randperm(len(of), generator=generator)[: images_per_class or None]] for of in members]
        return torch.cat(drawn).sort().values

    def z(self, split: str, index: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings of a split, or of some of its images, [N, D]."""
        index = self.x[split].index if index is None else index
        parts = index.split(512)  # images: h of more would be copied at once
        return torch.cat([avg_pool(self.x[split].read(part, self.blocks)[-1]).cpu() for part in parts])

    def map(self, explainer: EncoderKMeans, split: str) -> torch.Tensor:
        """q_s(b:) of the images passed, [N, H', W']."""
        b, normalisation, batches = explainer.start_block, explainer.normalisation, self.batches[split]
        how: dict[str, Any] = {"keep": False, "device": self.device}
        if not batches:
            one = self.x["train"].rows(self.x["train"].index[:1], b, normalisation, **how)
            return torch.empty(0, *one.grid, dtype=torch.int64)
        q_s = [explainer.sim(self.x[split].rows(index, b, normalisation, **how)).cpu() for index in batches]
        return torch.cat(q_s)[torch.cat(batches).argsort()]

    def nearest(self, explainer: EncoderKMeans, maps: torch.Tensor) -> Nearest:
        """The training patches nearest to the prototypes of the classes passed; ``maps`` of :meth:`map`."""

        def rows_of(members: torch.Tensor) -> CompositeRows:
            return self.rows(members, explainer.start_block, explainer.normalisation)

        index = self.x["train"].index
        return Nearest.of(explainer, maps, self.labels["train"][index], index, rows_of)

    def accuracies(
        self, explainer: EncoderKMeans, splits: Sequence[str] = ("train", "test")
    ) -> Iterator[tuple[str, str, float]]:
        """(metric, split, %): both readings of the prediction of eq. 10."""
        for split in splits:
            yield from accuracies(explainer, self.map(explainer, split), self.labels[split], split)


def accuracies(
    explainer: EncoderKMeans, q_s: torch.Tensor, labels: torch.Tensor, split: str
) -> Iterator[tuple[str, str, float]]:
    """(metric, split, %) of maps q_s [N, H', W']: the class with most positions, and that of the most frequent one."""
    parts = [part.long() for part in q_s.split(4096)]  # images: of more, counts of all prototypes would fill the memory
    most_positions = torch.cat([explainer.proj(part).argmax(1) for part in parts])
    most_frequent = torch.cat([explainer.most_frequent(part) for part in parts])
    yield "accuracy", split, accuracy(most_positions, labels)
    yield "accuracy_most_frequent", split, accuracy(most_frequent, labels)


def _place(needed: int, folder: Path | None, log: Callable[[str], None]) -> str:
    """Where so many bytes of activations go."""
    if needed <= IN_MEMORY:
        return "memory"
    free = shutil.disk_usage(folder).free if folder else 0
    if needed <= 0.9 * free:  # a tenth of the disk stays free for others
        return "disk"
    log(
        f"the activations take {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} free: they are computed "
        "anew whenever they are read, which is slow; scratch= names a folder with room"
    )
    return "nowhere"
