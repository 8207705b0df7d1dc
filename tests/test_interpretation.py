from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from kmex_utils import figures
from kmex_utils.activations import keep
from kmex_utils.attribution import attribution, segment_mean
from kmex_utils.backbones import resnet
from kmex_utils.composite import Normalisation, composite
from kmex_utils.datasets import load
from kmex_utils.explainers import EncoderKMeans
from kmex_utils.interpretation import interpret, segment_patch
from kmex_utils.kmeans import classwise


def test_patch_is_the_connected_part_around_the_row():
    image = np.full((80, 80, 3), 255, np.uint8)
    segments = np.zeros((8, 8), int)
    segments[2:4, 5:7] = 1  # the part around the row
    segments[7, 0] = 1  # the same prototype, elsewhere
    patch = segment_patch(image, segments, 2 * 8 + 5)
    assert patch.shape == (40, 40, 3)  # two cells and one of context on each side
    inside = (patch == 255).all(2)
    assert inside[10:30, 10:30].all() and inside.sum() == 400


def test_patch_at_the_border_stays_inside_the_image():
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    segments = np.arange(36).reshape(6, 6)
    assert segment_patch(image, segments, 0).shape == (30, 30, 3)
    assert np.array_equal(segment_patch(image, segments, 35)[20:, 20:], image[50:, 50:])
    assert np.array_equal(segment_patch(image, np.zeros((6, 6), int), 7), image)


@pytest.fixture(scope="module")
def explained():
    digits = load("mnist-mini", image_size=64, images_per_class=6)
    backbone = resnet("resnet18", 10, seed=1).eval().requires_grad_(False)
    x = keep(backbone, digits, "train", 2)
    explainers = {}
    for b in (2, 3, 4):
        rows_of = partial(x.rows, start_block=b, normalisation=Normalisation())
        found = classwise(rows_of, digits.train.labels, digits.classes, 2, restarts=2)
        explainers[b] = EncoderKMeans(found, 10, b, Normalisation())
    return digits, backbone, explainers


def test_interpretation_of_an_image(explained):
    digits, backbone, explainers = explained
    found = interpret(backbone, digits, explainers, digits.test.pixels[3], [4, 2])
    x = backbone.activations(digits.normalise(digits.test.pixels[[3]]))
    j = backbone(digits.normalise(digits.test.pixels[[3]])).argmax(1)
    for result, b in zip(found, (4, 2), strict=True):
        expected = explainers[b].sim(explainers[b].h(x))
        assert np.array_equal(result.map, expected[0].numpy())
        shares = [patch.share for patch in result.patches]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-9
        for patch in result.patches:
            assert patch.share == (result.map == patch.prototype).mean()
            assert patch.class_name == digits.classes[explainers[b].prototypes.labels[patch.prototype]]
    assert [result.name for result in found] == ["B4", "B234"]
    direct = segment_mean(attribution(x[-1], backbone.c[j]), explainers[4].sim(explainers[4].h(x)))
    np.testing.assert_allclose(found[0].attribution, direct[0].numpy(), rtol=1e-5)
    other = interpret(backbone, digits, explainers, digits.test.pixels[3], [4], target=(int(j) + 1) % 10)
    assert not np.allclose(other[0].attribution, found[0].attribution)


def test_patches_are_the_nearest_training_rows(explained):
    digits, backbone, explainers = explained
    p = explainers[2].prototypes
    q = composite(keep(backbone, digits, "train", 2).read(torch.arange(60), 2))
    for k in range(0, 20, 3):
        own = digits.train.labels == p.labels[k]
        least = (q[own] - p.vectors[k]).norm(dim=2).min()
        torch.testing.assert_close((q[p.image[k], p.position[k]] - p.vectors[k]).norm(), least, rtol=1e-3, atol=1e-7)


def test_figures_are_drawn_to_files_and_repeatable(explained, tmp_path):
    digits, backbone, explainers = explained
    found = interpret(backbone, digits, explainers, digits.test.pixels[3], [4, 2])
    for name in ("first", "again"):
        figures.save(figures.figure1(digits.test.rgb(3), found, "a digit"), tmp_path / name)
    for ending in (".png", ".pdf"):
        first, again = (tmp_path / f"{name}{ending}" for name in ("first", "again"))
        assert first.stat().st_size > 5000 and first.read_bytes() == again.read_bytes()
    assert plt.get_fignums() == []


def test_figure2_has_every_point_and_marker():
    generator = np.random.default_rng(0)
    points, labels = generator.normal(size=(40, 2)), np.arange(40) % 4
    some = (points[:4], labels[:4])
    figure = figures.figure2(
        list("abcd"),
        points,
        labels,
        points[:8],
        labels[:8],
        {"c_j": some, "c_j rescaled": some},
        {"KMEx (K/C=1)": some},
    )
    counts = [[len(c.get_offsets()) for c in side.collections] for side in figure.axes]
    assert counts == [[8, 40, 4, 4], [8, 40, 4]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list("abcd")


def test_colours_are_distinct():
    for count in (2, 10, 20):
        assert len({tuple(np.round(c, 3)) for c in figures.palette(count)}) == count
