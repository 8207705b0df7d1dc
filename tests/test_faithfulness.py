"""Measures of attributions against closed forms, naive loops, other libraries and attributions of known quality."""

import copy
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

import kmex_utils as kmex
from kmex_utils.evaluation import faithfulness
from kmex_utils.evaluation.faithfulness import area, steps_of
from kmex_utils.method.attribution import attribution, upsample

pytest_plugins = ("tests.fixtures_explained",)

SIDE = 8
TARGET = torch.tensor([1, 0, 1])


@pytest.fixture
def x(generator):
    return torch.rand(3, 3, SIDE, SIDE, generator=generator)


@pytest.fixture
def weights(generator):
    return torch.randn(2, 3, SIDE, SIDE, generator=generator)


@pytest.fixture
def linear(weights):
    """Scores y_j = w_j · x: what a pixel is worth is known."""
    return lambda images: torch.einsum("nchw,jchw->nj", images, weights)


def worth(x, fill, weights):
    """By how much y falls when a pixel goes, [N, S, S]."""
    return ((x - fill) * weights[TARGET]).sum(1)


def by_sorting(att, value):
    """Mean over the curve of a linear network that loses single pixels, highest first: (j + ½) / P of each stays."""
    p = att[0].numel()
    in_order = value.flatten(1).gather(1, att.flatten(1).argsort(1, descending=True))
    return (in_order * (torch.arange(p) + 0.5) / p).sum(1)


# --- deletion and insertion -----------------------------------------------------------------------------------------


def test_of_a_linear_network_in_closed_form(x, weights, linear, generator):
    """Every pixel a step: the pixel that goes j-th counts until then; insertion from the fill mirrors it."""
    att, fill = torch.randn(3, SIDE, SIDE, generator=generator), faithfulness.mean_colour(x)
    step, value = steps_of(att, SIDE * SIDE), worth(x, fill, weights)
    ends = [linear(images).gather(1, TARGET[:, None])[:, 0] for images in (x, fill)]
    expected = ends[1] + by_sorting(att, value)
    torch.testing.assert_close(area(linear, x, TARGET, step, fill).float(), expected, rtol=1e-4, atol=1e-4)
    expected = ends[0] - by_sorting(att, value)
    inserted = area(linear, x, TARGET, step, fill, insertion=True)
    torch.testing.assert_close(inserted.float(), expected, rtol=1e-4, atol=1e-4)


def test_no_order_of_a_linear_network_deletes_faster_than_its_own(x, weights, linear, generator):
    fill = faithfulness.blurred(x)
    own = worth(x, fill, weights)
    of = {name: area(linear, x, TARGET, steps_of(att, 16), fill) for name, att in (("own", own), ("opposite", -own))}
    for _ in range(5):
        other = area(linear, x, TARGET, steps_of(torch.rand(own.shape, generator=generator), 16), fill)
        assert (of["own"] < other).all() and (other < of["opposite"]).all()


@pytest.mark.parametrize("insertion", [False, True])
def test_a_constant_attribution_gives_the_straight_line(x, linear, insertion):
    """Half of both ends, however the pixels lie in memory; a curve that ranks pixels gives what memory order says."""
    fill = faithfulness.mean_colour(x)
    found = area(linear, x, TARGET, steps_of(torch.ones(3, SIDE, SIDE), 20), fill, insertion=insertion)
    expected = (linear(x) + linear(fill)).gather(1, TARGET[:, None])[:, 0] / 2
    torch.testing.assert_close(found.float(), expected)


def test_pixels_of_a_segment_go_together(x, linear):
    """Segments of 12, 20 and 32 of 64 pixels in 4 steps: the first fits into step 1, the second into 2, then 4."""
    att = torch.tensor([3.0] * 12 + [2.0] * 20 + [-1.0] * 32).view(1, SIDE, SIDE)
    step = steps_of(att, 4)
    assert step.flatten().tolist() == [1] * 12 + [2] * 20 + [4] * 32
    fill, y, image = torch.zeros_like(x[:1]), [], x[:1].clone()
    for count in (0, 12, 32, 64):
        image.flatten(2)[:, :, :count] = 0
        y.append(float(linear(image)[0, 1]))
    shares = np.array([0, 12, 32, 64]) / 64
    expected = np.trapezoid(y, shares)
    assert float(area(linear, x[:1], TARGET[:1], step, fill)) == pytest.approx(expected, rel=1e-5)


