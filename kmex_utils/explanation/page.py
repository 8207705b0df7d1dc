"""The explorer as one HTML file to send: views and images are in it. No kernel, no network; opens from disk."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ..drawing import data_url
from ..store import new_file, save_text
from .explorer import HERE, about, in_parts, patches, prototype, view
from .overlay import original

if TYPE_CHECKING:
    from ..networks.network import Target
    from .explained import AnyImage, Explained


class Level(NamedTuple):
    """Patch size and longest side of an image in pixels, nearest patches of a prototype, WebP quality."""

    patch: int
    side: int
    nearest: int
    quality: int


LEVELS = (Level(96, 640, 5, 80), Level(80, 480, 3, 70), Level(64, 320, 2, 55))  # tried in order until the file fits


def write(
    explained: "Explained",
    path: Path,
    images: "int | Sequence[AnyImage]",
    *,
    target: "Target",
    title: str,
    max_bytes: int,
    overwrite: bool,
) -> Path:
    """Write the explorer of some images as one file, as :meth:`Explained.page` says."""
    new_file(path, overwrite)
    if isinstance(images, int):
        of = len(explained.dataset.test) or len(explained.names) if explained.dataset else 0
        images = _evenly(range(of), min(images, of))
    if not len(images):
        raise ValueError("there are no images to show: give images, or load(…, images=folder)")
    entries = [_entry(explained, image, target) for image in tqdm(images, "page", leave=False, delay=1)]
    asked, title = len(entries), title or f"{explained.network.name} on {explained.settings['dataset']}"
    for level in LEVELS:
        for entry in entries:
            entry["image"] = data_url(entry["pixels"], level.side, quality=level.quality)
        prototypes = {b: _prototypes(explained, b, _used(entries, b), level) for b in explained.start_blocks}
        page = _page(explained, entries, prototypes, title, asked)
        if len(page) <= max_bytes:
            break
    while len(page) > max_bytes:
        if len(entries) == 1:
            raise ValueError(f"a page of one image takes {len(page):,} bytes, more than max_bytes = {max_bytes:,}")
        entries = _evenly(entries, max(1, min(len(entries) - 1, len(entries) * max_bytes // len(page))))
        page = _page(explained, entries, prototypes, title, asked)
    save_text(path, page.decode())
    return path


def _evenly(values: Sequence[Any], count: int) -> list[Any]:
    """So many of the values, from the first to the last."""
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)]


def _entry(explained: "Explained", image: "AnyImage", target: "Target") -> dict[str, Any]:
    """An image with its views, before they become text."""
    pixels, box = original(explained, image)
    small = Image.fromarray(np.ascontiguousarray(pixels))
    small.thumbnail((LEVELS[0].side, LEVELS[0].side))
    views = {b: view(explained, image, b, target, drawn=False) for b in explained.start_blocks}
    any_view = next(iter(views.values()))
    said = {"network": any_view["predicted"], **{v["explainer"]: v["explainer_predicted"] for v in views.values()}}
    row = {"name": any_view["name"], "label": any_view["label"], "said": said}
    return {"row": row, "views": views, "pixels": np.asarray(small), "box": in_parts(box, pixels)}


def _prototypes(
    explained: "Explained", start_block: int, used: Iterable[int], level: Level
) -> dict[int, dict[str, Any]]:
    """What is the same for the prototypes in every image, with their patches."""
    how = (level.patch, level.quality)
    return {
        k: prototype(explained, start_block, k, *how)
        | {"gallery": patches(explained, start_block, k, level.nearest, *how)}
        for k in sorted(used)
    }


def _used(entries: Sequence[dict[str, Any]], start_block: int) -> set[int]:
    """Prototypes that are somewhere in the images."""
    return {p["prototype"] for entry in entries for p in entry["views"][start_block]["prototypes"]}


def _page(
    explained: "Explained",
    entries: Sequence[dict[str, Any]],
    prototypes: dict[int, dict[int, dict[str, Any]]],
    title: str,
    asked: int,
) -> bytes:
    from jinja2 import Environment

    data = {
        "about": about(explained) | {"targets": []},  # the one it is made for
        "images": [entry["row"] for entry in entries],
        "thumbnails": [entry["image"] for entry in entries],
        "boxes": [entry["box"] for entry in entries],
        "views": [entry["views"] for entry in entries],
        "prototypes": {b: {k: of[k] for k in _used(entries, b)} for b, of in prototypes.items()},
    }
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string((HERE / "page.html").read_text(encoding="utf-8")).render(
        title=title,
        shown=len(entries),
        asked=asked,
        predictions_as_labels=explained.predictions_as_labels,
        css=(HERE / "explorer.css").read_text(encoding="utf-8"),
        js=(HERE / "explorer.js").read_text(encoding="utf-8"),
        data=json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c"),  # ends no script
    )
    return page.encode()
