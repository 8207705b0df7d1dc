"""How sure a map is: k-means from other seeds gives other prototypes, so some positions change theirs."""

from dataclasses import fields, replace
from typing import Any

import torch

from ..explanation.explained import Explained
from ..explanation.passed import Passed
from ..method.explainers import EncoderKMeans
from ..method.prototypes import Prototypes
from .fidelity import adjusted_for_chance, pairs, shuffled


def certainty(of: Passed | Explained, explainer: EncoderKMeans, refits: int = 5, **options: Any) -> torch.Tensor:
    """In which share of the refits each position of the test images keeps its prototype, [N, H', W'].

    ``of`` is what the explainer was fitted on; ``options`` are those of :func:`refitted`. An :class:`Explained` passes
    its images through its network once more; without them a ValueError.
    """
    if isinstance(of, Explained):
        if of.dataset is None:
            raise ValueError("the images are not here, only the prototypes: load(…, images=folder)")
        of = Passed.of(of.network, of.dataset, explainer.start_block, store="auto")
    q_s = of.map(explainer, "test")
    kept = [of.map(refit, "test") == q_s for refit in refitted(of, explainer, refits, **options)]
    return torch.stack(kept).float().mean(0)


def refitted(
    passed: Passed, explainer: EncoderKMeans, refits: int = 5, *, seed: int = 0, **options: Any
) -> list[EncoderKMeans]:
    """The explainer fitted again from the seeds after ``seed``, its own; prototypes are numbered as their partners'.

    ``options`` are those of :meth:`Passed.fit_encoder` that the explainer was fitted with: ``restarts``, ``index``.
    """
    if refits < 1:
        raise ValueError(f"refits must be at least 1, got {refits}")
    count = len(explainer.prototypes) // explainer.classes
    fits = (
        passed.fit_encoder(explainer.start_block, explainer.normalisation, count, seed=seed + i, **options)
        for i in range(1, refits + 1)
    )
    return [matched(refit, explainer) for refit in fits]


def matched(refit: EncoderKMeans, explainer: EncoderKMeans) -> EncoderKMeans:
    """The refit with its prototypes in the order of their partners in the explainer.

    Partners are one to one within each class, such that the distances between their centroids sum to the least
    (Hungarian algorithm).
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise ImportError("matching refits needs SciPy: pip install 'kmex-utils[sklearn]'") from None
    theirs, ours = (e.prototypes.vectors.double().unflatten(0, (e.classes, -1)) for e in (refit, explainer))
    partners = [linear_sum_assignment(distances)[1] for distances in torch.cdist(ours, theirs)]
    order = torch.cat([torch.from_numpy(of_class) + c * ours.shape[1] for c, of_class in enumerate(partners)])
    p = refit.prototypes
    ordered = {field.name: getattr(p, field.name)[order] for field in fields(Prototypes) if field.name != "inertia"}
    return replace(refit, prototypes=replace(p, **ordered))


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


def records(
    passed: Passed, explainer: EncoderKMeans, refits: int = 5, *, seed: int = 0, **options: Any
) -> list[dict[str, Any]]:
    """Each measure of :func:`agreement` with refits on the test images: value, spread over refits, null by chance."""
    q_s = passed.map(explainer, "test")
    fits = refitted(passed, explainer, refits, seed=seed, **options)
    others = torch.stack([passed.map(refit, "test") for refit in fits])
    null = by_chance(explainer, q_s, others, seed)
    rows = []
    for measure, values in agreement(explainer, q_s, others).items():
        spread = float(values.mean(1).std()) if len(values) > 1 else float("nan")
        rows.append(
            {"measure": measure, "value": float(values.mean()), "spread": spread, "null": float(null[measure].mean())}
        )
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
