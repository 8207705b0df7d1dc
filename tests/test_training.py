"""Training by the paper's recipe: batches, one step by hand, and a killed run against an uninterrupted one."""

import math
import shutil

import pytest
import torch
from conftest import small
from torch import nn

from kmex_utils.data import Input, load, own_input
from kmex_utils.hardware import pick_device, training_dtype
from kmex_utils.method.products import double_device
from kmex_utils.networks import Network, for_training
from kmex_utils.training import loop
from kmex_utils.training.batches import augment, training_batches
from kmex_utils.training.recipe import RECIPES, recipe
from kmex_utils.training.sgd import Schedule, train


@pytest.fixture(scope="module")
def digits():
    return load("mnist-mini", small(), images_per_class=6)


SCHEDULE = Schedule(epochs=3, batch_size=16, learning_rate=0.02, momentum=0.9)


def untrained(digits, arch="shufflenet_v2_x0_5"):
    return for_training(arch, digits.classes, "scratch", digits.input, seed=3)


def fit(digits, checkpoint, schedule=SCHEDULE, log=lambda line: None, network=None, **options):
    network = network or untrained(digits)
    options = {"seed": 3, "made_by": {"arch": "x"}, "precision": "float32", **options}
    history = train(network, digits, schedule, checkpoint=checkpoint, log=log, **options)
    return network, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory):
    """A training that nothing interrupts: the network, its history and its checkpoint."""
    checkpoint = tmp_path_factory.mktemp("whole") / "c.safetensors"
    return *fit(digits, checkpoint), checkpoint


class Killed(Exception):
    pass


def killed_after(epoch):
    """A log that raises after so many epochs."""

    def log(line):
        if f"epoch {epoch}/" in line:
            raise Killed

    return log


def test_one_step_is_sgd_with_momentum(digits, tmp_path):
    """Two steps by hand: v = m v + g, w = w - lr v, with the cosine's rates."""
    schedule = Schedule(epochs=1, batch_size=30, learning_rate=0.1, final_learning_rate=0.01, momentum=0.5)
    trained, network, before = (untrained(digits, "resnet18") for _ in range(3))
    fit(digits, tmp_path / "c.safetensors", schedule, network=trained)
    network.train().requires_grad_(True)
    velocity = [torch.zeros_like(p) for p in network.parameters()]
    for step, (x, labels) in enumerate(training_batches(digits, 30, 3, 0)):
        network.zero_grad()
        (-network(x).log_softmax(1)[torch.arange(30), labels].mean()).backward()
        rate = 0.01 + 0.09 * (1 + math.cos(math.pi * step / 2)) / 2
        with torch.no_grad():
            for p, v in zip(network.parameters(), velocity, strict=True):
                v.mul_(0.5).add_(p.grad)
                p.sub_(rate * v)
    for ours, expected, start in zip(trained.parameters(), network.parameters(), before.parameters(), strict=True):
        assert (ours - expected).norm() < 0.01 * (expected - start).norm()


def test_it_learns_and_is_deterministic(digits, whole, tmp_path):
    first, history, _ = whole
    again, _ = fit(digits, tmp_path / "c.safetensors")
    assert same(first, again)
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert not first.training and not any(p.requires_grad for p in first.parameters())


@pytest.mark.parametrize("done", [1, 2])
def test_a_killed_run_ends_with_the_same_weights(digits, whole, tmp_path, done):
    trained, history, _ = whole
    with pytest.raises(Killed):
        fit(digits, tmp_path / "cut.safetensors", log=killed_after(done))
    lines = []
    resumed, resumed_history = fit(digits, tmp_path / "cut.safetensors", log=lines.append)
    assert lines[0] == f"resuming after epoch {done}" and len(lines) == 1 + 3 - done
    assert same(trained, resumed)
    assert [r["loss"] for r in history] == [r["loss"] for r in resumed_history]


