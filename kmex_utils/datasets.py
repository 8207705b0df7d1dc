"""One entry point for all data sets: :func:`load`.

Each comes as a training set with augmentation, the same images without it, a test set, class names and the
recipe the paper uses for it. Images are decoded and resized once and kept as bytes; what happens every epoch
is only normalisation and augmentation, in batches, on the device.
"""

import fnmatch
import hashlib
import io
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from . import paths
from .store import replacing


@dataclass(frozen=True)
class Recipe:
    """Settings of one data set: the paper's and, where it refers to them, KMEx's (Gautam et al. 2024).

    ``image_size`` in pixels; ``mean`` and ``std`` of RGB values in [0, 1]; ``flip`` is the probability of a
    horizontal flip; ``padding`` the border of the random crop in pixels; ``learning_rate`` falls to
    ``final_learning_rate`` along a cosine, step by step.
    """

    image_size: int
    prototypes_per_class: int
    epochs: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    flip: float = 0.0
    padding: int = 0
    weights: str = "imagenet"
    batch_size: int = 128
    learning_rate: float = 0.01
    final_learning_rate: float = 1e-4
    momentum: float = 0.5


_GREY = {"mean": (0.13269,) * 3, "std": (0.29185,) * 3}
_STL10 = {"mean": (0.4466, 0.4397, 0.4066), "std": (0.2603, 0.2566, 0.2713)}
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

RECIPES = {
    # The embedded digits train from scratch in about a minute: image_size 56 (paper: 32, where B4 has one
    # position), epochs 2 (10), batch_size 32 (128), momentum 0.9 (0.5). Chosen on 2,000 other training digits.
    "mnist-mini": Recipe(56, 5, 2, **_GREY, weights="scratch", batch_size=32, momentum=0.9),
    "mnist": Recipe(32, 5, 10, **_GREY),
    "stl10": Recipe(96, 5, 30, **_STL10, flip=0.5, padding=2),
    # epochs and normalisation are not recoverable from KMEx's repository for CUB-200
    "cub200": Recipe(224, 10, 60, **_IMAGENET, flip=0.5, padding=8),
    "folder": Recipe(224, 5, 30, **_IMAGENET, flip=0.5, padding=8),
}

MNIST_MINI_SHA256 = "ca038e34953256d15c41ff771ae1cb9d00049611dec5ee0c80c29b86025a9d83"
CUB_URL = "https://data.caltech.edu/records/65de6-vp158/files/CUB_200_2011.tgz"
CUB_MD5 = "97eceeb196236b17998738112f37df78"


@dataclass(frozen=True)
class Images:
    """One split: ``pixels`` uint8 [N, 1 or 3, S, S], ``labels`` int64 [N], ``names`` one for each image."""

    pixels: np.ndarray
    labels: torch.Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def rgb(self, i: int) -> np.ndarray:
        """Image i as uint8 [S, S, 3], for display."""
        return np.broadcast_to(self.pixels[i].transpose(1, 2, 0), (*self.pixels.shape[2:], 3))


