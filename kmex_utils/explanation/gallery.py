"""What an explanation says of all its images: predictions, and how each prototype is used."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .explained import Explained


def network_classes(explained: "Explained") -> torch.Tensor | None:
    """For each class of the folder the network's output of that name, [groups]; None if a class has not exactly one.

    Numbers that stand in for unknown names name nothing.
    """
    if explained.predictions_as_labels:
        return torch.tensor(explained.settings["stand_in_classes"])
    theirs = [_plain(name) for name in explained.network.classes]
    ours = [_plain(name) for name in explained.classes]
    if not explained.network.named or len(set(ours)) < len(ours) or any(theirs.count(name) != 1 for name in ours):
        return None
    return torch.tensor([theirs.index(name) for name in ours])


def _plain(name: str) -> str:
    return name.lower().replace("_", " ").replace("-", " ").strip()


def relabelled(predicted: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The place of each predicted output among those kept, [N]; -1: it is not."""
    same = predicted[:, None] == kept
    return torch.where(same.any(1), same.int().argmax(1), -1)
