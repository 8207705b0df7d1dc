"""A folder of images: where it lies, which files are images, and what the layout says of classes and splits."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ..paths import expanded
from .reading import readable

SPLITS = ("train", "test", "val", "valid", "validation")  # in any case; one of the last four beside train/
LAYOUTS = "give <class>/*, or train/<class>/* with test/<class>/* (or val/)"
EXPLAINED = "explained.json"  # marks the folder of an explanation, whose pictures are no images to explain
LITTER = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}  # of macOS, Synology and Windows
NO_IMAGES = {".pdf", ".mpg", ".mpeg", ".eps", ".ps"}  # Pillow writes the first and does not read them; PostScript runs
NAMED = 10  # paths of one kind that are named


def listed(folder: str | Path, log: Callable[[str], None] | None = None) -> list[Path]:
    """Every image file below a folder, by its ending, sorted.

    Linked folders are followed, each folder once. Left out are hidden files and folders, what systems leave, links that
    lead nowhere or to a folder read before, folders that hold an explanation, and files of other endings; ``log`` gets
    one line for each kind there is, hidden folders and first-level folders without images among them.
    """
    root = expanded(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} does not exist or is not a folder: give a folder of images")
    endings = set(Image.registered_extensions()) - NO_IMAGES
    below, dead = _below(root)
    results = {file.parent for file in below if file.name == EXPLAINED} - {root}
    files = sorted(file for file in below if results.isdisjoint(file.parents))
    images = [file for file in files if file.suffix.lower() in endings]
    splits = [path for path in root.iterdir() if path.name.lower() in SPLITS and path.is_dir()]
    of_classes = {
        path for top in (root, *splits) for path in top.iterdir() if path.is_dir() and path.name not in LITTER
    }
    hidden = {path for path in of_classes if path.name.startswith(".") and _directly_in(path, endings)}
    empty = {path for path in of_classes if _shown(path.name)} - {p for file in images for p in file.parents}
    empty = empty - results - {*dead} if images else set()
    for left_out, why in (
        (dead, "they lead nowhere or to a folder read before"),
        (results, "they hold an explanation"),
        (hidden, "their names begin with a dot"),
        (empty, "they hold no images"),
    ):
        if left_out and log:
            names = sorted(readable(str(path.relative_to(root))) for path in left_out)
            more = f" … ({len(names)})" if len(names) > NAMED else ""
            log(f"left out, as {why}: {', '.join(names[:NAMED])}{more}")
    others = Counter(file.suffix.lower() or "without ending" for file in files if file.suffix.lower() not in endings)
    skipped = ", ".join(f"{count} {ending}" for ending, count in others.most_common())
    if not images:
        raise ValueError(f"{root} holds no images" + (f" of a known ending, but {skipped}" if skipped else ""))
    if skipped and log:
        log(f"left out by their ending: {skipped}")
    return images


def apart(results: Path, images: str | Path) -> None:
    """A ValueError where ``results`` would be taken for images of a folder the next time."""
    root, folder = expanded(images).resolve(), results.resolve()
    inside = folder == root or root in folder.parents
    if inside and not any((path / EXPLAINED).exists() for path in (folder, *folder.parents) if root in path.parents):
        raise ValueError(
            f"{results} lies among the images of {images}, which would grow by its pictures: choose another"
        )


def _below(root: Path) -> tuple[list[Path], list[Path]]:
    """Files below a folder, and the links left out: folders first where they lie, then by their links."""
    files, dead, entered, waiting = [], [], set(), [root]
    while waiting:
        start = waiting.pop(0)
        for name, folders, names in os.walk(start):
            folder = Path(name)
            if (real := folder.resolve()) in entered:
                dead.append(folder)
                folders.clear()
                continue
            entered.add(real)
            folders[:] = sorted(filter(_shown, folders))
            waiting += [folder / name for name in folders if (folder / name).is_symlink()]
            below = [folder / name for name in filter(_shown, names)]
            files += [file for file in below if file.is_file()]
            dead += [file for file in below if file.is_symlink() and not file.exists()]
    return files, dead


def _directly_in(folder: Path, endings: set[str]) -> bool:
    _, _, names = next(os.walk(folder), ("", [], []))  # of one that may not be read: nothing
    return any(Path(name).suffix.lower() in endings for name in names)


def _shown(name: str) -> bool:
    return not name.startswith(".") and name not in LITTER


def layout(root: Path, files: list[Path], *, needs_labels: bool, strict: bool) -> tuple[list[str], list[bool]]:
    """Class of each file ("": it has none) and whether it is of the test split.

    A ValueError for a layout that :func:`kmex_utils.data.load` does not know, a single class, test classes that train/
    lacks and, with ``strict``, a class folder without images.
    """
    fix = LAYOUTS if needs_labels else f"{LAYOUTS}, or images alone"
    parts = [file.relative_to(root).parts for file in files]
    top = {p[0] for p in parts if len(p) > 1}
    splits = sorted((name for name in top if name.lower() in SPLITS), key=lambda name: SPLITS.index(name.lower()))
    test, train_folder = [False] * len(parts), root
    if splits:
        is_train = [name.lower() == "train" for name in splits]
        if is_train != [True, False] or len(top) > 2 or any(len(p) < 3 for p in parts):
            names = ", ".join(f"{name}/" for name in splits)
            more = " of three splits, put train/ and test/ alone into a folder;" if len(splits) > 2 else ""
            raise ValueError(f"{root} holds {names} but not as a split with class folders:{more} {fix}")
        test, train_folder = [p[0] == splits[1] for p in parts], root / splits[0]
        parts = [p[1:] for p in parts]
    class_of = [p[0] if len(p) > 1 else "" for p in parts]
    classes = sorted(set(class_of) - {""})
    if not classes and needs_labels:
        raise ValueError(f"{root} holds images without class folders: {fix}")
    if classes and "" in class_of:
        loose = class_of.count("")
        raise ValueError(f"{root} holds {loose} images beside the class folders {', '.join(classes[:3])} …: {fix}")
    if len(classes) == 1:
        alone = f", or the folder {root / classes[0]} itself to have the network's predictions as labels"
        fix = "give at least two" + ("" if needs_labels else alone)
        raise ValueError(f"{root} holds one class only ({classes[0]}): {fix}")
    in_train = {name for name, is_test in zip(class_of, test, strict=True) if not is_test}
    folders = [path for path in train_folder.iterdir() if _shown(path.name) and path.is_dir()]
    empty = {path.name for path in folders if not (path / EXPLAINED).exists()} - in_train
    if strict and classes and empty:
        names = ", ".join(sorted(empty))
        raise ValueError(f"{train_folder} has classes without images: {names}; add images or remove the folders")
    if extra := sorted(set(classes) - in_train):
        raise ValueError(f"{root / splits[1]} has classes that train/ lacks: {', '.join(extra)}")
    return class_of, test
