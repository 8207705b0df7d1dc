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
from .reading import upright

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
        same relative name whose values are part numbers, 0 for none; it is read at 56 x 56 points.

    Raises
    ------
    ValueError, FileNotFoundError
        One line: there are no annotations, or none of a split's images has any.
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

    ``source`` as in :func:`parts`, where a table has the columns image, x, y, width, height, and a mask's box is that
    of all its parts.
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
                found[i] = torch.tensor([ys[0], xs[0], ys[1], xs[1]]).clamp(0, 1)
        by_split[split] = found
    return by_split


# --- where annotations lie ------------------------------------------------------------------------------------------


def _is_cub(dataset: Dataset) -> bool:
    return dataset.settings.get("source") == "cub200"


def _cub_root(dataset: Dataset) -> Path:
    return paths.resolve(dataset.settings["data"] or paths.DATA) / "CUB_200_2011"


@lru_cache(4)
def _cub_table(root: Path, name: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in (root / f"{name}.txt").read_text().splitlines())


@lru_cache(1)
def _cub_boxes(root: Path) -> dict[str, Frame]:
    names = _cub_table(root, "images")
    boxes = {names[i]: box.split() for i, box in _cub_table(root, "bounding_boxes").items()}
    return {name: (float(x), float(y), float(width), float(height)) for name, (x, y, width, height) in boxes.items()}


def _cub_points(root: Path) -> tuple[tuple[str, ...], Points]:
    images, points = _cub_table(root, "images"), defaultdict(list)
    for line in (root / "parts" / "part_locs.txt").read_text().splitlines():
        image, part, x, y, visible = line.split()
        if visible == "1":
            points[images[image]].append((int(part) - 1, float(x), float(y)))
    return tuple(_cub_table(root / "parts", "parts").values()), points


def _located(dataset: Dataset, source: str | Path, what: str) -> Path:
    if not source:
        raise ValueError(f"{dataset.name} has no {what} of its own: give a table or a folder of masks as annotations")
    place = paths.located(source)
    if not place.exists():
        raise FileNotFoundError(f"{place} does not exist: give a table of {what}, or a folder of masks")
    return place


def _table(path: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if missing := [column for column in columns if column not in (reader.fieldnames or ())]:
            raise ValueError(f"{path} has no column {', '.join(missing)}: it needs {', '.join(columns)}")
        yield from reader


def _points(path: Path) -> tuple[tuple[str, ...], Points]:
    rows = list(_table(path, ("image", "part", "x", "y")))
    names, points = sorted({row["part"] for row in rows}), defaultdict(list)
    for row in rows:
        points[row["image"]].append((names.index(row["part"]), float(row["x"]), float(row["y"])))
    return tuple(names), points


def _box_table(path: Path) -> dict[str, Frame]:
    rows = _table(path, ("image", "x", "y", "width", "height"))
    return {r["image"]: (float(r["x"]), float(r["y"]), float(r["width"]), float(r["height"])) for r in rows}


def _masks(dataset: Dataset, folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for name in (*dataset.train.names, *dataset.test.names):
        file = (folder / name).with_suffix(".png")
        if file.is_file():
            with Image.open(file) as image:
                mask = np.asarray(image)
            if mask.ndim != 2:
                raise ValueError(f"{file} is no mask: it needs one channel, whose values are part numbers")
            yield name, mask


def _mask_points(dataset: Dataset, folder: Path) -> tuple[tuple[str, ...], Points]:
    found, numbers = {}, set()
    for name, mask in _masks(dataset, folder):
        y, x = ((np.arange(LATTICE) + 0.5) * size / LATTICE for size in mask.shape)
        values = mask[y.astype(int)[:, None], x.astype(int)]
        found[name] = [(int(values[i, j]), x[j], y[i]) for i, j in zip(*values.nonzero(), strict=True)]
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
    folder = _cub_root(dataset) / "images" if _is_cub(dataset) else paths.located(dataset.settings["source"])
    with Image.open(folder / name) as image:
        return 0, 0, *upright(image).size
