"""The interpretation process to play with, in JupyterLab: choose image, start block, class; hover or click segments.

What is shown is drawn by ``explorer.js``, here and in the page of :mod:`kmex_utils.explanation.page`.
"""

import base64
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from ..data.input import Box
from ..drawing import COLOURED, GREY, data_url, palette, png
from ..parameters import whole
from . import gallery
from .interpretation import EXAMPLES
from .overlay import original

if TYPE_CHECKING:
    from ..networks.network import Target
    from .explained import AnyImage, Explained

HERE = Path(__file__).parent
PATCH = 96  # pixels of a patch on the screen
THUMBNAIL = 64
SIDE = 1024  # longest side of an image that is sent to the browser


class Explorer:
    """What ``explained.explorer()`` shows; display it as the last line of a cell.

    First an image as ``explained.picture`` takes it, from a start block (0: the shallowest). ``images`` are all those
    to choose from: the data set's, before them the given one if it is not of these. What the ``widget`` shows is its
    ``view``; its ``choice`` of ``image`` (index into ``images``), ``start_block``, ``target`` and ``minus`` and the
    prototype ``selected`` (-1: none) may be set from Python, too.
    """

    def __init__(self, explained: "Explained", image: "AnyImage" = 0, start_block: int = 0) -> None:
        self.explained, picture = explained, explained.picture(image)
        self.images: list[AnyImage] = [*([] if picture.split else [image]), *explained.names]
        self._names = [*([] if picture.split else [picture.name]), *explained.names]
        self._image = self._names.index(picture.name) if picture.split else 0
        self._start_block = start_block or explained.start_blocks[-1]
        if self._start_block not in explained.explainers:
            raise ValueError(f"start_block must be one of {explained.start_blocks}, got {start_block}")

    @cached_property
    def widget(self) -> Any:
        """The anywidget."""
        import anywidget
        import traitlets

        class Panels(anywidget.AnyWidget):
            _esm = HERE / "explorer.js"
            _css = HERE / "explorer.css"
            about = traitlets.Dict().tag(sync=True)
            images: Any = traitlets.List().tag(sync=True)
            choice = traitlets.Dict().tag(sync=True)
            view = traitlets.Dict().tag(sync=True)
            selected = traitlets.Int(-1).tag(sync=True)
            gallery: Any = traitlets.List().tag(sync=True)
            wanted: Any = traitlets.List().tag(sync=True)  # images whose thumbnails are to be sent
            thumbnails = traitlets.Dict().tag(sync=True)
            predict = traitlets.Bool(False).tag(sync=True)  # asked for predictions of all images
            still = traitlets.Unicode().tag(sync=True)

            @traitlets.validate("choice", "selected", "wanted")
            def _checked(self, proposal: Any) -> Any:
                """Of what a page sends: a TraitError in one line, and all stays as it was."""
                try:
                    check(proposal["trait"].name, proposal["value"])
                except (IndexError, KeyError, TypeError, ValueError) as error:
                    raise traitlets.TraitError(
                        f"{proposal['trait'].name} cannot be {proposal['value']!r}: {error}"
                    ) from None
                return proposal["value"]

        check = self._check
        choice = {"image": self._image, "start_block": self._start_block, "target": "", "minus": ""}
        widget = Panels(
            about=about(self.explained),
            images=self._rows(),
            choice=choice,
            view=self._chosen(choice),
            still=f"kmex-still-{uuid4().hex[:8]}",
        )
        widget.observe(self._show, "choice")
        widget.observe(self._select, "selected")
        widget.observe(self._send, "wanted")
        widget.observe(self._predict, "predict")
        return widget

    def _check(self, name: str, value: Any) -> None:
        """An error where a value of the widget's ``choice``, ``selected`` or ``wanted`` is not one to choose."""
        if name == "choice":
            whole(0, len(self.images) - 1, image=value["image"])
            if value["start_block"] not in self.explained.explainers:
                raise ValueError(f"start_block must be one of {self.explained.start_blocks}")
            self._outputs(value)
        elif name == "wanted":
            for i in value:
                whole(0, len(self.images) - 1, image=i)
        else:
            block = getattr(self, "_shown", self._start_block)
            whole(-1, len(self.explained.explainers[block].prototypes) - 1, prototype=value)

    def _outputs(self, choice: dict[str, Any]) -> list[str]:
        target = [choice["target"], *([choice["minus"]] if choice["minus"] else [])]
        self.explained.network.targets(target)
        return target

    def _rows(self) -> list[dict[str, Any]]:
        """Name of each image and, where they are known, its label and what is predicted for it."""
        rows: list[dict[str, Any]] = [{"name": name} for name in self._names]
        explained, first = self.explained, len(self._names) - len(self.explained.names)
        for split in ("test", "train") if explained.dataset else ():
            if split in explained.y and all((b, split) in explained.maps for b in explained.explainers):
                for i, said in enumerate(gallery.predictions(explained, split).to_dict("records"), first):
                    label = "" if explained.predictions_as_labels else said["label"]
                    rows[i] |= {"label": label, "said": {name: said[name] for name in said if name != "label"}}
            first += len(explained.dataset.split(split))  # type: ignore[union-attr]
        return rows

    def _chosen(self, choice: dict[str, Any]) -> dict[str, Any]:
        self._shown = choice["start_block"]
        return view(self.explained, self.images[choice["image"]], choice["start_block"], self._outputs(choice))

    def _show(self, change: Any) -> None:
        with self.widget.hold_sync():
            self.widget.selected = -1
            self.widget.view = self._chosen(change["new"])

    def _select(self, change: Any) -> None:
        k, start_block = change["new"], self.widget.choice["start_block"]
        self.widget.gallery = patches(self.explained, start_block, k) if k >= 0 else []

    def _send(self, change: Any) -> None:
        pictures = {i: self.explained.picture(self.images[i]) for i in change["new"]}
        sent = {str(i): data_url(picture.rgb, THUMBNAIL, method=0) for i, picture in pictures.items()}
        self.widget.thumbnails = self.widget.thumbnails | sent

    def _predict(self, change: Any) -> None:
        self.explained.fill()
        self.widget.images = self._rows()

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        try:
            name, words = self.widget.still, "still view: the explorer runs where the kernel and widgets do"
        except ImportError as error:
            name, words = "", f"still: the explorer needs {error.name}: pip install 'kmex-utils[explore]'"
        blocks = sorted({self._start_block, self.explained.start_blocks[0]}, reverse=True)
        source = base64.b64encode(png(self.explained.panel(self.images[self._image], blocks))).decode()
        still = (  # removed by the widget as soon as it runs
            f'<div id="{name}"><img style="max-width: 100%" alt="explanation maps, attributions and nearest patches" '
            f'src="data:image/png;base64,{source}"><br><small>{escape(words)}</small></div>'
        )
        if not name:
            display(HTML(still))
            return
        # In a saved notebook the output after it is an error, or words: no kernel holds the widget. While the still
        # view stands, it stays out of sight.
        hidden = f".jp-OutputArea-child:has(#{name}) + .jp-OutputArea-child {{ display: none; }}"
        display(HTML(f"<style>{hidden}</style>{still}"))
        reference = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        display({"application/vnd.jupyter.widget-view+json": reference, "text/plain": "", "text/html": ""}, raw=True)


