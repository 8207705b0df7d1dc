"""How each data set is trained: the paper's settings and, where it refers to them, KMEx's (Gautam et al. 2024)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """Settings of one data set.

    ``flip`` is the probability of a horizontal flip; ``padding`` the border of the random crop in pixels; ``weights``
    what training starts from; ``learning_rate`` falls to ``final_learning_rate`` along a cosine, step by step.
    """

    prototypes_per_class: int
    epochs: int
    flip: float = 0.0
    padding: int = 0
    weights: str = "imagenet"
    batch_size: int = 128
    learning_rate: float = 0.01
    final_learning_rate: float = 1e-4
    momentum: float = 0.5


RECIPES = {
    # The embedded digits train from scratch in about a minute: epochs 2 (paper: 10), batch_size 32 (128), momentum 0.9
    # (0.5). Chosen on 2,000 other training digits.
    "mnist-mini": Recipe(5, 2, weights="scratch", batch_size=32, momentum=0.9),
    "mnist": Recipe(5, 10),
    "stl10": Recipe(5, 30, flip=0.5, padding=2),
    "cub200": Recipe(10, 60, flip=0.5, padding=8),  # the epochs are not recoverable from KMEx's repository
    "folder": Recipe(5, 30, flip=0.5, padding=8),
}


def recipe(name: str) -> Recipe:
    """The recipe of a data set; images of one's own take that of ``folder``."""
    return RECIPES.get(name, RECIPES["folder"])
