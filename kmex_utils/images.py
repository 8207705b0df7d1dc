"""Your own folder of images, with labels or without; what cannot be read is named and the rest goes on."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .datasets import Dataset, Images, Recipe

NAMED = 10  # so many unreadable images are named; the others are counted
IN_MEMORY = 2**30  # bytes of decoded images; more go to a temporary file


@dataclass
class Reading:
    """What happened while images were read: ``unreadable`` (file, reason) and how many were converted from what."""

    total: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    converted: Counter = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """One line for each unreadable image, their count, and one for all conversions."""
        for name, reason in self.unreadable[:NAMED]:
            yield f"cannot read {name}: {reason}"
        if self.unreadable:
            yield f"{len(self.unreadable)} of {self.total} images cannot be read and are left out"
        if self.converted:
            kinds = ", ".join(f"{count} {kind}" for kind, count in self.converted.most_common())
            yield f"converted to 8-bit RGB: {kinds}"


def rgb(image: Image.Image) -> tuple[Image.Image, str]:
    """Upright 8-bit RGB of any image Pillow opens, and what it was converted from (empty: nothing to convert).

    16 bits are scaled to 8, transparency is laid on white, EXIF orientation is applied.
    """
    ImageOps.exif_transpose(image, in_place=True)
    mode = image.mode
    if mode == "RGB":
        return image, ""
    if mode.startswith("I") or mode == "F":
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if mode.startswith("I") and values.max(initial=0) > 255 else max(values.max(initial=0), 1)
        scaled = (values.clip(0) * (255 / top if top != 255 else 1)).round().clip(0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB"), "of 16 bit" if mode.startswith("I") else "of floating point"
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB"), "with transparency (laid on white)"
    kind = {"CMYK": "of CMYK", "L": "of one channel", "1": "of one channel", "P": "with a palette"}.get(
        mode, f"of {mode}"
    )
    return image.convert("RGB"), kind


def read(file: str | Path, size: int, fit: str = "crop") -> tuple[np.ndarray, str]:
    """One image as uint8 [3, size, size], and what it was converted from.

    ``fit``: ``crop`` cuts the centre square of the shorter side, ``stretch`` keeps all of the image.

    Raises
    ------
    ValueError
        It cannot be read, with the reason in a few words.
    """
    try:
        if Path(file).stat().st_size == 0:
            raise ValueError("zero bytes")
        with Image.open(file) as image:
            image, kind = rgb(image)
        if fit == "crop":
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        else:
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1), kind
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def read_many(
    files: Sequence[Path], size: int, fit: str, reading: Reading, root: Path | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """(index, uint8 [3, size, size]) of the files that can be read, in order; ``reading`` learns of the others."""

    def one(file: Path):
        try:
            return read(file, size, fit)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), 256):  # a bounded number ahead
            part = files[start : start + 256]
            for i, found in enumerate(pool.map(one, part), start):
                reading.total += 1
                if isinstance(found, str):
                    name = files[i].relative_to(root) if root else files[i]
                    reading.unreadable.append((str(name), found))
                    continue
                pixels, kind = found
                if kind:
                    reading.converted[kind] += 1
                yield i, pixels


def listed(folder: str | Path) -> list[Path]:
    """Every image file below a folder, by its ending, sorted; hidden ones left out.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist or is not a folder: give a folder of images")
    endings = set(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"}
    found = [
        file
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in endings
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
        and file.is_file()
    ]
    if not found:
        raise ValueError(f"{root} holds no images")
    return found


def load(
    folder: str | Path,
    image_size: int,
    *,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    fit: str = "crop",
    prototypes_per_class: int = 5,
    held_out: float = 0.2,
    seed: int = 0,
    report: Callable[[str], None] = print,
) -> Dataset:
    """A folder as a data set: ``train`` makes the prototypes, ``test`` is held out.

    Parameters
    ----------
    folder
        ``<class>/*`` (labels; a share ``held_out`` of each class becomes ``test``), ``train/<class>/*`` and
        ``test/<class>/*`` (labels and split), or images alone (no labels: ``classes`` is empty, all labels are -1).
    image_size, mean, std, fit
        What the network takes, as in :class:`~kmex_utils.networks.Network`.
    held_out
        In [0, 1); each class keeps at least one image in ``train``.
    seed
        Of the split.
    report
        Gets one line for each thing to say.

    Raises
    ------
    FileNotFoundError, ValueError
        No folder, no images, one class only.
    """
    from tqdm.auto import tqdm

    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share from 0 up to, not including, 1, got {held_out}")
    root = Path(folder).expanduser()
    files = listed(root)
    class_of, test = _layout(root, files)
    classes = tuple(sorted(set(class_of) - {""}))
    reading = Reading()
    pixels = _array(len(files), image_size)
    kept = []
    for i, image in tqdm(read_many(files, image_size, fit, reading, root), "images", len(files), leave=False):
        pixels[len(kept)] = image
        kept.append(i)
    for line in reading.lines():
        report(line)
    if not kept:
        raise ValueError(f"none of the {len(files)} images in {root} can be read")
    labels = np.array([classes.index(class_of[i]) if classes else -1 for i in kept], dtype=np.int64)
    empty = [name for c, name in enumerate(classes) if not (labels == c).any()]
    if empty:
        raise ValueError(f"no image of class {empty[0]!r} in {root} can be read")
    is_test = np.array([test[i] for i in kept]) if any(test) else _split(labels, held_out, seed)
    if is_test.all():
        raise ValueError(f"{root / 'train'} holds no readable images")

    def part(chosen: np.ndarray) -> Images:
        index = np.flatnonzero(chosen)
        names = tuple(str(files[kept[i]].relative_to(root)) for i in index)
        return Images(pixels[index] if chosen.any() else pixels[:0], torch.from_numpy(labels[index]), names)

    recipe = Recipe(image_size, prototypes_per_class, 0, mean, std)
    return Dataset(root.resolve().name, classes, part(~is_test), part(is_test), recipe)


def _layout(root: Path, files: list[Path]) -> tuple[list[str], list[bool]]:
    """Class of each file ("" where there is none) and whether it is of a test split."""
    parts = [file.relative_to(root).parts for file in files]
    top = {p[0] for p in parts if len(p) > 1}
    split = top == {"train", "test"} and all(len(p) > 2 for p in parts)
    if split:
        parts, test = [p[1:] for p in parts], [p[0] == "test" for p in parts]
    else:
        test = [False] * len(parts)
    class_of = [p[0] if len(p) > 1 else "" for p in parts]
    classes = sorted(set(class_of) - {""})
    if classes and "" in class_of:
        loose = class_of.count("")
        raise ValueError(
            f"{root} holds {loose} images beside the class folders {', '.join(classes[:3])} …: give <class>/*, or "
            "images alone"
        )
    if len(classes) == 1:
        raise ValueError(
            f"{root} holds one class only ({classes[0]}): give at least two, or the folder {root / classes[0]} itself "
            "to have the network's predictions as labels"
        )
    extra = sorted(
        {c for c, t in zip(class_of, test, strict=True) if t}
        - {c for c, t in zip(class_of, test, strict=True) if not t}
    )
    if extra:
        raise ValueError(f"{root / 'test'} has classes that train/ lacks: {', '.join(extra)}")
    return class_of, test


def _split(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    test = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == c))
        test[members[: min(int(share * len(members)), len(members) - 1)]] = True
    return test


def _array(count: int, size: int) -> np.ndarray:
    shape = (count, 3, size, size)
    if count * 3 * size * size <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile() as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)
