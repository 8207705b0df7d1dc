"""Activations are the same wherever they are kept, and what is fitted on them is what its definition says."""

import pytest
import torch
from conftest import small, untrained
from torch import nn

from kmex_utils import data
from kmex_utils.explanation.activations import STORES, embed, keep
from kmex_utils.explanation.passed import Passed
from kmex_utils.method.composite import Normalisation, composite
from kmex_utils.method.kmeans import kmeans

INDEX = torch.tensor([7, 3, 3, 39, 0])


@pytest.fixture(scope="module")
def images():
    return data.load("mnist-mini", small(64), images_per_class=4)


@pytest.fixture(scope="module")
def network(images):
    return untrained(images, seed=2)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("start_block", [2, 4])
def test_kept_anywhere(network, images, tmp_path, store, start_block):
    direct = network.activations(images.input(images.train.pixels[INDEX.numpy()]))[start_block - 1 :]
    kept = keep(network, images, "train", 2, store, folder=tmp_path / "x", batch_size=16)
    assert len(kept) == 40
    for x, expected in zip(kept.read(INDEX, start_block), direct, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=(1e-3 if store == "disk-half" else 1e-5) * scale)


@pytest.mark.parametrize("store", ["disk", "disk-half", "nowhere"])
def test_streaming_clusters_like_memory(network, images, tmp_path, store):
    index = torch.arange(20)
    clusters = {}
    for place in ("memory", store):
        kept = keep(network, images, "train", 2, place, folder=tmp_path / "x")
        rows = kept.rows(index, 2, Normalisation(), keep=place == "memory")
        start = rows.rows(torch.tensor([5, 300, 700]))
        clusters[place] = kmeans(rows, 3, start=start)
    tolerance = 2e-3 if store == "disk-half" else 1e-4
    assert clusters[store].inertia == pytest.approx(clusters["memory"].inertia, rel=tolerance)
    length = clusters["memory"].centroids.norm(dim=1, keepdim=True)
    difference = (clusters[store].centroids - clusters["memory"].centroids).norm(dim=1, keepdim=True)
    assert (difference < 5 * tolerance * length).all()


@pytest.mark.parametrize("factor", [1e-9, 1e6])
def test_half_precision_keeps_tiny_and_huge_values(network, images, tmp_path, factor):
    """float16 alone would flush 1e-9 to zero and 1e6 to infinity."""

    class Scaled(nn.Module):
        blocks = network.blocks

        def outputs(self, x):
            blocks, y = network.outputs(x)
            return [u * factor for u in blocks], y

    half = keep(Scaled(), images, "train", 4, "disk-half", folder=tmp_path / "h").read(INDEX, 4)[0]
    exact = keep(Scaled(), images, "train", 4, "memory").read(INDEX, 4)[0]
    assert (half - exact).abs().max() < 1e-3 * exact.abs().max()
    assert exact.abs().max() > 0


def test_embeddings_are_pooled_activations(network, images):
    h = keep(network, images, "test", 4).read(torch.arange(40), 4)[0]
    torch.testing.assert_close(embed(network, images, "test"), h.mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_unknown_place_is_refused(network, images):
    with pytest.raises(ValueError, match="store must be one of memory, disk"):
        keep(network, images, "train", 2, "tape")
    with pytest.raises(ValueError, match="needs a folder"):
        keep(network, images, "train", 2, "disk")


# --- fits -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def passed(network, images):
    return Passed.of(network, images, 2)


def test_scores_are_the_networks(passed, network, images):
    for split in ("train", "test"):
        with torch.no_grad():
            y = network(images.input(images.split(split).pixels))
        torch.testing.assert_close(passed.y[split], y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("normalisation", [Normalisation(), Normalisation(scale="1"), Normalisation(grid="deepest")])
def test_centroids_are_means_of_their_rows(passed, network, images, normalisation):
    """A fixed point of Lloyd's algorithm on the materialised rows of the images asked for."""
    index = passed.first_of_each_class(3)
    assert index.tolist() == [i for i in range(40) if (images.train.labels[:i] == images.train.labels[i]).sum() < 3]
    explainer = passed.fit_encoder(2, normalisation, 2, seed=0, restarts=3, index=index)
    with torch.no_grad():
        q = composite(network.activations(images.input(images.train.pixels))[1:], normalisation)
    p = explainer.prototypes
    for c in range(10):
        members = index[passed.labels["train"][index] == c]
        rows = q[members].flatten(0, 1)
        vectors = p.vectors[p.labels == c]
        assigned = torch.cdist(rows, vectors).argmin(1)
        means = torch.stack([rows[assigned == k].mean(0) for k in range(2)])
        assert (means - vectors).norm() < 0.02 * vectors.norm()
        assert set(p.image[p.labels == c].tolist()) <= set(members.tolist()), "indices of the training split"
    nearest = (q[p.image, p.position] - p.vectors).norm(dim=1)
    for k in range(len(p)):
        members = index[passed.labels["train"][index] == p.labels[k]]
        least = (q[members] - p.vectors[k]).norm(dim=2).min()
        torch.testing.assert_close(nearest[k], least, rtol=1e-3, atol=1e-7)


def test_kmex_is_of_the_images_asked_for(passed):
    index = passed.first_of_each_class(2)
    kmex = passed.fit_kmex(1, seed=0, restarts=1, index=index)
    z, labels = passed.z("train", index), passed.labels["train"][index]
    means = torch.stack([z[labels == c].mean(0) for c in range(10)])
    torch.testing.assert_close(kmex.prototypes.vectors, means, rtol=1e-4, atol=1e-5)
    assert set(kmex.prototypes.image.tolist()) <= set(index.tolist())


def test_accuracies_by_counting(passed):
    explainer = passed.fit_encoder(3, Normalisation(), 2, seed=0, restarts=1)
    q_s = passed.map(explainer, "test")
    of = explainer.prototypes.labels
    most_positions = torch.stack([torch.bincount(of[m.flatten()], minlength=10) for m in q_s]).argmax(1)
    right = (most_positions == passed.labels["test"]).double().mean().item()
    numbers = {(metric, split): value for metric, split, value in passed.accuracies(explainer, ["test"])}
    assert numbers["accuracy", "test"] == pytest.approx(100 * right)
    assert set(numbers) == {("accuracy", "test"), ("accuracy_most_frequent", "test")}


def test_a_block_that_is_not_there_is_refused(network, images):
    with pytest.raises(ValueError, match="there is no block 5: start blocks run from 1 to 4"):
        Passed.of(network, images, 5)
