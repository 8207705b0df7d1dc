"""What a trained ProtoPNet shows: where its prototypes come from, and which of them an image activates."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ...data import Dataset
from ...hardware import exact
from .model import TrainableProtoPNet

Box = tuple[int, int, int, int]  # top, bottom, left, right, in pixels
BOXES = ("patch", "activation")


@dataclass(frozen=True)
class Activated:
    """A prototype that an image activates, and the training patch it came from.

    ``activation`` [S, S], the similarities upsampled (bicubic), and the ``box`` of the most similar patch; ``index`` of
    the training image it came from, ``source`` uint8 [S, S, 3], with its own box.
    """

    prototype: int
    class_name: str
    similarity: float
    weight: float
    activation: np.ndarray
    box: Box
    index: int
    source: np.ndarray
    source_box: Box

    @property
    def points(self) -> float:
        """What the prototype adds to the explained class."""
        return self.similarity * self.weight


def most_activated(
    network: TrainableProtoPNet,
    dataset: Dataset,
    pixels: np.ndarray,
    count: int = 5,
    target: int | None = None,
    box: str = "patch",
) -> tuple[int, list[Activated]]:
    """The class and the prototypes that an image activates most, as *this looks like that* shows them.

    Parameters
    ----------
    pixels
        uint8 [1 or 3, S, S].
    target
        Class that the points go to; None takes the predicted one.
    box
        What is boxed: the ``patch`` of the latent grid, or ``activation``: the highest 5 % of the upsampled map (the
        authors; on a grid of few positions it falls into a corner).
    """
    maps = _similarities(network, dataset, pixels)
    similarity = maps.amax((1, 2))
    weight = network.last.weight.detach().cpu()
    j = int((weight @ similarity).argmax()) if target is None else target
    activated = []
    for k in similarity.argsort(descending=True, stable=True)[:count].tolist():
        name, points = dataset.classes[int(network.labels[k])], (float(similarity[k]), float(weight[j, k]))
        activation = upsampled(maps[k], dataset.input.size[0])
        here = _boxed(maps[k], int(maps[k].argmax()), network, dataset, box)
        index, source, source_box = prototype_source(network, dataset, k, box)
        activated.append(Activated(k, name, *points, activation, here, index, source, source_box))
    return j, activated


def prototype_source(
    network: TrainableProtoPNet, dataset: Dataset, prototype: int, box: str = "patch"
) -> tuple[int, np.ndarray, Box]:
    """Where a prototype came from: the training image's index, its pixels [S, S, 3] and the box."""
    if box not in BOXES:
        raise ValueError(f"box must be one of {', '.join(BOXES)}, got {box!r}")
    index = int(network.image[prototype])
    if index < 0:
        raise ValueError("the prototypes were not pushed to training patches yet: finish the training")
    activation = _similarities(network, dataset, dataset.train.pixels[index])[prototype]
    position = int(network.position[prototype])
    return index, dataset.train.rgb(index), _boxed(activation, position, network, dataset, box)


def faded(pixels: np.ndarray, box: Box) -> np.ndarray:
    """An image uint8 [S, S, 3], greyed outside a box."""
    top, bottom, left, right = box
    shown = (0.35 * pixels + 0.65 * 160).astype(np.uint8)
    shown[top:bottom, left:right] = pixels[top:bottom, left:right]
    return shown


@exact()
@torch.no_grad()
def _similarities(network: TrainableProtoPNet, dataset: Dataset, pixels: np.ndarray) -> torch.Tensor:
    """Similarity of every patch of an image to every prototype, [K, H - s + 1, W - s + 1], on the CPU."""
    explainer = network.eval().explainer
    latent = network.add_on(network.features(dataset.input(pixels[None], network.prototypes.device)))
    height = latent.shape[2] - network.prototypes.shape[2] + 1
    return explainer.sim(explainer.patches(latent))[0].T.unflatten(1, (height, -1)).cpu()


def _boxed(activation: torch.Tensor, position: int, network: TrainableProtoPNet, dataset: Dataset, box: str) -> Box:
    """The box of a patch by its position (row-major), or of the highest activation."""
    size = dataset.input.size[0]
    if box == "activation":
        return activated_box(upsampled(activation, size))
    covers = network.prototypes.shape[2]
    rows, columns = (positions + covers - 1 for positions in activation.shape)
    row, column = divmod(position, activation.shape[1])
    top, bottom = (round(edge * size / rows) for edge in (row, row + covers))
    left, right = (round(edge * size / columns) for edge in (column, column + covers))
    return top, bottom, left, right


def upsampled(activation: torch.Tensor, size: int) -> np.ndarray:
    """A map [H, W] at the image's size, bicubic, [S, S]."""
    return F.interpolate(activation[None, None], (size, size), mode="bicubic", align_corners=False)[0, 0].numpy()


def activated_box(activation: np.ndarray) -> Box:
    """The smallest box that holds the highest 5 % of a map."""
    high = activation >= np.percentile(activation, 95)
    rows, columns = (np.flatnonzero(high.any(axis)) for axis in (1, 0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
