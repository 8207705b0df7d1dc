"""How far an explanation can be believed: is it faithful to the network, does it come out again, does it mean parts."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.annotations import Parts, known
from ..explanation.explained import Explained
from ..explanation.gallery import relabelled
from ..explanation.passed import Passed
from ..explanation.refits import refitted
from ..hardware import pick_device
from . import certainty, faithfulness, fidelity

if TYPE_CHECKING:
    import pandas as pd


def measured(
    explained: Explained,
    annotations: str | Path = "",
    *,
    images: int = 20,
    steps: int = 10,
    refits: int = 3,
    device: str = "auto",
) -> dict[str, "pd.DataFrame"]:
    """Tables by name, from the images it was made from; one more pass through the network, and the refits.

    Parameters
    ----------
    annotations
        Of the folder's images: a CSV of keypoints (image, part, x, y) or of boxes (image, x, y, width, height), or a
        folder of masks, as :mod:`kmex_utils.data.annotations` reads them; CUB-200 has its own.
    images
        Held-out images to measure faithfulness on, drawn by the explanation's seed.
    steps
        Of a curve of deletion or insertion.
    refits
        Of k-means from other seeds, for certainty; each takes as long as the fit. 0: none. Those of
        :meth:`~kmex_utils.explanation.explained.Explained.certainty` are used where there are as many.

    Returns
    -------
    ``certainty``
        By explainer: the share of positions that keep prototype and class in a refit, of predictions that stay, with
        the spread over refits and the null of shuffled positions.
    ``faithfulness``
        As :func:`~kmex_utils.evaluation.faithfulness.table`, with localisation where boxes or masks are known; left
        out where eq. 11 does not hold.
    ``fidelity``
        By explainer NMI_m, ARI_m and purity in % beside their null, the position baseline and the ceiling of each
        grid; only where parts are known.

    Raises
    ------
    ValueError, FileNotFoundError
        The images are not here, none is held out, or the annotations are not of this form.
    """
    import pandas as pd

    dataset = explained.dataset
    explained.needs_its_images()
    assert dataset is not None
    if images < 1:
        raise ValueError(f"faithfulness needs at least one image, got {images}")
    if not len(dataset.test):
        raise ValueError("no image is held out: explain() with held_out above 0, or a folder with test/")
    parts, boxes, device = *known(dataset, annotations), str(pick_device(device))
    tables = {}
    with tempfile.TemporaryDirectory() as scratch:
        first = explained.start_blocks[-1]
        passed = Passed.of(explained.network, dataset, first, store="auto", folder=Path(scratch), device=device)
        if explained.predictions_as_labels:
            kept = torch.tensor(explained.settings["stand_in_classes"])
            labels = {split: relabelled(y.argmax(1), kept) for split, y in passed.y.items()}
            passed = replace(passed, labels=labels, classes=explained.classes)
        of = {explained.name(b): explained.explainers[b] for b in explained.start_blocks}
        records = []
        for b in explained.start_blocks if refits else ():
            explainer, how = explained.explainers[b], explained.fitted_with(b)
            known_ones = explained.refits[b].explainers(explainer) if b in explained.refits else []
            fits = known_ones if len(known_ones) == refits else refitted(passed, explainer, refits, **how)
            of_fits = certainty.records(passed, explainer, fits, how["seed"])
            records += [{"explainer": explained.name(b), **record} for record in of_fits]
        if refits:
            tables["certainty"] = pd.DataFrame(records)
        if parts:
            maps = {name: {split: passed.map(e, split) for split in parts} for name, e in of.items()}
            counts = {name: len(e.prototypes) for name, e in of.items()}
            tables["fidelity"] = pd.DataFrame(_fidelity(maps, counts, parts))
        explained.network.cpu()
    if explained.network.form:
        generator = torch.Generator().manual_seed(explained.settings.get("seed", 0))
        drawn = torch.randperm(len(dataset.test), generator=generator)[:images].sort().values
        of_drawn = boxes["test"][drawn] if boxes else None
        tables["faithfulness"] = faithfulness.table(
            explained, drawn.tolist(), boxes=of_drawn, steps=steps, device=device
        )
    return tables


def _fidelity(
    maps: Mapping[str, Mapping[str, torch.Tensor]], prototypes: Mapping[str, int], parts: Mapping[str, Parts]
) -> list[dict[str, Any]]:
    rows = []
    for name, of in maps.items():
        grid = (of["test"].shape[1], of["test"].shape[2])
        scores = fidelity.fidelity(of, parts, prototypes[name]).scores()
        best = fidelity.percent(fidelity.ceiling(parts["test"], grid).sum(0))
        best = {f"ceiling_{metric}": value for metric, value in best.items()}
        rows.append({"explainer": name, "grid": "x".join(map(str, grid)), **scores, **best})
    by_place = fidelity.percent(fidelity.position_baseline(parts).sum(0))
    return [*rows, {"explainer": "position", **by_place}]
