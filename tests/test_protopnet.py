"""ProtoPNet against the authors' code, and its training against an uninterrupted run.

``protopnet-authors.safetensors`` holds numbers only. They come from github.com/cfchen-duke/ProtoPNet at commit
81bf2b70, run on the CPU in float32: for prototypes of 1 x 1 and 2 x 2 positions, 24 random activations ``x``
[24, 10, 4, 3] of three classes went through their ``PPNet`` (add-on "regular", depth 6, two prototypes a class, the
features handing x through). Recorded are its initial weights (``start``), distances, similarities and logits; the terms
that ``_train_or_test`` logs; the weights after five epochs of its warm-up (three batches of 8); what
``push_prototypes`` chose in batches of 7; the last layer after 20 passes; and ``find_high_activation_crop`` of the maps
that OpenCV upsampled to 56 pixels.
"""

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small as small_input
from safetensors.torch import load_file
from torch import nn

from kmex_utils.data import load
from kmex_utils.method.explainers import ProtoPNet
from kmex_utils.networks import Network, for_training
from kmex_utils.paper.runs import Run
from kmex_utils.store import save_tensors
from kmex_utils.training import loop, protopnet
from kmex_utils.training.batches import affine
from kmex_utils.training.protopnet import Options, TrainableProtoPNet, train
from kmex_utils.training.protopnet.schedule import costs, optimizers, push, total
from kmex_utils.training.protopnet.views import activated_box, upsampled

AUTHORS = load_file(Path(__file__).with_name("protopnet-authors.safetensors"))
TERMS = ["cross_entropy", "cluster", "separation"]


def theirs(size, prefix=""):
    start = f"{size}x{size}.{prefix}"
    return {name.removeprefix(start): value for name, value in AUTHORS.items() if name.startswith(start)}


class Through(nn.Module):
    """Features that hand x through."""

    def __init__(self, channels, classes):
        super().__init__()
        self.classes = tuple(map(str, range(classes)))
        self.classifier = nn.Linear(channels, classes, bias=False)

    def encode(self, x):
        return x


def network_of(size):
    """Our network with their initial weights, its features handing x through."""
    network = TrainableProtoPNet(Through(10, 3), 2, Options(depth=6, size=size))
    missing = network.load_state_dict(theirs(size, "start."), strict=False).missing_keys
    assert set(missing) == {"labels", "image", "position", "network.classifier.weight"}
    return network


def close(ours, expected, tolerance=1e-5):
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def epoch(network, optimizer, options):
    """Their loop: three batches in order; the mean of each term."""
    x, label = (AUTHORS[f"{options.size}x{options.size}.{name}"] for name in ("x", "label"))
    means = []
    for part in torch.arange(24).split(8):
        smallest = network.smallest(network.add_on(x[part]))
        y = network.scores(smallest)
        terms = costs(y, smallest, label[part], network)
        optimizer.zero_grad()
        total(terms, options).backward()
        optimizer.step()
        means.append([terms[name].item() for name in TERMS])
    return torch.tensor(means, dtype=torch.float64).mean(0)


@pytest.mark.parametrize("size", [1, 2])
def test_distances_similarities_and_logits_are_the_authors(size):
    network, expected = network_of(size), theirs(size)
    explainer = network.explainer
    with torch.no_grad():
        h = explainer.h([expected["x"]])
        close(explainer.squared_distances(h).transpose(1, 2), expected["distances"].flatten(2))
        close(explainer.sim(h).transpose(1, 2), expected["similarities"].flatten(2))
        close(explainer([expected["x"]]), expected["logits"])
        close(network(expected["x"]), expected["logits"])
        close(network.smallest(network.add_on(expected["x"])), expected["smallest"])