def test_steps_by_counting(generator):
    """The step of a pixel is the first whose share covers it and all that score as high."""
    att = torch.randint(0, 6, (2, 5, 7), generator=generator).float()
    for image, step in zip(att, steps_of(att, 10), strict=True):
        for value, found in zip(image.flatten().tolist(), step.flatten().tolist(), strict=True):
            as_high = int((image >= value).sum())
            assert found == next(k for k in range(1, 11) if as_high * 10 <= k * 35)


def test_random_tie_orders_agree_in_the_mean(x, weights, linear, generator):
    """Of a linear network each order of a segment's pixels is as likely as its reverse, so the mean is the line."""
    att = torch.randint(0, 3, (3, SIDE, SIDE), generator=generator).float()
    fill = faithfulness.mean_colour(x)
    together = area(linear, x, TARGET, steps_of(att, SIDE * SIDE), fill)
    found = []
    for _ in range(400):
        broken = faithfulness.shuffled_ties(att, generator)
        found.append(area(linear, x, TARGET, steps_of(broken, SIDE * SIDE), fill))
    found = torch.stack(found)
    error = found.std(0) / 20
    assert (found.std(0) > 1e-3).all() and ((found.mean(0) - together).abs() < 4 * error).all()
    ranks = broken.flatten(1).sort(1).values
    assert torch.equal(ranks, torch.arange(64.0).expand(3, -1)), "a rank each"
    order = broken.flatten(1).argsort(1)
    assert (att.flatten(1).gather(1, order).diff(dim=1) >= 0).all(), "what is higher stays higher"


def test_pieces_in_random_order_stay_pieces(generator):
    att = torch.randint(0, 4, (200, 3, 3), generator=generator).float()
    found = faithfulness.random_order(att, generator)
    for a, b in zip(att.flatten(1), found.flatten(1), strict=True):
        assert torch.equal(a[:, None] == a, b[:, None] == b)
    first = (found.flatten(1) == found.flatten(1).amax(1, keepdim=True)) & (att.flatten(1) == 0)
    share = first.any(1).float().mean()
    assert 0.15 < share < 0.38, "of about four pieces each comes first as often"


def test_quantus_agrees_where_nothing_ties(x, weights, generator, monkeypatch):
    """Its curves are ours from the first step on; its area leaves the first step out and counts steps, not shares."""
    quantus = pytest.importorskip("quantus", reason="needs Quantus: pip install quantus")
    att, steps, grey = torch.rand(3, SIDE, SIDE, generator=generator), 16, x[:, :1]  # it ranks channels, too
    black = grey.amin((1, 2, 3), keepdim=True).expand_as(grey)  # Quantus calls the smallest value of an image so
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(SIDE * SIDE, 2, bias=False)).eval()
    module[1].weight = torch.nn.Parameter(weights[:, 0].flatten(1))

    how = {"features_in_step": SIDE * SIDE // steps, "perturb_baseline": "black", "disable_warnings": True}
    flipping = quantus.PixelFlipping(**how, abs=False, normalise=False)
    call = {"x_batch": grey.numpy(), "y_batch": TARGET.numpy(), "a_batch": att[:, None].numpy(), "device": "cpu"}
    theirs = torch.tensor(np.array(flipping(model=module, softmax=False, **call)))
    with torch.no_grad():
        start = module(grey).gather(1, TARGET[:, None])
        ours = area(module, grey, TARGET, steps_of(att, steps), black)
    expected = torch.trapezoid(torch.cat([start, theirs], 1), dx=1 / steps, dim=1)
    torch.testing.assert_close(ours, expected.double(), rtol=1e-4, atol=1e-4)
    first = (start[:, 0] + theirs[:, 0]) / 2 / steps
    monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)  # as its area still calls it
    assert flipping.get_auc_score / steps == pytest.approx(float((ours - first).mean()), rel=1e-3)