def test_a_killed_run_with_dropout_draws_the_same(digits, tmp_path):
    """Dropout and stochastic depth draw from the seed and the epoch, whatever the process has drawn before."""

    def with_dropout():
        torch.manual_seed(0)
        convolution = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Dropout(0.5), nn.ReLU())
        module = nn.Sequential(convolution, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        return Network(module, classes=digits.classes, input=digits.input)

    whole, _ = fit(digits, tmp_path / "whole.safetensors", network=with_dropout())
    network = with_dropout()
    torch.manual_seed(17)
    state = torch.get_rng_state()
    with pytest.raises(Killed):
        fit(digits, tmp_path / "cut.safetensors", log=killed_after(1), network=network)
    assert torch.equal(torch.get_rng_state(), state), "the process's random state is left as it was"
    resumed, _ = fit(digits, tmp_path / "cut.safetensors", network=with_dropout())
    assert same(whole, resumed)
    other, _ = fit(digits, tmp_path / "other.safetensors", network=with_dropout(), seed=4)
    assert not same(whole, other)


def test_a_checkpoint_of_other_settings_is_not_resumed(digits, whole, tmp_path):
    *_, checkpoint = whole
    shutil.copy(checkpoint, tmp_path)
    lines = []

    def log(line):
        lines.append(line)
        killed_after(1)(line)

    with pytest.raises(Killed):
        fit(digits, tmp_path / checkpoint.name, made_by={"arch": "other"}, log=log)
    assert "starting anew" in lines[0] and "epoch 1/3" in lines[1]


def test_a_finished_training_is_not_repeated(digits, whole, tmp_path, monkeypatch):
    """Its state, left by a kill after the last step, is all there is to do; unless other code made it."""
    trained, history, checkpoint = whole
    shutil.copy(checkpoint, tmp_path)
    lines = []
    again, same_history = fit(digits, tmp_path / checkpoint.name, log=lines.append)
    assert lines == ["resuming after epoch 3"] and same_history == history
    assert same(trained, again)
    monkeypatch.setattr(loop, "_code", lambda: "other")
    fit(digits, tmp_path / checkpoint.name, log=lines.append)
    assert "of a finished training by other code: starting anew" in lines[1] and len(lines) == 5


def test_bfloat16_trains_close_to_float32(digits, whole, tmp_path):
    _, single, _ = whole
    _, half = fit(digits, tmp_path / "c.safetensors", precision="bfloat16")
    assert half[0]["loss"] == pytest.approx(single[0]["loss"], rel=0.1)


def test_divergence_is_one_clear_line(digits, tmp_path):
    with pytest.raises(ValueError, match="the loss is .* in epoch 1: lower learning_rate"):
        fit(digits, tmp_path / "c.safetensors", Schedule(epochs=1, batch_size=16, learning_rate=1e18))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(epochs=0), "epochs must be at least 1"),
        (dict(epochs=1, learning_rate=-1.0), "learning_rate must be positive"),
        (dict(epochs=1, momentum=1.0), "momentum in"),
    ],
)
def test_bad_schedules(values, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**values)


def test_fewer_images_than_a_batch(digits, tmp_path):
    with pytest.raises(ValueError, match="60 training images are fewer than one batch of 128"):
        fit(digits, tmp_path / "c.safetensors", Schedule(epochs=1, batch_size=128))


@pytest.mark.parametrize(
    ("augmentation", "message"), [(dict(flip=2.0), "flip must be a probability"), (dict(padding=-2), "padding pixels")]
)
def test_bad_augmentation(digits, tmp_path, augmentation, message):
    with pytest.raises(ValueError, match=message):
        fit(digits, tmp_path / "c.safetensors", **augmentation)


def test_training_batches_depend_on_seed_and_epoch_only():
    digits = load("mnist-mini", Input(28, (0.5,) * 3, (0.5,) * 3))
    first = [labels.tolist() for _, labels in training_batches(digits, 256, seed=1, epoch=2)]
    again = [labels.tolist() for _, labels in training_batches(digits, 256, seed=1, epoch=2)]
    other = [labels.tolist() for _, labels in training_batches(digits, 256, seed=1, epoch=3)]
    assert first == again != other
    assert len(first) == 2500 // 256 and all(len(labels) == 256 for labels in first)


def test_augmentation_flips_and_shifts():
    x = torch.arange(2 * 3 * 5 * 6, dtype=torch.uint8).view(2, 3, 5, 6)
    flipped = augment(x, 1.0, 0, torch.Generator().manual_seed(0))
    assert torch.equal(flipped, x.flip(3))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    crops = {(i, j): padded[:, :, i : i + 5, j : j + 6] for i in range(5) for j in range(5)}
    seen = set()
    for seed in range(40):
        moved = augment(x, 0.0, 2, torch.Generator().manual_seed(seed))
        for n in range(2):
            matches = [shift for shift, crop in crops.items() if torch.equal(crop[n], moved[n])]
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) > 15


def test_recipes_are_the_papers():
    assert [own_input(name).image_size for name in ("mnist", "stl10", "cub200")] == [32, 96, 224]
    assert (RECIPES["mnist"].epochs, RECIPES["mnist"].prototypes_per_class) == (10, 5)
    assert (RECIPES["stl10"].epochs, RECIPES["stl10"].padding) == (30, 2)
    assert RECIPES["cub200"].prototypes_per_class == 10
    for name in ("mnist", "stl10", "cub200"):
        numbers = (recipe(name).weights, recipe(name).batch_size, recipe(name).learning_rate, recipe(name).momentum)
        assert numbers == ("imagenet", 128, 0.01, 0.5)
    assert recipe("my own images") == RECIPES["folder"]


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert double_device(torch.device("mps")).type == "cpu"
    assert double_device(torch.device("cuda")).type == "cuda"
    torch.ones(1, dtype=torch.float64, device=double_device(pick_device()))
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        pick_device("gpu")
    assert training_dtype("auto", torch.device("cpu")) == torch.float32  # whatever the chip
    assert training_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match="precision must be"):
        training_dtype("fp16", torch.device("cpu"))
