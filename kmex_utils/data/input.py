"""How an image enters a network: :class:`Input`."""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
LARGEST = 8192  # pixels of a side: two images of noise that large, to watch a network on, take 1.5 GiB
Box = tuple[float, float, float, float]  # left, top, right, bottom
LUMA = (19595, 38470, 7471)  # of 65536: ITU-R 601-2, as Pillow's convert("L") rounds it


@dataclass(frozen=True)
class Input:
    """How an image enters a network.

    Attributes
    ----------
    image_size
        In pixels: a number, or (H, W).
    mean, std
        Of RGB values in [0, 1]; one value is that of every channel. Numbers, arrays and tensors are taken.
    fit
        ``crop`` (the centre of the network's proportions) or ``stretch`` (all of the image).
    channels
        3, or 1: images enter as grey. They are kept, and shown, in colour.
    window
        (low, high): the values of images of more than 8 bits, integer or floating-point, that are black and white.
        Empty: 0 and 65535; floating-point images are refused.
    transform
        One's own way from an upright RGB Pillow image to the network's input, a float tensor [C, H, W] or uint8; it
        takes the place of ``fit``. ``mean`` and ``std`` are those it normalises with. Saved by its name alone.
    """

    image_size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fit: str = "stretch"
    channels: int = 3
    window: tuple[float, ...] = ()
    transform: Callable[[Any], torch.Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        try:
            size = tuple(map(operator.index, np.ravel(self.image_size).tolist()))
        except TypeError:
            size = ()
        if len(size) not in (1, 2) or min(size) < 1 or max(size) > LARGEST:
            what = f"image_size must be at least 1 pixel and at most {LARGEST:,}, a number or (H, W)"
            raise ValueError(f"{what}, got {self.image_size}")
        object.__setattr__(self, "image_size", size[0] if size[0] == size[-1] else size)
        for name in ("mean", "std", "window"):
            object.__setattr__(self, name, numbers(name, getattr(self, name)))
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 3 (RGB) or 1 (grey), got {self.channels}")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) not in (1, self.channels) or (name == "std" and min(values) <= 0):
                of = "R, G and B, or one value" if self.channels == 3 else "one value, for one channel"
                raise ValueError(f"mean and std must be of {of}, std positive; got {self.mean} and {self.std}")
            if max(values) > (1 if name == "mean" else 2) and not self.transform:
                raise ValueError(f"{name} is of values in [0, 1], got {values}: divide mean and std of 0 … 255 by 255")
            object.__setattr__(self, name, values * (self.channels // len(values)))
        if self.fit not in ("crop", "stretch"):
            raise ValueError(f"fit must be crop or stretch, got {self.fit!r}")
        if self.window and not (len(self.window) == 2 and self.window[0] < self.window[1]):
            raise ValueError(f"window must be (low, high), the values of black and white, got {self.window}")

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    def box(self, size: Sequence[int]) -> Box:
        """The part of an upright image of ``size`` (H, W) that enters the network, in its pixels, as fractions of them.

        All of it, or what is in the middle and of the network's proportions. A ValueError with a transform of one's
        own: only that knows.
        """
        if self.transform:
            raise ValueError(f"where {name_of(self.transform)} takes an image from is not known: give fit= instead")
        height, width = size
        if self.fit == "stretch":
            return 0, 0, width, height
        wide = self.size[1] / self.size[0]
        w, h = min(width, height * wide), min(height, width / wide)
        return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2

    def __call__(self, pixels: np.ndarray | torch.Tensor, device: torch.device | str = "cpu") -> torch.Tensor:
        """uint8 [n, 1 or 3, H, W] to the network's input, float32 [n, C, H, W], channels last."""
        if isinstance(pixels, np.ndarray):
            pixels = torch.from_numpy(np.array(pixels))  # a copy: cached images are read-only
        x = pixels.to(device)
        if x.shape[1] > self.channels:
            weights = torch.tensor(LUMA, device=x.device, dtype=torch.int32).view(1, 3, 1, 1)
            x = ((x * weights).sum(1, keepdim=True) + 2**15) // 2**16
        mean, std = (torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    @property
    def settings(self) -> dict[str, Any]:
        """Plain JSON, for :meth:`of`; what is not in use is left out."""
        settings = {**vars(self), "transform": name_of(self.transform) if self.transform else ""}
        optional = {"channels": 3, "window": (), "transform": ""}
        return {key: value for key, value in settings.items() if key not in optional or value != optional[key]}

    @classmethod
    def of(cls, settings: Mapping[str, Any], transform: Callable[[Any], torch.Tensor] | None = None) -> "Input":
        """The input of these ``settings``; a ValueError where they name a transform and none is given."""
        if (name := settings.get("transform")) and transform is None:
            raise ValueError(f"images enter by a transform of your own, {name}: give it again, as transform=")
        return cls(**{**settings, "transform": transform if name else None})


def name_of(transform: Callable[..., Any]) -> str:
    """A name for a function or for an object that is called."""
    return getattr(transform, "__qualname__", type(transform).__name__)


def read_off(transform: Callable[[Any], torch.Tensor]) -> dict[str, Any]:
    """``image_size`` and, if they are finite, ``mean`` and ``std`` of a transform, from a black and a white image.

    A ValueError where it fails or gives no tensor [C, H, W].
    """
    try:
        with torch.random.fork_rng(devices=[]):
            black, white = (transform(Image.new("RGB", (640, 480), colour)).flatten(1) for colour in ("black", "white"))
            size = tuple(transform(Image.new("RGB", (640, 480))).shape[1:])
    except Exception as error:  # whatever foreign code raises
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{name_of(transform)} does not make a tensor of a Pillow image: {why}") from None
    if len(size) != 2:
        raise ValueError(f"transform must give a tensor [C, H, W], got {len(size) + 1} dimensions")
    low, high = black.double().amin(1), white.double().amax(1)  # padding may hold the other
    if not black.is_floating_point() or not bool((high - low > 0).all()):
        return {"image_size": size}
    std = 1 / (high - low)
    # six digits: what float32 leaves of them
    return {
        "image_size": size,
        **{k: tuple(v.numpy().round(6).tolist()) for k, v in (("mean", -low * std), ("std", std))},
    }


def numbers(name: str, values: Any) -> tuple[float, ...]:
    """A number, a sequence, an array or a tensor as a flat tuple; a ValueError where it holds anything but numbers."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
    try:
        # by the shortest decimal: 0.485 of float32 is 0.485
        flat = tuple(float(str(value)) for value in np.ravel(values))
    except (TypeError, ValueError):
        flat = (math.nan,)
    if not all(map(math.isfinite, flat)):
        raise ValueError(f"{name} must be numbers, got {values!r}")
    return flat