def test_blur_is_rises():
    """11 pixels with σ = 5 at 224 (its example code), and a tent of 3 where that is less than a pixel."""
    x = torch.zeros(1, 3, 224, 224)
    x[..., 100, 100] = 1
    row = np.exp(-0.5 * (np.arange(-5, 6) / 5) ** 2)
    kernel = np.outer(row, row) / row.sum() ** 2
    np.testing.assert_allclose(faithfulness.blurred(x)[0, 0, 95:106, 95:106], kernel, rtol=1e-4)
    assert faithfulness.blurred(x)[0, 0, 94, 100] == 0
    assert (faithfulness.blurred(x[..., 92:108, 92:108])[0, 0] > 0).sum() == 9


# --- ROAD -----------------------------------------------------------------------------------------------------------


def naive_imputation(image, removed):
    """Each removed pixel the weighted mean of its neighbours, by a dense solve."""
    height, width = removed.shape
    a, b = np.eye(height * width), image.reshape(3, -1).T.copy()
    for i, j in np.argwhere(removed):
        row, total = i * width + j, 0.0
        b[row] = 0
        for di, dj in itertools.product((-1, 0, 1), repeat=2):
            if (di or dj) and 0 <= i + di < height and 0 <= j + dj < width:
                weight = 1 / 12 if di and dj else 1 / 6
                a[row, (i + di) * width + j + dj] -= weight
                total += weight
        a[row, row] = total
    return np.linalg.solve(a, b).T.reshape(image.shape)


def test_road_by_a_dense_solve(generator):
    x = torch.rand(4, 3, 7, 6, generator=generator)
    removed = torch.rand(4, 7, 6, generator=generator) < torch.tensor([0.2, 0.5, 0.9, 0.0])[:, None, None]
    filled = faithfulness.imputed(x, removed, noise=0)
    for image, hole, found in zip(x, removed, filled, strict=True):
        np.testing.assert_allclose(found, naive_imputation(image.double().numpy(), hole.numpy()), rtol=1e-4, atol=1e-6)
    nothing = faithfulness.imputed(x, torch.ones_like(removed), noise=0)
    torch.testing.assert_close(nothing, faithfulness.mean_colour(x))


def test_road_noise(generator):
    x, removed = torch.rand(1, 3, 40, 40, generator=generator), torch.zeros(1, 40, 40, dtype=torch.bool)
    removed[:, :30] = True
    twice = [faithfulness.imputed(x, removed, noise=0.1, seed=1) for _ in range(2)]
    assert torch.equal(*twice)
    noise = (twice[0] - faithfulness.imputed(x, removed, noise=0))[0]
    assert float(noise[:, :30].std()) == pytest.approx(0.1, rel=0.05) and not noise[:, 30:].any()


def test_road_of_quantus(generator):
    quantus = pytest.importorskip("quantus", reason="needs Quantus: pip install quantus")
    image, removed = torch.rand(3, 12, 12, generator=generator), torch.rand(12, 12, generator=generator) < 0.6
    index = removed.flatten().nonzero()[:, 0].numpy()
    theirs = quantus.functions.perturb_func.noisy_linear_imputation(image.numpy(), index, noise=0.0)
    ours = faithfulness.imputed(image[None], removed[None], noise=0)[0]
    np.testing.assert_allclose(ours, np.asarray(theirs).reshape(3, 12, 12), rtol=1e-4, atol=1e-5)


# --- where it is ----------------------------------------------------------------------------------------------------


def test_localisation_of_known_attributions():
    """A box of the upper left quarter: all inside, all outside, everywhere the same, and half of it."""
    att = torch.zeros(4, 8, 8)
    att[0, 1:3, 1:3], att[1, 6, 6], att[2], att[3, 3:5, :2] = 2.0, 1.0, 0.7, 1.0
    att[0, 7, 7] = -5.0  # speaks against the class: no energy
    found = faithfulness.localisation(att, torch.tensor([0, 0, 0.5, 0.5]).expand(4, -1))
    assert found["pointing game"].tolist() == [1.0, 0.0, 0.25, 0.5], "all of the highest count, in equal parts"
    assert found["energy inside"].tolist() == pytest.approx([1.0, 0.0, 0.25, 0.5])
    assert found["box"].tolist() == [0.25] * 4


