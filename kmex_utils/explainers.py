"""All explainers are one form (eq. 3): x -> enc -> h -> sim(h_r, p_k) -> proj -> y.

Each instance says where h is taken, what sim is and what proj is; :class:`Explainer` composes the three.

==========================  =========================  =====================  ================================
instance                    h                          sim                    proj
==========================  =========================  =====================  ================================
:class:`CNNAsSEM`           x(B), every position       dot product            average over positions
:class:`KMEx`               z = avg.pool(x(B))         exp(-||z - p||)        one-hot of the class of the argmax
:class:`EncoderKMeans`      q(b:), every position      one-hot of the argmin  counts in windows of K/C
==========================  =========================  =====================  ================================
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .backbones import avg_pool
from .composite import CompositeRows, Normalisation
from .kmeans import Prototypes


class Explainer(ABC):
    """Eq. 3. ``activations`` are the backbone's x(1) … x(B), each [N, D_b, H_b, W_b]."""

    @abstractmethod
    def h(self, activations: Sequence[torch.Tensor]) -> Any:
        """Where the prototypes live."""

    @abstractmethod
    def sim(self, h: Any) -> torch.Tensor:
        """Similarity of every h_r to every prototype p_k."""

    @abstractmethod
    def proj(self, similarity: torch.Tensor) -> torch.Tensor:
        """Prediction scores y, [N, C]."""

    def __call__(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """Y = proj(sim(h)), [N, C]."""
        return self.proj(self.sim(self.h(activations)))


class CNNAsSEM(Explainer):
    """The CNN itself (Theorem 1): prototypes are the classifier's columns c_j [C, D].

    With a bias b [C], h gets one channel more that is 1 everywhere and c_j the entry b_j there. The average pool keeps
    the 1, so y_j = z · c_j + b_j has the form of eq. 2 without bias: nothing is lost by leaving it out.
    """

    def __init__(self, c: torch.Tensor, b: torch.Tensor | None = None) -> None:
        self.c = c.detach() if b is None else torch.cat([c, b[:, None]], 1).detach()
        self.constant = b is not None

    def h(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """The encoder's output, [N, R, D], or [N, R, D + 1] with the constant channel."""
        h = activations[-1].flatten(2).transpose(1, 2)
        return torch.cat([h, torch.ones_like(h[..., :1])], 2) if self.constant else h

    def sim(self, h: torch.Tensor) -> torch.Tensor:
        """h_r · c_j, [N, R, C]."""
        return h @ self.c.T.to(h)

    def proj(self, similarity: torch.Tensor) -> torch.Tensor:
        """The average over positions, [N, C] (eq. 5)."""
        return similarity.mean(1)


class KMEx(Explainer):
    """The classifier replaced by class-wise centroids of z (section 3.2)."""

    def __init__(self, prototypes: Prototypes, classes: int) -> None:
        self.prototypes = prototypes
        self.classes = classes

    def h(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """The embedding z, [N, D]."""
        return avg_pool(activations[-1])

    def sim(self, h: torch.Tensor) -> torch.Tensor:
        """exp(-||z - p_k||), [N, K]."""
        return torch.exp(-self.distances(h))

    def distances(self, z: torch.Tensor) -> torch.Tensor:
        """||z - p_k||, [N, K]."""
        return torch.cdist(z, self.prototypes.vectors.to(z), compute_mode="donot_use_mm_for_euclid_dist")

    def proj(self, similarity: torch.Tensor) -> torch.Tensor:
        """One-hot of the class of the most similar prototype, [N, C]."""
        labels = self.prototypes.labels.to(similarity.device)
        return F.one_hot(labels[similarity.argmax(1)], self.classes).to(similarity)


class EncoderKMeans(Explainer):
    """The encoder explained from block b to the last (section 3.3): B4, B34, B234, B1234.

    ``start_block`` b counts from 1. sim is one-hot, so it is kept as the index of its one: the explanation map.
    """

    def __init__(self, prototypes: Prototypes, classes: int, start_block: int, normalisation: Normalisation) -> None:
        self.prototypes = prototypes
        self.classes = classes
        self.start_block = start_block
        self.normalisation = normalisation

    def h(self, activations: Sequence[torch.Tensor]) -> CompositeRows:
        """The composite q(b:) of eq. 8, as an operator."""
        return CompositeRows(activations[self.start_block - 1 :], self.normalisation)

    def sim(self, h: CompositeRows) -> torch.Tensor:
        """q_s of eq. 9: index of the closest of all K prototypes at every position, [N, H', W']; ties to the lowest."""
        p = self.prototypes.vectors.to(h.device)
        half = p.square().sum(1) / 2
        maps = [self._closest(chunk, p, half).view(h.rows_per_image, -1).T for _, chunk in h.chunks()]
        return torch.cat(maps).view(h.images, *h.grid)

    @staticmethod
    def _closest(chunk, p: torch.Tensor, half: torch.Tensor, at_once: int = 256) -> torch.Tensor:
        """Index of the closest prototype to each row, some prototypes at a time: never rows x K numbers."""
        best = index = None
        for start in range(0, len(p), at_once):
            part = slice(start, start + at_once)
            value, k = chunk.dots(p[part]).sub_(half[part]).max(1)
            if best is None:
                best, index = value, k
            else:
                index = torch.where(value > best, k + start, index)
                best = torch.maximum(value, best)
        return index

    def proj(self, similarity: torch.Tensor) -> torch.Tensor:
        """Eq. 10: how often a class's prototypes were chosen, averaged over its window of K/C, [N, C]."""
        chosen = similarity.flatten(1)
        counts = torch.zeros(len(chosen), len(self.prototypes), device=chosen.device)
        counts.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        return counts.unflatten(1, (self.classes, -1)).mean(2)

    def most_frequent(self, similarity: torch.Tensor) -> torch.Tensor:
        """The other reading of the prediction: the class of the single most frequent prototype, [N]."""
        labels = self.prototypes.labels.to(similarity.device)
        return labels[torch.mode(similarity.flatten(1), 1).values]


def block_name(start_block: int, blocks: int = 4) -> str:
    """The paper's name of the explainer from a block on: 4 -> ``B4``, 2 -> ``B234``.

    Raises
    ------
    ValueError
        There is no such block.
    """
    if not 1 <= start_block <= blocks:
        raise ValueError(f"there is no block {start_block}: start blocks run from 1 to {blocks}")
    return "B" + "".join(map(str, range(start_block, blocks + 1)))