def about(explained: "Explained") -> dict[str, Any]:
    """What is the same for all views."""
    from matplotlib import colormaps

    ramp, cautions = np.arange(256), explained.cautions()
    notes = {explained.name(b): [cautions[b]] if b in cautions else [] for b in explained.start_blocks}
    for b, refits in explained.refits.items():
        notes[explained.name(b)].append(refits.line(explained.name(b)))
    for line in repr(explained.edits).splitlines() if explained.edits.done else ():
        notes[line.partition(":")[0]].append(f"edited: {line}")
    return {
        "blocks": [(b, explained.name(b)) for b in explained.start_blocks],
        "classes": list(explained.classes),
        "targets": list(dict.fromkeys(explained.network.classes)) if explained.network.form else [],
        "same_words": gallery.network_classes(explained) is not None,
        "why_no_attribution": "" if explained.network.form else explained.network.between,
        "notes": notes,
        "diverging": colormaps["RdBu_r"](ramp, bytes=True)[:, :3].tolist(),
        "sequential": colormaps["cividis"](ramp, bytes=True)[:, :3].tolist(),
    }


def view(
    explained: "Explained", image: "AnyImage", start_block: int, target: "Target" = "", *, drawn: bool = True
) -> dict[str, Any]:
    """All that is shown of an image from a start block, as plain numbers, words and images (data URLs).

    ``map`` is [H', W'] of indices into ``prototypes``, which come largest segment first; ``attribution`` [H', W'] are
    eq. 11's values carried to this block, ``low`` and ``high`` the ends of their colour scale, ``total`` what the
    prototypes' contributions sum to; ``certainty`` [H', W'] the share of refits in which a position keeps its
    prototype; ``box`` the part of the image that enters the network: left, top, right, bottom, in parts of its sides.
    Without ``drawn`` the image is left out, and what is the same for a prototype in every image.
    """
    picture, count = explained.picture(image), len(explained.explainers[start_block].prototypes)
    (part,) = explained.interpretations(picture, [start_block], target, count)
    rank = np.zeros(count, int)
    rank[[patch.prototype for patch in part.patches]] = np.arange(len(part.patches))
    colours = [[round(255 * value) for value in colour] for colour in (*palette(COLOURED), (GREY,) * 3)]
    prototypes: list[dict[str, Any]] = [
        {
            "prototype": patch.prototype,
            "share": patch.share,
            "contribution": patch.contribution,
            "colour": colours[min(i, COLOURED)],
        }
        for i, patch in enumerate(part.patches)
    ]
    label = -1
    if picture.split and not explained.predictions_as_labels:
        label = int(explained.labels_of(picture.split)[picture.index])
    shown = {
        "name": picture.name,
        "explainer": explained.name(start_block),
        "map": rank[part.map].tolist(),
        "prototypes": prototypes,
        "attribution": None if part.attribution is None else _rounded(part.attribution),
        "low": part.centre - part.half,
        "high": part.centre + part.half,
        "total": part.total,
        "target": " − ".join(part.target),
        "predicted": str(gallery.network_says(explained, explained.seen(picture).y)[0]),
        "explainer_predicted": part.predicted,
        "label": explained.classes[label] if label >= 0 else "",
        "certainty": None if part.certainty is None else _rounded(part.certainty),
    }
    if drawn:
        pixels, box = original(explained, image)
        for p in prototypes:
            p |= prototype(explained, start_block, p["prototype"])
        shown |= {"image": data_url(pixels, SIDE, method=0), "box": in_parts(box, pixels)}
    return shown


