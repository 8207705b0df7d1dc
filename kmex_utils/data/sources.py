"""Where images come from: the paper's data sets, a folder, one's own ``torch`` data set; not yet decoded."""

import fnmatch
import glob
import hashlib
import io
import operator
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate, default_convert

from .. import paths
from ..store import lock, replacing
from . import folders
from .input import Input, read_off
from .reading import UNREADABLE, Reading, outside, readable, taken

MNIST_MINI_SHA256 = "ca038e34953256d15c41ff771ae1cb9d00049611dec5ee0c80c29b86025a9d83"
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"
SIZES = {  # training images, test images, classes
    "mnist-mini": (2_500, 1_500, 10),
    "mnist": (60_000, 10_000, 10),
    "stl10": (5_000, 8_000, 10),
    "cub200": (5_994, 5_794, 200),
}
LOOKED_AT = 16  # images of a torch data set, to tell whether its tensors are normalised


@dataclass(frozen=True)
class Listing:
    """N images, not yet decoded: ``labels`` int64 [N] (-1: none), ``is_test`` bool [N] (None: there is no test split).

    They lie in ``files`` (with ``boxes`` to cut out: x, y, width, height) or in ``pixels``, uint8 [N, 1 or 3, H, W].
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    names: Sequence[str]
    is_test: np.ndarray | None
    files: Sequence[Path] = ()
    boxes: Sequence[Sequence[float]] = ()
    pixels: np.ndarray | None = None


def matching(classes: Sequence[str], wanted: str | Sequence[str]) -> list[int]:
    """Indices of the classes that comma-separated names or patterns, or a list of names, select; empty selects all."""
    patterns = [glob.escape(name) for name in wanted]
    if isinstance(wanted, str):
        patterns = [pattern.strip() for pattern in wanted.split(",")] if wanted.strip() else []
    if not patterns:
        return list(range(len(classes)))
    for pattern in patterns:
        if not any(fnmatch.fnmatch(name, pattern) for name in classes):
            raise ValueError(f"no class matches {pattern!r}; the classes are {', '.join(classes)}")
    keep = [i for i, name in enumerate(classes) if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    if len(keep) < 2:
        raise ValueError(f"`classes` {wanted!r} leaves only {classes[keep[0]]!r}; keep at least two classes")
    return keep


def held_out(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which images are held out, bool [n]: a random ``share`` of each label, rounded down; at least one image stays."""
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        mask[members[: min(int(share * len(members)), len(members) - 1)]] = True
    return mask


def known(name: str, data: Path, crop: bool) -> Listing:
    """One of the paper's data sets, downloaded into ``data`` if it is not there."""
    if name == "cub200":
        return _cub200(data, crop)
    return {"mnist-mini": _mnist_mini, "mnist": _mnist, "stl10": _stl10}[name](data)


def expected(name: str) -> Listing:
    """The numbers that :func:`known` gives after the download; classes are numbered."""
    train, test, classes = SIZES[name]
    labels = np.concatenate([np.arange(count) % classes for count in (train, test)])
    return Listing(tuple(map(str, range(classes))), labels, (), np.arange(len(labels)) >= train)


def _in_memory(classes: Sequence[str], pixels: list, labels: list, names: Any = None) -> Listing:
    """A listing of the pixels, labels and names of (train, test)."""
    names = [str(name) for part in names or [range(len(part)) for part in labels] for name in part]
    is_test = np.arange(len(names)) >= len(labels[0])
    return Listing(
        tuple(classes), np.concatenate(labels, dtype=np.int64), names, is_test, pixels=np.concatenate(pixels)
    )


def _mnist_mini(data: Path) -> Listing:
    file = paths.MNIST_MINI
    content = file.read_bytes() if file.exists() else b""
    if hashlib.sha256(content).hexdigest() != MNIST_MINI_SHA256:
        raise ValueError(f"{file} is missing or damaged; restore it with `git checkout -- data/mnist-mini.npz`")
    arrays = np.load(io.BytesIO(content), allow_pickle=False)
    images, labels, index = ([arrays[f"{s}_{key}"] for s in ("train", "test")] for key in ("images", "labels", "index"))
    return _in_memory("0123456789", [part[:, None] for part in images], labels, index)


def _mnist(data: Path) -> Listing:
    from torchvision.datasets import MNIST

    raw = data / "MNIST" / "raw"
    with _alone(raw), _downloading("the four MNIST .gz files", raw):
        for file in raw.glob("*-ubyte"):  # torchvision takes one that a kill left as it is
            if not _whole(file):
                file.unlink()
        splits = [MNIST(data, train=train, download=True) for train in (True, False)]
    pixels = [split.data.numpy()[:, None] for split in splits]
    return _in_memory("0123456789", pixels, [split.targets.numpy() for split in splits])


