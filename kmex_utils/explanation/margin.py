"""Why a segment is of this prototype and not of that one: the margin between them, split over blocks and channels."""

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..drawing import short, styled
from .interpretation import Patch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from .explained import Explained


@dataclass(frozen=True)
class Margin:
    """How much nearer the rows q of a segment are to its prototype a than to b.

    ||q - p_b||² - ||q - p_a||² is a sum over channels, so over blocks: ``terms`` [R, Σ D_b], signed, by position of the
    segment and channel; positive ones speak for a. ``apart`` is ||p_a - p_b||², the margin of a row that equals p_a:
    on the border between them it is 0. Both in the units of q; ``channels`` are D_b by block name. Of prototypes merged
    a is at each position the nearest of them.
    """

    name: str
    a: Patch
    b: Patch
    terms: np.ndarray
    apart: float
    channels: dict[str, int]

    def __repr__(self) -> str:
        than = f"{self.b.prototype} ({self.b.class_name})"
        of = f"{self.total:.3g} of {self.apart:.3g}"
        return f"Margin({self.name}: {self.a.prototype} ({self.a.class_name}) rather than {than}, {of})"

    @property
    def total(self) -> float:
        """The margin, its mean over the segment."""
        return float(self.terms.sum(1).mean())

    def table(self, channels: int = 0) -> "pd.DataFrame":
        """By block, or the ``channels`` that matter most: their ``contribution`` to the margin, which they sum to.

        With it the ``spread`` over positions, and the contribution ``relative`` to ``apart``.
        """
        import pandas as pd

        ends = np.cumsum([0, *self.channels.values()])
        by_block = np.stack([self.terms[:, i:j].sum(1) for i, j in pairwise(ends)], 1)
        values, index = by_block, pd.Index(self.channels, name="block")
        if channels:
            order = (-np.abs(self.terms.mean(0))).argsort(kind="stable")[:channels]
            values = self.terms[:, order]
            block = np.searchsorted(ends, order, side="right") - 1
            names = list(self.channels)
            pairs = [(names[b], int(i - ends[b])) for i, b in zip(order, block, strict=True)]
            index = pd.MultiIndex.from_tuples(pairs, names=["block", "channel"])
        mean = values.mean(0)
        return pd.DataFrame({"contribution": mean, "spread": values.std(0), "relative": mean / self.apart}, index)

    @styled
    def figure(self) -> "Figure":
        """Both prototypes by their nearest patches, and the contributions of the blocks with their spread."""
        import matplotlib.pyplot as plt

        table = self.table() / self.apart
        layout: dict[str, Any] = {"width_ratios": [1, 1, 2.2]}
        figure, (left, right, bars) = plt.subplots(1, 3, figsize=(6.2, 0.3 * len(table) + 1.3), gridspec_kw=layout)
        for axes, patch, what in ((left, self.a, "why"), (right, self.b, "and not")):
            axes.imshow(patch.pixels)
            axes.set_axis_off()
            axes.set_title(f"{what} {patch.prototype}\n{short(patch.label)}", fontsize=8)
        colours = ["C0" if value > 0 else "C1" for value in table.contribution]
        bars.barh(table.index, table.contribution, xerr=table.spread, color=colours)
        bars.axvline(0, color="0.3", linewidth=0.8)
        bars.invert_yaxis()
        bars.set_title(f"{self.name}: {self.total / self.apart:.2f} in all (0: border, 1: the prototype)", fontsize=8)
        bars.set_xlabel(f"speaks for {self.b.prototype} (below 0) or {self.a.prototype}")
        return figure


def margin(explained: "Explained", image: Any, start_block: int = 0, prototype: int = -1, against: str = "") -> Margin:
    """As :meth:`Explained.margin` says."""
    b = start_block or explained.start_blocks[-1]
    if b not in explained.explainers:
        raise ValueError(f"start_block must be one of {explained.start_blocks}, got {b}")
    explainer, segment = explained.explainers[b], explained.edits.segment(b)
    p, labels = explainer.prototypes.vectors.double().cpu(), explainer.prototypes.labels
    x = explained.activations(explained.picture(image).pixels[None])
    h = explainer.h(x)
    q_s = explainer.sim(h).cpu()
    used, counts = q_s.unique(return_counts=True)
    k = int(used[counts.argmax()]) if prototype == -1 else prototype
    if k not in used:
        raise ValueError(f"prototype {k} is not in this map; those that are: {', '.join(map(str, used.tolist()))}")
    q = h.rows((q_s.flatten() == k).nonzero().flatten().to(h.device)).double().cpu()
    members = (segment == k).nonzero().flatten()
    p_a = p[members[torch.cdist(q, p[members]).argmin(1)]]
    if against and against not in explained.classes:
        raise ValueError(
            f"against must be a class of the prototypes, got {against!r}: {', '.join(explained.classes[:8])}"
        )
    if against:
        rivals = labels == explained.classes.index(against)
    else:  # of several that are second, as those with no cell at all, the nearest
        y = explainer.proj(q_s)[0].index_fill(0, labels[k], -1)
        rivals = (y == y.max())[labels]
    rivals = (rivals & (segment >= 0) & (segment != k)).nonzero().flatten()
    if not len(rivals):
        raise ValueError(f"{against or 'this explanation'} has no other prototype than {k}")
    other = int(rivals[torch.cdist(q, p[rivals]).square().mean(0).argmin()])
    terms = (q - p[other]).square() - (q - p_a).square()
    apart = float((p_a - p[other]).square().sum(1).mean())
    names = {f"x({i})": x[i - 1].shape[1] for i in range(b, len(x) + 1)}
    a, rival = explained.patch(b, k), explained.patch(b, other)
    return Margin(explained.name(b), a, rival, terms.numpy(), apart, names)
