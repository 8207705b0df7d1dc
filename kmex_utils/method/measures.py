"""What Tables 1 and 2 report: cosine alignment of prototypes with embeddings, and accuracy."""

import torch
import torch.nn.functional as F


def accuracy(predicted: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of predicted == true, in %."""
    return 100 * (predicted.cpu() == labels.cpu()).double().mean().item()


def cosine_alignment(
    z: torch.Tensor, labels: torch.Tensor, prototypes: torch.Tensor, prototype_labels: torch.Tensor, pairs: str = "all"
) -> tuple[float, float]:
    """Table 1: mean cosine of each class's prototypes with the embeddings of the class and with all others.

    Embeddings ``z`` are [N, D], ``prototypes`` [K, D]. ``pairs`` are ``all`` of a prototype and an embedding, or
    ``nearest``: each embedding with the class's prototype closest to it in Euclidean distance. Both means are taken
    per class, then averaged over classes; a mean of cosines is the dot product of two mean unit vectors.
    """
    if pairs not in ("all", "nearest"):
        raise ValueError(f"pairs must be 'all' or 'nearest', got {pairs!r}")
    z, prototypes = z.double(), prototypes.double()
    unit = F.normalize(z, dim=1)
    inside, outside = [], []
    total = unit.sum(0)
    for j in prototype_labels.unique().tolist():
        member = labels == j
        if not member.any() or member.all():
            count = f"{int(member.sum())} of {len(member)}"
            raise ValueError(f"class {j} needs embeddings inside and outside it, found {count}")
        p = prototypes[prototype_labels == j]
        if pairs == "all":
            mean_p = F.normalize(p, dim=1).mean(0)
            members = unit[member].sum(0)
            inside.append(members @ mean_p / member.sum())
            outside.append((total - members) @ mean_p / (~member).sum())
        else:
            nearest = (z @ p.T - p.square().sum(1) / 2).argmax(1)
            cosine = (unit * F.normalize(p, dim=1)[nearest]).sum(1)
            inside.append(cosine[member].mean())
            outside.append(cosine[~member].mean())
    return torch.stack(inside).mean().item(), torch.stack(outside).mean().item()
