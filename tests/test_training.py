import math

import pytest
import torch

from kmex_utils.backbones import Backbone, resnet
from kmex_utils.datasets import load
from kmex_utils.hardware import float64_device, pick_device, training_dtype
from kmex_utils.training import Schedule, train


@pytest.fixture(scope="module")
def digits():
    return load("mnist-mini", image_size=32, images_per_class=6)


SCHEDULE = Schedule(epochs=3, batch_size=16, learning_rate=0.02, momentum=0.9)


def fit(digits, checkpoint, schedule=SCHEDULE, report=lambda line: None, **options):
    backbone = resnet("resnet18", 10, seed=3)
    options = {"seed": 3, "made_by": {"arch": "resnet18"}, "precision": "float32", **options}
    history = train(backbone, digits, schedule, checkpoint=checkpoint, report=report, **options)
    return backbone, history


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_one_step_is_sgd_with_momentum(digits, tmp_path):
    """Two steps by hand: v = m v + g, w = w - lr v, with the cosine's rates."""
    schedule = Schedule(epochs=1, batch_size=30, learning_rate=0.1, final_learning_rate=0.01, momentum=0.5)
    trained, _ = fit(digits, tmp_path / "c.safetensors", schedule)
    backbone = resnet("resnet18", 10, seed=3).train()
    velocity = [torch.zeros_like(p) for p in backbone.parameters()]
    for step, (x, labels) in enumerate(digits.training_batches(30, 3, 0)):
        backbone.zero_grad()
        (-backbone(x).log_softmax(1)[torch.arange(30), labels].mean()).backward()
        rate = 0.01 + 0.09 * (1 + math.cos(math.pi * step / 2)) / 2
        with torch.no_grad():
            for p, v in zip(backbone.parameters(), velocity, strict=True):
                v.mul_(0.5).add_(p.grad)
                p.sub_(rate * v)
    before = resnet("resnet18", 10, seed=3)
    for ours, expected, start in zip(trained.parameters(), backbone.parameters(), before.parameters(), strict=True):
        assert (ours - expected).norm() < 0.01 * (expected - start).norm()


def test_it_learns_and_is_deterministic(digits, tmp_path):
    first, history = fit(digits, tmp_path / "a.safetensors")
    again, _ = fit(digits, tmp_path / "b.safetensors")
    assert same(first, again)
    assert [record["epoch"] for record in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]


@pytest.mark.parametrize("done", [1, 2])
def test_a_killed_run_ends_with_the_same_weights(digits, tmp_path, done):
    whole, history = fit(digits, tmp_path / "whole.safetensors")

    class Killed(Exception):
        pass

    def kill(line):
        if f"epoch {done}/" in line:
            raise Killed

    with pytest.raises(Killed):
        fit(digits, tmp_path / "cut.safetensors", report=kill)
    lines = []
    resumed, resumed_history = fit(digits, tmp_path / "cut.safetensors", report=lines.append)
    assert lines[0] == f"resuming after epoch {done}" and len(lines) == 1 + 3 - done
    assert same(whole, resumed)
    assert [r["loss"] for r in history] == [r["loss"] for r in resumed_history]


def test_a_checkpoint_of_other_settings_is_not_resumed(digits, tmp_path):
    fit(digits, tmp_path / "c.safetensors")
    lines = []
    fit(digits, tmp_path / "c.safetensors", made_by={"arch": "other"}, report=lines.append)
    assert "starting anew" in lines[0] and "epoch 1/3" in lines[1]


def test_bfloat16_trains_close_to_float32(digits, tmp_path):
    _, single = fit(digits, tmp_path / "a.safetensors")
    _, half = fit(digits, tmp_path / "b.safetensors", precision="bfloat16")
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


def test_blocks_of_a_resnet():
    backbone = resnet("resnet34", 10)
    shapes = [tuple(x.shape[1:]) for x in backbone.eval().activations(torch.zeros(1, 3, 224, 224))]
    assert shapes == [(64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)]
    assert backbone.classifier.bias is None and backbone.c.shape == (10, 512)


def test_blocks_are_torchvisions_network():
    from torchvision.models import resnet18

    backbone = resnet("resnet18", 1000, seed=5).eval()
    torch.manual_seed(5)
    theirs = resnet18().eval()
    theirs.fc = backbone.classifier
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_initialisation_is_seeded_and_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    assert same(resnet("resnet18", 3, seed=1), resnet("resnet18", 3, seed=1))
    assert not same(resnet("resnet18", 3, seed=1), resnet("resnet18", 3, seed=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "resnet18-f37072fd.pth"


def test_imagenet_weights_from_the_expected_place(hub):
    from torchvision.models import resnet18

    theirs = resnet18()
    torch.save(theirs.state_dict(), hub)
    backbone = resnet("resnet18", 4, "imagenet")
    assert torch.equal(backbone.blocks[0][0].weight, theirs.conv1.weight)
    assert backbone.c.shape == (4, 512)


def test_damaged_imagenet_weights_are_named(hub):
    hub.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"resnet18-f37072fd.pth is damaged .*; delete it"):
        resnet("resnet18", 4, "imagenet")


def test_missing_imagenet_weights_are_one_clear_line(hub, no_network):
    with pytest.raises(
        ConnectionError, match=rf"put https://\S+/resnet18-f37072fd.pth at {hub}, or train from scratch"
    ):
        resnet("resnet18", 4, "imagenet")


def test_a_classifier_with_bias():
    with_bias, without = resnet("resnet18", 4, seed=1, bias=True), resnet("resnet18", 4, seed=1)
    assert with_bias.b.shape == (4,) and without.b is None
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(with_bias.eval()(x), with_bias.classifier(with_bias.activations(x)[-1].mean((2, 3))))


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown arch 'vgg16': use one of .*resnet34"):
        resnet("vgg16", 4)
    with pytest.raises(ValueError, match="weights must be 'imagenet' or 'scratch', got 'imagnet'"):
        resnet("resnet18", 4, "imagnet")
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        pick_device("gpu")
    with pytest.raises(ValueError, match="precision must be"):
        training_dtype("fp16", torch.device("cpu"))


def test_devices():
    assert pick_device("cpu").type == "cpu"
    assert float64_device(torch.device("mps")).type == "cpu"
    assert float64_device(torch.device("cuda")).type == "cuda"
    torch.ones(1, dtype=torch.float64, device=float64_device(pick_device()))


def test_other_heads_are_refused():
    blocks = [torch.nn.Identity()]
    with pytest.raises(ValueError, match="the head is a Sequential, not one linear layer"):
        Backbone(blocks, torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)))
