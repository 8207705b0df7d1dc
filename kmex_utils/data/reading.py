"""The one way from an image file to pixels: upright, 8-bit RGB, of the network's size; or why not."""

import math
import re
import shutil
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .. import paths
from ..store import room
from .input import Input, name_of

NAMED = 10  # so many unreadable images are named; the others are counted
AHEAD = 256  # images decoded before the first of them is taken: 37 MiB at 224 pixels
IN_MEMORY = 2**29  # bytes of decoded images of a split; more go to a temporary file
LARGE = 2**25  # pixels of an image that is decoded alone: many at once would fill the memory
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error, Image.DecompressionBombError)
KINDS = {"L": "of one channel", "1": "of one channel", "P": "with a palette"}  # of Pillow's modes
UPRIGHT = {  # by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE = 65535  # of 16 bits
DARK = 4096  # brightest values below it use less than a 16th of 16 bits: 12 bits in 16
TOLERANCE = 0.5 / 255  # beyond [0, 1]: clipped, it is the same 8-bit value


@dataclass
class Reading:
    """What happened while images were read: ``unreadable`` (name, reason) and how many were converted from what.

    ``strict`` and ``scratch`` as in :func:`kmex_utils.data.load`.
    """

    total: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)
    values: tuple[float, float] = (0, 0)  # least and largest of more than 8 bits, without a window
    strict: bool = False
    scratch: str | Path | None = None

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Count an image; what broken files raise inside makes it unreadable."""
        self.total += 1
        try:
            yield
        except UNREADABLE as error:
            self.unreadable.append((name, reason(error)))

    def pixels(self, image: "Read") -> np.ndarray:
        """The pixels of what was read; what it was is counted."""
        self.converted.update([image.kind] if image.kind else [])
        self.values = (min(self.values[0], *image.values, 0), max(self.values[1], *image.values, 0))
        return image.pixels

    def room(self, shape: tuple[int, ...]) -> np.ndarray:
        """An empty uint8 array: in memory up to half a GiB, else in a file in ``scratch`` (None: the system's)."""
        needed = int(np.prod(shape))
        if needed <= IN_MEMORY:
            return np.empty(shape, np.uint8)
        folder = paths.scratch(self.scratch)
        free = shutil.disk_usage(folder).free
        if needed > free:
            sizes = f"{shape[0]:,} images take {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} free"
            raise ValueError(f"{sizes}: give scratch=, a folder with room")
        return room(folder, np.uint8, shape)

    def lines(self) -> Iterator[str]:
        """One line for each unreadable image, their count, and one for all conversions."""
        for name, why in self.unreadable[:NAMED]:
            yield f"cannot read {name}: {why}"
        if self.unreadable:
            yield f"{len(self.unreadable)} of {self.total} images cannot be read and are left out"
        if self.converted:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.converted.most_common())
            yield f"converted to 8-bit RGB: {kinds}"
        low, high = self.values
        if low < 0 or 0 < high < DARK or high > WHITE:
            if low == 0 and high < DARK:
                high = 2 ** math.ceil(math.log2(high + 1)) - 1  # of so many bits
            words = f"images of more than 8 bits hold values {self.values[0]:.0f} … {self.values[1]:.0f}"
            yield f"{words}, and 0 is black, {WHITE} white: give window=({low:.0f}, {high:.0f})"

    def check(self) -> None:
        """If ``strict``, raise ValueError for unreadable images: one line that names up to three."""
        if self.strict and self.unreadable:
            named = ", ".join(f"{name} ({why})" for name, why in self.unreadable[:3])
            more = f" and {len(self.unreadable) - 3} more" if len(self.unreadable) > 3 else ""
            count = f"{len(self.unreadable)} of {self.total} images"
            raise ValueError(f"{count} cannot be read; remove or replace them: {named}{more}")


def reason(error: Exception) -> str:
    """Why an image cannot be read, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


class Read(NamedTuple):
    """``pixels`` uint8 [3, H, W]; ``kind``: what they were converted from; ``values``: the least and the largest.

    ``values`` are of more than 8 bits without a window, else empty.
    """

    pixels: np.ndarray
    kind: str = ""
    values: Sequence[float] = ()


def readable(name: str) -> str:
    """A file's name as text of one line: what UTF-8 cannot hold, control characters and backslashes are escaped."""
    return re.sub(
        r"[\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda c: c[0].encode("unicode_escape").decode(), name
    )


