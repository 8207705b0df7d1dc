"""One HTML file to send: settings, tables, prototypes by class, panels. No network at viewing, readable on a phone."""

import base64
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .figures import figure1
from .store import save_text

TEMPLATE = Path(__file__).with_name("report.html")
LEVELS = (
    (112, 85),
    (88, 75),
    (64, 60),
)  # patch size in pixels and quality, tried from the left until the file is in bounds


def write(
    explained,
    path: Path,
    panels: Sequence = (),
    *,
    target: str = "",
    title: str = "",
    max_bytes: int = 5_000_000,
    overwrite: bool = False,
) -> Path:
    """Write the report of a :class:`~kmex_utils.explained.Explained`.

    Parameters
    ----------
    panels
        Images to draw Figure 1 of, as ``explained.picture`` takes them.
    target
        Class of attribution in the panels; empty: the predicted one.
    max_bytes
        Bound on the file. Patches become smaller first, then the last classes are left out, and the page says so.
    overwrite
        Replace a file that exists.

    Raises
    ------
    FileExistsError, ValueError
        The file exists; or even the smallest report is larger than ``max_bytes``.
    """
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists: choose another name, or give overwrite=True")
    pictures = [explained.picture(image) for image in panels]
    shown = list(range(len(explained.dataset.classes)))
    figures = [_figures(explained, picture, target) for picture in pictures]
    size = 0
    for pixels, quality in LEVELS:
        drawn = [
            _panel(explained, picture, target, found, quality) for picture, found in zip(pictures, figures, strict=True)
        ]
        page = _page(explained, shown, drawn, pixels, quality, title)
        size = len(page.encode())
        if size <= max_bytes:
            save_text(path, page)
            return path
    bare = len(_page(explained, [], drawn, pixels, quality, title).encode())
    while shown and size > max_bytes:
        fitting = int(len(shown) * max(max_bytes - bare, 0) / max(size - bare, 1))
        shown = shown[: min(fitting, len(shown) - 1)]
        page = _page(explained, shown, drawn, pixels, quality, title)
        size = len(page.encode())
    if size > max_bytes:
        raise ValueError(
            f"the report's tables and {len(pictures)} panels alone take {size:,} bytes, more than max_bytes = "
            f"{max_bytes:,}: choose fewer panels or raise max_bytes"
        )
    save_text(path, page)
    return path


def _page(explained, shown: list[int], drawn: list[dict], pixels: int, quality: int, title: str) -> str:
    from jinja2 import Environment

    dataset, network = explained.dataset, explained.network
    classes = [_prototypes(explained, c, pixels, quality) for c in shown]
    table = explained.table.rename(columns=lambda name: name.replace("images of the prototypes", "own images"))
    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE.read_text())
    return page.render(
        title=title or f"{network.name} on {dataset.name}",
        explained=explained,
        network=network,
        dataset=dataset,
        classes=classes,
        clustered=int((dataset.train.labels >= 0).sum()),
        left_out=len(dataset.classes) - len(shown),
        columns=list(table.columns),
        rows=[(model, [_number(name, v) for name, v in zip(table, row, strict=True)]) for model, row in _rows(table)],
        settings=[(name, _words(value)) for name, value in _flat(explained.settings)],
        panels=drawn,
    )


def _rows(table):
    return [(model, table.loc[model].tolist()) for model in table.index]


def _number(column: str, value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.{1 if '%' in column else 2}f}"


def _flat(settings: dict) -> list[tuple[str, object]]:
    rows = list(settings.get("network", {}).items())
    rows += [(name, value) for name, value in settings.items() if name not in ("network", "stand_in_classes", "folder")]
    return [(name, value) for name, value in rows if value not in ("", None)]


def _words(value) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value)
    return str(value)


def _prototypes(explained, c: int, pixels: int, quality: int) -> dict:
    """The prototypes of a class: for each explainer, the most shared first."""
    explainers = []
    for b in explained.start_blocks:
        own = [k for k, label in enumerate(explained.explainers[b].prototypes.labels.tolist()) if label == c]
        own.sort(key=lambda k: -explained.sharing(b, k)[0])
        found = [
            {
                "prototype": k,
                "shared": explained.sharing(b, k)[0],
                "url": _encoded(_fitted(explained.patch(b, k).pixels, pixels), quality),
            }
            for k in own
        ]
        explainers.append({"name": explained.name(b), "prototypes": found})
    images = explained.sharing(explained.start_blocks[0], own[0])[1]
    return {"name": explained.dataset.classes[c], "images": images, "explainers": explainers}


def _figures(explained, picture, target: str) -> dict[str, np.ndarray]:
    """Figure 1 of an image, drawn: uint8 [H, W, 3] by explainer, from the last block and the shallowest."""
    blocks = sorted({explained.start_blocks[0], explained.start_blocks[-1]}, reverse=True)
    drawn = {}
    for found in explained.interpretations(picture, blocks, target):
        buffer = io.BytesIO()
        figure1(picture.rgb, [found]).savefig(buffer, format="png", dpi=120)
        with Image.open(buffer) as image:
            drawn[found.name] = np.asarray(image.convert("RGB"))
    return drawn


def _panel(explained, picture, target: str, figures: dict[str, np.ndarray], quality: int) -> dict:
    seen = explained.seen(picture)
    j = explained.target(target, seen)
    classes = explained.network.classes
    return {
        "name": picture.name,
        "predicted": classes[int(seen.y.argmax())],
        "target": classes[j] if explained.network.pooled_linear else "",
        "figures": [{"name": name, "url": _encoded(pixels, quality)} for name, pixels in figures.items()],
    }


def _fitted(pixels: np.ndarray, size: int) -> np.ndarray:
    if max(pixels.shape) <= size:
        return pixels
    return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).resize((size, size), Image.Resampling.BILINEAR))


def _encoded(pixels: np.ndarray, quality: int) -> str:
    return _encode(pixels.tobytes(), pixels.shape, quality)


@lru_cache(maxsize=4096)
def _encode(content: bytes, shape: tuple[int, ...], quality: int) -> str:
    buffer = io.BytesIO()
    Image.fromarray(np.frombuffer(content, np.uint8).reshape(shape)).save(buffer, "WEBP", quality=quality)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
