"""What is known of images beside their class: keypoints of parts, and boxes.

They come with CUB-200; for a folder, from a table or from masks beside it, see :func:`parts`.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .. import paths
from .dataset import Dataset
from .reading import UNREADABLE, reason, upright
from .sources import SIZES

LATTICE = 56  # points of a mask along a side: the finest map, B1234's, of an image of 224 pixels

Points = Mapping[str, Sequence[tuple[int, float, float]]]  # by image: part, x and y in pixels
Frame = tuple[float, float, float, float]  # x, y, width, height in pixels


@dataclass(frozen=True)
class Parts:
    """The visible parts of N ``images``, n in all.

    ``names`` of the parts; of each visible one ``image`` (index into the split), ``part`` (into ``names``) and where it
    lies in the image as the network sees it: ``y`` and ``x`` in [0, 1], shares of height and width. Tensors [n].
    """

    names: tuple[str, ...]
    images: int
    image: torch.Tensor
    part: torch.Tensor
    y: torch.Tensor
    x: torch.Tensor

    def __len__(self) -> int:
        return len(self.part)

    def cells(self, grid: Sequence[int]) -> torch.Tensor:
        """The positions, row-major, of a grid (H, W) that the parts lie in, [n]."""
        row, column = ((share * n).long().clamp_max(n - 1) for share, n in zip((self.y, self.x), grid, strict=True))
        return row * grid[1] + column

    def of(self, index: torch.Tensor) -> "Parts":
        """Those of some images [n'], counted anew in the order of the index."""
        place = torch.full((self.images,), -1)
        place[index] = torch.arange(len(index))
        image = place[self.image]
        rest = (of[image >= 0] for of in (image, self.part, self.y, self.x))
        return Parts(self.names, len(index), *rest)

    def without_sides(self) -> "Parts":
        """Left and right of a part as one, by the first word of their names."""
        bare = [name.removeprefix("left ").removeprefix("right ") for name in self.names]
        names = tuple(dict.fromkeys(bare))
        number = torch.tensor([names.index(name) for name in bare])
        return Parts(names, self.images, self.image, number[self.part], self.y, self.x)


def parts(dataset: Dataset, source: str | Path = "") -> dict[str, Parts]:
    """Visible parts of ``train`` and ``test``.

    Parameters
    ----------
    dataset
        Of files: CUB-200, or a folder.
    source
        CUB-200 brings its own (empty). Else a CSV table with the columns image, part, x, y (name of the image in the
        data set, name of the part, pixels of the upright image), or a folder with a mask for each image: a PNG of the
        same relative name and size whose values are part numbers, 0 for none; it is read at 56 x 56 points.

    Raises
    ------
    ValueError, FileNotFoundError
        One line: there are no annotations, they are not of this form, or none of a split's images has any.
    """
    if _is_cub(dataset) and not source:
        names, points = _cub_points(_cub_root(dataset))
    else:
        place = _located(dataset, source, "parts")
        names, points = _points(place) if place.is_file() else _mask_points(dataset, place)
    splits = {split: _of_split(dataset, split, names, points) for split in ("train", "test")}
    for split, visible in splits.items():
        if not len(visible):
            raise ValueError(f"no {split} image of {dataset.name} has a part in {source or 'part_locs.txt'}")
    return splits


def boxes(dataset: Dataset, source: str | Path = "") -> dict[str, torch.Tensor]:
    """Boxes of the object by split, [N, 4]: y0, x0, y1, x1 as shares of what the network sees; NaN where unknown.

    ``source`` and errors as in :func:`parts`, but one box is enough. A table has the columns image, x, y, width and
    height; a mask's box is that of all its parts. A box outside what the network sees is unknown.
    """
    if _is_cub(dataset) and not source:
        given: Mapping[str, Frame] = _cub_boxes(_cub_root(dataset))
    else:
        place = _located(dataset, source, "boxes")
        given = _box_table(place) if place.is_file() else dict(_mask_boxes(dataset, place))
    by_split = {}
    for split in ("train", "test"):
        found = torch.full((len(dataset.split(split)), 4), torch.nan, dtype=torch.float64)
        for i, name in enumerate(dataset.split(split).names):
            if name in given:
                x, y, width, height = given[name]
                xs, ys = _seen(dataset, name, np.array([x, x + width]), np.array([y, y + height]))
                box = torch.tensor([ys[0], xs[0], ys[1], xs[1]]).clamp(0, 1)
                if (box[2:] > box[:2]).all():
                    found[i] = box
        by_split[split] = found
    if all(found.isnan().all() for found in by_split.values()):
        raise ValueError(f"no image of {dataset.name} has a box in {source or 'bounding_boxes.txt'}")
    return by_split


# --- where annotations lie ------------------------------------------------------------------------------------------


def known(dataset: Dataset, source: str | Path = "") -> tuple[dict[str, Parts] | None, dict[str, torch.Tensor] | None]:
    """Parts and boxes by split, or None for what ``source`` does not tell: a table has either, masks have both."""
    if not source and not _is_cub(dataset):
        return None, None
    place = paths.located(source) if source else None
    if place is None or not place.is_file():
        return parts(dataset, source), boxes(dataset, source)
    with place.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        columns = next(csv.reader(file), [])
    return (None, boxes(dataset, source)) if "width" in columns else (parts(dataset, source), None)


def _is_cub(dataset: Dataset) -> bool:
    return dataset.settings.get("source") == "cub200"


def _cub_root(dataset: Dataset) -> Path:
    return paths.resolve(dataset.settings["data"] or paths.DATA) / "CUB_200_2011"


def _image_folder(dataset: Dataset) -> Path:
    """What the names of a data set's images are relative to."""
    if _is_cub(dataset):
        return _cub_root(dataset) / "images"
    if (source := dataset.settings.get("source", "")) in ("", *SIZES):
        raise ValueError(f"the images of {dataset.name} are no files: annotations belong to a folder of images")
    return paths.located(source)


def _cub_lines(root: Path, name: str) -> list[str]:
    if not (file := root / f"{name}.txt").is_file():
        raise FileNotFoundError(f"{file} does not exist: unpack the whole of CUB_200_2011.tgz")
    return file.read_text(encoding="utf-8").splitlines()


@lru_cache(4)
def _cub_table(root: Path, name: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in _cub_lines(root, name))


@lru_cache(1)
def _cub_boxes(root: Path) -> dict[str, Frame]:
    names = _cub_table(root, "images")
    boxes = {names[i]: box.split() for i, box in _cub_table(root, "bounding_boxes").items()}
    return {name: (float(x), float(y), float(width), float(height)) for name, (x, y, width, height) in boxes.items()}


def _cub_points(root: Path) -> tuple[tuple[str, ...], Points]:
    images, points = _cub_table(root, "images"), defaultdict(list)
    for line in _cub_lines(root, "parts/part_locs"):
        image, part, x, y, visible = line.split()
        if visible == "1":
            points[images[image]].append((int(part) - 1, float(x), float(y)))
    return tuple(_cub_table(root, "parts/parts").values()), points


def _located(dataset: Dataset, source: str | Path, what: str) -> Path:
    _image_folder(dataset)
    if not source:
        raise ValueError(f"{dataset.name} has no {what} of its own: give a table or a folder of masks as annotations")
    place = paths.located(source)
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist: give a table of {what}, or a folder of masks")
    return place


def _table(path: Path, text: Sequence[str], numbers: Sequence[str]) -> Iterator[tuple[dict[str, str], list[float]]]:
    """Rows of a CSV with the columns ``text`` and ``numbers``, the latter as numbers beside them."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            rows, present = list(reader), reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV table: {reason(error)}") from None
    if missing := [column for column in (*text, *numbers) if column not in present]:
        raise ValueError(f"{path} has no column {', '.join(missing)}: it needs {', '.join((*text, *numbers))}")
    for i, row in enumerate(rows, 1):
        try:
            yield row, [float(row[column]) for column in numbers]
        except ValueError:
            raise ValueError(f"{path}, row {i}: {', '.join(numbers)} must be numbers") from None


def _points(path: Path) -> tuple[tuple[str, ...], Points]:
    rows = list(_table(path, ("image", "part"), ("x", "y")))
    names, points = sorted({row["part"] for row, _ in rows}), defaultdict(list)
    for row, (x, y) in rows:
        points[row["image"]].append((names.index(row["part"]), x, y))
    return tuple(names), points


def _box_table(path: Path) -> dict[str, Frame]:
    rows = _table(path, ("image",), ("x", "y", "width", "height"))
    return {row["image"]: (x, y, width, height) for row, (x, y, width, height) in rows}


def _masks(dataset: Dataset, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name in (*dataset.train.names, *dataset.test.names):
        file = (folder / name).with_suffix(".png")
        if file.is_file():
            try:
                with Image.open(file) as image:
                    mask = np.asarray(image, dtype=int)
            except UNREADABLE as error:
                raise ValueError(f"cannot read {file}: {reason(error)}") from None
            width, height = _size(dataset, name)
            if mask.shape != (height, width):
                raise ValueError(f"{file} is no mask of its image: it needs one channel and {width} x {height} pixels")
            yield name, mask


def _mask_points(dataset: Dataset, folder: Path) -> tuple[tuple[str, ...], Points]:
    found, numbers = {}, set()
    for name, mask in _masks(dataset, folder):
        y, x = ((np.arange(LATTICE) + 0.5) * size / LATTICE for size in mask.shape)
        values = mask[y.astype(int)[:, None], x.astype(int)]
        found[name] = [(values[i, j], x[j], y[i]) for i, j in zip(*values.nonzero(), strict=True)]
        numbers |= {*np.unique(values).tolist()} - {0}
    place = {number: part for part, number in enumerate(sorted(numbers))}
    points = {name: [(place[number], x, y) for number, x, y in rows] for name, rows in found.items()}
    return tuple(map(str, place)), points


def _mask_boxes(dataset: Dataset, folder: Path) -> Iterator[tuple[str, Frame]]:
    for name, mask in _masks(dataset, folder):
        y, x = mask.nonzero()
        if len(y):
            yield name, (x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min())


# --- as the network sees them ---------------------------------------------------------------------------------------


def _of_split(dataset: Dataset, split: str, names: tuple[str, ...], points: Points) -> Parts:
    rows = []
    for i, name in enumerate(dataset.split(split).names):
        if of_image := points.get(name):
            part, x, y = np.array(of_image).T
            x, y = _seen(dataset, name, x, y)
            inside = (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)
            rows.append(np.stack([np.full(inside.sum(), i), part[inside], y[inside], x[inside]]))
    image, part, y, x = torch.from_numpy(np.concatenate(rows, 1) if rows else np.empty((4, 0)))
    return Parts(names, len(dataset.split(split)), image.long(), part.long(), y, x)


def _seen(dataset: Dataset, name: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of an image's file as shares of what enters the network."""
    if dataset.input.transform:
        raise ValueError(f"where the parts of {name} lie after your own transform is not known: give none")
    left, top, width, height = _frame(dataset, name)
    if dataset.input.fit == "crop":  # the centre of the network's proportions, as Pillow's ImageOps.fit
        rows, columns = dataset.input.size
        scale = min(width / columns, height / rows)
        left, top = left + (width - scale * columns) / 2, top + (height - scale * rows) / 2
        width, height = scale * columns, scale * rows
    return (x - left) / width, (y - top) / height


def _frame(dataset: Dataset, name: str) -> Frame:
    """What of an image's file is read."""
    if _is_cub(dataset) and dataset.settings["crop"]:
        x, y, width, height = _cub_boxes(_cub_root(dataset))[name]
        left, top = round(x), round(y)  # as it is cut
        return left, top, round(x + width) - left, round(y + height) - top
    return 0, 0, *_size(dataset, name)


def _size(dataset: Dataset, name: str) -> tuple[int, int]:
    """Width and height of an image, upright."""
    with Image.open(_image_folder(dataset) / name) as image:
        return upright(image).size
