"""Fractions of the training images: what is drawn, and that the study's numbers are what they say."""

import pandas as pd
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from kmex_utils import subsets
from kmex_utils.activations import keep
from kmex_utils.backbones import avg_pool
from kmex_utils.kmeans import DenseRows, classwise, inertia


@pytest.mark.parametrize(("fraction", "expected"), [(0.1, 2), (0.5, 6), (1.0, 12)])
def test_draws_are_the_same_share_of_every_class(digits, fraction, expected):
    index = subsets.draw(digits.train.labels, 3, fraction, at_least=2, seed=5)
    assert torch.bincount(digits.train.labels[index]).tolist() == [expected] * 3
    assert index.tolist() == sorted(set(index.tolist()))
    assert torch.equal(index, subsets.draw(digits.train.labels, 3, fraction, at_least=2, seed=5))


def test_study_measures_what_it_says(backbone, digits):
    found = subsets.study(backbone, digits, [0.5, 1.0], 2, [4], seed=3, prototypes_per_class=2, restarts=2)
    records = pd.DataFrame(found).set_index(["model", "fraction", "draw"])
    assert set(records.index.get_level_values("model")) == {"KMEx", "B4"}
    assert (records.images.xs(0.5, level="fraction") == 18).all()
    assert (records.images.xs(1.0, level="fraction") == 36).all()
    # one of them by hand, with the distances written down
    z = avg_pool(keep(backbone, digits, "train", 4).read(torch.arange(36), 4)[-1])
    labels = digits.train.labels
    rows_of = lambda index: DenseRows(z[index])  # noqa: E731
    whole = classwise(rows_of, labels, digits.classes, 2, seed=3, restarts=2).vectors
    index = subsets.draw(labels, 3, 0.5, 2, seed=3001)
    part = classwise(
        lambda some: rows_of(index[some]), labels[index], digits.classes, 2, seed=3 + 202, restarts=2
    ).vectors
    own = torch.arange(3).repeat_interleave(2)
    spread = [
        torch.where(own == labels[:, None], torch.cdist(z.double(), p.double()), torch.inf).amin(1).square().sum()
        for p in (part, whole)
    ]
    one = records.loc["KMEx", 0.5, 1]
    assert one.inertia == pytest.approx(float(spread[0] / spread[1]), rel=1e-3)
    partitions = [torch.cdist(z, p).argmin(1) for p in (whole, part)]
    assert one.agreement == pytest.approx(adjusted_rand_score(*partitions), abs=1e-6)


def test_inertia_is_the_sum_of_squared_distances(generator):
    x, p = torch.randn(300, 7, generator=generator), torch.randn(4, 7, generator=generator)
    expected = torch.cdist(x.double(), p.double()).amin(1).square().sum()
    assert inertia(DenseRows(x, rows_per_chunk=90), p) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (([0.0, 1.0], 1, [4]), "fractions must lie in"),
        (([], 1, [4]), "fractions must lie in"),
        (([1.0], 0, [4]), "draws must be at least 1"),
        (([1.0], 1, [5]), "there is no block 5"),
    ],
)
def test_an_impossible_study_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        subsets.check(*wrong)