@pytest.mark.parametrize("size", [1, 2])
def test_the_whole_schedule_is_the_authors(size):
    """Terms of the loss, five warm-up epochs, push, 20 passes of the last layer: one after the other."""
    network, expected, options = network_of(size), theirs(size), Options(depth=6, size=size)
    x, label = expected["x"], expected["label"]
    with torch.no_grad():
        smallest = network.smallest(network.add_on(x))
        terms = costs(network.scores(smallest), smallest, label, network)
    close(torch.stack([terms[name] for name in TERMS]).double(), expected["terms"])

    adam = optimizers(network, options)
    for _ in range(5):
        means = epoch(network, adam["warm"], options)
    close(means, expected["warm_terms"])
    close(network.prototypes.detach(), expected["warm.prototypes"])
    close(network.add_on[2].weight.detach(), expected["warm.add_on.2.weight"], 1e-4)

    with torch.no_grad():
        moved = push(network, network.add_on(x).split(7), label)
    assert network.image.tolist() == expected["push.image"].tolist()
    assert network.position.tolist() == expected["push.position"].tolist()
    close(moved, expected["push.distance"])
    close(network.prototypes.detach(), expected["push.prototypes"], 1e-4)

    for _ in range(20):
        means = epoch(network, adam["last"], options)
    close(means, expected["last_terms"], 1e-4)
    close(network.last.weight.detach(), expected["last.weight"])
    close(costs(network.scores(smallest), smallest, label, network)["l1"].detach(), expected["l1"])
    with (
        torch.no_grad()
    ):  # at distance zero, where a pushed prototype's own patch lies, rounding counts 1/epsilon times
        close(network(x), expected["last.logits"], 5e-3)


@pytest.mark.parametrize("size", [1, 2])
def test_maps_and_boxes_are_opencvs(size):
    expected = theirs(size)
    maps = [upsampled(activation, 56) for activation in expected["activation"]]
    np.testing.assert_allclose(maps[0], expected["upsampled"].numpy(), atol=1e-4)
    assert [list(activated_box(m)) for m in maps] == expected["boxes"].tolist()


def test_the_gradient_of_the_loss_is_numerical():
    network = network_of(2).double()
    x, label = AUTHORS["2x2.x"][:6].double(), AUTHORS["2x2.label"][:6]
    values = (network.prototypes, network.last.weight)
    smallest = network.smallest(network.add_on(x))
    total(costs(network.scores(smallest), smallest, label, network), Options()).backward()
    for parameter in values:
        flat, gradient = parameter.data.flatten(), parameter.grad.flatten()
        for i in (0, 7, len(flat) - 1):
            ends = []
            for step in (1e-6, -1e-6):
                flat[i] += step
                with torch.no_grad():
                    smallest = network.smallest(network.add_on(x))
                    ends.append(total(costs(network.scores(smallest), smallest, label, network), Options()).item())
                flat[i] -= step
            assert gradient[i].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-8)


def test_the_authors_schedule():
    steps = Options().plan()
    epochs = [(phase, epoch) for phase, epoch, i in steps if phase != "last"]
    assert epochs == [
        *(("warm", e) for e in range(5)),
        *(("joint", e) for e in range(5, 11)),
        ("push", 10),
        *(("joint", e) for e in range(11, 21)),
        ("push", 20),
    ]
    assert [i for phase, epoch, i in steps if phase == "last" and epoch == 10] == list(range(20))


@pytest.fixture(scope="module")
def digits():
    return load("mnist-mini", small_input(), images_per_class=6)


QUICK = Options(depth=8, warm_epochs=2, joint_epochs=3, push_start=3, push_every=3, last_passes=3, batch_size=16)


