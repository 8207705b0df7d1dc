"""How sure a map is: against naive loops, scikit-learn, and maps whose agreement is known."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from kmex_utils.evaluation.certainty import adjusted_rand, agreement
from kmex_utils.evaluation.fidelity import shuffled
from kmex_utils.explanation.passed import Passed
from kmex_utils.explanation.refits import matched, refitted
from kmex_utils.method.composite import Normalisation, composite

HOW = {"restarts": 1, "seed": 5}


@pytest.fixture(scope="module")
def passed(network, digits):
    return Passed.of(network, digits, 2)


@pytest.fixture(scope="module")
def explainer(passed):
    return passed.fit_encoder(3, Normalisation(), 3, **HOW)


def renumbered(explainer, order):
    """The same prototypes in another order."""
    p = explainer.prototypes
    rows = {name: getattr(p, name)[order] for name in ("vectors", "labels", "sizes", "image", "position")}
    return replace(explainer, prototypes=replace(p, **rows))


@pytest.mark.parametrize("shape", [(1, 400), (30, 49), (5, 1)])
def test_adjusted_rand_is_scikit_learns(shape, generator):
    a, b = torch.randint(6, shape, generator=generator), torch.randint(4, shape, generator=generator)
    b = torch.where(torch.rand(shape, generator=generator) < 0.5, a, b)
    expected = torch.tensor([adjusted_rand_score(*pair) for pair in zip(a, b, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(adjusted_rand(a, b), expected)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0, 0, 1, 1], [1, 1, 0, 0], 1),  # numbers do not matter
        ([0, 0, 0, 0], [2, 2, 2, 2], 1),
        ([0, 1, 2, 3], [3, 0, 1, 2], 1),
        ([0, 0, 0, 0], [0, 1, 2, 3], 0),
        ([0, 0, 1, 2], [0, 0, 1, 1], 4 / 7),  # Hubert & Arabie: 1 pair together, 1/3 expected, 3/2 at most
    ],
)
def test_adjusted_rand_of_known_partitions(a, b, expected):
    assert adjusted_rand(torch.tensor([a]), torch.tensor([b])).item() == pytest.approx(expected)


def test_the_same_prototypes_in_another_order_agree(passed, explainer):
    order = torch.tensor([2, 0, 1, 4, 3, 5, 8, 7, 6])  # within their classes
    q_s, other = (passed.map(e, "test") for e in (explainer, renumbered(explainer, order)))
    assert (q_s != other).any()
    same = matched(renumbered(explainer, order), explainer)
    for name in ("vectors", "labels", "sizes", "image", "position"):
        assert torch.equal(getattr(same.prototypes, name), getattr(explainer.prototypes, name))
    for name, values in agreement(explainer, q_s, passed.map(same, "test")[None]).items():
        assert (values == 1).all(), name


def test_partners_have_the_least_total_distance(explainer, generator):
    p = explainer.prototypes.vectors
    other = replace(explainer, prototypes=replace(explainer.prototypes, vectors=p + 0.01 * torch.randn(p.shape)))
    partners = matched(other, explainer).prototypes.vectors
    for c in range(3):
        ours, theirs, got = (vectors[3 * c : 3 * c + 3].double() for vectors in (p, other.prototypes.vectors, partners))
        totals = [(ours - theirs[list(order)]).norm(dim=1).sum() for order in permutations(range(3))]
        assert (ours - got.double()).norm(dim=1).sum() == pytest.approx(min(totals).item())


def test_shares_are_counted_position_by_position(passed, explainer, digits):
    """Refits by their definition: rows materialised, prototypes paired, positions counted one by one."""
    x = passed.x["test"].read(torch.arange(len(digits.test)), 3)
    q = composite(x).double()
    others, clear = [], torch.ones(len(digits.test), *x[0].shape[2:], dtype=torch.bool)
    for seed in (6, 7):
        p = passed.fit_encoder(3, Normalisation(), 3, restarts=1, seed=seed).prototypes.vectors.double()
        pairs = torch.cdist(explainer.prototypes.vectors.double(), p)
        order = []
        for c in range(3):
            own = pairs[3 * c : 3 * c + 3, 3 * c : 3 * c + 3]
            best = min(
                permutations(range(3)), key=lambda way, own=own: sum(own[i, j] for i, j in enumerate(way)).item()
            )
            order += [3 * c + j for j in best]
        nearest = torch.cdist(q, p[order]).topk(2, largest=False)
        others.append(nearest.indices[..., 0].view_as(clear))
        clear &= (nearest.values[..., 1] / nearest.values[..., 0] > 1.0001).view_as(clear)  # else rounding decides
    q_s = passed.map(explainer, "test")
    kept = [passed.map(refit, "test") == q_s for refit in refitted(passed, explainer, 2, **HOW)]
    share, naive = torch.stack(kept).float().mean(0), torch.zeros(q_s.shape)
    for n, h, w in torch.cartesian_prod(*map(torch.arange, q_s.shape)).tolist():
        naive[n, h, w] = sum(int(other[n, h, w] == q_s[n, h, w]) for other in others) / 2
    torch.testing.assert_close(share[clear], naive[clear])
    assert 0 < share.mean() < 1 and clear.float().mean() > 0.95
    measures = agreement(explainer, q_s, torch.stack(others))
    assert measures["prototype"].mean() == pytest.approx(naive.mean().item())
    assert measures["prototype_always"].mean() == pytest.approx((naive == 1).float().mean().item())
    kept = sum((other // 3 == q_s // 3).double() for other in others) / 2
    assert measures["class"].mean() == pytest.approx(kept.mean().item())
    assert measures["class_always"].mean() == pytest.approx((kept == 1).double().mean().item())
    predicted = [
        torch.tensor([(m // 3).flatten().bincount(minlength=3).argmax() for m in maps]) for maps in [q_s, *others]
    ]
    stays = torch.stack([other == predicted[0] for other in predicted[1:]])
    assert torch.equal(measures["prediction"], stays.double())
    assert torch.equal(measures["prediction_always"][0], stays.all(0).double())
    rand = [adjusted_rand_score(q_s.flatten(), other.flatten()) for other in others]
    assert measures["adjusted_rand"].flatten().tolist() == pytest.approx(rand)
    assert {name: tuple(values.shape) for name, values in measures.items()} == {
        **dict.fromkeys(("prototype", "class", "prediction", "adjusted_rand_by_image"), (2, len(q_s))),
        **dict.fromkeys(("prototype_always", "class_always", "prediction_always"), (1, len(q_s))),
        "adjusted_rand": (2, 1),
    }


def test_independent_maps_agree_by_chance(explainer, generator):
    """Prototypes with probability 0.1, 0.4, 0.5 in three classes each: 0.42 / 3 meet."""
    shape, p = (3, 200, 14, 14), torch.tensor([0.1, 0.4, 0.5] * 3) / 3
    maps = torch.multinomial(p, 3 * 200 * 196, replacement=True, generator=generator).view(shape)
    measures = agreement(explainer, maps[0], maps[1:])
    assert measures["prototype"].mean() == pytest.approx(0.42 / 3, abs=0.005)
    assert measures["class"].mean() == pytest.approx(1 / 3, abs=0.005)
    assert measures["adjusted_rand"].abs().max() < 0.002
    assert measures["adjusted_rand_by_image"].mean().abs() < 0.002


def test_shuffling_keeps_each_map_s_counts(generator):
    maps = torch.randint(5, (2, 7, 6, 4), generator=generator)
    mixed = shuffled(maps, 3)
    assert torch.equal(mixed.flatten(2).sort().values, maps.flatten(2).sort().values)
    assert not torch.equal(mixed, maps) and torch.equal(mixed, shuffled(maps, 3))
    assert not torch.equal(mixed, shuffled(maps, 4))


def test_no_refits_are_refused(passed, explainer):
    with pytest.raises(ValueError, match="refits must be at least 1"):
        refitted(passed, explainer, 0)
