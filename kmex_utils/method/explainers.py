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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from . import products
from .composite import Normalisation
from .operator import CompositeRows

if TYPE_CHECKING:
    from .prototypes import Prototypes


def avg_pool(h: torch.Tensor) -> torch.Tensor:
    """Z of eq. 2: the mean over positions, [N, D, H, W] -> [N, D]."""
    return h.mean((2, 3))


class Explainer(ABC):
    """Eq. 3, y = proj(sim(h)). ``activations`` are the network's x(1) … x(B), each [N, D_b, H_b, W_b]."""

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
        """Scores y of the activations, [N, C]."""
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


@dataclass(eq=False)
class KMEx(Explainer):
    """The classifier replaced by class-wise centroids of z (section 3.2).

    exp(-d) is 0 from d = 104 on in float32, and the argmax of a row of zeros is the first prototype's. So sim is
    float64, which holds to d = 745, and calling the explainer, :meth:`nearest` and :meth:`predict` use the distances
    themselves: the argmax of exp(-d) is that of -d.
    """

    prototypes: "Prototypes"
    classes: int

    def h(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """The embedding z, [N, D]."""
        return avg_pool(activations[-1])

    def sim(self, h: torch.Tensor) -> torch.Tensor:
        """exp(-||z - p_k||), float64 [N, K]."""
        distances = self.distances(h)
        return torch.exp(-distances.to(products.double_device(distances.device), torch.float64))

    def __call__(self, activations: Sequence[torch.Tensor]) -> torch.Tensor:
        """Scores y of the activations, [N, C], at any distance."""
        return self.proj(-self.distances(self.h(activations)))

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


@dataclass(eq=False)
class EncoderKMeans(Explainer):
    """The encoder explained from block b to the last (section 3.3): B4, B34, B234, B1234.

    ``start_block`` b counts from 1. sim is one-hot, so it is kept as the index of its one: the explanation map.
    """

    prototypes: "Prototypes"
    classes: int
    start_block: int
    normalisation: Normalisation

    def h(self, activations: Sequence[torch.Tensor]) -> CompositeRows:
        """The composite q(b:) of eq. 8, as an operator."""
        return CompositeRows(activations[self.start_block - 1 :], self.normalisation, rows_per_chunk=products.MAP_ROWS)

    def sim(self, h: CompositeRows) -> torch.Tensor:
        """q_s of eq. 9: index of the closest of all K prototypes at every position, [N, H', W']; ties to the lowest."""
        parts = self.prototypes.vectors.to(h.device).split(products.MAP_PROTOTYPES)
        prototypes = [(h.columns(p), p.square().sum(1) / 2) for p in parts]
        q_s = []
        for _, chunk in h.chunks():
            value, index = zip(*(chunk.closeness(*part).max(1) for part in prototypes), strict=True)
            part = torch.stack(value).argmax(0, keepdim=True)
            q_s.append((torch.stack(index).gather(0, part) + part * products.MAP_PROTOTYPES)[0])
        return torch.cat(q_s).view(h.images, *h.grid)

    def proj(self, similarity: torch.Tensor) -> torch.Tensor:
        """Eq. 10: how often a class's prototypes were chosen, averaged over its window of K/C, [N, C]."""
        index = similarity.flatten(1)
        counts = torch.zeros(len(index), len(self.prototypes), device=index.device)
        counts.scatter_add_(1, index, torch.ones_like(index, dtype=counts.dtype))
        return counts.unflatten(1, (self.classes, -1)).mean(2)

    def most_frequent(self, similarity: torch.Tensor) -> torch.Tensor:
        """The other reading of the prediction: the class of the single most frequent prototype, [N]."""
        labels = self.prototypes.labels.to(similarity.device)
        return labels[torch.mode(similarity.flatten(1), 1).values]


@dataclass(eq=False)
class ProtoPNet(Explainer):
    """The baseline (Chen et al. 2019), learned in :mod:`kmex_utils.training.protopnet`, not computed after training.

    ``add_on`` maps x(B) to the latent grid [N, D', H, W]; the prototypes ``vectors`` [K, D', s, s] are patches of s x s
    positions of it; ``last`` [C, K] are the weights of proj's linear layer, ``epsilon`` is the ε of the similarity.
    """

    add_on: Callable[[torch.Tensor], torch.Tensor]
    vectors: torch.Tensor
    last: torch.Tensor
    epsilon: float

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
    """The paper's name of the explainer from a block on: 4 -> ``B4``, 2 -> ``B234``; refuses one that is not there."""
    if not 1 <= start_block <= blocks:
        raise ValueError(f"there is no block {start_block}: start blocks run from 1 to {blocks}")
    return "B" + "".join(map(str, range(start_block, blocks + 1)))


def block_names(start_blocks: Sequence[int], blocks: int = 4, last: bool = False) -> dict[int, str]:
    """The paper's name by start block, from the deepest; with ``last``, the last block must be among them."""
    names = {b: block_name(b, blocks) for b in sorted(start_blocks, reverse=True)}
    if len(names) < len(start_blocks):
        raise ValueError(f"start_blocks must differ, got {list(start_blocks)}")
    if last and blocks not in names:
        raise ValueError(f"start_blocks must hold {blocks}, to compare the others with, got {list(start_blocks)}")
    return names
