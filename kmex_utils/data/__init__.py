"""Images and labels as a network takes them, wherever they come from."""

from .dataset import Dataset, Images, count, load, own_input, reopen
from .input import IMAGENET_MEAN, IMAGENET_STD, Input
from .sources import held_out, matching

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Dataset", "Images", "Input"]
__all__ += ["count", "held_out", "load", "matching", "own_input", "reopen"]
