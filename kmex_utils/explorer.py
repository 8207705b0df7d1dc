"""The interpretation process to play with, in JupyterLab: choose image, start block, class; hover or click segments."""

import base64
import io
import math
from html import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import matplotlib as mpl
import numpy as np
from PIL import Image

from .figures import palette

HERE = Path(__file__).parent
COLOURED = 10  # prototypes with a colour of their own, the largest; the others are light grey, as in Figure 1
GREY = (224, 224, 224)
PATCH = 96  # pixels of a patch on the screen
PREDICTED = ""  # the choice of class that follows the prediction


class Explorer:
    """What ``explained.explorer()`` shows; display it as the last line of a cell.

    Parameters
    ----------
    explained
        A :class:`~kmex_utils.explained.Explained`.
    image, start_block
        Shown first: an index or name, and a start block (0: the shallowest).

    Attributes
    ----------
    image, start_block, target
        The three controls (ipywidgets).
    panels
        The linked panels; its ``selected`` is the prototype clicked, -1 for none.
    """

    def __init__(self, explained, image: int | str = 0, start_block: int = 0) -> None:
        self.explained = explained
        first = explained.picture(image).name
        block = start_block or explained.start_blocks[-1]
        if block not in explained.explainers:
            raise ValueError(f"start_block must be one of {explained.start_blocks}, got {block}")
        self._start = (first, block)
        self._widget = None

    def view(self, image: int | str, start_block: int, target: str = PREDICTED) -> dict[str, Any]:
        """All that one state of the controls shows, as plain numbers, words and images (data URLs).

        ``map`` is [H', W'] of indices into ``prototypes``, which come largest segment first; ``attribution`` [H', W']
        are eq. 11's values carried to this block, ``limit`` the end of their colour scale.
        """
        explained = self.explained
        picture = explained.picture(image)
        seen = explained.seen(picture)
        q_s = seen.maps[start_block]
        used, inverse, counts = q_s[0].unique(return_inverse=True, return_counts=True)
        order = counts.argsort(descending=True, stable=True)
        ranked = order.argsort()[inverse]
        colours = [tuple(round(255 * v) for v in colour) for colour in palette(COLOURED)]
        explainer = explained.explainers[start_block]
        prototypes = []
        for rank, (k, count) in enumerate(zip(used[order].tolist(), counts[order].tolist(), strict=True)):
            shared, images = explained.sharing(start_block, k)
            prototypes.append(
                {
                    "prototype": k,
                    "class": explained.dataset.classes[int(explainer.prototypes.labels[k])],
                    "share": count / q_s.numel(),
                    "shared": shared,
                    "images": images,
                    "colour": colours[rank] if rank < COLOURED else GREY,
                    "patch": self.patch(start_block, k),
                }
            )
        j = explained.target(target, seen)
        att = explained.attributions(seen, target)
        limit = max(float(a.abs().max()) for a in att.values()) or 1.0 if att else 1.0
        values = att[start_block][0].numpy() if att else None
        label = -1 if not picture.split else int(explained.dataset.split(picture.split).labels[picture.index])
        votes = explainer.proj(q_s)[0]
        return {
            "name": picture.name,
            "image": _url(picture.rgb),
            "explainer": explained.name(start_block),
            "map": ranked.tolist(),
            "prototypes": prototypes,
            "attribution": None if values is None else [[float(f"{v:.4g}") for v in row] for row in values],
            "attribution_colours": None if values is None else _diverging(values, limit).tolist(),
            "limit": limit,
            "target": explained.network.classes[j],
            "predicted": explained.network.classes[int(seen.y.argmax())],
            "explainer_predicted": explained.dataset.classes[int(votes.argmax())],
            "label": "" if label < 0 or explained.predictions_as_labels else explained.dataset.classes[label],
            "why_no_attribution": explained.network.between,
        }

    def patch(self, start_block: int, prototype: int, rank: int = 0) -> str:
        """A prototype's patch as a data URL."""
        return _url(self.explained.patch(start_block, prototype, rank).pixels, PATCH)

    def patches(self, start_block: int, prototype: int) -> list[str]:
        """All patches of a prototype as data URLs."""
        found = self.explained.patches(start_block, prototype)
        return [_url(patch.pixels, PATCH) for patch in found]

    def still(self):
        """Figure 1 of the image shown, for where widgets cannot run."""
        name, block = self._start
        blocks = sorted({block, self.explained.start_blocks[0]}, reverse=True)
        return self.explained.panel(name, blocks)

    @property
    def widget(self):
        """The ipywidgets box."""
        if self._widget is None:
            self._build()
        return self._widget

    def _build(self) -> None:
        import anywidget
        import ipywidgets
        import traitlets

        class Panels(anywidget.AnyWidget):
            _esm = HERE / "explorer.js"
            _css = HERE / "explorer.css"
            view = traitlets.Dict().tag(sync=True)
            selected = traitlets.Int(-1).tag(sync=True)
            nearest = traitlets.List().tag(sync=True)
            still = traitlets.Unicode().tag(sync=True)

        explained = self.explained
        name, block = self._start
        wide = {"description_width": "initial"}
        self.image = ipywidgets.Dropdown(options=explained.names, value=name, description="image", style=wide)
        self.start_block = ipywidgets.ToggleButtons(
            options=[(explained.name(b), b) for b in explained.start_blocks], value=block, style={"button_width": "5em"}
        )
        self.target = ipywidgets.Dropdown(
            options=[("predicted", PREDICTED), *((c, c) for c in dict.fromkeys(explained.network.classes))],
            value=PREDICTED,
            description="attribution to",
            style=wide,
            disabled=not explained.network.pooled_linear,
        )
        self._id = f"kmex-still-{uuid4().hex[:8]}"
        self.panels = Panels(view=self.view(name, block), still=self._id)
        for control in (self.image, self.start_block, self.target):
            control.observe(self._show, "value")
        self.panels.observe(self._select, "selected")
        row = ipywidgets.Box(
            [self.image, self.start_block, self.target],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self._widget = ipywidgets.VBox([row, self.panels])

    def _show(self, change) -> None:
        with self.panels.hold_sync():
            self.panels.selected = -1
            self.panels.view = self.view(self.image.value, self.start_block.value, self.target.value)

    def _select(self, change) -> None:
        k = change["new"]
        self.panels.nearest = self.patches(self.start_block.value, k) if k >= 0 else []

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        try:
            widget = self.widget
        except ImportError as error:
            display(HTML(_still(self.still(), "", f"still: the explorer needs {error.name}")))
            return
        # removed by the widget as soon as it runs
        display(HTML(_still(self.still(), self._id, "still view: the explorer runs where the kernel and widgets do")))
        display(widget)


def _url(pixels: np.ndarray, size: int = 0) -> str:
    """uint8 [H, W, 3] as a data URL (lossless WebP), scaled down to at most ``size``."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    if size and max(image.size) > size:
        image = image.resize((size, math.ceil(size * image.height / image.width)), Image.Resampling.BILINEAR)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=85, method=0)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _diverging(values: np.ndarray, limit: float) -> np.ndarray:
    """Figure 1's colours of an attribution, uint8 [H, W, 3]: red speaks for the class."""
    shade = mpl.colormaps["RdBu_r"](0.5 + values / (2 * limit))[..., :3]
    return (255 * shade).round().astype(np.uint8)


def _still(figure, name: str, words: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    source = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<div id="{name}"><img style="max-width: 100%" alt="explanation maps, attributions and nearest patches" '
        f'src="data:image/png;base64,{source}"><br><small>{escape(words)}</small></div>'
    )
