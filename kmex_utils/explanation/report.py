"""One HTML file to send: settings, tables, prototypes by class, panels. No network at viewing, readable on a phone."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..drawing import data_url, png
from ..store import save_text
from .figure1 import figure1

if TYPE_CHECKING:
    from ..networks.network import Target
    from .explained import Explained

TEMPLATE = Path(__file__).with_name("report.html")
LEVELS = ((112, 85), (88, 75), (64, 60))  # patch size in pixels and WebP quality, tried in order until the file fits
NOT_SHOWN = ("classes", "data", "folder", "stand_in_classes")  # lists, and paths of the sender's machine
PANEL_DPI = 120  # 620 pixels a panel, as wide as the page shows it


def write(
    explained: "Explained",
    path: Path,
    panels: Sequence[Any] = (),
    *,
    target: "Target" = "",
    title: str = "",
    max_bytes: int = 5_000_000,
    overwrite: bool = False,
) -> Path:
    """Write the report of an :class:`~kmex_utils.explanation.explained.Explained`.

    Parameters
    ----------
    panels
        Images to draw Figure 1 of, as ``explained.picture`` takes them.
    target
        Of the attributions in the panels, as in :meth:`~kmex_utils.explanation.explained.Explained.panel`.
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
    drawn = [_panel(explained, image, target) for image in panels]
    shown = len(explained.classes)
    for size, quality in LEVELS:
        for panel in drawn:
            panel["urls"] = {name: data_url(pixels, quality=quality) for name, pixels in panel["figures"].items()}
        classes = [_class(explained, c, size, quality) for c in range(shown)]
        page = _page(explained, title, drawn, classes)
        if len(page.encode()) <= max_bytes:
            break
    bare = len(_page(explained, title, drawn, []).encode())
    while shown and (length := len(page.encode())) > max_bytes:
        fitting = int(shown * max(max_bytes - bare, 0) / max(length - bare, 1))
        shown = min(fitting, shown - 1)
        page = _page(explained, title, drawn, classes[:shown])
    if len(page.encode()) > max_bytes:
        raise ValueError(
            f"the report's tables and {len(drawn)} panels alone take {bare:,} bytes, more than max_bytes = "
            f"{max_bytes:,}: choose fewer panels or raise max_bytes"
        )
    save_text(path, page)
    return path


def _page(explained: "Explained", title: str, panels: list[dict[str, Any]], classes: list[dict[str, Any]]) -> str:
    from jinja2 import Environment

    last = explained.start_blocks[0]
    labels = explained.explainers[last].prototypes.labels.tolist()
    images = [explained.sharing(last, labels.index(c))[1] for c in range(len(explained.classes))]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text()).render(
        title=title or f"{explained.network.name} on {explained.settings['dataset']}",
        explained=explained,
        network=explained.network,
        table=explained.table,
        clustered=sum(images),
        held_out=len(explained.dataset.test) if explained.dataset else 0,
        panels=panels,
        classes=classes,
        settings=list(_flat(explained.settings)),
    )


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings that are set, those within settings too."""
    for name, value in settings.items():
        if name not in NOT_SHOWN and value not in ("", None):
            yield from _flat(value) if isinstance(value, Mapping) else [(name, value)]


def _class(explained: "Explained", c: int, size: int, quality: int) -> dict[str, Any]:
    """The prototypes of a class: for each explainer, the most shared first."""
    explainers = {}
    for b in explained.start_blocks:
        of_class = (explained.explainers[b].prototypes.labels == c).nonzero().flatten().tolist()
        shared = {k: explained.sharing(b, k)[0] for k in of_class}
        explainers[explained.name(b)] = [
            {"prototype": k, "shared": shared[k], "url": data_url(explained.patch(b, k).pixels, size, quality=quality)}
            for k in sorted(of_class, key=shared.__getitem__, reverse=True)
        ]
    return {"name": explained.classes[c], "images": explained.sharing(b, of_class[0])[1], "explainers": explainers}


def _panel(explained: "Explained", image: Any, target: "Target") -> dict[str, Any]:
    """Figure 1 of an image with the class it speaks of: uint8 [H, W, 3] from the last block and from the shallowest."""
    picture, names, figures = explained.picture(image), explained.network.classes, {}
    for part in explained.interpretations(picture, (), target):
        with Image.open(io.BytesIO(png(figure1(picture.rgb, [part]), PANEL_DPI))) as drawn:
            figures[part.name] = np.asarray(drawn.convert("RGB"))
    said = {"predicted": names[int(explained.seen(picture).y.argmax())], "target": " − ".join(part.target)}
    return {"name": picture.name, **said, "figures": figures}
