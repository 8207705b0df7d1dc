"""One HTML file to send: settings, tables, prototypes by class, panels. No network at viewing, readable on a phone."""

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..drawing import data_url, png
from ..store import new_file, save_text
from .edits import left_of
from .figure1 import figure1
from .interpretation import EXAMPLES

if TYPE_CHECKING:
    from ..networks.network import Target
    from .explained import Explained

TEMPLATE = Path(__file__).with_name("report.html")
# patch size in pixels, WebP quality, and examples beside the nearest patch, tried in order until the file fits
LEVELS = ((112, 85, EXAMPLES), (88, 75, EXAMPLES), (64, 60, EXAMPLES), (64, 60, ()))
# Of the median distance of two prototypes: nearer ones are called near-copies. Of frozen ImageNet features on 23 birds
# that are 8 to 21 of 115 prototypes, of a network trained on STL-10 none of 50.
COPY = 0.25
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
    new_file(path, overwrite)
    if isinstance(panels, str | int):
        raise TypeError(f"panels are a list of images, got {panels!r}: give [{panels!r}]")
    drawn = [_panel(explained, image, target) for image in panels]
    shown = len(explained.classes)
    known = _known(explained)
    for size, quality, examples in LEVELS:
        for panel in drawn:
            panel["urls"] = {name: data_url(pixels, quality=quality) for name, pixels in panel["figures"].items()}
        classes = [_class(explained, c, size, quality, examples, known) for c in range(shown)]
        page = _page(explained, title, drawn, classes, known)
        if len(page.encode()) <= max_bytes:
            break
    bare = len(_page(explained, title, drawn, [], known).encode())
    while shown and (length := len(page.encode())) > max_bytes:
        fitting = int(shown * max(max_bytes - bare, 0) / max(length - bare, 1))
        shown = min(fitting, shown - 1)
        page = _page(explained, title, drawn, classes[:shown], known)
    if len(page.encode()) > max_bytes:
        raise ValueError(
            f"the report's tables and {len(drawn)} panels alone take {bare:,} bytes, more than max_bytes = "
            f"{max_bytes:,}: choose fewer panels or raise max_bytes"
        )
    save_text(path, page)
    return path


def _known(explained: "Explained") -> dict[str, Any]:
    """Tables of the data set's images, where it is here."""
    if explained.dataset is None:
        return {}
    split = "test" if len(explained.dataset.test) else "train"
    galleries = {b: explained.gallery(b, split) for b in explained.start_blocks}
    return {"predictions": explained.predictions(split), "classes": explained.by_class(0, split), "gallery": galleries}


def _page(
    explained: "Explained",
    title: str,
    panels: list[dict[str, Any]],
    classes: list[dict[str, Any]],
    known: dict[str, Any],
) -> str:
    from jinja2 import Environment

    last = explained.start_blocks[0]
    labels = explained.explainers[last].prototypes.labels.tolist()
    images = [explained.sharing(last, labels.index(c))[1] for c in range(len(explained.classes))]
    held_out = len(explained.dataset.test) if explained.dataset else 0
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title or f"{explained.network.name} on {explained.settings['dataset']}",
        explained=explained,
        network=explained.network,
        table=explained.table,
        clustered=sum(images),
        held_out=held_out,
        panels=panels,
        classes=classes,
        by_class=known.get("classes"),
        shallowest=explained.name(explained.start_blocks[-1]),
        split="held out" if held_out else "that made the prototypes",
        edits=repr(explained.edits).splitlines() if explained.edits.done else [],
        refits=[refits.line(explained.name(b)) for b, refits in explained.refits.items()],
        copy=COPY,
        settings=list(_flat(explained.settings)),
    )


def _flat(settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All settings that are set, those within settings too."""
    for name, value in settings.items():
        if name not in NOT_SHOWN and value not in ("", None):
            yield from _flat(value) if isinstance(value, Mapping) else [(name, value)]


def _class(
    explained: "Explained", c: int, size: int, quality: int, examples: Sequence[str], known: dict[str, Any]
) -> dict[str, Any]:
    """A class: what is wrong with its images, and its prototypes, for each explainer the most shared first."""
    explainers, name = {}, explained.classes[c]
    for b in explained.start_blocks:
        left = left_of(explained.edits.segment(b))
        of_class = left[explained.explainers[b].prototypes.labels[left] == c].tolist()
        prototypes = []
        for k in of_class:
            there = explained.nearest[b].examples[k, :, 0] >= 0
            ranks: list[int | str] = [0, *(rank for rank, have in zip(examples, there, strict=False) if have)]
            urls = [data_url(explained.patch(b, k, rank).pixels, size, quality=quality) for rank in ranks]
            shared, use = explained.sharing(b, k)[0], known["gallery"][b].loc[k] if known else None
            own = explained.edits.names(b).get(k, "")
            exists = explained.refits[b].times(k) if b in explained.refits else ""
            prototypes.append(
                {"prototype": k, "name": own, "shared": shared, "urls": urls, "use": use, "exists": exists}
            )
        explainers[explained.name(b)] = sorted(prototypes, key=lambda of: -of["shared"])
    wrong = {}
    if known:
        said = known["predictions"][known["predictions"].label == name]
        said.index = [Path(image).name for image in said.index]
        wrong = {model: list(said.loc[said[model] != name, model].items()) for model in said if model != "label"}
    images = explained.sharing(b, of_class[0])[1]
    return {"name": name, "images": images, "explainers": explainers, "wrong": wrong}


def _panel(explained: "Explained", image: Any, target: "Target") -> dict[str, Any]:
    """Figure 1 of an image with the class it speaks of: uint8 [H, W, 3] from the last block and from the shallowest."""
    picture, names, figures = explained.picture(image), explained.network.classes, {}
    for part in explained.interpretations(picture, (), target):
        with Image.open(io.BytesIO(png(figure1(picture.rgb, [part]), PANEL_DPI))) as drawn:
            figures[part.name] = np.asarray(drawn.convert("RGB"))
    said = {"predicted": names[int(explained.seen(picture).y.argmax())], "target": " − ".join(part.target)}
    return {"name": picture.name, **said, "figures": figures}