def small():
    """A network with batch normalisation that trains in no time: 32 pixels become one position, 64 become 2 x 2."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        block = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.BatchNorm2d(12), nn.ReLU(), nn.AvgPool2d(4))
        head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10, bias=False))
    return Network(nn.Sequential(block, *head), classes=tuple("0123456789"), input=small_input(64))


def fit(digits, checkpoint, options=QUICK, log=lambda line: None, **more):
    network = TrainableProtoPNet(small(), 2, options, seed=3)
    more = {"seed": 3, "made_by": {"network": "x"}, "precision": "float32", "save_after": 0.0, **more}
    history = train(network, digits, options, checkpoint=checkpoint, log=log, **more)
    return network, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("frozen", ["anew", "once"])
def test_a_killed_run_ends_with_the_same_weights(digits, tmp_path, frozen):
    """Cut within the warm-up, within the joint phase, between push and last layer, and within its passes."""
    options = replace(QUICK, frozen_features=frozen)
    whole, history = fit(digits, tmp_path / "whole.safetensors", options)
    plan = options.plan()

    class Killed(Exception):
        pass

    wanted = [("warm", 0, 0), ("joint", 2, 0), ("push", 3, 0), ("last", 3, 1)]
    for cut in (plan.index(step) + 1 for step in wanted):
        path = tmp_path / f"{cut}.safetensors"
        saves = itertools.count(1)

        def save(*state, saves=saves, cut=cut):
            save_tensors(*state)
            if next(saves) == cut:
                raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "save_tensors", save)
            fit(digits, path, options)
        lines = []
        resumed, resumed_history = fit(digits, path, options, lines.append)
        assert lines[0] == f"resuming after step {cut}"
        assert same(whole, resumed)
        drop = lambda records: [{k: v for k, v in r.items() if k != "seconds"} for r in records]  # noqa: E731
        assert drop(history) == drop(resumed_history)


def test_phases_train_what_they_should(digits, tmp_path):
    """Warm-up leaves the features' weights, the last phase everything but the last layer."""
    start = TrainableProtoPNet(small(), 2, QUICK, seed=3)
    warm, _ = fit(digits, tmp_path / "a", replace(QUICK, joint_epochs=0, last_passes=0, frozen_features="once"))
    last, _ = fit(digits, tmp_path / "b", replace(QUICK, joint_epochs=0, last_passes=2, frozen_features="once"))
    moved = lambda a, b: {n for (n, x), y in zip(a.named_parameters(), b.parameters(), strict=True) if (x != y).any()}  # noqa: E731
    assert {name.split(".")[0] for name in moved(start, warm)} == {"add_on", "prototypes"}
    assert moved(warm, last) == {"last.weight"}
    with_joint, _ = fit(digits, tmp_path / "c", replace(QUICK, last_passes=0))
    assert {name.split(".")[0] for name in moved(warm, with_joint)} == {"network", "add_on", "prototypes"}


def test_frozen_features_anew_follow_batch_statistics(digits, tmp_path):
    """As in the authors' code, batch normalisation stays in training mode while the features' weights are frozen."""
    options = replace(QUICK, joint_epochs=0, last_passes=0)
    fresh = small().module[0][1].running_mean
    anew, _ = fit(digits, tmp_path / "a", options)
    once, _ = fit(digits, tmp_path / "b", replace(options, frozen_features="once"))
    assert torch.equal(once.network.module[0][1].running_mean, fresh)
    assert not torch.equal(anew.network.module[0][1].running_mean, fresh)


@pytest.mark.parametrize("size", [1, 2])
def test_prototypes_are_the_patches_they_were_pushed_to(tmp_path, size):
    """Against all patches of all training images at once, from the trained network."""
    digits = load("mnist-mini", small_input(64), images_per_class=4)
    options = replace(QUICK, size=size, last_passes=0, frozen_features="once")
    network, history = fit(digits, tmp_path / "c", options)
    _, h = protopnet.evaluate(network, digits, "train")
    for k, label in enumerate(network.labels.tolist()):
        i, r = int(network.image[k]), int(network.position[k])
        assert digits.train.labels[i] == label
        close(network.prototypes[k].detach().flatten(), h[i, r])
    places = {(int(i), int(r)) for i, r in zip(network.image, network.position, strict=True)}
    assert [r["distinct"] for r in history if r["phase"] == "push"][-1] == len(places)