def upright(image: Image.Image) -> Image.Image:
    """Turned as its EXIF says, of which the orientation alone is read; malformed EXIF says nothing."""
    image.load()  # TIFF turns itself
    try:
        method = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # TypeError, struct.error, SyntaxError, KeyError …: the pixels are fine
        return image
    return image if method is None else image.transpose(method)


def rgb(image: Image.Image, window: Sequence[float] = ()) -> tuple[Image.Image, str, Sequence[float]]:
    """Upright 8-bit RGB of an image, what it was converted from (empty: nothing), and as :class:`Read` its values.

    Of more than 8 bits ``window`` is black and white (empty: 0 and 65535, in every image); transparency is laid on
    white.
    """
    image = upright(image)
    mode = image.mode
    if mode == "RGB":
        return image, "", ()
    if mode == "F" and not window:
        raise ValueError("floating-point pixels have no fixed white: give window=(low, high)")
    if mode == "F" or mode.startswith("I"):
        values = np.asarray(image, dtype=np.float64)
        low, high = window or (0, WHITE)
        scaled = np.nan_to_num((values - low) / ((high - low) / 255)).round().clip(0, 255).astype(np.uint8)
        extremes = () if window else (values.min(), values.max())
        kind = "of floating point" if mode == "F" else "of 16 bit"
        return Image.fromarray(scaled).convert("RGB"), kind, extremes
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), "with transparency (laid on white)", ()
    return image.convert("RGB"), KINDS.get(mode, f"of {mode}"), ()


def fitted(image: Image.Image, input: Input) -> Read:
    """An open image as it enters a network, before normalisation."""
    image, kind, values = rgb(image, input.window)
    if input.transform:
        return Read(_transformed(image, input), kind, values)
    height, width = input.size
    if input.fit == "crop":
        image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
    else:
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return Read(np.asarray(image).transpose(2, 0, 1), kind, values)


def _transformed(image: Image.Image, input: Input) -> np.ndarray:
    """What one's own transform makes of an image, as uint8 [3, H, W]."""
    assert input.transform
    try:
        x = input.transform(image)
    except Exception as error:  # whatever foreign code raises
        raise ValueError(f"{name_of(input.transform)} fails on a Pillow image: {reason(error)}") from None
    wanted = (input.channels, *input.size)
    if not isinstance(x, torch.Tensor) or x.shape != wanted:
        got = list(x.shape) if isinstance(x, torch.Tensor) else type(x)
        raise ValueError(f"transform must give a tensor {list(wanted)} as image_size says, got {got}")
    array = x.detach().cpu().numpy()
    pixels = array if x.dtype == torch.uint8 else as_bytes(array, input)
    return np.broadcast_to(pixels, (3, *input.size))


def as_bytes(array: np.ndarray, input: Input, normalised: bool | None = None) -> np.ndarray:
    """Floats [1 or 3, H, W] as uint8 of the same shape: values in [0, 1], or normalised by ``input``'s mean and std.

    ``normalised`` None: those are that leave [0, 1]. A ValueError where neither gives values in [0, 1].
    """
    if normalised is None:
        normalised = outside(array)
    if normalised:
        mean, std = (np.reshape(values, (-1, 1, 1))[: len(array)] for values in (input.mean, input.std))
        undone = array.astype(np.float64) * std + mean
    else:
        undone = array
    if outside(undone):
        raise ValueError(
            f"values {array.min():.3g} … {array.max():.3g} are not in [0, 1], nor normalised by mean {input.mean} and "
            f"std {input.std}: give mean= and std= as the images were normalised"
        )
    return (undone * 255).round().clip(0, 255).astype(np.uint8)


def outside(array: np.ndarray) -> bool:
    """Whether any value leaves [0, 1]."""
    return not (array.min() >= -TOLERANCE and array.max() <= 1 + TOLERANCE)


