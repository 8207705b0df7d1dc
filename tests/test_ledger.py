"""What open choices are worth: that each reading is what its name says, and what the changes are compared with."""

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import blocks_of
from test_claims import all_records

from kmex_utils.explanation.passed import Passed
from kmex_utils.method.composite import SCALES, Normalisation, composite
from kmex_utils.paper import ledger

EFFECTS = ["dataset", "question", "model", "metric", "mean", "std", "seeds"]


@pytest.fixture(scope="module")
def passed(network, digits):
    return Passed.of(network, digits, 2)


def q_of(network, digits, split, b, normalisation):
    with torch.no_grad():
        x = network.activations(digits.input(digits.split(split).pixels))
    return composite(x[b - 1 :], normalisation).double()


@pytest.mark.parametrize(("question", "option", "normalisation"), ledger.READINGS)
def test_each_reading_is_the_one_it_names(passed, network, digits, question, option, normalisation):
    """Its accuracy, again from materialised q and by distances written down."""
    if question != "default":
        assert str(getattr(normalisation, question)) == option
    explainer = passed.fit_encoder(2, normalisation, 2, seed=3, restarts=2, index=passed.first_of_each_class(8))
    numbers = {(metric, split): value for metric, split, value in passed.accuracies(explainer)}
    for split in ("train", "test"):
        q = q_of(network, digits, split, 2, normalisation)
        nearest = torch.cdist(q, explainer.prototypes.vectors.double()).argmin(2)
        classes = F.one_hot(nearest // 2, 3).sum(1)
        expected = 100 * (classes.argmax(1) == digits.split(split).labels).double().mean()
        assert numbers["accuracy", split] == pytest.approx(float(expected), abs=1e-4)


def test_centroids_are_means_of_their_rows(passed, network, digits):
    """What makes a fit k-means, on the images it was given, under a reading that is not the default."""
    normalisation, index = Normalisation(grid="double", scale="1"), passed.first_of_each_class(8)
    expected = [i for c in range(3) for i in (digits.train.labels == c).nonzero().flatten().tolist()[:8]]
    assert index.tolist() == sorted(expected)
    p = passed.fit_encoder(2, normalisation, 2, seed=3, restarts=2, index=index).prototypes.vectors.double()
    q, labels = q_of(network, digits, "train", 2, normalisation)[index], digits.train.labels[index]
    for c in range(3):
        rows = q[labels == c].flatten(0, 1)
        nearest = torch.cdist(rows, p[2 * c : 2 * c + 2]).argmin(1)
        means = torch.stack([rows[nearest == k].mean(0) for k in range(2)])
        torch.testing.assert_close(means, p[2 * c : 2 * c + 2], rtol=1e-3, atol=1e-4)


def test_maps_are_compared_by_their_correlation(generator):
    one = torch.randn(3, 4, 5, generator=generator)
    other = one + torch.randn(3, 4, 5, generator=generator)
    expected = [torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] for a, b in zip(one, other, strict=True)]
    torch.testing.assert_close(ledger.map_correlation(one, other).float(), torch.stack(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ledger.map_correlation(one, 3 * one + 2), torch.ones(3).double())
    assert ledger.map_correlation(torch.full((1, 4, 5), 0.3), torch.full((1, 4, 5), 0.7)).item() == 1, "neither varies"
    assert ledger.map_correlation(one[:1], torch.full((1, 4, 5), 0.7)).item() == pytest.approx(0)


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
    result = ledger.changes(records).set_index(["question", "option", "metric", "seed"])["change"].to_dict()
    assert result == {
        ("prediction", "most frequent", "accuracy", 0): -2.0,
        ("scale", "1", "accuracy", 0): 3.0,
        ("scale", "1", "accuracy", 1): 4.0,
        ("attribution start", "raw", "map_correlation", 1): 0.9,
        ("bias", "switched", "accuracy", 0): -0.5,
    }


def test_prices_are_what_the_cnn_keeps():
    rows = [
        ("default", "", "B4", "accuracy", 0, 78.0),
        ("default", "", "B234", "accuracy", 0, 70.0),
        ("default", "", "B234", "accuracy_most_frequent", 0, 65.0),
        ("scale", "1", "B234", "accuracy", 0, 77.0),
        ("scale", "1", "B234", "accuracy", 1, 75.0),
        ("scale", "1", "B34", "accuracy", 1, 10.0),
        ("attribution start", "raw", "B234", "map_correlation", 0, 0.9),
    ]
    records = pd.DataFrame(rows, columns=["question", "option", "model", "metric", "seed", "value"])
    result = ledger.prices(records.assign(split="test"), pd.DataFrame(all_records()), "stl10")
    result = result.set_index(["question", "option", "model"])
    assert result["mean"].to_dict() == {
        ("all images", "", "B4"): 4.0,
        ("all images", "", "B234"): 10.0,
        ("default", "", "B4"): 2.0,
        ("default", "", "B234"): 10.0,
        ("scale", "1", "B234"): 4.5,
        ("prediction", "most frequent", "B234"): 15.0,
    }
    assert result.paper["scale", "1", "B234"] == pytest.approx(86.1 - 77.9)


def test_the_depth_study_tells_of_the_factor_too():
    depth = [
        ("B234", "1/D", "accuracy", 5, 0, 70.0),
        ("B234", "1/D", "accuracy_most_frequent", 5, 0, 65.0),
        ("B234", "1", "accuracy", 5, 0, 79.0),
        ("B234", "1", "accuracy", 20, 0, 80.0),
        ("KMEx", "", "accuracy", 5, 0, 79.0),
        ("CNN", "", "accuracy", 0, 0, 80.0),
    ]
    depth = pd.DataFrame(depth, columns=["model", "scale", "metric", "prototypes_per_class", "seed", "value"]).assign(
        split="test"
    )
    scales = ledger.ledger_of_depth(depth.replace({"scale": {"": np.nan}}), 5)
    result = ledger.prices(scales, pd.DataFrame(all_records()), "stl10").query("question != 'all images'")
    assert result.set_index(["question", "option"])["mean"].to_dict() == {
        ("default", ""): 10.0,
        ("scale", "1"): 1.0,
        ("prediction", "most frequent"): 15.0,
    }


def test_effects_of_what_else_is_open():
    rows = [
        ("default", "", "KMEx (K/C=5)", "cos_class", "train", 0, 0.80),
        ("default", "", "KMEx (K/C=1)", "cos_class", "train", 0, 0.90),
        ("pairs", "nearest", "KMEx (K/C=5)", "cos_class", "train", 0, 0.85),
        ("pairs", "nearest", "KMEx (K/C=1)", "cos_class", "train", 0, 0.90),
        ("default", "", "B4", "accuracy", "test", 0, 70.0),
        ("norm", "image", "B4", "accuracy", "test", 0, 71.0),
        ("attribution start", "raw", "B4", "map_correlation", "test", 0, 0.7),
        ("attribution start", "raw", "B4", "map_correlation", "test", 1, 0.9),
        ("as trained", "", "CNN", "accuracy", "test", 0, 80.0),
        ("as trained", "", "CNN", "accuracy", "train", 0, 90.0),
        ("bias", "switched", "CNN", "accuracy", "test", 0, 79.5),
        ("bias", "switched", "CNN", "accuracy", "train", 0, 95.0),
        ("as trained", "", "KMEx (K/C=1)", "accuracy", "test", 0, 70.0),
        ("bias", "switched", "KMEx (K/C=1)", "accuracy", "test", 0, 72.0),
    ]
    columns = ["question", "option", "model", "metric", "split", "seed", "value"]
    result = ledger.effects(pd.DataFrame(rows, columns=columns).replace({"option": {"": np.nan}}), "stl10")
    assert result.columns.tolist() == EFFECTS
    assert result[["question", "model", "metric", "seeds"]].values.tolist() == [
        ["pairs", "KMEx (K/C=5)", "cos_class", 1],
        ["attribution start", "B4", "map_correlation", 2],
        ["bias", "CNN", "accuracy", 1],
        ["bias", "KMEx (K/C=1)", "accuracy", 1],
    ]
    assert result["mean"].tolist() == pytest.approx([0.05, 0.8, -0.5, 2.0])
    assert result["std"][1] == pytest.approx(0.02**0.5)


def test_share_of_the_deepest_block(generator):
    """As the rows of q(b:) have it: each block's part of a difference, its own length divided out."""
    assert ledger.last_share("resnet18", "1/D") == pytest.approx(512**-2 / (128**-2 + 256**-2 + 512**-2))
    narrow = 'timm/resnet18 {"layers": [1, 1, 1, 1], "channels": [8, 16, 24, 32]}'
    assert ledger.last_share(narrow, "1/D") == pytest.approx(32**-2 / (16**-2 + 24**-2 + 32**-2))
    x = blocks_of(channels=(128, 256, 512))
    for scale in SCALES:
        q = composite(x, Normalisation(scale=scale))
        squared = [part.square().sum(-1).amax() for part in q.split((128, 256, 512), -1)]
        assert ledger.last_share("resnet18", scale) == pytest.approx(float(squared[-1] / sum(squared)), rel=1e-4)


def test_weightings_are_the_prices_of_the_factors():
    prices = [
        ("stl10", "default", "", "B234", 8.2, 14.0, 1.0, 2),
        ("stl10", "scale", "1", "B234", 8.2, 1.0, 0.5, 2),
        ("stl10", "scale", "1", "B4", 0.6, 0.5, 0.5, 2),
        ("stl10", "norm", "image", "B234", 8.2, 13.0, 0.5, 2),
    ]
    prices = pd.DataFrame(prices, columns=["dataset", "question", "option", "model", "paper", "mean", "std", "seeds"])
    result = ledger.weightings(prices, {"stl10": "resnet18"})
    assert result.scale.tolist() == ["1/D", "1"] and result["mean"].tolist() == [14.0, 1.0]
    assert result.last_share.tolist() == pytest.approx([0.0476, 1 / 3], abs=1e-4)
