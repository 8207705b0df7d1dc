"""Activations are the same wherever they are kept."""

import pytest
import torch

from kmex_utils.activations import WHERE, embed, keep
from kmex_utils.backbones import resnet
from kmex_utils.composite import Normalisation
from kmex_utils.datasets import load
from kmex_utils.kmeans import kmeans


@pytest.fixture(scope="module")
def network():
    digits = load("mnist-mini", image_size=64, images_per_class=4)
    return resnet("resnet18", 10, seed=2).eval().requires_grad_(False), digits


INDEX = torch.tensor([7, 3, 3, 39, 0])


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("start_block", [2, 4])
def test_kept_anywhere(network, tmp_path, where, start_block):
    backbone, digits = network
    direct = backbone.activations(digits.normalise(digits.train.pixels[INDEX.numpy()]))[start_block - 1 :]
    kept = keep(backbone, digits, "train", 2, where, folder=tmp_path / "x", batch_size=16)
    assert len(kept) == 40
    found = kept.read(INDEX, start_block)
    for x, expected in zip(found, direct, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=(1e-3 if where == "disk-half" else 1e-5) * scale)


@pytest.mark.parametrize("where", ["disk", "disk-half", "nowhere"])
def test_streaming_clusters_like_memory(network, tmp_path, where):
    backbone, digits = network
    index = torch.arange(20)
    found = {}
    for place in ("memory", where):
        kept = keep(backbone, digits, "train", 2, place, folder=tmp_path / "x")
        rows = kept.rows(index, 2, Normalisation(), keep=place == "memory", rows_per_chunk=300)
        start = rows.rows(torch.tensor([5, 300, 700]))
        found[place] = kmeans(rows, 3, start=start)
    tolerance = 2e-3 if where == "disk-half" else 1e-4
    assert found[where].inertia == pytest.approx(found["memory"].inertia, rel=tolerance)
    length = found["memory"].centroids.norm(dim=1, keepdim=True)
    difference = (found[where].centroids - found["memory"].centroids).norm(dim=1, keepdim=True)
    assert (difference < 5 * tolerance * length).all()


def test_half_precision_keeps_tiny_and_huge_values(network, tmp_path):
    """float16 alone would flush 1e-9 to zero and 1e6 to infinity."""
    backbone, digits = network
    factors = iter((1e-9, 1e6))

    class Scaled(torch.nn.Module):
        blocks = backbone.blocks

        def activations(self, x):
            return [u * self.factor for u in backbone.activations(x)]

    for factor in factors:
        scaled = Scaled()
        scaled.factor = factor
        half = keep(scaled, digits, "train", 4, "disk-half", folder=tmp_path / "h").read(INDEX, 4)[0]
        exact = keep(scaled, digits, "train", 4, "memory").read(INDEX, 4)[0]
        assert (half - exact).abs().max() < 1e-3 * exact.abs().max()
        assert exact.abs().max() > 0


def test_embeddings_are_pooled_activations(network):
    backbone, digits = network
    h = keep(backbone, digits, "test", 4).read(torch.arange(40), 4)[0]
    torch.testing.assert_close(embed(backbone, digits, "test"), h.mean((2, 3)), rtol=1e-4, atol=1e-6)


def test_unknown_place_is_refused(network):
    with pytest.raises(ValueError, match="where must be one of memory, disk"):
        keep(*network, "train", 2, "tape")
    with pytest.raises(ValueError, match="needs a folder"):
        keep(*network, "train", 2, "disk")
