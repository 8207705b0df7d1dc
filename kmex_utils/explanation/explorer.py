"""The interpretation process to play with, in JupyterLab: choose image, start block, class; hover or click segments."""

import base64
from collections.abc import Iterator
from functools import cached_property, partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from ..drawing import COLOURED, GREY, data_url, diverging, palette, png
from .interpretation import Interpretation

if TYPE_CHECKING:
    from ..networks.network import Target
    from .explained import Explained

HERE = Path(__file__).parent
PATCH = 96  # pixels of a patch on the screen
GIVEN = PREDICTED = ""  # the choice of image for one that is not of the data set; of class, for the predicted one
NOTHING = ""  # the choice of what is subtracted


class Explorer:
    """What ``explained.explorer()`` shows; display it as the last line of a cell.

    First an image as ``explained.picture`` takes it, from a start block (0: the shallowest). Once ``widget`` is made,
    ``image``, ``start_block``, ``target`` and ``minus`` are its controls (ipywidgets), ``panels`` the linked panels,
    whose ``selected`` is the prototype clicked, -1 for none.
    """

    def __init__(self, explained: "Explained", image: Any = 0, start_block: int = 0) -> None:
        self.explained, self._first = explained, explained.picture(image)
        self._start_block = start_block or explained.start_blocks[-1]
        if self._start_block not in explained.explainers:
            raise ValueError(f"start_block must be one of {explained.start_blocks}, got {start_block}")

    def view(self, image: Any, start_block: int, target: "Target" = PREDICTED) -> dict[str, Any]:
        """All that one state of the controls shows, as plain numbers, words and images (data URLs).

        ``map`` is [H', W'] of indices into ``prototypes``, which come largest segment first; ``attribution`` [H', W']
        are eq. 11's values carried to this block, ``low`` and ``high`` the ends of their colour scale, ``total`` what
        the prototypes' contributions sum to.
        """
        explained, network = self.explained, self.explained.network
        picture = explained.picture(self._first if isinstance(image, str) and image == GIVEN else image)
        seen = explained.seen(picture)
        count = len(explained.explainers[start_block].prototypes)
        (part,) = explained.interpretations(picture, [start_block], target, count)
        rank = np.zeros(count, int)
        rank[[patch.prototype for patch in part.patches]] = np.arange(len(part.patches))
        label = ""
        if explained.dataset and picture.split and not explained.predictions_as_labels:
            label = explained.classes[int(explained.dataset.split(picture.split).labels[picture.index])]
        view = {
            "name": picture.name,
            "image": _url(picture.rgb),
            "explainer": part.name,
            "map": rank[part.map].tolist(),
            "prototypes": list(self._prototypes(start_block, part)),
            "attribution": None,
            "low": part.centre - part.half,
            "high": part.centre + part.half,
            "total": part.total,
            "target": " − ".join(part.target),
            "predicted": network.classes[int(seen.y.argmax())],
            "explainer_predicted": part.predicted,
            "label": label,
            "why_no_attribution": network.between,
        }
        if part.attribution is not None:
            colours = diverging(part.attribution, part.centre, part.half)
            view["attribution_colours"] = (255 * colours).round().astype(int).tolist()
            view["attribution"] = [[float(f"{value:.4g}") for value in row] for row in part.attribution]
        return view

    def _prototypes(self, start_block: int, part: Interpretation) -> Iterator[dict[str, Any]]:
        colours = [[round(255 * value) for value in colour] for colour in (*palette(COLOURED), (GREY,) * 3)]
        for i, patch in enumerate(part.patches):
            shared, images = self.explained.sharing(start_block, patch.prototype)
            yield {
                "prototype": patch.prototype,
                "class": patch.label,
                "share": patch.share,
                "contribution": patch.contribution,
                "shared": shared,
                "images": images,
                "colour": colours[min(i, COLOURED)],
                "patch": _url(patch.pixels, PATCH),
            }

    def patches(self, start_block: int, prototype: int) -> list[str]:
        """All patches of a prototype as data URLs."""
        return [_url(patch.pixels, PATCH) for patch in self.explained.patches(start_block, prototype)]

    @cached_property
    def widget(self) -> Any:
        """The ipywidgets box."""
        import anywidget
        import ipywidgets
        import traitlets

        class Panels(anywidget.AnyWidget):
            _esm = HERE / "explorer.js"
            _css = HERE / "explorer.css"
            view = traitlets.Dict().tag(sync=True)
            selected = traitlets.Int(-1).tag(sync=True)
            nearest = traitlets.List(traitlets.Unicode()).tag(sync=True)
            still = traitlets.Unicode().tag(sync=True)

        explained, first = self.explained, self._first
        Dropdown = partial(ipywidgets.Dropdown, style={"description_width": "initial"})
        images = [(name, name) for name in explained.names]
        if not first.split:
            images.insert(0, (first.name, GIVEN))
        blocks = [(explained.name(b), b) for b in explained.start_blocks]
        classes = [("predicted", PREDICTED), *((name, name) for name in dict.fromkeys(explained.network.classes))]
        self.image = Dropdown(description="image", options=images, value=first.name if first.split else GIVEN)
        self.start_block = ipywidgets.ToggleButtons(options=blocks, value=self._start_block)
        self.start_block.style.button_width = "5em"
        self.target = Dropdown(description="attribution to", options=classes, value=PREDICTED)
        self.minus = Dropdown(description="minus that to", options=[("nothing", NOTHING), *classes[1:]])
        self.target.disabled = self.minus.disabled = not explained.network.form
        self.panels = Panels(view=self.view(first, self._start_block), still=f"kmex-still-{uuid4().hex[:8]}")
        controls = [self.image, self.start_block, self.target, self.minus]
        for control in controls:
            control.observe(self._show, "value")
        self.panels.observe(self._select, "selected")
        layout = ipywidgets.Layout(flex_flow="row wrap", align_items="center")
        return ipywidgets.VBox([ipywidgets.Box(controls, layout=layout), self.panels])

    def _show(self, change: Any) -> None:
        with self.panels.hold_sync():
            self.panels.selected = -1
            target = [self.target.value, *([self.minus.value] if self.minus.value != NOTHING else [])]
            self.panels.view = self.view(self.image.value, self.start_block.value, target)

    def _select(self, change: Any) -> None:
        k = change["new"]
        self.panels.nearest = self.patches(self.start_block.value, k) if k >= 0 else []

    def _ipython_display_(self) -> None:
        from IPython.display import HTML, display

        try:
            shown, name = [self.widget], self.panels.still
            words = "still view: the explorer runs where the kernel and widgets do"
        except ImportError as error:
            shown, name = [], ""
            words = f"still: the explorer needs {error.name}: pip install 'kmex-utils[explore]'"
        blocks = sorted({self._start_block, self.explained.start_blocks[0]}, reverse=True)
        source = base64.b64encode(png(self.explained.panel(self._first, blocks))).decode()
        still = (  # removed by the widget as soon as it runs
            f'<div id="{name}"><img style="max-width: 100%" alt="explanation maps, attributions and nearest patches" '
            f'src="data:image/png;base64,{source}"><br><small>{escape(words)}</small></div>'
        )
        display(HTML(still), *shown)


def _url(pixels: np.ndarray, size: int = 0) -> str:
    return data_url(pixels, size, method=0)  # quick: the control waits for it
