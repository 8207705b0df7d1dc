"""All explainers are one form (eq. 3): x -> enc -> h -> sim(h_r, p_k) -> proj -> y.

Each instance says where h is taken, what sim is and what proj is; :class:`Explainer` composes the three.

==========================  =========================  =====================  ================================
instance                    h                          sim                    proj
==========================  =========================  =====================  ================================
:class:`CNNAsSEM`           x(B), every position       dot product            average over positions
:class:`KMEx`               z = avg.pool(x(B))         exp(-||z - p||)        one-hot of the class of the argmax
:class:`EncoderKMeans`      q(b:), every position      one-hot of the argmin  counts in windows of K/C
:class:`ProtoPNet`          add-on(x(B)), every patch  log((d²+1)/(d²+ε))     maximum over patches, then linear
==========================  =========================  =====================  ================================
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .backbones import avg_pool
from .composite import CompositeRows, Normalisation
from .hardware import float64_device
from .kmeans import Chunk, Prototypes


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
    """The classifier replaced by class-wise centroids of z (section 3.2).

    exp(-d) is 0 from d = 104 on in float32, and the argmax of a row of zeros is the first prototype's. So sim is
    float64, which holds to d = 745, and calling the explainer, :meth:`nearest` and :meth:`predict` use the distances
    themselves: the argmax of exp(-d) is the argmin of d.
    """

    def __init__(self, prototypes: Prototypes, classes: int) -> None:
        self.prototypes = prototypes
        self.classes = classes

    def h(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """The embedding z, [N, D]."""
        return avg_pool(activations[-1])

    def sim(self, h: torch.Tensor) -> torch.Tensor:
        """exp(-||z - p_k||), float64 [N, K]."""
        distances = self.distances(h)
        return torch.exp(-distances.to(float64_device(distances.device), torch.float64))

    def __call__(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """Y = proj(sim(h)), at any distance, [N, C]."""
        z = self.h(activations)
        return F.one_hot(self.predict(z), self.classes).to(z)

    def nearest(self, z: torch.Tensor) -> torch.Tensor:
        """Index of the closest prototype, [N]."""
        return self.distances(z).argmin(1)

    def predict(self, z: torch.Tensor) -> torch.Tensor:
        """Class of the closest prototype, [N]."""
        return self.prototypes.labels.to(z.device)[self.nearest(z)]

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
        return CompositeRows(activations[self.start_block - 1 :], self.normalisation, rows_per_chunk=1024)

    def sim(self, h: CompositeRows) -> torch.Tensor:
        """q_s of eq. 9: index of the closest of all K prototypes at every position, [N, H', W']; ties to the lowest."""
        parts = []
        for p in self.prototypes.vectors.to(h.device).split(2048):  # never rows x K numbers
            parts.append((h.columns(p), p.square().sum(1, keepdim=True) / 2))
        return torch.cat([_closest(chunk, parts) for _, chunk in h.chunks()]).view(h.images, *h.grid)

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


def _closest(chunk: Chunk, parts: Sequence[tuple[Any, torch.Tensor]], group: int = 16) -> torch.Tensor:
    """Index of the closest prototype to each row, [rows], by parts (prototypes, half their squared lengths).

    Of each group of prototypes only the maximum is looked at, then only the best group of each row.
    """
    best = index = None
    start = 0
    for p, half in parts:
        closeness = chunk.dots(p).sub_(half)
        divisible = len(closeness) % group == 0
        groups = closeness.unflatten(0, (-1, group)) if divisible else closeness[:, None]  # [groups, in each, rows]
        value, winner = groups.amax(1).max(0)
        within = groups.gather(0, winner.expand(1, groups.shape[1], -1))[0].max(0).indices
        found = start + winner * groups.shape[1] + within
        index = found if best is None else torch.where(value > best, found, index)
        best = value if best is None else torch.maximum(value, best)
        start += len(closeness)
    return index


class ProtoPNet(Explainer):
    """The baseline, learned instead of computed after training (Chen et al. 2019); see :mod:`kmex_utils.protopnet`.

    Parameters
    ----------
    add_on
        Maps x(B) to the latent grid, [N, D', H, W].
    vectors
        Prototypes p_k, each a patch of s x s positions, [K, D', s, s].
    last
        Weights of proj's linear layer, [C, K].
    epsilon
        ε of the similarity.
    """

    def __init__(
        self, add_on: Callable[[torch.Tensor], torch.Tensor], vectors: torch.Tensor, last: torch.Tensor, epsilon: float
    ) -> None:
        self.add_on = add_on
        self.vectors = vectors
        self.last = last
        self.epsilon = epsilon

    def h(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """Patches of the latent grid, row-major, [N, R, D' s s] with R = (H - s + 1) (W - s + 1)."""
        return self.patches(self.add_on(activations[-1]))

    def patches(self, latent: torch.Tensor) -> torch.Tensor:
        """Every s x s patch of a latent grid [N, D', H, W] as a row, [N, R, D' s s]."""
        return F.unfold(latent, self.vectors.shape[2:]).transpose(1, 2)

    def squared_distances(self, h: torch.Tensor) -> torch.Tensor:
        """d² = ||h_r||² - 2 h_r · p_k + ||p_k||², not below zero, [N, R, K]."""
        p = self.vectors.flatten(1)
        return F.relu(h.square().sum(2, keepdim=True) - 2 * (h @ p.T) + p.square().sum(1))

    def log_similarity(self, squared: torch.Tensor) -> torch.Tensor:
        """log((d² + 1) / (d² + ε)), elementwise."""
        return torch.log((squared + 1) / (squared + self.epsilon))

    def sim(self, h: torch.Tensor) -> torch.Tensor:
        """Similarity of every patch to every prototype, [N, R, K]."""
        return self.log_similarity(self.squared_distances(h))

    def proj(self, similarity: torch.Tensor) -> torch.Tensor:
        """The maximum over patches, weighted per class, [N, C]."""
        return similarity.amax(1) @ self.last.T


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
