"""Maps and attributions as arrays: against the panel's parts, captum, and what other libraries compute from them."""

import re
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

import kmex_utils as kmex
from kmex_utils.explanation.arrays import attribute
from kmex_utils.method.composite import Normalisation, composite

pytest_plugins = ("tests.fixtures_explained",)
EQUAL = Normalisation(scale="1")  # the default of explain()


@pytest.fixture(scope="module")
def x(explained):
    """Network inputs: two photographs, and one that is none."""
    pixels = np.stack([explained.picture(i).pixels for i in (0, 4)])
    noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return torch.cat([explained.network.input(pixels), noise])


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start_block", [4, 3, 2])
def test_labels_are_the_map_at_the_images_size(explained, start_block):
    (part,) = explained.interpretations(3, [start_block], "temple")
    found = explained.labels(3, start_block, target="temple")
    cells = 64 // len(part.map)
    assert found.labels.dtype == np.int32 and found.labels.min() >= 1
    assert np.array_equal(found.labels - 1, np.kron(part.map, np.ones((cells, cells), int)))
    assert np.array_equal(found.attribution, np.kron(part.attribution, np.ones((cells, cells), np.float32)))
    expected = [(p.prototype + 1, p.prototype, p.class_name, p.share) for p in part.patches]
    assert list(found.table.itertuples(name=None)) == expected
    assert found.table.index.name == "label" and [*found.table] == ["prototype", "class", "share"]


def test_what_other_tools_measure_of_labels(explained):
    """Sizes and means by label: regions of scikit-image are made of the same numbers."""
    labels, attribution, table = explained.labels(3)
    assert len(table) > 1 and table.share.sum() == pytest.approx(1)
    areas = ndimage.sum_labels(np.ones_like(labels), labels, table.index)
    np.testing.assert_allclose(areas, table.share * 64 * 64)
    seen = explained.seen(explained.picture(3))
    q_s, att = seen.maps[2][0], explained.attributions(seen)[2][0]
    by_prototype = [float(att[q_s == k].mean()) for k in table.prototype]
    np.testing.assert_allclose(ndimage.mean(attribution, labels, table.index), by_prototype, rtol=1e-5)


def test_regions_of_scikit_image(explained):
    measure = pytest.importorskip("skimage.measure", reason="needs scikit-image: pip install scikit-image")
    labels, attribution, table = explained.labels(3)
    regions = {r.label: r for r in measure.regionprops(labels, intensity_image=attribution)}
    assert sorted(regions) == sorted(table.index)
    for label, share in table.share.items():
        assert regions[label].area == pytest.approx(share * 64 * 64)
        assert regions[label].intensity_min == pytest.approx(regions[label].intensity_max, rel=1e-5), "one mean each"


def test_a_size_that_the_map_does_not_divide(photos):
    """60 pixels by 4 and by 8 positions: every position is a block of pixels, of 7 or 8 here."""
    from torchvision.models import resnet18

    network = kmex.network(resnet18(num_classes=2), classes=["flower", "temple"], image_size=60)
    explained = kmex.explain(network, photos, prototypes_per_class=1, restarts=1, device="cpu", log=str)
    (part,) = explained.interpretations(0, [3])
    assert part.map.shape == (4, 4) and 60 % 4 == 0
    (part,) = explained.interpretations(0, [2])
    assert part.map.shape == (8, 8) and 60 % 8
    labels = explained.labels(0, 2).labels
    for row, column in np.ndindex(60, 60):
        assert labels[row, column] == part.map[row * 8 // 60, column * 8 // 60] + 1


# --- attributions of network inputs -------------------------------------------------------------------------------


def test_of_any_input_by_its_own_map(explained, x):
    """Of the data set's own photographs as the panel has them; another target for each image."""
    for b in (4, 2):
        att = attribute(explained, x, start_block=b)
        assert att.shape == (3, 64, 64)
        for i, image in enumerate((0, 4)):
            np.testing.assert_allclose(att[i], explained.labels(image, b).attribution, rtol=1e-4, atol=1e-7)
        q = composite(explained.network.activations(x)[b - 1 :], EQUAL)
        q_s = torch.cdist(q.double(), explained.explainers[b].prototypes.vectors.double()).argmin(2)
        assert (q_s.view(3, -1) == explained.see_inputs(x).maps[b].flatten(1)).float().mean() > 0.99, "but for ties"
    each = attribute(explained, x, torch.tensor([1, 0, 1]))
    one, zero = attribute(explained, x, "temple"), attribute(explained, x, 0)
    assert np.array_equal(each, np.stack([one[0], zero[1], one[2]])) and not np.allclose(one, zero)
    for target in (1, [1], np.array([1, 1, 1]), torch.tensor(1)):
        assert np.array_equal(attribute(explained, x, target), one)
    with torch.no_grad():
        predicted = explained.network(x).argmax(1)
    assert np.array_equal(attribute(explained, x), attribute(explained, x, predicted))


def test_raw_eq_11_is_grad_cam_before_its_relu(explained, x):
    """The gradient of y_j is c_j / R at each of R positions: Grad-CAM is h · c_j / R, eq. 11 is h · c_j / ||c_j||²."""
    captum = pytest.importorskip("captum.attr", reason="captum is an optional extra")
    network = explained.network
    theirs = captum.LayerGradCam(network, network.module.layer4)
    for target in (0, 1):
        grad_cam = theirs.attribute(x.clone().requires_grad_(), target=target).detach()
        assert grad_cam.shape == (3, 1, 2, 2)
        expected = 4 / network.c[target].square().sum() * captum.LayerAttribution.interpolate(grad_cam, (64, 64))
        att = explained.captum(4, attribution_start="raw").attribute(x, target)
        torch.testing.assert_close(att, expected.expand_as(x), rtol=1e-3, atol=1e-5 * float(att.abs().max()))
    assert (grad_cam < 0).any(), "or the ReLU would not show"


def test_an_attribution_of_captum(explained, x):
    """Its metrics run on it, and say what their definitions say."""
    captum = pytest.importorskip("captum.attr", reason="captum is an optional extra")
    from captum.metrics import infidelity, sensitivity_max

    ours, target = explained.captum(2), torch.tensor([1, 0, 1])
    assert isinstance(ours, captum.Attribution)
    att = ours.attribute(x, target)
    assert att.shape == x.shape and att.dtype == x.dtype
    assert torch.equal(att[:, 0], att[:, 2]) and np.array_equal(att[:, 0], attribute(explained, x, target, 2))
    (of_tuple,) = ours.attribute((x,), target=target)
    assert torch.equal(of_tuple, att)

    step = 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))

    def stepped(inputs):
        return step, inputs - step

    with torch.no_grad():
        y = [explained.network(u)[torch.arange(3), target] for u in (x, x - step)]
        found = infidelity(explained.network, stepped, x, att, target=target, n_perturb_samples=1)
    expected = ((step * att).sum((1, 2, 3)) - (y[0] - y[1])).square()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)

    moved = ours.attribute(x + step, target) - att
    expected = moved.flatten(1).norm(dim=1) / att.flatten(1).norm(dim=1)
    found = sensitivity_max(ours.attribute, x, lambda inputs: inputs + step, target=target, n_perturb_samples=1)
    assert expected.max() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    several = sensitivity_max(ours.attribute, x, target=target, n_perturb_samples=2)
    assert several.shape == (3,) and (several >= 0).all()