@dataclass(frozen=True)
class Dataset:
    """A data set with the paper's settings for it."""

    name: str
    classes: tuple[str, ...]
    train: Images
    test: Images
    recipe: Recipe

    def split(self, name: str) -> Images:
        """``train`` (without augmentation) or ``test``."""
        return {"train": self.train, "test": self.test}[name]

    def normalise(self, pixels: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
        """uint8 [n, 1 or 3, S, S] to the network's input, float32 [n, 3, S, S], channels last."""
        x = torch.from_numpy(np.array(pixels)).to(device)  # a copy: cached images are read-only
        return self._normalised(x)

    def _normalised(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.tensor(self.recipe.mean, device=x.device).view(1, 3, 1, 1)
        std = torch.tensor(self.recipe.std, device=x.device).view(1, 3, 1, 1)
        return ((x.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)

    def batches(
        self, split: str, batch_size: int = 128, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Every image of a split once, in order, without augmentation: (x [n, 3, S, S], labels [n])."""
        images = self.split(split)
        for start in range(0, len(images), batch_size):
            index = slice(start, start + batch_size)
            yield self.normalise(images.pixels[index], device), images.labels[index].to(device)

    def training_batches(
        self, batch_size: int, seed: int, epoch: int, device: torch.device | str = "cpu"
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """One epoch, shuffled and augmented; a last incomplete batch is dropped.

        The order and the augmentation depend on (seed, epoch) alone, so a resumed run sees the same batches.
        """
        generator = epoch_generator(seed, epoch)
        for index in shuffled(len(self.train), batch_size, generator):
            pixels = torch.from_numpy(np.array(self.train.pixels[index.numpy()])).to(device)
            pixels = augment(pixels, self.recipe.flip, self.recipe.padding, generator)
            yield self._normalised(pixels), self.train.labels[index].to(device)


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """The source of an epoch's order and augmentation."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def shuffled(count: int, batch_size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Indices 0 … count - 1 in random order, in batches; a last incomplete one is dropped."""
    batches = torch.randperm(count, generator=generator).split(batch_size)
    return [index for index in batches if len(index) == batch_size]


def augment(x: torch.Tensor, flip: float, padding: int, generator: torch.Generator) -> torch.Tensor:
    """Horizontal flips and random crops (zero border of ``padding`` pixels), drawn image by image."""
    n, _, height, width = x.shape
    if flip:
        flipped = (torch.rand(n, generator=generator) < flip).to(x.device)
        x = torch.where(flipped.view(-1, 1, 1, 1), x.flip(3), x)
    if padding:
        top, left = torch.randint(2 * padding + 1, (2, n, 1), generator=generator).to(x.device)
        rows = (top + torch.arange(height, device=x.device)).view(n, 1, height, 1)
        columns = (left + torch.arange(width, device=x.device)).view(n, 1, 1, width)
        image = torch.arange(n, device=x.device).view(n, 1, 1, 1)
        channel = torch.arange(x.shape[1], device=x.device).view(1, -1, 1, 1)
        x = F.pad(x, (padding,) * 4)[image, channel, rows, columns]
    return x


def load(
    name: str,
    folder: str | Path = "",
    *,
    image_size: int = 0,
    classes: str = "",
    crop: bool = False,
    images_per_class: int = 0,
    validation: float = 0.0,
    flip: float = -1.0,
    padding: int = -1,
    data: str | Path = paths.DATA,
) -> Dataset:
    """A data set by name, or one's own images.

    Parameters
    ----------
    name
        ``mnist-mini``, ``mnist``, ``stl10`` or ``cub200``; with ``folder``, any label for your own images
        (a known name then lends its recipe).
    folder
        Own images, ``train/<class>/*`` and ``test/<class>/*``.
    image_size
        Pixels; 0 takes the recipe's.
    classes
        Comma-separated names or patterns (``*Sparrow``) of the classes to keep; empty keeps all.
    crop
        CUB-200: cut each image to its bounding box.
    images_per_class
        Keep the first so many images of each class in either split; 0 keeps all.
    validation
        To choose settings by: the last of this share of each class's training images take the test split's place,
        and the test images are not read.
    flip, padding
        Augmentation, see :class:`Recipe`; -1 takes the recipe's.
    data
        Where downloads and decoded images are kept.

    Raises
    ------
    ValueError, FileNotFoundError, ConnectionError
        One line that names the fix: unknown name, missing folder, unreadable images, no network.
    """
    if name not in RECIPES and not folder:
        raise ValueError(
            f"unknown dataset {name!r}: use one of {', '.join(RECIPES)}, or give `folder` for your own images"
        )
    if name == "folder" and not folder:
        raise ValueError("dataset 'folder' needs `folder`, a path that holds train/<class>/* and test/<class>/*")
    if crop and (folder or name != "cub200"):
        raise ValueError("`crop` cuts to CUB-200's bounding boxes; leave it False for other data")
    if image_size < 0 or images_per_class < 0:
        raise ValueError("image_size and images_per_class must be 0 (the default) or positive")
    if not 0 <= validation < 1:
        raise ValueError(f"validation must be a share of the training images, at least 0 and below 1, got {validation}")
    if (flip != -1 and not 0 <= flip <= 1) or padding < -1:
        raise ValueError(f"flip must be a probability and padding pixels (-1: the recipe's), got {flip} and {padding}")
    recipe = RECIPES.get(name, RECIPES["folder"])
    recipe = replace(
        recipe,
        image_size=image_size or recipe.image_size,
        flip=recipe.flip if flip == -1 else flip,
        padding=recipe.padding if padding == -1 else padding,
    )
    data = paths.resolve(data)

    if folder:
        source = _folder(paths.resolve(folder))
    elif name == "cub200":
        source = _cub200(data, crop)
    else:
        source = {"mnist-mini": _mnist_mini, "mnist": _mnist, "stl10": _stl10}[name](data)
    keep = matching(source.classes, classes)
    train = _first_per_class(source.train.only(keep), images_per_class)
    if validation:
        train, test = _held_out(train, validation)
    else:
        test = _first_per_class(source.test.only(keep), images_per_class)
    parts = (("train", train), ("validation" if validation else "test", test))
    splits = [split.decoded(recipe.image_size, data / "cache", f"{name}-{part}") for part, split in parts]
    return Dataset(name, tuple(source.classes[c] for c in keep), *splits, recipe)


# --- sources: what lies on disk, before decoding ---------------------------------------------------------------


@dataclass(frozen=True)
class _Files:
    """Image files of one split, decoded when needed; ``boxes`` (x, y, width, height) or None."""

    files: tuple[Path, ...]
    labels: np.ndarray
    names: tuple[str, ...]
    boxes: np.ndarray | None = None

    def take(self, index: np.ndarray, labels: np.ndarray) -> "_Files":
        pick = lambda items: tuple(items[i] for i in index)  # noqa: E731
        return _Files(pick(self.files), labels, pick(self.names), None if self.boxes is None else self.boxes[index])

    def only(self, keep: list[int]) -> "_Files":
        return _only(self, keep)

    def decoded(self, size: int, cache: Path, label: str) -> Images:
        key = hashlib.sha256(repr((size, None if self.boxes is None else self.boxes.tolist())).encode())
        for file in self.files:
            stat = file.stat()
            key.update(f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        path = cache / f"{label}-{size}-{key.hexdigest()[:12]}.npy"
        if not path.exists():
            self._decode(size, path, label)
        pixels = np.load(path, mmap_mode="r")
        return Images(pixels, torch.from_numpy(self.labels), self.names)

    def _decode(self, size: int, path: Path, label: str) -> None:
        from tqdm.auto import tqdm

        boxes = self.boxes if self.boxes is not None else [None] * len(self.files)
        unreadable: list[str] = []
        with replacing(path) as temporary, ThreadPoolExecutor() as pool:
            shape = (len(self.files), 3, size, size)
            pixels = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
            work = pool.map(_read, self.files, boxes, [size] * len(self.files))
            for i, image in enumerate(tqdm(work, f"decode {label}", len(self.files), mininterval=1, leave=False)):
                if isinstance(image, Exception):
                    unreadable.append(f"{self.files[i]} ({image})")
                else:
                    pixels[i] = image
            if unreadable:
                more = f" and {len(unreadable) - 3} more" if len(unreadable) > 3 else ""
                raise ValueError(
                    f"{len(unreadable)} of {len(self.files)} images cannot be read; remove or replace them: "
                    + ", ".join(unreadable[:3])
                    + more
                )
            pixels.flush()


@dataclass(frozen=True)
class _Bytes:
    """Images already in memory, uint8 [N, channels, H, W]."""

    pixels: np.ndarray
    labels: np.ndarray
    names: tuple[str, ...]

    def take(self, index: np.ndarray, labels: np.ndarray) -> "_Bytes":
        return _Bytes(self.pixels[index], labels, tuple(self.names[i] for i in index))

    def only(self, keep: list[int]) -> "_Bytes":
        return _only(self, keep)

    def decoded(self, size: int, cache: Path, label: str) -> Images:
        pixels = self.pixels
        if pixels.shape[2:] != (size, size):
            parts = [torch.from_numpy(pixels[i : i + 4096]).float() for i in range(0, len(pixels), 4096)]
            parts = [F.interpolate(p, (size, size), mode="bilinear", antialias=True) for p in parts]
            pixels = torch.cat([p.round().clamp(0, 255).byte() for p in parts]).numpy()
        return Images(pixels, torch.from_numpy(self.labels), self.names)


@dataclass(frozen=True)
class _Source:
    classes: tuple[str, ...]
    train: _Files | _Bytes
    test: _Files | _Bytes


def _only(split, keep: list[int]):
    new_label = np.full(max(int(split.labels.max(initial=-1)), max(keep)) + 1, -1)
    new_label[keep] = np.arange(len(keep))
    labels = new_label[split.labels]
    index = np.flatnonzero(labels >= 0)
    return split.take(index, labels[index].astype(np.int64))


def _first_per_class(split, count: int):
    if not count:
        return split
    index = np.sort(np.concatenate([np.flatnonzero(split.labels == c)[:count] for c in np.unique(split.labels)]))
    return split.take(index, split.labels[index])


def _held_out(split, share: float):
    """The split without, and of, the last ``share`` of each class."""
    mine = [np.flatnonzero(split.labels == c) for c in np.unique(split.labels)]
    kept = [len(index) - round(share * len(index)) for index in mine]
    if not all(0 < k < len(index) for k, index in zip(kept, mine, strict=True)):
        raise ValueError(f"validation={share} leaves a class without training or validation images")
    first = np.sort(np.concatenate([index[:k] for k, index in zip(kept, mine, strict=True)]))
    last = np.sort(np.concatenate([index[k:] for k, index in zip(kept, mine, strict=True)]))
    return split.take(first, split.labels[first]), split.take(last, split.labels[last])


def matching(classes: tuple[str, ...], patterns: str) -> list[int]:
    """Indices of the classes that comma-separated names or patterns (``*Sparrow``) select; empty selects all."""
    if not patterns.strip():
        return list(range(len(classes)))
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatch.fnmatch(name, pattern) for name in classes):
            raise ValueError(f"no class matches {pattern!r}; the classes are {', '.join(classes)}")
    keep = [i for i, name in enumerate(classes) if any(fnmatch.fnmatch(name, pattern) for pattern in wanted)]
    if len(keep) < 2:
        raise ValueError(f"`classes` {patterns!r} leaves only {classes[keep[0]]!r}; keep at least two classes")
    return keep


def _read(file: Path, box: np.ndarray | None, size: int) -> np.ndarray | Exception:
    """One RGB image, cut to its box and resized, uint8 [3, size, size]; or why it cannot be read."""
    try:
        with Image.open(file) as image:
            image = image.convert("RGB")
            if box is not None:
                x, y, width, height = box
                image = image.crop((round(x), round(y), round(x + width), round(y + height)))
            image = image.resize((size, size), Image.Resampling.BILINEAR)
        return np.asarray(image).transpose(2, 0, 1)
    except UnidentifiedImageError:
        return ValueError("not an image")
    except (OSError, ValueError, SyntaxError) as error:
        return error


def _mnist_mini(data: Path) -> _Source:
    content = paths.MNIST_MINI.read_bytes() if paths.MNIST_MINI.exists() else b""
    if hashlib.sha256(content).hexdigest() != MNIST_MINI_SHA256:
        raise ValueError(
            f"{paths.MNIST_MINI} is missing or damaged; restore it with `git checkout -- data/mnist-mini.npz`"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        splits = [
            _Bytes(
                file[f"{s}_images"][:, None], file[f"{s}_labels"].astype(np.int64), tuple(map(str, file[f"{s}_index"]))
            )
            for s in ("train", "test")
        ]
    return _Source(tuple("0123456789"), *splits)


def _mnist(data: Path) -> _Source:
    from torchvision.datasets import MNIST

    def split(train: bool) -> _Bytes:
        images = _downloaded(
            lambda: MNIST(data, train=train, download=True), data / "MNIST" / "raw", "the four MNIST .gz files"
        )
        labels = images.targets.numpy().astype(np.int64)
        return _Bytes(images.data.numpy()[:, None], labels, tuple(map(str, range(len(labels)))))

    return _Source(tuple("0123456789"), split(True), split(False))


def _stl10(data: Path) -> _Source:
    from torchvision.datasets import STL10

    def split(part: str) -> _Bytes:
        images = _downloaded(lambda: STL10(data, split=part, download=True), data, "stl10_binary.tar.gz")
        return _Bytes(images.data, images.labels.astype(np.int64), tuple(map(str, range(len(images.labels)))))

    train = split("train")
    with open(data / "stl10_binary" / "class_names.txt") as file:
        return _Source(tuple(file.read().split()), train, split("test"))


def _cub200(data: Path, crop: bool) -> _Source:
    root = data / "CUB_200_2011"
    if not (root / "images.txt").exists():
        archive = data / "CUB_200_2011.tgz"
        if not archive.exists():
            from torchvision.datasets.utils import download_url

            _downloaded(lambda: download_url(CUB_URL, str(data), archive.name, CUB_MD5), data, archive.name)
        extract_cub(archive, data)
    table = lambda name: [line.split(maxsplit=1) for line in (root / name).read_text().splitlines()]  # noqa: E731
    names = {i: name for i, name in table("images.txt")}
    labels = {i: int(label) - 1 for i, label in table("image_class_labels.txt")}
    is_train = {i: flag == "1" for i, flag in table("train_test_split.txt")}
    boxes = {i: [float(v) for v in box.split()] for i, box in table("bounding_boxes.txt")} if crop else {}
    present = sorted(set(labels.values()))
    classes = tuple(name.split(".", 1)[-1] for i, name in table("classes.txt") if int(i) - 1 in present)

    def split(train: bool) -> _Files:
        ids = [i for i in names if is_train[i] == train]
        return _Files(
            tuple(root / "images" / names[i] for i in ids),
            np.array([present.index(labels[i]) for i in ids], dtype=np.int64),
            tuple(names[i] for i in ids),
            np.array([boxes[i] for i in ids]) if crop else None,
        )

    return _Source(classes, split(True), split(False))


def extract_cub(archive: Path, data: Path) -> None:
    """Check the official archive's MD5 and unpack it; links and names that leave the folder are refused."""
    with open(archive, "rb") as file:
        if hashlib.file_digest(file, "md5").hexdigest() != CUB_MD5:
            raise ValueError(
                f"{archive} is not the official CUB-200-2011 archive (MD5 {CUB_MD5}); delete it and run again"
            )
    with tarfile.open(archive) as tar:
        tar.extractall(data, filter="data")


def _folder(root: Path) -> _Source:
    for part in ("train", "test"):
        if not (root / part).is_dir():
            raise FileNotFoundError(
                f"{root / part} does not exist; `folder` must hold train/<class>/* and test/<class>/*"
            )
    classes = tuple(sorted(p.name for p in (root / "train").iterdir() if p.is_dir()))
    if len(classes) < 2:
        raise ValueError(f"{root / 'train'} holds {len(classes)} class folders; at least two are needed")
    extra = sorted({p.name for p in (root / "test").iterdir() if p.is_dir()} - set(classes))
    if extra:
        raise ValueError(f"{root / 'test'} has classes that train/ lacks: {', '.join(extra)}")
    endings = set(Image.registered_extensions())

    def split(part: str) -> _Files:
        found = [
            (file, label)
            for label, name in enumerate(classes)
            for file in sorted((root / part / name).glob("*"))
            if file.suffix.lower() in endings
        ]
        if not found:
            raise ValueError(f"{root / part} holds no images")
        files, labels = zip(*found, strict=True)
        return _Files(files, np.array(labels, dtype=np.int64), tuple(str(f.relative_to(root)) for f in files))

    source = _Source(classes, split("train"), split("test"))
    empty = [name for c, name in enumerate(classes) if not (source.train.labels == c).any()]
    if empty:
        raise ValueError(f"{root / 'train'} has classes without images: {', '.join(empty)}")
    return source


def _downloaded(fetch, where: Path, what: str):
    """Run a download; a missing network is one line that says which file to put where."""
    where.mkdir(parents=True, exist_ok=True)
    try:
        return fetch()
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"cannot download ({error}); put {what} into {where} and run again") from None