def test_push_is_the_nearest_patch_of_the_class():
    """By loops over all patches, whatever the batches; ties go to the first."""
    generator = torch.Generator().manual_seed(0)
    network = TrainableProtoPNet(Through(5, 3), 4, Options(depth=5))
    latent = torch.rand(20, 5, 3, 2, generator=generator)
    latent[7:14] = latent[:7]
    labels = torch.arange(20) % 7 % 3
    before = network.prototypes.detach().clone()[:, :, 0, 0]
    expected = []
    for k in range(12):
        patches = [(i, r) for i in range(20) if labels[i] == k // 4 for r in range(6)]
        distance = [((latent[i].flatten(1)[:, r] - before[k]) ** 2).sum() for i, r in patches]
        expected.append(patches[int(torch.stack(distance).argmin())])
    for batch in (1, 6, 20):
        network.prototypes.data.copy_(before[:, :, None, None])
        push(network, latent.split(batch), labels)
        assert list(zip(network.image.tolist(), network.position.tolist(), strict=True)) == expected


def test_push_never_holds_more_than_a_batch_of_one_class(monkeypatch):
    """In memory at once: distances of a batch's patches to the prototypes of a class, however many images there are."""
    network = TrainableProtoPNet(Through(5, 3), 4, Options(depth=5))
    sizes, real = [], ProtoPNet.squared_distances
    monkeypatch.setattr(ProtoPNet, "squared_distances", lambda self, h: sizes.append(real(self, h)) or sizes[-1])
    push(network, (torch.rand(10, 5, 3, 2) for _ in range(40)), torch.arange(400) % 3)
    assert max(d.numel() for d in sizes) <= 10 * 6 * 4


def test_affine_keeps_images_in_place():
    x = torch.zeros(64, 3, 33, 33)
    x[:, :, 16, 16] = 1.0
    x[:, :, 10:13, 16] = 1.0
    turned = affine(x, torch.Generator().manual_seed(0))
    assert torch.equal(turned, affine(x, torch.Generator().manual_seed(0)))
    assert (turned[:, 0, 15:18, 15:18].amax((1, 2)) > 0.5).all()
    column = (turned[:, 0, 9:14].sum(1) * torch.arange(33)).sum(1) / turned[:, 0, 9:14].sum((1, 2))
    assert 0.3 < (column - 16).abs().max() < 2.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(size=0), "size must be at least 1"),
        (dict(l1=-1.0), "l1 must not be negative"),
        (dict(add_on_rate=0.0), "add_on_rate must be positive"),
        (dict(frozen_features="never"), "'anew' or 'once', got 'never'"),
    ],
)
def test_bad_options(values, message):
    with pytest.raises(ValueError, match=message):
        Options(**values)


def test_bad_input_is_one_clear_line(digits, tmp_path):
    with pytest.raises(ValueError, match="2 x 2 positions does not fit the 1 x 1 grid of 32-pixel images"):
        fit(digits, tmp_path / "c", replace(QUICK, size=2))
    with pytest.raises(ValueError, match="60 training images are fewer than one batch of 80"):
        fit(digits, tmp_path / "c", replace(QUICK, batch_size=80))
    empty = replace(digits, train=replace(digits.train, labels=digits.train.labels.clamp_max(8)))
    with pytest.raises(ValueError, match="class '9' has no training images"):
        fit(empty, tmp_path / "c")
    with pytest.raises(ValueError, match="K/C.* must be at least 1"):
        TrainableProtoPNet(small(), 0, QUICK)
    with pytest.raises(ValueError, match="the loss is .* in the warm phase: lower its rates"):
        fit(digits, tmp_path / "c", replace(QUICK, prototypes_rate=1e30))


