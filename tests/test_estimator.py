"""KMEx as a scikit-learn classifier: its contract, and what scikit-learn itself makes of the same embeddings."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="KMExClassifier is for scikit-learn, an optional extra")
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import pairwise_distances
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from kmex_utils.explanation.passed import Passed
from kmex_utils.method.estimator import KMExClassifier

TOO_FEW = "a single sample is fewer than K/C, which is refused"


@pytest.fixture(scope="module")
def digits():
    """1,797 digits as 64 numbers each; their names."""
    z, y = load_digits(return_X_y=True)
    return z, np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])[y]


@pytest.mark.parametrize(("prototypes_per_class", "refused"), [(1, ()), (2, ("check_fit2d_1sample",))])
def test_scikit_learns_own_checks(prototypes_per_class, refused):
    expected = dict.fromkeys(refused, TOO_FEW)
    done = check_estimator(
        KMExClassifier(prototypes_per_class), expected_failed_checks=expected, on_skip=None, on_fail="raise"
    )
    assert {result["check_name"] for result in done if result["status"] == "xfail"} == set(refused)
    assert sum(result["status"] == "passed" for result in done) > 50


def test_one_prototype_a_class_is_the_nearest_centroid(digits):
    z, y = digits
    ours, theirs = KMExClassifier(1).fit(z[:900], y[:900]), NearestCentroid().fit(z[:900], y[:900])
    np.testing.assert_allclose(ours.prototypes_, theirs.centroids_, rtol=1e-5, atol=1e-5)
    assert ours.classes_.tolist() == ours.prototype_labels_.tolist() == theirs.classes_.tolist()
    assert np.array_equal(ours.predict(z[900:]), theirs.predict(z[900:]))
    assert ours.score(z[900:], y[900:]) == theirs.score(z[900:], y[900:]) > 0.8


def test_inertia_of_each_class_is_that_of_scikit_learns_k_means(digits):
    """Both are the best of ten restarts: either may find the better optimum, by little."""
    z, y = digits
    kmex = KMExClassifier(4, random_state=1).fit(z, y)
    for name in kmex.classes_:
        members, p = z[y == name], kmex.prototypes_[kmex.prototype_labels_ == name]
        inertia = (pairwise_distances(members, p).min(1) ** 2).sum()
        assert inertia == pytest.approx(KMeans(4, n_init=10, random_state=0).fit(members).inertia_, rel=0.01)


@pytest.mark.parametrize("scale", [1, 100])  # exp(-||z - p||) of far prototypes underflows; the class does not
def test_similarities_and_classes_by_definition(digits, scale):
    z, y = digits[0] * scale, digits[1]
    kmex = KMExClassifier(3, restarts=2).fit(z, y)
    d = pairwise_distances(z, kmex.prototypes_)
    assert kmex.transform(z).shape == (len(z), 30)
    np.testing.assert_allclose(kmex.transform(z), np.exp(-d), rtol=1e-3 * scale)
    assert np.array_equal(kmex.predict(z), kmex.prototype_labels_[d.argmin(1)])
    assert kmex.prototype_labels_.tolist() == np.repeat(sorted(set(y)), 3).tolist()
    assert kmex.n_features_in_ == 64
    assert kmex.get_feature_names_out().tolist() == [f"kmexclassifier{k}" for k in range(30)]


def test_the_same_prototypes_as_of_a_network_passed_once():
    """``Passed`` pools h itself; given one position, h is z."""
    generator = torch.Generator().manual_seed(3)
    z, labels = torch.randn(60, 7, generator=generator), torch.arange(60) % 3

    class Kept:
        index = torch.arange(60)

        def read(self, index, start_block):
            return [z[index, :, None, None]]

    passed = Passed({"train": Kept()}, {}, {"train": labels}, ("a", "b", "c"), 1, torch.device("cpu"))
    for seed in (0, 5):
        theirs = passed.fit_kmex(4, seed=seed, restarts=3).prototypes
        ours = KMExClassifier(4, restarts=3, random_state=seed).fit(z.numpy(), labels.numpy())
        assert np.array_equal(ours.prototypes_, theirs.vectors.numpy())
        assert np.array_equal(ours.prototype_labels_, theirs.labels.numpy())


def test_random_states(digits):
    z, y = digits[0][:200], digits[1][:200]

    def prototypes(random_state):
        return KMExClassifier(4, restarts=1, random_state=random_state).fit(z, y).prototypes_

    assert np.array_equal(prototypes(np.int64(3)), prototypes(3)) and not np.array_equal(prototypes(3), prototypes(4))
    state = np.random.RandomState(3)
    assert not np.array_equal(prototypes(state), prototypes(state)), "a state goes on"
    assert np.array_equal(prototypes(np.random.RandomState(3)), prototypes(np.random.RandomState(3)))


def test_in_a_pipeline_and_a_search(digits):
    z, y = digits[0][:600], digits[1][:600]
    pipeline = make_pipeline(StandardScaler(), KMExClassifier(restarts=1))
    scores = cross_val_score(pipeline, z, y, cv=3)
    assert scores.min() > 0.75
    parameter = "kmexclassifier__prototypes_per_class"
    search = GridSearchCV(pipeline, {parameter: np.array([1, 5])}, cv=3).fit(z, y)
    assert search.cv_results_["mean_test_score"][1] == pytest.approx(scores.mean())
    assert search.cv_results_["mean_test_score"][0] == pytest.approx(
        cross_val_score(make_pipeline(StandardScaler(), NearestCentroid()), z, y, cv=3).mean()
    )
    assert np.array_equal(pickle.loads(pickle.dumps(search)).predict(z), search.predict(z))
    table = clone(pipeline).set_output(transform="pandas").fit(z, y).transform(z)
    assert table.shape == (600, 50) and table.columns[7] == "kmexclassifier7"


def test_what_cannot_be_clustered_is_one_line(digits):
    z, y = digits[0][:30], digits[1][:30]
    with pytest.raises(ValueError, match=r"^class 'eight' has \d+ training rows .*, fewer than K/C = 9: lower [^\n]*$"):
        KMExClassifier(9).fit(z, y)
    with pytest.raises(ValueError, match="prototypes per class .* must be at least 1, got 0"):
        KMExClassifier(0).fit(z, y)
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        KMExClassifier(1, restarts=0).fit(z, y)
    with pytest.raises(TypeError, match="^prototypes_per_class must be an integer, got 2.5$"):
        KMExClassifier(2.5).fit(z, y)
    for scale in (5e17, 1e20):  # float32's end is 3e38
        with pytest.raises(
            ValueError,
            match=r"^the embeddings hold NaN or infinite values, or too large ones to square in float32: [^\n]+$",
        ):
            KMExClassifier(1).fit(z * scale, y)


def test_without_scikit_learn_one_line():
    code = "import sys; sys.modules['sklearn'] = None; import kmex_utils.method.estimator"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"\nImportError: KMExClassifier needs scikit-learn .*: pip install [^\n]+\n$", done.stderr)
