"""Fits that differ in one point: that each number is what its name says, and what the changes are compared with."""

import pandas as pd
import pytest
import torch

from kmex_utils import figures, studies
from kmex_utils.attribution import attributions
from kmex_utils.composite import Normalisation, composite


@pytest.fixture(scope="module")
def kept(backbone, digits):
    return studies.Kept.of(backbone, digits, 2, 8)


@pytest.fixture(scope="module")
def studied(kept):
    records, explainers = studies.readings(kept, 2, seed=3, restarts=2)
    return pd.DataFrame(records), explainers


def q_of(backbone, digits, split, b, normalisation):
    with torch.no_grad():
        x = backbone.activations(digits.normalise(digits.split(split).pixels))
    return composite(x[b - 1 :], normalisation).double()


def test_prototypes_come_from_the_first_images_of_each_class(kept, digits):
    expected = [i for c in range(3) for i in (digits.train.labels == c).nonzero().flatten().tolist()[:8]]
    assert kept.some.tolist() == sorted(expected)


def test_each_reading_is_the_one_it_names(studied, kept, backbone, digits):
    """One fit of each, again from materialised q and by distances written down."""
    records, _ = studied
    found = records.set_index(["question", "option", "model", "metric", "split"])["value"]
    assert len(found) == len(studies.READINGS) * 3 * 4
    for question, option, normalisation in studies.READINGS:
        explainer = kept.fit(2, normalisation, 2, seed=3, restarts=2)
        q = q_of(backbone, digits, "test", 2, normalisation)
        nearest = torch.cdist(q, explainer.prototypes.vectors.double()).argmin(2)
        classes = torch.nn.functional.one_hot(nearest // 2, 3).sum(1)
        expected = 100 * (classes.argmax(1) == digits.test.labels).double().mean()
        assert found[question, option, "B234", "accuracy", "test"] == pytest.approx(float(expected), abs=1e-4)


def test_centroids_are_means_of_their_rows(kept, backbone, digits):
    """What makes a fit k-means, on the images it was given, under a reading that is not the default."""
    normalisation = Normalisation(grid="double", scale="1")
    p = kept.fit(2, normalisation, 2, seed=3, restarts=2).prototypes.vectors.double()
    q, labels = q_of(backbone, digits, "train", 2, normalisation)[kept.some], digits.train.labels[kept.some]
    for c in range(3):
        rows = q[labels == c].flatten(0, 1)
        mine = torch.cdist(rows, p[2 * c : 2 * c + 2]).argmin(1)
        means = torch.stack([rows[mine == k].mean(0) for k in range(2)])
        torch.testing.assert_close(means, p[2 * c : 2 * c + 2], rtol=1e-3, atol=1e-4)


def test_starts_of_the_attribution_are_compared(studied, kept, backbone, digits):
    _, explainers = studied
    agreement = studies.attribution_starts(kept, backbone, explainers, 5)
    with torch.no_grad():
        x = backbone.activations(digits.normalise(digits.test.pixels[:5]))
        target = backbone(digits.normalise(digits.test.pixels[:5])).argmax(1)
        one, other = (attributions(x, backbone.c, target, explainers, start=s)[2] for s in ("segments", "raw"))
    expected = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(one, other, strict=True)]
    expected = torch.tensor([1.0 if torch.isnan(value) else value for value in expected]).mean()
    assert agreement["B4"] == 1.0  # one position at 32 pixels
    assert agreement["B234"] == pytest.approx(float(expected), abs=1e-4)


def test_depths(kept):
    records = pd.DataFrame(studies.depths(kept, [1, 3], [4, 2], ["1/D", "1"], seed=0, restarts=2))
    found = records.set_index(["model", "scale", "per_class", "metric", "split"])["value"]
    assert found.between(0, 100).all() and not found.index.duplicated().any()
    assert {(m, s) for m, s, *_ in found.index} == {("KMEx", ""), ("B4", "1/D"), ("B234", "1/D"), ("B234", "1")}
    alone = kept.fit(2, Normalisation(scale="1"), 3, seed=0, restarts=2)
    for metric, split, value in kept.accuracies(alone, ["test"]):
        assert found["B234", "1", 3, metric, split] == value
    with pytest.raises(ValueError, match="8 images.*fewer than K/C = 9"):
        studies.depths(kept, [9], [4], ["1/D"], seed=0)


def test_changes_are_within_a_seed():
    rows = [
        ("default", "", 0, "B234", "accuracy", 90.0),
        ("default", "", 0, "B234", "accuracy_most_frequent", 88.0),
        ("default", "", 1, "B234", "accuracy", 80.0),
        ("scale", "1", 0, "B234", "accuracy", 93.0),
        ("scale", "1", 0, "B234", "accuracy_most_frequent", 50.0),
        ("scale", "1", 1, "B234", "accuracy", 84.0),
        ("attribution start", "raw", 1, "B234", "map_correlation", 0.9),
        ("as trained", "", 0, "CNN", "accuracy", 97.0),
        ("bias", "switched", 0, "CNN", "accuracy", 96.5),
    ]
    records = pd.DataFrame(rows, columns=["question", "option", "seed", "model", "metric", "value"]).assign(
        split="test"
    )
    found = studies.changes(records).set_index(["question", "option", "metric", "seed"])["change"].to_dict()
    assert found == {
        ("prediction", "most frequent", "accuracy", 0): -2.0,
        ("scale", "1", "accuracy", 0): 3.0,
        ("scale", "1", "accuracy", 1): 4.0,
        ("attribution start", "raw", "map_correlation", 1): 0.9,
        ("bias", "switched", "accuracy", 0): -0.5,
    }


def test_figures_show_every_number(studied, kept):
    """Each change is a mark; each start block a line."""
    changes = studies.changes(studied[0])
    (side,) = figures.ledger(changes).axes
    marks = [line for line in side.lines if len(line.get_xdata()) > 2]
    shown = sorted(round(float(value), 6) for line in marks for value in line.get_xdata())
    expected = changes.query("metric == 'accuracy' and split == 'test'").change
    assert shown == sorted(round(value, 6) for value in expected)
    records = pd.DataFrame(studies.depths(kept, [1, 3], [4, 2], ["1/D", "1"], seed=0, restarts=2))
    for side in figures.depth_study(records).axes:
        assert {line.get_label() for line in side.lines} == {"KMEx", "B4", "B234"}
