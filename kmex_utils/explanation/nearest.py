"""What lies near the prototypes: the training patches that show them, and how many images share them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..method.explainers import EncoderKMeans
from ..method.operator import CompositeRows
from .interpretation import EXAMPLES

NEAREST = 5  # patches of each prototype, of as many images: what one row of the explorer holds


@dataclass(frozen=True)
class Nearest:
    """Training images near the prototypes of an explainer.

    ``index`` of the image and ``position`` of its nearest row, [K, n] each (-1: the class has no more images);
    ``shared`` [K]: in how many training images of its class a prototype appears, ``images`` [K]: of how many. Ordered
    by their cell nearest to it, these have a median and a last one: ``examples`` [K, 2, 2], image and position of it
    (-1: none).
    """

    index: torch.Tensor
    position: torch.Tensor
    shared: torch.Tensor
    images: torch.Tensor
    examples: torch.Tensor

    @classmethod
    def of(
        cls,
        explainer: EncoderKMeans,
        maps: torch.Tensor,
        labels: torch.Tensor,
        index: torch.Tensor,
        rows_of: Callable[[torch.Tensor], CompositeRows],
    ) -> "Nearest":
        """By definition, from the rows of each class; prototypes of a class without images stay without (-1).

        ``maps`` q_s [N, H', W'] and ``labels`` [N] are of the training images of an ``index`` [N], ascending;
        ``rows_of`` gives the rows of some images of the training split.
        """
        p, nearest = explainer.prototypes, torch.full((len(explainer.prototypes), NEAREST), -1)
        position, images = nearest.clone(), torch.zeros(len(p), dtype=torch.int64)
        shared, examples = appearances(p.labels, labels, maps), torch.full((len(p), len(EXAMPLES), 2), -1)
        for c in p.labels.unique().tolist():
            of_class = (p.labels == c).nonzero().flatten()
            members = index[labels == c]
            if not len(members):
                continue
            rows = rows_of(members)
            distance, row = rows.nearest(p.vectors[of_class])
            first = torch.searchsorted(members, p.image[of_class])  # the nearest row of all, as the clustering noted it
            distance.scatter_(1, first[:, None], -torch.inf)
            row.scatter_(1, first[:, None], p.position[of_class, None])
            n = min(NEAREST, len(members))
            order = distance.topk(n, 1, largest=False).indices
            nearest[of_class, :n], position[of_class, :n] = members[order], row.gather(1, order)
            images[of_class] = len(members)
            cells = maps[labels == c].flatten() == of_class[:, None]
            distance, row = rows.nearest(p.vectors[of_class], cells)
            order, have = distance.argsort(1), (distance < torch.inf).sum(1)
            for e, rank in enumerate(((have - 1) // 2, have - 1)):  # the median and the last
                which = order.gather(1, rank.clamp_min(0)[:, None])
                places = torch.cat([members[which], row.gather(1, which)], 1)
                examples[of_class, e] = torch.where(have[:, None] > 0, places, -1)
        return cls(nearest, position, shared, images, examples)

    def check(self, prototypes: int) -> None:
        """A ValueError unless this is of so many prototypes, in whole numbers."""
        index, position, examples = self.index, self.position, self.examples
        shapes = {len(x) for x in vars(self).values()} == {prototypes} and examples.shape[2:] == (2,)
        if not shapes or index.dim() != 2 or index.shape != position.shape or examples.shape[1] > len(EXAMPLES):
            raise ValueError("its nearest patches are of other prototypes")
        if any(x.is_floating_point() or (x < -1).any() for x in vars(self).values()):
            raise ValueError("its nearest patches are no whole numbers")

    def first(self) -> "Nearest":
        """The nearest one alone."""
        return replace(self, index=self.index[:, :1], position=self.position[:, :1], examples=self.examples[:, :0])

    def ranks(self) -> list[tuple[int, int | str]]:
        """(prototype, rank) of every patch there is, ``typical`` and ``weakest`` in place of a rank last."""
        ranks: list[tuple[int, int | str]] = [(k, rank) for k, rank in (self.index >= 0).nonzero().tolist()]
        return ranks + [(k, EXAMPLES[e]) for k, e in (self.examples[..., 0] >= 0).nonzero().tolist()]

    def place(self, prototype: int, rank: int | str) -> tuple[int, int]:
        """Training image and position of a patch."""
        if isinstance(rank, int):
            return int(self.index[prototype, rank]), int(self.position[prototype, rank])
        e = EXAMPLES.index(rank)
        if e >= self.examples.shape[1] or self.examples[prototype, e, 0] < 0:
            raise ValueError(
                f"prototype {prototype} has no {rank} example: no cell in its class's images, or not saved"
            )
        image, position = self.examples[prototype, e].tolist()
        return image, position


def appearances(labels_of_prototypes: torch.Tensor, labels: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """In how many images of its class each prototype appears, [K], from ``labels`` [N] and ``maps`` [N, H', W']."""
    counts = torch.zeros_like(labels_of_prototypes)
    for c in labels_of_prototypes.unique().tolist():
        q_s = maps[labels == c].flatten(1)
        for k in (labels_of_prototypes == c).nonzero().flatten().tolist():
            counts[k] = (q_s == k).any(1).sum()
    return counts
