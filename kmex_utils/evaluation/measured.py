"""How far an explanation can be believed: is it faithful to the network, does it come out again, does it mean parts."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data.annotations import Parts, known
from ..explanation.explained import Explained
from ..explanation.refits import passed_again, refitted
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

    explained.needs_its_images()
    dataset = explained.dataset
    assert dataset is not None
    if images < 1:
        raise ValueError(f"faithfulness needs at least one image, got {images}")
    if not len(dataset.test):
        raise ValueError("no image is held out: explain() with held_out above 0, or a folder with test/")
    parts, boxes = known(dataset, annotations)
    tables, sure, true = {}, [], []
    with passed_again(explained, device=device) as passed:
        for b in explained.start_blocks:
            name, explainer, how = explained.name(b), explained.explainers[b], explained.fitted_with(b)
            maps = {split: passed.map(explainer, split) for split in passed.x}
            if parts:
                true.append({"explainer": name, **_fidelity(maps, len(explainer.prototypes), parts)})
            if refits:
                earlier = explained.refits[b].explainers(explainer) if b in explained.refits else []
                fits = earlier if len(earlier) == refits else refitted(passed, explainer, refits, **how)
                others = torch.stack([passed.map(refit, "test") for refit in fits])
                records = certainty.records(explainer, maps["test"], others, how["seed"])
                sure += [{"explainer": name, **record} for record in records]
    if sure:
        tables["certainty"] = pd.DataFrame(sure)
    if parts:
        by_place = fidelity.percent(fidelity.position_baseline(parts).sum(0))
        tables["fidelity"] = pd.DataFrame([*true, {"explainer": "position", **by_place}])
    if explained.network.form:
        generator = torch.Generator().manual_seed(explained.settings.get("seed", 0))
        drawn = torch.randperm(len(dataset.test), generator=generator)[:images].sort().values
        of_drawn = boxes["test"][drawn] if boxes else None
        how = {"boxes": of_drawn, "steps": steps, "device": str(pick_device(device))}
        tables["faithfulness"] = faithfulness.table(explained, drawn.tolist(), **how)
    return tables


def _fidelity(maps: Mapping[str, torch.Tensor], prototypes: int, parts: Mapping[str, Parts]) -> dict[str, Any]:
    grid = (maps["test"].shape[1], maps["test"].shape[2])
    scores = fidelity.fidelity(maps, parts, prototypes).scores()
    best = fidelity.percent(fidelity.ceiling(parts["test"], grid).sum(0))
    ceiling = {f"ceiling_{metric}": value for metric, value in best.items()}
    return {"grid": "x".join(map(str, grid)), **scores, **ceiling}