def taken(image: Any, input: Input, normalised: bool | None = None) -> Read:
    """A Pillow image, or an array or tensor, as it enters a network, before normalisation.

    uint8 [H, W], [H, W, 1, 3 or 4] or [1 or 3, H, W]; floats [1 or 3, H, W] or [H, W, 1 or 3] as :func:`as_bytes` takes
    them; or, of more than 8 bits, numbers [H, W] as in a file. A TypeError for any other.
    """
    if isinstance(image, Image.Image):
        return fitted(image, input)
    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else np.asarray(image)
    floats, shape = array.dtype.kind == "f", array.shape
    first = len(shape) == 3 and shape[0] in (1, 3) and (floats or shape[2] not in (1, 3, 4))
    if len(shape) == 2 and array.dtype.kind in "iuf" and array.dtype != np.uint8 and 0 not in shape:
        wide = array if array.dtype == np.uint16 else array.astype(np.float32 if floats else np.int32)
        return fitted(Image.fromarray(wide), input)
    last = len(shape) == 3 and shape[2] in (1, 3, 4)
    if not (floats or array.dtype == np.uint8) or not (first or last or len(shape) == 2) or 0 in shape:
        kinds = "uint8 [H, W, 3] or [3, H, W], or floats [3, H, W]"
        raise TypeError(f"images must be Pillow images, or arrays or tensors, {kinds}, got {array.dtype} {list(shape)}")
    if floats:
        array = as_bytes(array if first else array.transpose(2, 0, 1), input, normalised)
        if array.shape[1:] == input.size:  # as the network takes it
            return Read(np.broadcast_to(array, (3, *input.size)))
        first = True
    array = array.transpose(1, 2, 0) if first else array
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    return fitted(Image.fromarray(np.ascontiguousarray(array)), input)


def read(file: str | Path, input: Input, box: Sequence[float] | None = None) -> Read:
    """One file as :func:`fitted` makes it; raises ValueError with the reason in a few words if it cannot be read.

    ``box`` (x, y, width, height) is cut out first, in the file's own pixels: annotations count them as stored.
    """
    try:
        with opened(file) as image:
            if box is None:
                return fitted(image, input)
            x, y, width, height = box
            return fitted(image.crop((round(x), round(y), round(x + width), round(y + height))), input)
    except Exception as error:  # Pillow's readers raise TypeError, KeyError, struct.error … for broken files
        raise ValueError(reason(error)) from None


_LARGE = threading.Lock()


@contextmanager
def opened(file: str | Path) -> Iterator[Image.Image]:
    """An image file, not yet decoded. PostScript is none: it is a program. Raises what Pillow raises, or ValueError."""
    if Path(file).stat().st_size == 0:
        raise ValueError("zero bytes")
    Image.init()
    with Image.open(file, formats=[name for name in Image.ID if name != "EPS"]) as image:
        pixels, most = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if most and pixels > most:
            size = f"{image.width} x {image.height} pixels, more than the {most:,} that Pillow calls safe"
            raise ValueError(f"{size}: make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS")
        with _LARGE if pixels > LARGE else nullcontext():
            yield image


class Streamed:
    """Pixels of image files, uint8 [N, 3, H, W], decoded whenever they are read: indexed along N as an array is.

    A ValueError where one of them cannot be read.
    """

    def __init__(self, files: Sequence[Path], input: Input, names: Sequence[str], boxes: Sequence = ()) -> None:
        self.files, self.input, self.names, self.boxes = files, input, names, boxes
        self.shape = len(files), 3, *input.size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> np.ndarray:
        chosen, reading = np.arange(len(self))[index], Reading(strict=True)
        some = np.atleast_1d(chosen).tolist()
        of, names, boxes = ([part[i] for i in some if part] for part in (self.files, self.names, self.boxes))
        pixels = np.empty((len(some), *self.shape[1:]), np.uint8)
        for i, image in read_many(of, self.input, reading, names=names, boxes=boxes):
            pixels[i] = image
        reading.check()
        return pixels if chosen.ndim else pixels[0]


def read_many(
    files: Sequence[Path], input: Input, reading: Reading, *, names: Sequence[str], boxes: Sequence = ()
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 [3, H, W]) of the files that can be read; ``reading`` learns of the others by ``names``."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), AHEAD):
            part = range(start, min(start + AHEAD, len(files)))
            work = [pool.submit(read, files[i], input, boxes[i] if boxes else None) for i in part]
            for i, future in zip(part, work, strict=True):
                with reading.attempt(names[i]):
                    yield i, reading.pixels(future.result())
