"""How sure a map is: how far the maps of refits (:mod:`kmex_utils.explanation.refits`) agree with it."""

from typing import Any

import torch

from ..method.explainers import EncoderKMeans
from .fidelity import adjusted_for_chance, pairs, shuffled


def agreement(explainer: EncoderKMeans, q_s: torch.Tensor, others: torch.Tensor) -> dict[str, torch.Tensor]:
    """How far the maps of n matched refits, ``others`` [n, N, H', W'], agree with the explainer's, ``q_s`` [N, H', W'].

    By measure, [n, N], or 1 in place of what it is taken over:

    - ``prototype``, ``class``: share of positions that keep their prototype, or one of the same class;
    - ``prediction``: whether the predicted class (eq. 10) stays;
    - the same with ``_always``: in all refits at once, [1, N];
    - ``adjusted_rand``: of all positions of both, [n, 1], and ``adjusted_rand_by_image``.
    """
    labels, classes = explainer.prototypes.labels, explainer.proj(q_s).argmax(1)
    kept = {
        "prototype": others == q_s,
        "class": labels[others] == labels[q_s],
        "prediction": torch.stack([explainer.proj(other).argmax(1) == classes for other in others])[..., None, None],
    }
    measures = {name: same.double().mean((2, 3)) for name, same in kept.items()}
    measures |= {f"{name}_always": same.all(0, keepdim=True).double().mean((2, 3)) for name, same in kept.items()}
    measures["adjusted_rand_by_image"] = torch.stack(
        [adjusted_rand(q_s.flatten(1), other.flatten(1)) for other in others]
    )
    measures["adjusted_rand"] = torch.stack([adjusted_rand(q_s.view(1, -1), other.view(1, -1)) for other in others])
    return measures


def by_chance(explainer: EncoderKMeans, q_s: torch.Tensor, others: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """:func:`agreement` with the positions of each refit's map shuffled; of the prediction with its images shuffled."""
    other_images = others[:, torch.randperm(len(q_s), generator=torch.Generator().manual_seed(seed))]
    swapped = agreement(explainer, q_s, other_images)
    measures = agreement(explainer, q_s, shuffled(others, seed))
    return measures | {name: swapped[name] for name in ("prediction", "prediction_always")}


def records(explainer: EncoderKMeans, q_s: torch.Tensor, others: torch.Tensor, seed: int) -> list[dict[str, Any]]:
    """Each measure of :func:`agreement`: its value, its spread over refits and over images, its null by chance."""
    null, rows = by_chance(explainer, q_s, others, seed), []
    for measure, values in agreement(explainer, q_s, others).items():
        spreads = {"spread": values.mean(1), "spread_images": values.mean(0)}
        numbers = {name: of.std() if len(of) > 1 else torch.nan for name, of in spreads.items()}
        numbers |= {"value": values.mean(), "null": null[measure].mean()}
        rows.append({"measure": measure, **{name: float(number) for name, number in numbers.items()}})
    return rows


def adjusted_rand(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adjusted Rand index of each row of two labellings, int [N, M] each: [N]."""
    both = a * (int(b.max()) + 1) + b
    together, of_a, of_b = (_pairs_alike(labels) for labels in (both, a, b))
    return adjusted_for_chance(together, of_a, of_b, pairs(torch.tensor(float(a.shape[1]))))


def _pairs_alike(labels: torch.Tensor) -> torch.Tensor:
    """Pairs in each row of labels [N, M] that have one label, float64 [N]."""
    width = int(labels.max()) + 1
    row = torch.arange(len(labels), device=labels.device)[:, None]
    code, count = (row * width + labels).unique(return_counts=True)
    alike = pairs(count.double())
    return alike.new_zeros(len(labels)).index_add_(0, code // width, alike)
