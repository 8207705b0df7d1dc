"""Overlays at the picture's own resolution: the geometry against Pillow, the receptive field against intervals."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import kmex_utils as kmex
from kmex_utils import drawing
from kmex_utils.data import Input
from kmex_utils.data.reading import fitted
from kmex_utils.explanation.overlay import cells, receptive_field

pytest_plugins = ("tests.fixtures_explained",)
SIZES = [(150, 230), (230, 150), (100, 100), (97, 211)]


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("image_size", [64, (32, 64), (48, 31)])
@pytest.mark.parametrize("size", SIZES)
def test_the_box_is_what_enters(size, image_size, fit):
    """Red counts columns and green rows: what Pillow makes of the picture says where each pixel came from."""
    height, width = size
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0], ramps[..., 1] = np.arange(width), np.arange(height)[:, None]
    input = Input(image_size, (0.5,), (0.5,), fit)
    came_from = fitted(Image.fromarray(ramps), input).pixels.astype(float)
    left, top, right, bottom = input.box(size)
    for channel, axis, start, stop in ((0, 1, left, right), (1, 0, top, bottom)):
        count = input.size[axis]
        expected = start + (np.arange(count) + 0.5) * (stop - start) / count - 0.5
        found = came_from[channel].mean(1 - axis)
        assert np.abs(found - expected)[1:-1].max() < 0.75, "half a level is rounding"
        assert np.abs(found - expected).max() < 1 + (stop - start) / count / 2, "a border has one neighbour"


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("size", SIZES)
def test_cells_against_a_warp_of_pillow(size, fit):
    grid, box = (7, 5), Input((70, 50), (0.5,), (0.5,), fit).box(size)
    labels = np.arange(35, dtype=np.uint8).reshape(grid)
    left, top, right, bottom = box
    x, y = grid[1] / (right - left), grid[0] / (bottom - top)
    affine = (x, 0, -left * x, 0, y, -top * y)
    method = Image.Transform.AFFINE, affine, Image.Resampling.NEAREST
    warped = Image.fromarray(labels).transform((size[1], size[0]), *method, fillcolor=255)
    rows, columns = cells(size, box, grid)
    ours = np.where((rows < 0)[:, None] | (columns < 0), 255, labels[rows[:, None], columns])
    assert (ours == np.asarray(warped)).mean() > 0.999, "but for a pixel whose centre lies on a border"
    assert set(np.unique(ours)) - {255} == set(range(35))


def test_only_a_transform_knows_its_own_box():
    with pytest.raises(ValueError, match="where own takes an image from is not known: give fit= instead"):
        Input(64, (0.5,), (0.5,), transform=own).box((100, 100))


def own(image):
    return torch.zeros(3, 64, 64)


@pytest.fixture
def wide(tmp_path):
    """A photograph of another shape than the network's input, stored on its side."""
    from sklearn.datasets import load_sample_image

    upright = load_sample_image("flower.jpg")[100:300, 60:500]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(np.rot90(upright)).save(tmp_path / "wide.png", exif=exif)
    return tmp_path / "wide.png", upright


def test_an_overlay_on_the_picture(explained, wide):
    """200 x 440: the middle 200 x 200 enters, by 8 x 8 cells of 25 pixels; the rest is half way to white."""
    file, upright = wide
    (part,) = explained.interpretations(file, [2])
    light = upright + 0.4 * (255.0 - upright)
    plain = explained.overlay(file, opacity=0, outline=False)
    assert plain.size == (440, 200) and np.array_equal(np.asarray(plain)[:, 120:320], upright[:, 120:320])
    for of, colours in (
        ("map", drawing.coloured(part.map)),
        ("attribution", drawing.diverging(part.attribution, part.centre, part.half)),
    ):
        layer = np.kron(colours, np.ones((25, 25, 1))) * 255
        drawn = np.asarray(explained.overlay(file, of=of, opacity=0.4, outline=False)).astype(float)
        np.testing.assert_allclose(drawn[:, 120:320], 0.6 * upright[:, 120:320] + 0.4 * layer, atol=0.51)
        np.testing.assert_allclose(drawn[:, :120], light[:, :120], atol=0.51)
        lines = np.asarray(explained.overlay(file, of=of, opacity=0)).astype(float)
        differ = np.abs(lines[:, 120:320] - upright[:, 120:320]).max(2) > 0.5
        for row, column in np.ndindex(8, 8):
            middle = np.s_[25 * row + 1 : 25 * row + 24, 25 * column + 1 : 25 * column + 24]
            assert not differ[middle].any(), "an outline of one pixel on each side"
        across = part.map[:, 1:] != part.map[:, :-1]
        assert across.any() and all(
            np.allclose(lines[25 * row + 12, 120 + 25 * column + 25], layer[25 * row + 12, 25 * column + 25], atol=0.51)
            for row, column in np.argwhere(across)
        )


