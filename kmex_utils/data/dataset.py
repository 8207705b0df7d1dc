"""One entry point for all images: :func:`load`.

Images are decoded and resized once and kept as bytes; what happens every epoch is only normalisation and augmentation,
in batches, on the device.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from .. import paths
from ..parameters import whole
from ..store import clean, replacing, reserve
from . import sources
from .input import IMAGENET_MEAN, IMAGENET_STD, Input
from .reading import Reading, Streamed, read_many, readable
from .sources import Listing

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # x [n, C, H, W], labels [n]

_GREY = (0.13269,) * 3, (0.29185,) * 3
_OWN_INPUTS = {
    "mnist-mini": Input(56, *_GREY),  # (paper: 32, where B4 has one position)
    "mnist": Input(32, *_GREY),
    "stl10": Input(96, (0.4466, 0.4397, 0.4066), (0.2603, 0.2566, 0.2713)),
    "cub200": Input(224, IMAGENET_MEAN, IMAGENET_STD),  # the normalisation is not recoverable from KMEx's repository
}


def own_input(name: str) -> Input:
    """The paper's size and normalisation of a data set; for any other name 224 pixels and ImageNet's."""
    return _OWN_INPUTS.get(name, Input(224, IMAGENET_MEAN, IMAGENET_STD))


@dataclass(frozen=True)
class Images:
    """One split: ``pixels`` uint8 [N, 1 or 3, H, W], ``labels`` int64 [N] (-1: none), ``names`` one for each image."""

    pixels: np.ndarray | Streamed
    labels: torch.Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def rgb(self, i: int) -> np.ndarray:
        """Image i as uint8 [H, W, 3], for display."""
        return np.broadcast_to(self.pixels[i].transpose(1, 2, 0), (*self.pixels.shape[2:], 3))


@dataclass(frozen=True)
class Dataset:
    """Images to make prototypes from (``train``) and to measure on (``test``).

    ``settings`` are plain JSON, from which :func:`reopen` gives the same data set; of a ``torch`` one it refuses.
    """

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    input: Input
    settings: dict[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> Images:
        """``train`` or ``test``."""
        return {"train": self.train, "test": self.test}[name]

    def batches(self, split: str, batch_size: int = 128, device: torch.device | str = "cpu") -> Batches:
        """Every image of a split once, in order, without augmentation."""
        images = self.split(split)
        for start in range(0, len(images), batch_size):
            index = slice(start, start + batch_size)
            yield self.input(images.pixels[index], device), images.labels[index].to(device)


def load(
    source: Any,
    input: Input | None = None,
    *,
    name: str = "",
    classes: str | Sequence[str] = "",
    crop: bool = False,
    images_per_class: int = 0,
    validation: float = 0.0,
    held_out: float = 0.0,
    seed: int = 0,
    strict: bool = True,
    needs_labels: bool = True,
    stream: bool = False,
    data: str | Path | None = paths.DATA,
    scratch: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> Dataset:
    """A data set by name, a folder of images, or a ``torch`` data set.

    Parameters
    ----------
    source
        ``mnist-mini``, ``mnist``, ``stl10`` or ``cub200``; a folder with ``train/<class>/*`` and ``test/<class>/*``
        (``val``, ``valid`` or ``validation`` stand for ``test``), with ``<class>/*``, or with images alone; a ``torch``
        data set or its ``DataLoader``, or a pair (train, test), of (image, label). An image is a Pillow image, or an
        array or tensor: uint8, or floats in [0, 1] or normalised, see :func:`~kmex_utils.data.sources.torch_data`.
    input
        Size, fit and normalisation; None: the data set's own.
    name
        Of the data set (empty: the source's own); a known name lends a folder its input.
    classes
        The classes to keep: comma-separated names or patterns (``*Sparrow``), or a list of names; empty keeps all.
    crop
        CUB-200: cut each image to its bounding box.
    images_per_class
        Keep the first so many images of each class in either split; 0 keeps all.
    validation
        To choose settings by: this share of each class's training images takes the test split's place, and the test
        images are not read.
    held_out
        The share of each class that becomes the test split where the source has none.
    seed
        Of the images that :func:`~kmex_utils.data.held_out` chooses for either share.
    strict
        Stop at unreadable images, class folders without images and a missing test split. Without it unreadable images
        are named by ``log`` and left out.
    needs_labels
        Without it images alone are taken too: ``classes`` is empty, all labels are -1.
    stream
        Decode image files whenever they are read, not once into a file: for what does not fit on a disk, decoded. One
        that cannot be read is an error then, and not before.
    data
        Where downloads and, if ``strict``, decoded images are kept; None: decoded images are not kept.
    scratch
        Folder of the temporary file that many images go to if they are not kept; None: the system's.
    log
        Gets one line for each thing to say.

    Raises
    ------
    ValueError, FileNotFoundError, ConnectionError, TypeError
        One line that names the fix: unknown name, missing folder, unreadable images, no network.
    """
    if crop and source != "cub200":
        raise ValueError("`crop` cuts to CUB-200's bounding boxes; leave it False for other data")
    scratch = paths.scratch(scratch)
    choice: dict[str, Any] = {"images_per_class": images_per_class, "validation": validation, "held_out": held_out}
    choice |= {"classes": classes, "seed": seed}
    downloads, reading = paths.resolve(data or paths.DATA), Reading(strict=strict, scratch=scratch)
    place = ""  # of a source that can be opened again
    if isinstance(source, str) and source in sources.SIZES:
        name, input, place = name or source, input or own_input(source), source
        listing = sources.known(source, downloads, crop)
    elif isinstance(source, str | Path):
        name, place = name or readable(paths.located(source).resolve().name), _place(source)
        listing = sources.folder(source, needs_labels=needs_labels, strict=strict, log=log)
    else:
        first = source[0] if isinstance(source, tuple) else source
        name = name or type(first.dataset if isinstance(first, DataLoader) else first).__name__
        input = input or own_input(name)
        listing = sources.torch_data(source, input, needs_labels, reading)
    input = input or own_input(name)
    if strict and listing.is_test is None and not (validation or held_out):
        raise ValueError(f"{name} has no test split: give one, or a share as held_out or validation")
    kept, labels, train, test = _chosen(listing, **choice)

    def images(split: str, index: np.ndarray) -> Images:
        if listing.pixels is not None:
            pixels = _resized(listing.pixels, index, input.size, reading)
        elif stream:
            names = tuple(listing.names[i] for i in index)
            boxes = [listing.boxes[i] for i in index] if listing.boxes else ()
            streamed = Streamed([listing.files[i] for i in index], input, names, boxes)
            return Images(streamed, torch.from_numpy(labels[index]), names)
        else:
            kept_there = strict and data is not None and len(index) and not input.transform  # its code may change
            cache = downloads / "cache" / f"{name}-{split}" if kept_there else None
            pixels, index = _decoded(listing, index, input, reading, cache)
        return Images(pixels, torch.from_numpy(labels[index]), tuple(listing.names[i] for i in index))

    splits = images("train", train), images("validation" if validation else "test", test)
    for line in reading.lines():
        log(line)
    if not len(splits[0]):
        raise ValueError(f"none of the {len(train)} images of {name} that make prototypes can be read")
    if missing := set(range(len(kept))) - set(splits[0].labels.tolist()):
        raise ValueError(f"no image of class {kept[min(missing)]!r} in {name} can be read")
    settings = {"source": place, "name": name, "crop": crop, "strict": strict, "needs_labels": needs_labels, **choice}
    settings |= {"input": input.settings, "classes": kept, "data": None if data is None else _place(data)}
    settings |= {"stream": stream} if stream else {}
    settings["held_out"] = held_out if listing.is_test is None else 0.0  # what was done: a test split there is, is used
    return Dataset(name, kept, *splits, input, json.loads(json.dumps(settings)))


def reopen(settings: Mapping[str, Any], **options: Any) -> Dataset:
    """The data set whose ``settings`` these are (those of a ``torch`` data set do not find it, a ValueError).

    ``options``: ``scratch`` and ``log`` of :func:`load`, which says what else is raised.
    """
    if not settings["source"]:
        raise ValueError("a torch data set is not found by its settings: give it again")
    return replace(load(**{**settings, "input": Input.of(settings["input"])}, **options), settings=dict(settings))


def count(source: str | Path, *, classes: str | Sequence[str] = "", **choice: Any) -> tuple[int, int, int]:
    """Training images, test images and classes that :func:`load` gives; nothing is downloaded or decoded.

    ``choice``: images_per_class, validation, held_out, seed. Which images of STL-10 or CUB-200 ``classes`` keeps is not
    known before the download: all are counted. Raises what :func:`load` raises.
    """
    if source in sources.SIZES:
        listing = sources.expected(str(source))
        classes = classes if source in ("mnist-mini", "mnist") else ""
    else:
        listing = sources.folder(source, needs_labels=True, strict=True)
    kept, _, train, test = _chosen(listing, classes, **choice)
    return len(train), len(test), len(kept)


def _chosen(
    listing: Listing,
    classes: str | Sequence[str],
    images_per_class: int = 0,
    validation: float = 0.0,
    held_out: float = 0.0,
    seed: int = 0,
) -> tuple[tuple[str, ...], np.ndarray, np.ndarray, np.ndarray]:
    """What the arguments of :func:`load` choose: class names, labels [N] among them, training and test index."""
    whole(images_per_class=images_per_class, seed=seed)
    for option, share in (("validation", validation), ("held_out", held_out)):
        if not isinstance(share, int | float) or not 0 <= share < 1:
            raise ValueError(f"{option} must be a share of the training images, at least 0 and below 1, got {share}")
    keep = sources.matching(listing.classes, classes)
    chosen = np.isin(listing.labels, keep or [-1])
    labels = np.searchsorted(keep, listing.labels) if keep else listing.labels
    is_test = np.zeros(len(labels), bool) if listing.is_test is None else listing.is_test

    def first(index: np.ndarray) -> np.ndarray:
        """The first images of each class."""
        members = [index[labels[index] == label][: images_per_class or None] for label in np.unique(labels[index])]
        return np.sort(np.concatenate(members)) if members else index

    train = first(np.flatnonzero(chosen & ~is_test))
    test = first(np.flatnonzero(chosen & is_test))
    if validation or listing.is_test is None:
        mask = sources.held_out(labels[train], validation or held_out, seed)
        train, test = train[~mask], train[mask]
    if validation and set(labels[test]) < set(labels[train]):
        raise ValueError(f"validation={validation} leaves a class without validation images: give a larger share")
    return tuple(listing.classes[c] for c in keep), labels, train, test


def _place(path: str | Path) -> str:
    """A folder as settings name it: from the repository's root inside it, else absolute or as given."""
    there = paths.located(path)
    if there.is_relative_to(paths.ROOT):
        return there.relative_to(paths.ROOT).as_posix()
    return str(path if paths.resolve(path) == there else there)


def _resized(pixels: np.ndarray, index: np.ndarray, size: tuple[int, int], reading: Reading) -> np.ndarray:
    """The indexed ``pixels``, of another size."""
    images = reading.room((len(index), pixels.shape[1], *size))
    for start in range(0, len(index), 4096):  # 4,096 images of 96 pixels are 0.45 GB in float32
        x = torch.from_numpy(pixels[index[start : start + 4096]])
        if x.shape[2:] != size:
            x = F.interpolate(x.float(), size, mode="bilinear", antialias=True).round().clamp(0, 255).byte()
        images[start : start + 4096] = x.numpy()
    return images


def _decoded(
    listing: Listing, index: np.ndarray, input: Input, reading: Reading, cache: Path | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of files, and the index of those that can be read.

    They are decoded once into a file whose name begins with ``cache`` and ends with a hash of what decides its content.
    """
    from tqdm.auto import tqdm

    files, names = [listing.files[i] for i in index], [listing.names[i] for i in index]
    boxes = [listing.boxes[i] for i in index] if listing.boxes else ()
    kept: list[int] = []

    def decode(pixels: np.ndarray) -> np.ndarray:
        images = read_many(files, input, reading, names=names, boxes=boxes)
        for i, image in tqdm(images, "decode", len(files), mininterval=1, leave=False):
            pixels[len(kept)] = image
            kept.append(i)
        reading.check()
        return pixels[: len(kept)]

    shape = (len(index), 3, *input.size)
    if not cache:
        return decode(reading.room(shape)), index[kept]
    key = hashlib.sha256(repr((input.size, input.fit, input.window, boxes)).encode())
    for file in files:
        stat = file.stat()
        key.update(os.fsencode(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n"))
    path = cache.with_name(f"{cache.name}-{'x'.join(map(str, dict.fromkeys(input.size)))}-{key.hexdigest()[:12]}.npy")
    if not path.exists():
        clean(path.parent)
        with replacing(path) as temporary:
            with temporary.open("r+b") as file:  # as open_memmap does, which reserves nothing
                head = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, head)
                reserve(file, file.tell() + math.prod(shape), path.parent)
                pixels = np.memmap(file, np.uint8, "r+", file.tell(), shape)
            decode(pixels)
    return np.load(path, mmap_mode="r"), index
