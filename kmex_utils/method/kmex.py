"""KMEx fitted: class-wise k-means of the embeddings (section 3.2)."""

from collections.abc import Sequence
from typing import Any

import torch

from .explainers import KMEx
from .kmeans import DenseRows
from .prototypes import classwise


def fit_kmex(
    z: torch.Tensor, labels: torch.Tensor, classes: Sequence[str], prototypes_per_class: int, **options: Any
) -> KMEx:
    """KMEx from embeddings z [N, D] and labels [N] (section 3.2); ``options``: ``seed`` and ``restarts`` of k-means."""

    def rows_of(index: torch.Tensor) -> DenseRows:
        return DenseRows(z[index])

    name = f"KMEx, K/C = {prototypes_per_class}"
    return KMEx(classwise(rows_of, labels, classes, prototypes_per_class, progress=name, **options), len(classes))