def test_a_pixel_is_where_its_centre_is():
    """The box from 0.24 to 0.66 of four pixels holds the centres 0.375 and 0.625, in height; in width those below ½."""
    att = torch.arange(16.0).view(1, 4, 4)
    found = faithfulness.localisation(att, torch.tensor([[0.24, 0.0, 0.66, 0.5]]))
    assert float(found["energy inside"]) == pytest.approx((4 + 5 + 8 + 9) / 120) and float(found["box"]) == 4 / 16
    unknown = faithfulness.localisation(att, torch.full((1, 4), torch.nan))
    assert all(of_image.isnan().all() for of_image in unknown.values())
    assert faithfulness.localisation(-att, torch.tensor([[0, 0, 1, 1.0]]))["energy inside"].isnan()


# --- exact deletion -------------------------------------------------------------------------------------------------


def replaced(network, h, mean, w):
    """y where the share w [R] of each row of h [1, D, H, W] is the mean row, by running the head."""
    rows = h.flatten(2)[0].T
    mixed = (1 - w[:, None]) * rows + w[:, None] * mean
    return network.classifier(mixed.mean(0))


def test_exact_deletion_by_replacing_rows(generator):
    """Every set of segments, on h's own grid and a finer one, against the head run on h with replaced rows."""
    torch.manual_seed(0)
    from torchvision.models import resnet18

    network = kmex.network(resnet18(num_classes=3), image_size=96)
    with torch.no_grad():
        h = network.activations(torch.rand(2, 3, 96, 96, generator=generator))[-1]
    mean, j = 0.3 * torch.rand(512, generator=generator), torch.tensor([2, 0])
    for grid in ((3, 3), (7, 6)):
        a = torch.stack([upsample(e.view(1, 3, 3), grid).flatten() for e in torch.eye(9)], 1)  # A [R', R] of eq. 7
        effect = faithfulness.effects(h, network.c[j], mean, grid)
        att = torch.randint(0, 4, (2, *grid), generator=generator).float()
        found, falls = faithfulness.exact_deletion(att, effect), []
        for i in range(2):
            y, share = [], []
            for least in (9.0, 3.0, 2.0, 1.0, 0.0):
                gone = (att[i] >= least).flatten().float()
                w = (a.T @ gone) / a.sum(0)
                y.append(float(replaced(network, h[i : i + 1], mean, w)[j[i]]))
                share.append(float(gone.mean()))
                assert y[0] - y[-1] == pytest.approx(float(effect[i][att[i] >= least].sum()), rel=1e-3, abs=1e-5)
            falls.append((np.trapezoid(np.array(y) - y[-1], share), y[0] - y[-1]))
        area, fall = map(np.array, zip(*falls, strict=True))
        np.testing.assert_allclose(found, 0.5 + (area - fall / 2) / fall.mean(), rtol=1e-3, atol=1e-5)


def test_exact_deletion_of_the_known(generator):
    """A constant attribution scores ½; raw eq. 11 takes rows in the best order there is."""
    h, c = torch.rand(5, 6, 4, 3, generator=generator), torch.rand(5, 6, generator=generator)
    effect = faithfulness.effects(h, c, torch.zeros(6), (4, 3))
    constant = faithfulness.exact_deletion(torch.ones(5, 4, 3), effect)
    assert constant.tolist() == pytest.approx([0.5] * 5)
    best = faithfulness.exact_deletion(attribution(h, c), effect)
    for _ in range(20):
        assert (best <= faithfulness.exact_deletion(torch.rand(5, 4, 3, generator=generator), effect)).all()


# --- sanity check and what it is compared with ----------------------------------------------------------------------


def test_randomised_from_the_head_down(network):
    """Block by block: what lies before keeps its weights, what lies after does not, the network itself keeps all."""
    before = copy.deepcopy(network.module.state_dict())
    parts = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4", "fc"]
    for block, first in ((5, "fc"), (4, "layer4"), (3, "layer3"), (2, "layer2"), (1, "conv1")):
        state = faithfulness.randomised(network, block).module.state_dict()
        convolutions = {key for key in state if key.endswith("weight") and "bn" not in key and state[key].dim() > 1}
        same = {key.split(".")[0] for key in convolutions if torch.equal(state[key], before[key])}
        other = {key.split(".")[0] for key in convolutions if not torch.equal(state[key], before[key])}
        assert same == {part for part in parts[: parts.index(first)] if part != "bn1"}
        assert other == {part for part in parts[parts.index(first) :] if part != "bn1"}
    assert all(torch.equal(value, before[key]) for key, value in network.module.state_dict().items())
    again, another = (faithfulness.randomised(network, 5, seed).module.fc.weight for seed in (0, 1))
    assert torch.equal(faithfulness.randomised(network, 5).module.fc.weight, again) and not torch.equal(again, another)