def test_any_image_has_an_overlay(explained, photos, wide):
    """By file, Pillow image, index or name of the folder at its own size; an array as it enters."""
    file, _ = wide
    with Image.open(file) as image:
        same = explained.overlay(image)
    assert np.array_equal(np.asarray(same), np.asarray(explained.overlay(file)))
    name = explained.names[3]
    sizes = {explained.overlay(image).size for image in (3, name, photos / name)}
    assert sizes == {(160, 140)}
    assert explained.overlay(explained.picture(3).rgb).size == (64, 64)
    with pytest.raises(ValueError, match="of must be map or attribution, got 'both'"):
        explained.overlay(3, of="both")
    with pytest.raises(ValueError, match="opacity must be from 0"):
        explained.overlay(3, opacity=40)


# --- receptive field ----------------------------------------------------------------------------------------------


LAYERS = ((3, 2, 1), (3, 1, 1), (2, 2, 0), (5, 1, 2))  # kernel, stride, padding; the first two are block 1


@pytest.fixture(scope="module")
def cnn():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
    head = [nn.Conv2d(8, 8, 5, 1, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)]
    return kmex.network(nn.Sequential(*convolutions, *head), image_size=64)


def back(first, last, layers):
    """The positions of the input that first … last of the last layer's output are computed from."""
    for kernel, stride, padding in reversed(layers):
        first, last = first * stride - padding, last * stride - padding + kernel - 1
    return max(first, 0), min(last, 63)


@pytest.mark.parametrize("cell", [(7, 9), (0, 15), (15, 3)])
def test_the_receptive_field_of_the_last_block(cnn, cell):
    (top, bottom), (left, right) = (back(i, i, LAYERS) for i in cell)
    assert receptive_field(cnn, 2, (16, 16), cell) == (left, top, right + 1, bottom + 1)


@pytest.mark.parametrize("cell", [(14, 21), (0, 31)])
def test_the_receptive_field_of_several_blocks(cnn, cell):
    """A cell of the finer grid is made of two positions of the last block on each axis, at a border of one."""
    spans = []
    for i in cell:
        lower = (i + 0.5) / 2 - 0.5
        taps = [min(max(int(np.floor(lower)) + step, 0), 15) for step in (0, 1)]
        first, last = back(*taps, LAYERS)
        own = back(i, i, LAYERS[:2])
        spans.append((min(first, own[0]), max(last, own[1]) + 1))
    (top, bottom), (left, right) = spans
    assert receptive_field(cnn, 1, (32, 32), cell) == (left, top, right, bottom)
    with pytest.raises(ValueError, match="cell must be a row and a column of 32 x 32, got"):
        receptive_field(cnn, 1, (32, 32), (32, 0))


def test_a_mean_over_the_image_sees_all_of_it():
    """Squeeze and excitation."""
    network = kmex.network("mobilenet_v3_small", "random", image_size=64)
    grid = tuple(network.activations(torch.zeros(1, 3, 64, 64))[-1].shape[2:])
    assert receptive_field(network, len(network.blocks), grid, (0, 0)) == (0, 0, 64, 64)


def test_the_field_is_framed(explained, wide):
    """ResNet18 at 64 pixels: a cell of B4 sees all that enters; black and white lines at the crop's corners."""
    framed = np.asarray(explained.overlay(wide[0], 4, opacity=0, outline=False, cell=(0, 1)))
    bare = np.asarray(explained.overlay(wide[0], 4, opacity=0, outline=False))
    rows, columns = np.nonzero((framed != bare).any(2))
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (0, 199, 120, 319)
    assert not (framed != bare)[110:190, 130:210].any(), "within the field and outside the cell"
