"""Your own folder of images, with labels or without; what cannot be read is named and the rest goes on."""

import shutil
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
IN_MEMORY = 2**30  # bytes of decoded images of a split; more go to a temporary file
HELD_OUT = ("test", "val", "valid", "validation")  # names of the folder beside train/, in any case
LAYOUTS = "give <class>/*, or train/<class>/* with test/<class>/* (or val/), or images alone"


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

    16 bits are scaled to 8 (65535 is white in every image), transparency is laid on white, EXIF orientation is applied.

    Raises
    ------
    ValueError
        Floating-point pixels: where white is, they do not say.
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
    kind = {"CMYK": "of CMYK", "L": "of one channel", "1": "of one channel", "P": "with a palette"}.get(
        mode, f"of {mode}"
    )
    return image.convert("RGB"), kind


def fitted(image: Image.Image, size: int, fit: str = "crop") -> tuple[np.ndarray, str]:
    """An open image as uint8 [3, size, size], and what it was converted from.

    ``fit``: ``crop`` cuts the centre square of the shorter side, ``stretch`` keeps all of the image.
    """
    image, kind = rgb(image)
    if fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    else:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1), kind


def read(file: str | Path, size: int, fit: str = "crop") -> tuple[np.ndarray, str]:
    """One file as :func:`fitted` makes it.

    Raises
    ------
    ValueError
        It cannot be read, with the reason in a few words.
    """
    try:
        if Path(file).stat().st_size == 0:
            raise ValueError("zero bytes")
        with Image.open(file) as image:
            return fitted(image, size, fit)
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


def listed(folder: str | Path, report: Callable[[str], None] | None = None) -> list[Path]:
    """Every image file below a folder, by its ending, sorted; hidden ones left out.

    ``report`` gets one line with the endings of the files that are left out, if there are any.

    Raises
    ------
    FileNotFoundError, ValueError
        There is no such folder, or no image in it.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist or is not a folder: give a folder of images")
    endings = set(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg"}
    files = [
        file
        for file in sorted(root.rglob("*"))
        if not any(part.startswith(".") for part in file.relative_to(root).parts) and file.is_file()
    ]
    found = [file for file in files if file.suffix.lower() in endings]
    others = Counter(file.suffix.lower() or "without ending" for file in files if file.suffix.lower() not in endings)
    skipped = ", ".join(f"{count} {ending}" for ending, count in others.most_common())
    if not found:
        raise ValueError(f"{root} holds no images" + (f" of a known ending, but {skipped}" if skipped else ""))
    if skipped and report:
        report(f"left out by their ending: {skipped}")
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
    scratch: str | Path | None = None,
    report: Callable[[str], None] = print,
) -> Dataset:
    """A folder as a data set: ``train`` makes the prototypes, ``test`` is held out.

    Parameters
    ----------
    folder
        ``<class>/*`` (labels; a share ``held_out`` of each class becomes ``test``), ``train/<class>/*`` and
        ``test/<class>/*`` (labels and split; ``val``, ``valid`` or ``validation`` stand for ``test``), or images alone
        (no labels: ``classes`` is empty, all labels are -1).
    image_size, mean, std, fit
        What the network takes, as in :class:`~kmex_utils.networks.Network`.
    held_out
        In [0, 1); each class keeps at least one image in ``train``.
    seed
        Of the split.
    scratch
        Folder of the temporary file that many images go to; None: the system's.
    report
        Gets one line for each thing to say.

    Raises
    ------
    FileNotFoundError, ValueError
        No folder, no images, one class only, no room for them.
    """
    from tqdm.auto import tqdm

    if not 0 <= held_out < 1:
        raise ValueError(f"held_out must be a share from 0 up to, not including, 1, got {held_out}")
    root = Path(folder).expanduser()
    files = listed(root, report)
    class_of, test = _layout(root, files)
    classes = tuple(sorted(set(class_of) - {""}))
    labels = np.array([classes.index(name) if classes else -1 for name in class_of], dtype=np.int64)
    is_test = np.array(test) if any(test) else _split(labels, held_out, seed)
    reading = Reading()
    kept: dict[bool, list[int]] = {False: [], True: []}
    pixels = {split: _array(int((is_test == split).sum()), image_size, scratch) for split in kept}
    for i, image in tqdm(read_many(files, image_size, fit, reading, root), "images", len(files), leave=False):
        split = bool(is_test[i])
        pixels[split][len(kept[split])] = image
        kept[split].append(i)
    for line in reading.lines():
        report(line)
    if not kept[False]:
        where = f"images in {root} that make prototypes" if kept[True] else f"{len(files)} images in {root}"
        raise ValueError(f"none of the {where} can be read")
    for c, name in enumerate(classes):
        if not (labels[kept[False]] == c).any():
            raise ValueError(f"no image of class {name!r} in {root} can be read")

    def part(split: bool) -> Images:
        index = kept[split]
        names = tuple(str(files[i].relative_to(root)) for i in index)
        return Images(pixels[split][: len(index)], torch.from_numpy(labels[index]), names)

    recipe = Recipe(image_size, prototypes_per_class, 0, mean, std)
    return Dataset(root.resolve().name, classes, part(False), part(True), recipe)


def _layout(root: Path, files: list[Path]) -> tuple[list[str], list[bool]]:
    """Class of each file ("" where there is none) and whether it is of a test split."""
    parts = [file.relative_to(root).parts for file in files]
    top = {p[0].lower(): p[0] for p in parts if len(p) > 1}
    test = [False] * len(parts)
    splits = [name for name in ("train", *HELD_OUT) if name in top]
    held_out = ""
    if len(splits) == 2 and splits[0] == "train" and len(top) == 2 and all(len(p) > 2 for p in parts):
        held_out = top[splits[1]]
        parts, test = [p[1:] for p in parts], [p[0] == held_out for p in parts]
    elif splits:
        folders = ", ".join(f"{top[name]}/" for name in splits)
        more = " of three splits, put train/ and test/ alone into a folder;" if len(splits) > 2 else ""
        raise ValueError(f"{root} holds {folders} but not as a split with class folders:{more} {LAYOUTS}")
    class_of = [p[0] if len(p) > 1 else "" for p in parts]
    classes = sorted(set(class_of) - {""})
    if classes and "" in class_of:
        loose = class_of.count("")
        raise ValueError(f"{root} holds {loose} images beside the class folders {', '.join(classes[:3])} …: {LAYOUTS}")
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
        raise ValueError(f"{root / held_out} has classes that train/ lacks: {', '.join(extra)}")
    return class_of, test


def _split(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    test = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == c))
        test[members[: min(int(share * len(members)), len(members) - 1)]] = True
    return test


def _array(count: int, size: int, scratch: str | Path | None = None) -> np.ndarray:
    shape = (count, 3, size, size)
    needed = count * 3 * size * size
    if needed <= IN_MEMORY:
        return np.empty(shape, np.uint8)
    free = shutil.disk_usage(scratch or tempfile.gettempdir()).free
    if needed > free:  # writing to a memory map on a full disk kills the process
        raise ValueError(
            f"{count:,} images take {needed / 2**30:.1f} GiB and {scratch or tempfile.gettempdir()} has "
            f"{free / 2**30:.1f} free: give scratch=, a folder with room"
        )
    with tempfile.TemporaryFile(dir=scratch) as file:
        return np.memmap(file, np.uint8, "w+", shape=shape)