def test_agreement_of_maps_and_attributions(generator):
    a = torch.randint(0, 3, (4, 6, 6), generator=generator)
    b = torch.cat([2 - a[:1], torch.zeros(1, 6, 6, dtype=torch.int64), a[2:]])
    b[2, :3] = torch.randint(0, 3, (3, 6), generator=generator)
    found = faithfulness.adjusted_rand(a, b)
    assert found[0] == 1 and found[1] == 0 and 0 < found[2] < 1 and found[3] == 1
    assert faithfulness.adjusted_rand(b[1:2], b[1:2] + 4).isnan().all(), "one segment each: nothing to compare"
    left, right = a.float(), a.float() + torch.randint(0, 2, a.shape, generator=generator)
    expected = [spearmanr(u.flatten(), v.flatten()).statistic for u, v in zip(left, right, strict=True)]
    np.testing.assert_allclose(faithfulness.spearman(left, right), expected, rtol=1e-9)
    assert faithfulness.spearman(left, torch.ones_like(left)).isnan().all()


def test_rise_is_the_weighted_mean_of_its_masks(x):
    """Scores that do not see the image give the masks' own mean, about 1 everywhere; a network that looks at one corner
    gets its highest value there.
    """
    flat = faithfulness.rise(lambda images: torch.ones(len(images), 2), x[:1], TARGET[:1], 4000, cells=4)
    assert float(flat.mean()) == pytest.approx(1, abs=0.02) and float((flat - 1).abs().max()) < 0.1
    corner = faithfulness.rise(lambda images: images[:, 0, :2, 6:].mean((1, 2))[:, None].expand(-1, 2), x, TARGET, 1000)
    for att in corner:
        row, column = divmod(int(att.argmax()), SIDE)
        assert row <= 1 and column >= 6
    again = faithfulness.rise(lambda images: images.flatten(1)[:, :2], x, TARGET, 70)
    assert torch.equal(again, faithfulness.rise(lambda images: images.flatten(1)[:, :2], x, TARGET, 70))


def test_what_notebook_17_takes_from_captum_is_torch_cams(network, digits):
    """LayerCAM, on a layer whose outputs are not negative, and Grad-CAM: both before any scaling."""
    captum = pytest.importorskip("captum.attr", reason="captum is an optional extra")
    methods = pytest.importorskip("torchcam.methods", reason="needs torch-cam: pip install torchcam")
    x, j = digits.input(digits.test.pixels[:3]).requires_grad_(), [2, 0, 1]
    layer, target = network.module.layer2, torch.tensor(j)
    pairs = {
        "LayerCAM": captum.LayerGradientXActivation(network, layer).attribute(x, target).relu().sum(1),
        "GradCAM": captum.LayerGradCam(network, layer).attribute(x, target, relu_attributions=True)[:, 0],
    }
    for name, ours in pairs.items():
        with getattr(methods, name)(network.module, "layer2") as extractor:
            (theirs,) = extractor(j, network.module(x), normalized=False)
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-3, atol=1e-5 * float(theirs.max()))
        assert theirs.max() > 0 and ours.shape == (3, 4, 4)


def test_controls():
    x = torch.zeros(1, 3, 9, 9)
    x[:, :, :, 5:] = 1
    edges = faithfulness.edges(x)
    assert edges.shape == (1, 9, 9) and edges[0, :, 4:6].eq(4).all(), "Sobel's weights of a step add to 4"
    assert not edges[0, :, [0, 1, 2, 3, 6, 7, 8]].any()
    centre = faithfulness.centre(x)[0]
    assert int(centre.argmax()) == 40 and float(centre[4, 8]) == pytest.approx(np.exp(-2), rel=1e-5)


def test_summary_is_mean_and_standard_error():
    values, null = torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([0.0, 1.0, 7.0])
    (record,) = faithfulness.summary({"a": values}, {"a": null})
    assert record["measure"] == "a" and record["value"] == 2 and record["spread"] == pytest.approx(1.0)
    assert record["null"] == pytest.approx(8 / 3) and record["margin_spread"] == pytest.approx(0.5)