def test_a_function_of_quantus_form(explained, x):
    """As its metrics call it: arrays, by keyword, with the device; the model may be the module itself."""
    call = partial(explained.explain_func, inputs=x.numpy(), targets=np.array([1, 0, 1]))
    for model in (explained.network, explained.network.module):
        att = call(model=model, device="cpu", start_block=3, attribution_start="raw")
        assert isinstance(att, np.ndarray) and att.shape == (3, 1, 64, 64) and att.dtype == np.float32
        ours = attribute(explained, x, [1, 0, 1], 3, "raw")
        assert np.array_equal(att[:, 0], ours)
    with pytest.raises(
        ValueError, match=r"^the prototypes are of ResNet, the model given is another: explain\(\) it.*$"
    ):
        call(model=nn.Identity())


def test_metrics_of_quantus(explained, x):
    quantus = pytest.importorskip("quantus", reason="needs Quantus: pip install quantus")
    y, inputs = np.array([1, 0, 1]), x.numpy()
    how = {"model": explained.network, "x_batch": inputs, "y_batch": y, "device": "cpu"}
    how |= {"explain_func": explained.explain_func, "explain_func_kwargs": {"start_block": 4}}
    sparse = quantus.Sparseness(abs=True, normalise=False, disable_warnings=True)(**how, a_batch=None)
    for score, att in zip(sparse, np.abs(attribute(explained, x, y, 4)), strict=True):
        values = np.sort(att.ravel())
        rank = np.arange(1, values.size + 1)
        gini = ((2 * rank - values.size - 1) * values).sum() / (values.size * values.sum())
        assert score == pytest.approx(gini, rel=1e-3)
    flipping = quantus.PixelFlipping(features_in_step=1024, perturb_baseline="black", disable_warnings=True)
    curves = np.array(flipping(**how, a_batch=None))
    black = x.amin((1, 2, 3), keepdim=True).expand_as(x)  # Quantus calls the smallest value of an image so
    with torch.no_grad():
        all_flipped = explained.network(black).softmax(1)[torch.arange(3), torch.from_numpy(y)]
    assert curves.shape == (3, 12)
    np.testing.assert_allclose(curves[:, -1], all_flipped, rtol=1e-3)
    with pytest.raises(ValueError, match="the model given is another"):
        quantus.MPRT(disable_warnings=True, display_progressbar=False)(**how)  # explains copies with random weights


def test_what_cannot_be_attributed_is_one_line(explained, x, photos):
    with pytest.raises(ValueError, match=r"start_block must be one of \[4, 3, 2\], got 1"):
        attribute(explained, x, start_block=1)
    with pytest.raises(ValueError, match="target must be one class, or one for each of the 3 images, got 2"):
        attribute(explained, x, [0, 1])
    for target in ([0, 7, 1], "church", 2):
        with pytest.raises(
            ValueError, match=f"target must be a class of ResNet, got {target if target != [0, 7, 1] else 7!r}"
        ):
            attribute(explained, x, target)
    with pytest.raises(ValueError, match=r"start blocks run from 2 to 4, got 1"):
        explained.labels(0, 1)


class Squashed(nn.Module):
    """The maximum over positions before the head."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.encoder(x).amax((2, 3)))


def test_where_eq_11_does_not_hold_there_are_labels_and_no_attributions(photos):
    torch.manual_seed(0)
    network = kmex.network(Squashed(), classes=["flower", "temple"], image_size=32)
    explained = kmex.explain(network, photos, prototypes_per_class=2, restarts=1, device="cpu", log=str)
    found = explained.labels(0)
    assert found.attribution is None and found.labels.shape == (32, 32) and found.table.share.sum() == pytest.approx(1)
    with pytest.raises(ValueError, match=r"^there are no attributions, as eq. 11 does not hold for Squashed: [^\n]+$"):
        attribute(explained, torch.zeros(1, 3, 32, 32))


def test_without_captum_one_line():
    code = "import sys; sys.modules['captum'] = None; import kmex_utils.explanation.captum"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert re.search(r"\nImportError: captum is not installed: pip install captum\n$", done.stderr)