def _stl10(data: Path) -> Listing:
    from torchvision.datasets import STL10

    with _alone(data), _downloading("stl10_binary.tar.gz", data):
        splits = [STL10(data, split=split, download=True) for split in ("train", "test")]
    classes = (data / "stl10_binary" / "class_names.txt").read_text(encoding="utf-8").split()
    return _in_memory(classes, [split.data for split in splits], [split.labels for split in splits])


def _whole(idx: Path) -> bool:
    """Whether a file in MNIST's format is as long as its head says."""
    content = idx.read_bytes()
    head = np.frombuffer(content, ">i4", min(len(content) // 4, 1 + content[3] if len(content) > 3 else 0))
    return len(head) > 1 and len(content) == head.nbytes + int(np.prod(head[1:]))


def _cub200(data: Path, crop: bool) -> Listing:
    root, archive = data / "CUB_200_2011", data / "CUB_200_2011.tgz"
    if not _extracted(root):
        with _alone(data):
            if not archive.exists() and not _extracted(root):
                from torchvision.datasets.utils import download_url

                with _downloading(archive.name, data), replacing(archive) as temporary:
                    download_url(CUB_URL, str(data), temporary.name, CUB_MD5)
            if not _extracted(root):
                extract_cub(archive, data)

    def table(name: str) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in (root / f"{name}.txt").read_text(encoding="utf-8").splitlines())

    images, class_of, is_train = table("images"), table("image_class_labels"), table("train_test_split")
    names, boxes = table("classes"), table("bounding_boxes") if crop else {}
    present = sorted(set(class_of.values()), key=int)
    labels = np.array([present.index(class_of[i]) for i in images])
    is_test = np.array([is_train[i] != "1" for i in images])
    classes = tuple(names[c].split(".", 1)[-1] for c in present)
    files = [root / "images" / name for name in images.values()]
    cut = [[float(value) for value in boxes[i].split()] for i in images] if crop else ()
    return Listing(classes, labels, list(images.values()), is_test, files, cut)


def _extracted(root: Path) -> bool:
    """Whether all images of CUB-200's list are there: other programs leave a part when they are killed."""
    listed = root / "images.txt"
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    return bool(lines) and all((root / "images" / line.split(maxsplit=1)[-1]).is_file() for line in lines)


def extract_cub(archive: Path, data: Path) -> None:
    """Check the official archive's MD5 and unpack it; links and names that leave the folder are refused.

    It is unpacked beside, and renamed when it is whole.
    """
    with open(archive, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != CUB_MD5:
            official = f"the official CUB-200-2011 archive (MD5 {CUB_MD5})"
            raise ValueError(f"{archive} is not {official}; delete it and run again")
    root, beside = data / "CUB_200_2011", data / ".CUB_200_2011"
    shutil.rmtree(beside, ignore_errors=True)  # what a killed one left
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(beside, filter="data")
        shutil.rmtree(root, ignore_errors=True)
        (beside / root.name).rename(root)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _alone(where: Path) -> AbstractContextManager[Any]:
    """Of two processes that fetch into a folder one waits for the other; what cannot be written to is not fetched."""
    where.mkdir(parents=True, exist_ok=True)
    return lock(where / ".fetching.lock", seconds=86_400) if os.access(where, os.W_OK) else nullcontext()


@contextmanager
def _downloading(what: str, where: Path) -> Iterator[None]:
    """A missing network is one line that says which file to put where."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"cannot download ({error}); put {what} into {where} and run again") from None


def folder(
    source: str | Path, *, needs_labels: bool, strict: bool, log: Callable[[str], None] | None = None
) -> Listing:
    """A folder of images, see :func:`~kmex_utils.data.folders.layout`."""
    root = paths.located(source)
    if isinstance(source, str) and not root.is_dir() and Path(source).name == source:
        raise ValueError(f"unknown dataset {source!r}: use one of {', '.join(SIZES)}, or give a folder of images")
    files = folders.listed(root, log)
    class_of, test = folders.layout(root, files, needs_labels=needs_labels, strict=strict)
    class_of = [readable(name) for name in class_of]
    classes = sorted(set(class_of) - {""})
    number = {name: label for label, name in enumerate(classes)}
    labels, is_test = np.array([number.get(name, -1) for name in class_of]), np.array(test)
    names = [readable(file.relative_to(root).as_posix()) for file in files]
    return Listing(tuple(classes), labels, names, is_test if is_test.any() else None, files)


def torch_data(source: Any, input: Input, needs_labels: bool, reading: Reading) -> Listing:
    """A ``torch`` data set, or a pair (train, test), of (image, label); read once, to uint8 [N, 3, H, W].

    Of a ``DataLoader`` the data set is read, in its own order. Float tensors are taken as values in [0, 1] or, where
    any of the data set leaves it, as normalised: as the data set's ``transform`` does it, else as ``input`` says.
    """
    from tqdm.auto import tqdm

    pair = source if isinstance(source, tuple) else (source,)
    parts: list[Any] = [part.dataset if isinstance(part, DataLoader) else part for part in pair]
    if len(pair) > 2 or not all(hasattr(part, "__len__") and hasattr(part, "__getitem__") for part in parts):
        kinds = "a known name, a folder, a torch data set with a length or its DataLoader, or a pair (train, test)"
        raise TypeError(f"give {kinds}, got {type(source).__name__}")
    pixels = reading.room((sum(map(len, parts)), 3, *input.size))
    rows: list[tuple[int, int, bool]] = []  # label, index and whether it is of the test split
    for split, dataset in enumerate(parts):
        collate = getattr(pair[split], "collate_fn", default_collate) if dataset is not pair[split] else default_collate
        as_taken, normalised = _normalised(dataset, collate, input)
        for i in tqdm(range(len(dataset)), "read", mininterval=1, leave=False):
            with reading.attempt(f"image {i}"):
                image, label = _image_and_label(dataset[i], collate)
                pixels[len(rows)] = reading.pixels(taken(image, as_taken, normalised))
                rows.append((label, i, split == 1))
    reading.check()
    labels, index, test = np.array(rows, np.int64).reshape(-1, 3).T
    classes, labels = _classes(parts[0], labels, test == 1) if needs_labels or (labels >= 0).any() else ((), labels)
    names, is_test = [*map(str, index)], test == 1 if len(parts) > 1 else None
    return Listing(classes, labels, names, is_test, pixels=pixels[: len(rows)])


def _normalised(dataset: Any, collate: Callable[..., Any], input: Input) -> tuple[Input, bool]:
    """How the float tensors of a data set were normalised, and whether they were; a ValueError if it is not known."""
    inner = dataset
    while not hasattr(inner, "transform") and hasattr(inner, "dataset"):  # a Subset
        inner = inner.dataset
    with suppress(AttributeError, KeyError, ValueError):  # there is none, or none of Pillow images
        found = read_off(inner.transform)
        return replace(input, mean=found["mean"], std=found["std"], channels=len(found["mean"])), True
    floats = []
    for i in range(0, len(dataset), len(dataset) // LOOKED_AT + 1):
        with suppress(*UNREADABLE):
            image, _ = _image_and_label(dataset[i], collate)
            if isinstance(image, torch.Tensor | np.ndarray) and image.ndim == 3 and np.asarray(image).dtype.kind == "f":
                floats.append(image)
    normalised = any(outside(np.asarray(image)) for image in floats)
    for image in floats:
        taken(image, input, normalised)  # refuses at once what no image of the data set would give
    return input, normalised


def _classes(dataset: Any, labels: np.ndarray, is_test: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the classes that have training images, by ``.classes`` or numbers, and labels among them."""
    present = np.unique(labels[~is_test]).tolist()
    if len(present) < 2 or present[0] < 0:
        raise ValueError(f"labels must be 0, 1 … of at least two classes, got {present[:3]}")
    if extra := sorted(set(labels.tolist()) - set(present)):
        raise ValueError(f"the test images have labels that the training images lack: {extra}")
    while not hasattr(dataset, "classes") and hasattr(dataset, "dataset"):  # a Subset
        dataset = dataset.dataset
    names = getattr(dataset, "classes", range(present[-1] + 1))
    if present[-1] >= len(names):
        raise ValueError(f"there is a label {present[-1]}, but the data set's .classes are {len(names)}")
    return tuple(str(names[c]) for c in present), np.searchsorted(present, labels)


def _image_and_label(item: Any, collate: Callable[..., Any]) -> tuple[Any, int]:
    try:
        if collate not in (default_collate, default_convert):
            (image,), (label,) = collate([item])  # a batch of one
        else:
            image, label = item
        return image, operator.index(label)
    except (TypeError, ValueError):
        raise TypeError(f"a data set's items must be (image, integer label), got {type(item)}") from None