# --- of an explanation ----------------------------------------------------------------------------------------------


def test_a_bench_measures_by_these_functions(network, digits):
    """Each part of what it says again; NaN boxes are left out of localisation."""
    x = digits.input(digits.test.pixels[:3])
    boxes = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.2, 0.2, 0.9, 0.9], [torch.nan] * 4])
    bench = faithfulness.Bench(network, x, steps=3, mean=torch.zeros(512), boxes=boxes)
    with torch.no_grad():
        activations, y = network.outputs(x)
    assert torch.equal(bench.target, y.argmax(1)) and torch.equal(bench.h, activations[-1])
    att = torch.tensor([[1.0, 2], [3, 3]]).expand(3, -1, -1)
    values, null = bench.measure(att), bench.null(att)
    sized = att.repeat_interleave(16, 1).repeat_interleave(16, 2)
    on = (bench.y, x, bench.target, steps_of(sized, 3))
    for name, fill in (("mean colour", faithfulness.mean_colour(x)), ("blur", faithfulness.blurred(x))):
        torch.testing.assert_close(values[f"deletion, {name}"], area(*on, fill))
        torch.testing.assert_close(values[f"insertion, {name}"], area(*on, fill, insertion=True))
    torch.testing.assert_close(values["ROAD"], area(*on[:3], steps_of(sized, 5), None), rtol=1e-3, atol=1e-4)
    broken = bench.with_ties_broken(att)
    assert broken.shape == (3,) and not torch.equal(broken, bench.with_ties_broken(att))
    c_j = network.c[bench.target]
    effect = faithfulness.effects(bench.h, c_j, torch.zeros(512), (2, 2))
    torch.testing.assert_close(values["exact deletion"], faithfulness.exact_deletion(att, effect).detach())
    assert values["pointing game"].tolist()[:2] == pytest.approx([0, float((sized[1] == 3)[6:29, 6:29].sum() / 512)])
    assert null["pointing game"].tolist()[:2] == [0.25, (23 / 32) ** 2] and null["energy inside"][2].isnan()
    assert values["pointing game"][2].isnan() and values["energy inside"][2].isnan()
    assert set(null) == set(values) and (null["exact deletion"] == 0.5).all()


def test_what_cannot_be_measured_is_one_line():
    scaled = SimpleNamespace(form="scaled", name="ConvNeXt")
    with pytest.raises(ValueError, match="^exact deletion needs a linear head, ConvNeXt has none: leave mean out$"):
        faithfulness.Bench(scaled, torch.zeros(1, 3, 8, 8), mean=torch.zeros(4))
    unnamed = SimpleNamespace(name="Own", blocks=("relu", "h"), module=torch.nn.Sequential(torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="^block 1 of Own ends at no module, its weights cannot be told apart$"):
        faithfulness.randomised(unnamed, 2)


@pytest.mark.slow
def test_a_table_of_any_explanation(explained):
    """Own network and folder: one row again from its parts."""
    table = faithfulness.table(explained, [0, 3, 5], steps=4)
    assert set(table.method) == {"B4", "B34", "B234", "CAM", "centre", "edges", "random pixels"}
    measures = ["deletion, mean colour", "deletion, blur", "insertion, mean colour", "insertion, blur", "ROAD"]
    assert table.measure.tolist() == measures * 7 and table.value.between(0, 1).all() and table.null.between(0, 1).all()
    pixels = np.stack([explained.picture(i).pixels for i in (0, 3, 5)])
    x = explained.network.input(pixels)
    att = torch.from_numpy(explained.captum(3).attribute(x)[:, 0].numpy())
    with torch.no_grad():
        p = explained.network(x).softmax(1)
    y, target = faithfulness.probabilities(explained.network), p.argmax(1)
    of = area(y, x, target, steps_of(att, 4), faithfulness.mean_colour(x))
    row = table.set_index(["method", "measure"]).loc["B34", "deletion, mean colour"]
    assert row.value == pytest.approx(float(of.mean()), rel=1e-4)
    assert row.spread == pytest.approx(float(of.std()) / 3**0.5, rel=1e-3)
    again = faithfulness.table(explained, [0, 3, 5], steps=4)
    assert again.equals(table)
