"""The one way from an image file to pixels: upright, 8-bit RGB, of the network's size; or why not."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

NAMED = 10  # so many unreadable images are named; the others are counted
AHEAD = 256  # images decoded before the first of them is taken: 37 MiB at 224 pixels
IN_MEMORY = 2**30  # bytes of decoded images of a split; more go to a temporary file
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises for broken files
KINDS = {"L": "of one channel", "1": "of one channel", "P": "with a palette"}  # of Pillow's modes


@dataclass
class Reading:
    """What happened while images were read: ``unreadable`` (name, reason) and how many were converted from what.

    ``strict`` and ``scratch`` as in :func:`kmex_utils.data.load`.
    """

    total: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter[str] = field(default_factory=Counter)
    strict: bool = False
    scratch: str | Path | None = None

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Count an image; what Pillow raises inside makes it unreadable."""
        self.total += 1
        try:
            yield
        except UNREADABLE as error:
            self.unreadable.append((name, reason(error)))

    def pixels(self, image: tuple[np.ndarray, str]) -> np.ndarray:
        """The pixels of what :func:`read` or :func:`fitted` returned; its conversion is counted."""
        self.converted.update([image[1]] if image[1] else [])
        return image[0]

    def room(self, shape: tuple[int, ...]) -> np.ndarray:
        """An empty uint8 array: in memory up to 1 GiB, else in a temporary file in ``scratch`` (None: the system's)."""
        needed = int(np.prod(shape))
        if needed <= IN_MEMORY:
            return np.empty(shape, np.uint8)
        folder = Path(self.scratch or tempfile.gettempdir()).expanduser()
        free = shutil.disk_usage(folder).free
        if needed > free:  # writing to a memory map would kill the process
            sizes = f"{shape[0]:,} images take {needed / 2**30:.1f} GiB and {folder} has {free / 2**30:.1f} free"
            raise ValueError(f"{sizes}: give scratch=, a folder with room")
        with tempfile.TemporaryFile(dir=folder) as file:
            return np.memmap(file, np.uint8, "w+", shape=shape)

    def lines(self) -> Iterator[str]:
        """One line for each unreadable image, their count, and one for all conversions."""
        for name, why in self.unreadable[:NAMED]:
            yield f"cannot read {name}: {why}"
        if self.unreadable:
            yield f"{len(self.unreadable)} of {self.total} images cannot be read and are left out"
        if self.converted:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.converted.most_common())
            yield f"converted to 8-bit RGB: {kinds}"

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


def rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Upright 8-bit RGB of an image, and what it was converted from (empty: nothing to convert).

    16 bits are scaled to 8 (65535 is white in every image); transparency is laid on white.
    """
    image = ImageOps.exif_transpose(image)
    mode = image.mode
    if mode == "RGB":
        return image, ""
    if mode == "F":
        raise ValueError("floating-point pixels have no fixed white: save them with 8 or 16 bits")
    if mode.startswith("I"):
        scaled = (np.asarray(image, dtype=np.float64) / 257).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB"), "of 16 bit"
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), "with transparency (laid on white)"
    return image.convert("RGB"), KINDS.get(mode, f"of {mode}")


def fitted(image: Image.Image, size: int, fit: str) -> tuple[np.ndarray, str]:
    """An open image as uint8 [3, size, size], and what it was converted from.

    ``fit``: ``crop`` cuts the centre square of the shorter side, ``stretch`` keeps all of the image.
    """
    image, kind = rgb(image)
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    else:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1), kind


def read(file: str | Path, size: int, fit: str, box: Sequence[float] | None = None) -> tuple[np.ndarray, str]:
    """One file as :func:`fitted` makes it; raises ValueError with the reason in a few words if it cannot be read.

    ``box`` (x, y, width, height) is cut out first, in the file's own pixels: annotations count them as stored.
    """
    try:
        if Path(file).stat().st_size == 0:
            raise ValueError("zero bytes")
        with Image.open(file) as image:
            if box is None:
                return fitted(image, size, fit)
            x, y, width, height = box
            return fitted(image.crop((round(x), round(y), round(x + width), round(y + height))), size, fit)
    except UNREADABLE as error:
        raise ValueError(reason(error)) from None


def read_many(
    files: Sequence[Path], size: int, fit: str, reading: Reading, *, names: Sequence[str], boxes: Sequence = ()
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 [3, size, size]) of the files that can be read; ``reading`` learns of the others by ``names``."""
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), AHEAD):
            part = range(start, min(start + AHEAD, len(files)))
            work = [pool.submit(read, files[i], size, fit, boxes[i] if boxes else None) for i in part]
            for i, future in zip(part, work, strict=True):
                with reading.attempt(names[i]):
                    yield i, reading.pixels(future.result())
