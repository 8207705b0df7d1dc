"""What Tables 1 and 2 report: cosine alignment of prototypes with embeddings, and accuracy."""

import torch
import torch.nn.functional as F


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of predicted == true, in %."""
    return 100 * (predicted.cpu() == labels.cpu()).double().mean().item()


def cosine_alignment(
    z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, prototype_labels: torch.Tensor, pairs: str = "all"
) -> tuple[float, float]:
    """Table 1: mean cosine of each class's prototypes with its own embeddings and with all others.

    Both means are taken per class, then averaged over classes. A mean of cosines is the dot product of two mean
    unit vectors, so with ``pairs="all"`` no N x K matrix is formed.

    Parameters
    ----------
    z, labels
        Embeddings [N, D] and their classes [N].
    prototypes, prototype_labels
        [K, D] and [K].
    pairs
        ``all`` prototype-embedding pairs, or ``nearest``: each embedding with the class's prototype closest to it
        in Euclidean distance.

    Returns
    -------
    (class, out)
    """
    if pairs not in ("all", "nearest"):
        raise ValueError(f"pairs must be 'all' or 'nearest', got {pairs!r}")
    z, prototypes = z.double(), prototypes.double()
    unit = F.normalize(z, dim=1)
    inside, outside = [], []
    total = unit.sum(0)
    for j in prototype_labels.unique().tolist():
        own = labels == j
        if not own.any() or own.all():
            raise ValueError(f"class {j} needs embeddings inside and outside it, found {int(own.sum())} of {len(own)}")
        p = prototypes[prototype_labels == j]
        if pairs == "all":
            mean_p = F.normalize(p, dim=1).mean(0)
            mine = unit[own].sum(0)
            inside.append(mine @ mean_p / own.sum())
            outside.append((total - mine) @ mean_p / (~own).sum())
        else:
            nearest = (z @ p.T - p.square().sum(1) / 2).argmax(1)
            cosine = (unit * F.normalize(p, dim=1)[nearest]).sum(1)
            inside.append(cosine[own].mean())
            outside.append(cosine[~own].mean())
    return torch.stack(inside).mean().item(), torch.stack(outside).mean().item()