def prototype(explained: "Explained", start_block: int, k: int, size: int = PATCH, quality: int = 85) -> dict[str, Any]:
    """What is the same for a prototype in every image."""
    patch, (shared, images) = explained.patch(start_block, k), explained.sharing(start_block, k)
    refits = explained.refits.get(start_block)
    return {
        "class": patch.class_name,
        "name": patch.name,
        "shared": shared,
        "images": images,
        "exists": refits.times(k) if refits else "",
        "patch": data_url(patch.pixels, size, quality=quality, method=0),
    }


def patches(
    explained: "Explained", start_block: int, k: int, nearest: int = 0, size: int = PATCH, quality: int = 85
) -> list[dict[str, str]]:
    """A prototype's patches with a word each: the ``nearest`` so many (0: all there are), typical and weakest."""
    close = explained.patches(start_block, k)[: nearest or None]
    shown = [("nearest" if i == 0 else str(i + 1), patch) for i, patch in enumerate(close)]
    there = explained.nearest[start_block].examples[k, :, 0] >= 0
    shown += [(e, explained.patch(start_block, k, e)) for e, have in zip(EXAMPLES, there, strict=False) if have]
    return [{"word": word, "url": data_url(p.pixels, size, quality=quality, method=0)} for word, p in shown]


def in_parts(box: Box, pixels: np.ndarray) -> list[float]:
    """A box of an image [H, W, 3], its sides 1."""
    height, width = pixels.shape[:2]
    return [box[0] / width, box[1] / height, box[2] / width, box[3] / height]


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values]
