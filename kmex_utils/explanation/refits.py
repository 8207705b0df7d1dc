"""How sure prototypes are: k-means from other seeds gives others, matched to them one by one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import paths
from ..hardware import exact, pick_device
from ..method.explainers import EncoderKMeans
from ..method.prototypes import Prototypes
from .passed import Passed

if TYPE_CHECKING:
    from .explained import Explained

# A prototype exists in a refit whose partner has more than half of their cells in common. Two prototypes of one fit
# share no cell, so at most one can have that much: who the partner is does not depend on the matching. Hennig (2007,
# Cluster-wise assessment of cluster stability) calls a cluster below it dissolved.
EXISTS = 0.5


@dataclass(frozen=True)
class Refits:
    """Of n refits of an explainer of K prototypes, each numbered as its partner.

    ``vectors`` [n, K, D], empty where they were not kept; ``overlap`` [n, K] of the cells of a prototype and of its
    partner in the training images, intersection over union (Jaccard), and ``chance`` [n, K], what independent maps of
    these sizes would give; ``kept`` [n]: share of the training images' positions that keep their prototype.
    """

    vectors: torch.Tensor
    overlap: torch.Tensor
    chance: torch.Tensor
    kept: torch.Tensor

    @classmethod
    def of(cls, q_s: torch.Tensor, maps: torch.Tensor, vectors: torch.Tensor) -> "Refits":
        """From the map of the training images [N, H', W'] and those of the refits [n, N, H', W']."""
        k = vectors.shape[1]
        ours = q_s.flatten().bincount(minlength=k).double()
        theirs = torch.stack([other.flatten().bincount(minlength=k) for other in maps]).double()
        both = torch.stack([q_s[other == q_s].bincount(minlength=k) for other in maps]).double()
        by_chance = ours * theirs / q_s.numel()
        overlap, chance = (shared / (ours + theirs - shared).clamp_min(1) for shared in (both, by_chance))
        return cls(vectors, overlap, chance, (maps == q_s).double().mean((1, 2, 3)))

    def explainers(self, explainer: EncoderKMeans) -> list[EncoderKMeans]:
        """The refits, with the edits of the explainer; none where their vectors were not kept."""
        p = explainer.prototypes
        return [replace(explainer, prototypes=replace(p, vectors=vectors)) for vectors in self.vectors]

    @property
    def exists(self) -> torch.Tensor:
        """In how many refits each prototype exists, [K]."""
        return (self.overlap > EXISTS).sum(0)

    def times(self, prototype: int) -> str:
        """In how many it exists, of how many."""
        return f"{self.exists[prototype]} of {len(self.kept)}"

    @property
    def repeats(self) -> bool:
        """Whether most prototypes exist in most refits."""
        return bool((2 * self.exists > len(self.overlap)).double().mean() > 0.5)

    def line(self, name: str) -> str:
        """What to say of them."""
        n, k = self.overlap.shape
        most = int((2 * self.exists > n).sum())
        spread = f" ± {100 * self.kept.std().item():.0f}" if n > 1 else ""
        numbers = f"{most} of {k} prototypes exist in most of {n} refits"
        numbers += f", {100 * self.kept.mean().item():.0f}{spread} % of positions keep theirs"
        return f"{name}: {numbers}" if self.repeats else f"{name}: this clustering does not repeat: {numbers}"


def refit(
    explained: "Explained",
    refits: int,
    *,
    device: str = "auto",
    scratch: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> dict[int, Refits]:
    """Refits of every start block, from one more pass of the images."""
    found = {}
    with passed_again(explained, device=device, scratch=scratch, log=log) as passed:
        for b in explained.start_blocks:
            explainer = explained.edits.fitted(b)[0]
            others = refitted(passed, explainer, refits, **explained.fitted_with(b))
            maps = torch.stack([passed.map(other, "train").int() for other in others])
            vectors = torch.stack([other.prototypes.vectors for other in others])
            found[b] = Refits.of(passed.map(explainer, "train"), maps, vectors)
            log(found[b].line(explained.name(b)))
    return found


@contextmanager
def passed_again(
    explained: "Explained",
    *,
    device: str = "auto",
    scratch: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> Iterator[Passed]:
    """The images that the prototypes were made from, once more through the network, with the explanation's labels.

    A ValueError if they are not here.
    """
    explained.needs_its_images()
    assert explained.dataset is not None
    with exact(), torch.no_grad():
        try:
            where: dict[str, Any] = {"folder": paths.scratch(scratch), "device": pick_device(device), "log": log}
            first = explained.start_blocks[-1]
            passed = Passed.of(explained.network, explained.dataset, first, store="auto", **where)
            explained.y |= {split: y.cpu() for split, y in passed.y.items()}
            labels = {split: explained.labels_of(split) for split in passed.x}
            yield replace(passed, labels=labels, classes=explained.classes)
        finally:
            explained.network.to("cpu")


def refitted(
    passed: Passed, explainer: EncoderKMeans, refits: int = 5, *, seed: int = 0, fit_on: int = 0, **options: Any
) -> list[EncoderKMeans]:
    """The explainer fitted again from the seeds after ``seed``, its own; prototypes are numbered as their partners'.

    ``options`` are those of :meth:`Passed.fit_encoder` that the explainer was fitted with: ``restarts``, ``index``.
    With ``fit_on`` each refit draws so many training images of each class for itself.
    """
    if refits < 1:
        raise ValueError(f"refits must be at least 1, got {refits}")
    count = len(explainer.prototypes) // explainer.classes
    fits = []
    for draw in range(seed + 1, seed + 1 + refits):
        drawn = {"index": passed.some_of_each_class(fit_on, draw)} if fit_on else {}
        how = {**options, **drawn, "seed": draw}
        fits.append(passed.fit_encoder(explainer.start_block, explainer.normalisation, count, **how))
    return [matched(refit, explainer) for refit in fits]


def matched(refit: EncoderKMeans, explainer: EncoderKMeans) -> EncoderKMeans:
    """The refit with its prototypes in the order of their partners in the explainer.

    Partners are one to one within each class, such that the distances between their centroids sum to the least
    (Hungarian algorithm). Edits of the explainer are the refit's, too.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("matching refits needs SciPy: pip install 'kmex-utils[sklearn]'") from None
    theirs, ours = (e.prototypes.vectors.double().unflatten(0, (e.classes, -1)) for e in (refit, explainer))
    partners = [linear_sum_assignment(distances)[1] for distances in torch.cdist(ours, theirs)]
    order = torch.cat([torch.from_numpy(of_class) + c * ours.shape[1] for c, of_class in enumerate(partners)])
    p = refit.prototypes
    ordered = {field.name: getattr(p, field.name)[order] for field in fields(Prototypes) if field.name != "inertia"}
    return replace(explainer, prototypes=replace(p, **ordered))
