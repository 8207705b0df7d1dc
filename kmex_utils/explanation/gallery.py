"""What an explanation says of all its images: predictions, and how each prototype is used."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..paths import unnumbered
from .edits import left_of
from .passed import SPLITS

if TYPE_CHECKING:
    import pandas as pd

    from .explained import Explained


def network_classes(explained: "Explained") -> torch.Tensor | None:
    """For each class of the folder the network's output of that name, [groups]; None if a class has not exactly one.

    Numbers that stand in for unknown names name nothing.
    """
    if explained.predictions_as_labels:
        return torch.tensor(explained.settings["stand_in_classes"])
    theirs = [plain(name) for name in explained.network.classes]
    ours = [plain(name) for name in explained.classes]
    if not explained.network.named or len(set(ours)) < len(ours) or any(theirs.count(name) != 1 for name in ours):
        return None
    return torch.tensor([theirs.index(name) for name in ours])


def plain(name: str) -> str:
    """A class name for comparison: no number before it, lower case, spaces."""
    return unnumbered(name).lower().replace("_", " ").replace("-", " ").strip()


def relabelled(predicted: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The place of each predicted output among those kept, [N]; -1: it is not."""
    same = predicted[:, None] == kept
    return torch.where(same.any(1), same.int().argmax(1), -1)


def chosen(explained: "Explained", split: str) -> str:
    """The split asked for; empty: the held-out images, or where there are none, those of the prototypes. Fills it."""
    if explained.dataset is None:
        raise ValueError("the images are not here, only the prototypes: load(…, images=folder)")
    split = split or ("test" if len(explained.dataset.test) else "train")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    explained.fill()
    return split


def network_says(explained: "Explained", y: torch.Tensor) -> np.ndarray:
    """Names of the classes predicted by scores [N, C], in the folder's own words where it has the class, [N]."""
    outputs, predicted = network_classes(explained), y.argmax(1)
    said = np.array(explained.network.classes, object)[predicted.numpy()]  # of one image a tensor would be an index
    if outputs is not None:
        ours = relabelled(predicted, outputs)
        said = np.where(ours >= 0, np.array([*explained.classes, ""], object)[ours.numpy()], said)
    return said


def predictions(explained: "Explained", split: str = "") -> "pd.DataFrame":
    """What network and explainers say of a split's images: by image its ``label``, then a column for each.

    ``split``: ``test``, ``train``, or empty: the held-out images if there are any. Confusions follow from it:
    ``pandas.crosstab(table.label, table.B234)``.
    """
    import pandas as pd

    split, classes = chosen(explained, split), np.array([*explained.classes, ""], object)
    said = network_says(explained, explained.y[split])
    names = explained.names[: len(said)] if split == "test" else explained.names[-len(said) :]
    columns = {"label": classes[explained.labels_of(split)], "network": said}
    for b in explained.start_blocks:
        columns[explained.name(b)] = classes[explained.explainers[b].proj(explained.maps[b, split].long()).argmax(1)]
    return pd.DataFrame(columns, pd.Index(names, name="image"))


def by_class(explained: "Explained", start_block: int = 0, split: str = "") -> "pd.DataFrame":
    """By class the number of images, each model's accuracy in %, and an explainer's confusions.

    ``taken for``, ``taken from``: classes that its images go to, and whose images it gets, with how many; of the
    explainer from ``start_block`` (0: the shallowest). ``split`` as in :meth:`predictions`.
    """
    import pandas as pd

    name = explained.name(start_block or explained.start_blocks[-1])
    table = predictions(explained, split)
    models = [column for column in table if column != "label"]
    right = table[models].eq(table.label, axis=0).groupby(table.label).mean().mul(100)
    result = right.reindex(explained.classes)
    result.insert(0, "images", table.label.value_counts().reindex(explained.classes, fill_value=0))
    wrong = table[table.label.ne(table[name]) & table.label.ne("")]
    for way, key, other in (("taken for", "label", name), ("taken from", name, "label")):
        counts = wrong.groupby(key)[other].value_counts(sort=True)
        words = [f"{c} ({n})" for c, n in zip(counts.index.get_level_values(1), counts, strict=True)]
        joined = pd.Series(words, counts.index.get_level_values(0), dtype=object).groupby(level=0).agg(", ".join)
        result[way] = joined.reindex(explained.classes, fill_value="")
    return result.rename_axis("class")


FAR = 10.0  # points below the network; depth costs 8 on the paper's STL-10, which it calls a trade-off