def test_a_trained_network_comes_back_and_explains(digits, tmp_path):
    run = Run.of(tmp_path, "mnist-mini", 3)
    trained = for_training("shufflenet_v2_x0_5", digits.classes, "scratch", digits.input, seed=3)
    made_by = {"arch": "shufflenet_v2_x0_5", "arch_args": {}, "classes": list(digits.classes), "data": digits.settings}
    run.save_training(trained.eval().requires_grad_(False), digits, made_by)
    with pytest.raises(FileNotFoundError, match="run notebook 05_protopnet"):
        run.part("ProtoPNet", "05_protopnet")
    with pytest.raises(ValueError, match="'imagenet', 'network' or a file with weights, got 'scratch'"):
        protopnet.start(run.network(), "scratch", 2, QUICK, 3)
    with pytest.raises(FileNotFoundError, match="imagenett"):
        protopnet.start(run.network(), "imagenett", 2, QUICK, 3)
    other = for_training("shufflenet_v2_x0_5", ["a", "b"], "scratch", digits.input, seed=4)
    torch.save(other.module.state_dict(), tmp_path / "other.pth")
    from_file = protopnet.start(run.network(), str(tmp_path / "other.pth"), 2, QUICK, 3).network.module.state_dict()
    weights = {name: value for name, value in other.module.state_dict().items() if not name.startswith("fc.")}
    assert len(weights) > 100 and all(torch.equal(from_file[name], value) for name, value in weights.items())
    with pytest.raises(ValueError, match="is of no library that makes it again"):
        protopnet.start(small(), "imagenet", 2, QUICK, 3)
    network = protopnet.start(run.network(), "network", 2, QUICK, 3)
    with pytest.raises(ValueError, match="not pushed"):
        protopnet.most_activated(network, digits, digits.test.pixels[0])
    train(network, digits, QUICK, seed=3, checkpoint=tmp_path / "c", made_by={}, log=lambda line: None)
    run.save_part("ProtoPNet", network.state_dict(), {"prototypes_per_class": 2, "options": asdict(QUICK)})
    again = protopnet.load(run.network(), *run.part("ProtoPNet", "05_protopnet"))
    assert same(network, again)
    j, activated = protopnet.most_activated(again, digits, digits.test.pixels[0], count=20)
    y = again(digits.input(digits.test.pixels[:1]))[0]
    assert j == int(y.argmax())
    assert sum(a.points for a in activated) == pytest.approx(y[j].item(), rel=1e-4), "all points sum to the score"
    assert [a.similarity for a in activated] == sorted((a.similarity for a in activated), reverse=True)


@pytest.mark.parametrize("size", [1, 2])
def test_boxes_are_the_patches(tmp_path, size):
    """On a 3 x 3 grid of 96 pixels a position is a square of 32."""
    digits = load("mnist-mini", small_input(96), images_per_class=4)
    network, _ = fit(digits, tmp_path / "c", replace(QUICK, size=size, frozen_features="once"))
    for k in range(len(network.labels)):
        i, source, box = protopnet.prototype_source(network, digits, k)
        row, column = divmod(int(network.position[k]), 4 - size)
        assert box == (32 * row, 32 * (row + size), 32 * column, 32 * (column + size))
        assert i == network.image[k] and source.shape == (96, 96, 3)
        shown = protopnet.faded(source, box)
        assert (shown[box[0] : box[1], box[2] : box[3]] == source[box[0] : box[1], box[2] : box[3]]).all()
    with pytest.raises(ValueError, match="box must be one of patch, activation"):
        protopnet.most_activated(network, digits, digits.test.pixels[0], box="cell")


def test_joint_rates_fall_as_the_authors_scheduler_makes_them():
    """Their loop steps StepLR(5, 0.1) before it trains a joint epoch."""
    options = Options(warm_epochs=3, joint_epochs=12)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.1)
    for epoch in range(3, 15):
        optimizer.step()
        scheduler.step()
        assert options.joint_rate(epoch) == pytest.approx(scheduler.get_last_lr()[0])