def cautions(explained: "Explained") -> dict[int, str]:
    """A line on each explainer that falls far below the network on held-out images, by start block, with the cause.

    By more than 10 points and more than twice the standard error of the difference: such a map shows what the explainer
    sees, not why the network decides. Said when it is fitted, in panels, report, explorer and page. Where the network's
    accuracy is not known, the best explainer's stands in for it.
    """
    table, n = explained.table, explained.settings.get("held_out_images", 0)
    if table is None or not n:
        return {}
    word = "agreement" if explained.predictions_as_labels else "accuracy"
    known = table[f"{word}, {SPLITS['test']} (%)"].dropna()
    known = known[[not name.endswith(", edited") for name in known.index]]
    if explained.predictions_as_labels:
        whose, best = "the network", 100.0
    else:
        whose = "the network" if "CNN" in known else str(known.idxmax())
        best = float(known["CNN"] if "CNN" in known else known.max())
    lines = {}
    last = explained.start_blocks[0]
    for b in explained.start_blocks:
        ours = float(known.get(explained.name(b), best))
        error = (sum(p * (100 - p) for p in (ours, best)) / n) ** 0.5
        if best - ours <= max(FAR, 2 * error):
            continue
        scale = explained.explainers[b].normalisation.scale
        above = [explained.name(other) for other in explained.start_blocks if other > b and other not in lines]
        if b < last and scale in ("1/D", "1/sqrt(D)"):
            why = f"with scale={scale!r} shallow blocks outweigh the last: try scale='1'"
        elif above:
            why = f"shallower blocks do not tell these classes apart: believe {above[-1]}"
        else:
            why = (
                "positions alone do not tell these classes apart: more images or another prototypes_per_class may help"
            )
        share = f"{ours:.0f} % of the held-out images"
        if explained.predictions_as_labels:
            lines[b] = f"{explained.name(b)} agrees with the network on {share} ({why})"
        else:
            lines[b] = f"{explained.name(b)} is right on {share}, {whose} on {best:.0f} % ({why})"
    return lines


def gallery(explained: "Explained", start_block: int = 0, split: str = "") -> "pd.DataFrame":
    """How the prototypes of an explainer are used in a split's images; arguments as in :meth:`by_class`.

    Returns
    -------
    DataFrame
        By prototype its ``class`` and own ``name``; in how many ``images`` it has a cell, and its share of all
        ``cells`` in %; in how many images that the explainer gives to its class rightly (``right``) and wrongly
        (``wrong``); the share of its cells in other classes' images in % (``elsewhere``), and in the one of them
        that has ``most`` (``most_with``); the nearest other prototype (``copy_of``) and how far it is, over the
        median distance of two prototypes (``copy_distance``);
        after :meth:`certainty` in how many refits it ``exists``.
    """
    import pandas as pd

    b = start_block or explained.start_blocks[-1]
    explained.name(b)
    split, explainer = chosen(explained, split), explained.explainers[b]
    p, q_s, labels = explainer.prototypes, explained.maps[b, split].flatten(1).long(), explained.labels_of(split)
    count, classes = len(p), len(explained.classes)
    cells = torch.zeros(len(q_s), count).scatter_add_(1, q_s, torch.ones(q_s.shape))
    there, predicted = cells > 0, explainer.proj(explained.maps[b, split].long()).argmax(1)
    of_class = predicted[:, None] == p.labels
    right = of_class & (labels[:, None] == p.labels)
    wrong = of_class & (labels[:, None] != p.labels) & (labels[:, None] >= 0)
    in_class = torch.zeros(classes + 1, count).index_add_(0, labels % (classes + 1), cells)[:classes]
    elsewhere = in_class.scatter(0, p.labels[None], 0)
    left = left_of(explained.edits.segment(b))
    copy, ratio = near_copies(p.vectors[left].double())
    all_cells = in_class.sum(0)
    columns = {
        "class": np.array(explained.classes, object)[p.labels],
        "name": [explained.edits.names(b).get(k, "") for k in range(count)],
        "images": there.sum(0),
        "cells": 100 * cells.sum(0) / max(1, q_s.numel()),
        "right": (there & right).sum(0),
        "wrong": (there & wrong).sum(0),
        "elsewhere": 100 * elsewhere.sum(0) / all_cells,
        "most": 100 * elsewhere.amax(0) / all_cells,
        "most_with": np.where(elsewhere.amax(0) > 0, np.array(explained.classes, object)[elsewhere.argmax(0)], ""),
    }
    table = pd.DataFrame(columns, pd.Index(range(count), name="prototype")).loc[left.tolist()]
    table["copy_of"], table["copy_distance"] = left[copy].numpy(), ratio.numpy()
    if b in explained.refits:
        table["exists"] = explained.refits[b].exists[left].numpy()
    return table


def near_copies(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each prototype [n, D] the nearest other one, and its distance over the median one of two prototypes, [n] each.

    Rows scatter far more around a centroid than centroids lie apart, in hundreds of channels, so that their distance
    would make every prototype a copy.
    """
    distance = torch.cdist(vectors, vectors, compute_mode="donot_use_mm_for_euclid_dist")
    median = distance[tuple(torch.triu_indices(len(vectors), len(vectors), 1))].median()
    nearest = distance.fill_diagonal_(torch.inf).min(1)
    return nearest.indices, nearest.values / median
