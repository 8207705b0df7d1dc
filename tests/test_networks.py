"""Any network as blocks: against the network's own forward, the theorem, and what must be refused."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from kmex_utils.explainers import CNNAsSEM
from kmex_utils.networks import Network, network, summary, theorem1_residual

torchvision_blocks = {
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "resnext50_32x4d": ["layer1", "layer2", "layer3", "layer4"],
    "densenet121": [*(f"features.denseblock{b}" for b in (1, 2, 3)), "features.norm5"],
    "googlenet": ["conv3", "inception3b", "inception4e", "inception5b"],
    "efficientnet_b0": ["features.2", "features.3", "features.5", "features.8"],
    "mobilenet_v2": ["features.3", "features.6", "features.13", "features.18"],
    "regnet_y_400mf": [f"trunk_output.block{b}" for b in (1, 2, 3, 4)],
    "shufflenet_v2_x1_0": ["maxpool", "stage2", "stage3", "conv5"],
    "mnasnet1_0": ["layers.8", "layers.9", "layers.11", "layers.16"],
}


def noise(found, n=2):
    return torch.randn(n, 3, found.image_size, found.image_size, generator=torch.Generator().manual_seed(1))


def settled(found):
    """Random weights with the batch statistics of noise."""
    from kmex_utils.networks import _settle

    _settle(found.module, noise(found, 4))
    return found


@pytest.mark.parametrize("arch", torchvision_blocks)
def test_architectures_of_torchvision(arch):
    found = settled(network(arch, "random", image_size=64))
    x = noise(found)
    with torch.no_grad():
        activations, y = found.outputs(x)
        assert torch.equal(y, found.module(x)), "the network's own prediction"
    assert list(found.blocks) == torchvision_blocks[arch]
    assert [u.shape[2] for u in activations] == [16, 8, 4, 2]
    z = activations[-1].mean((2, 3))
    torch.testing.assert_close(z @ found.c.T + found.b, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    assert theorem1_residual(found, x) < 1e-5
    assert found.pooled_linear and (y[0] - y[1]).abs().max() > 1e-3 * y.abs().max(), "the images tell"


def test_blocks_are_the_networks_own_tensors():
    found = settled(network("resnet50", "random", image_size=64))
    m, x = found.module, noise(found)
    with torch.no_grad():
        expected = [m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x)))))]
        for layer in (m.layer2, m.layer3, m.layer4):
            expected.append(layer(expected[-1]))
        for ours, theirs in zip(found.activations(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_h_is_what_the_pool_averages():
    """DenseNet's last ReLU is a function, not a module: h must come after it."""
    found = settled(network("densenet121", "random", image_size=64))
    x = noise(found)
    with torch.no_grad():
        h = found.activations(x)[-1]
        torch.testing.assert_close(h, F.relu(found.module.features(x)))
    assert (h >= 0).all()


def test_a_bias_is_a_constant_channel():
    """Without loss of generality: h with a channel of ones and c_j with the entry b_j is the same network."""
    found = settled(network("mobilenet_v2", "random", image_size=64))
    found.classifier.bias.copy_(torch.randn(1000))
    with torch.no_grad():
        activations, y = found.outputs(noise(found))
    sem = CNNAsSEM(found.c, found.b)
    h = sem.h(activations)
    assert h.shape[2] == sem.c.shape[1] == found.c.shape[1] + 1 and (h[..., -1] == 1).all()
    torch.testing.assert_close(sem(activations), y, rtol=1e-4, atol=1e-5)
    without = CNNAsSEM(found.c)(activations)
    assert (without - y).abs().max() > 1, "the bias matters here"
    torch.testing.assert_close(without + found.b, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arch", "between"),
    [
        ("convnext_tiny", "classifier.0 (LayerNorm2d) lies between"),
        ("mobilenet_v3_small", "classifier.0 (Linear), classifier.1 (Hardswish) lie between"),
        ("vgg11", "classifier.0 (Linear)"),
    ],
)
def test_something_between_pool_and_head(arch, between):
    found = network(arch, "random", image_size=64)
    x = noise(found)
    with torch.no_grad():
        activations, y = found.outputs(x)
        assert torch.equal(y, found.module(x))
    assert not found.pooled_linear and between in found.between
    assert [u.shape[2] for u in activations] == [16, 8, 4, 2]
    with pytest.raises(ValueError, match=f"Theorem 1 and eq. 11 do not hold for {arch}: {re.escape(between)}"):
        theorem1_residual(found, x)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/efficientnet_b0", "timm/regnety_002"])
def test_timm(name):
    pytest.importorskip("timm", reason="timm is an optional extra")
    found = settled(network(name, "random", image_size=64))
    x = noise(found)
    with torch.no_grad():
        assert torch.equal(found(x), found.module(x))
    assert [u.shape[2] for u in found.activations(x)] == [16, 8, 4, 2]
    assert theorem1_residual(found, x) < 1e-5


class Own(nn.Module):
    """A network with odd names, an in-place ReLU after a block, and an output that is not the scores."""

    def __init__(self, pool="mean"):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8))
        self.second = nn.Conv2d(8, 16, 3, 2, 1)
        self.answer = nn.Linear(16, 4)
        self.pool = pool

    def forward(self, x):
        x = F.relu_(self.second(F.relu_(self.first(x))))
        z = x.amax((2, 3)) if self.pool == "max" else x.mean((2, 3))
        return {"probabilities": self.answer(z + x.mean((2, 3)) if self.pool == "max" else z).softmax(1)}


def test_your_own_module():
    found = Network(Own(), image_size=32, classes=list("abcd"))
    assert found.head == "answer" and found.blocks == ("first", "second") and found.classes == tuple("abcd")
    x = noise(found)
    with torch.no_grad():
        (first, h), y = found.outputs(x)
        torch.testing.assert_close(first, found.module.first(x))  # before the ReLU in place
        torch.testing.assert_close(y.softmax(1), found.module(x)["probabilities"])
    assert h.shape == (2, 16, 8, 8) and theorem1_residual(found, x) < 1e-5
    assert not any(p.requires_grad for p in found.parameters())


def test_blocks_by_hand():
    found = network("resnet18", "random", image_size=64, blocks=("layer2.0", "layer4"), head="fc")
    assert [tuple(u.shape[1:]) for u in found.activations(noise(found))] == [(128, 8, 8), (512, 2, 2)]


def test_another_pool_is_noticed():
    found = Network(Own("max"), image_size=32)
    assert found.between == "the input of its head is not the average of its feature maps"


POOLS = {
    "flatten": lambda x: x.flatten(2).mean(-1),
    "view": lambda x: x.view(*x.shape[:2], -1).mean(dim=2),
    "1d": lambda x: nn.AdaptiveAvgPool1d(1)(x.flatten(2)).flatten(1),
    "functional 1d": lambda x: F.adaptive_avg_pool1d(x.reshape(*x.shape[:2], -1), 1)[..., 0],
    "sum": lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]),
    "twice": lambda x: x.mean(3).mean(2),
}


class Gated(nn.Module):
    """Channels gated by a pooled descriptor (squeeze and excitation), and a choice of final pool."""

    def __init__(self, pool):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.gate = nn.Linear(8, 8)
        self.second = nn.Conv2d(8, 16, 3, 2, 1)
        self.fc = nn.Linear(16, 4)
        self.pool = POOLS[pool]

    def forward(self, x):
        x = self.first(x)
        x = self.second(x * self.gate(x.mean((2, 3))).sigmoid()[..., None, None])
        return self.fc(self.pool(x))


@pytest.mark.parametrize("pool", ["flatten", "view", "1d", "functional 1d"])
def test_a_mean_over_flattened_positions_is_the_pool(pool):
    found = Network(Gated(pool), image_size=32)
    x = noise(found)
    with torch.no_grad():
        assert found.blocks == ("first", "second") and found.activations(x)[-1].shape == (2, 16, 8, 8)
    assert theorem1_residual(found, x) < 1e-5


@pytest.mark.parametrize("pool", ["sum", "twice"])
def test_a_pool_that_is_not_recognised_is_refused(pool):
    """The gate's pool must not pass for the one before the head."""
    with pytest.raises(ValueError, match=r"second \(Conv2d\) of Gated makes maps after the last average pool"):
        Network(Gated(pool), image_size=32)


def test_equal_names_are_told_apart():
    found = Network(Own(), image_size=32, classes=["crane", "cat", "crane", "dog"])
    assert found.classes == ("crane (0)", "cat", "crane (2)", "dog") and found.named
    assert found.output("crane (2)") == 2 and not Network(Own(), image_size=32).named
    with pytest.raises(ValueError, match=r"target must be a class of Own, got 'crane': crane \([02]\), crane"):
        found.output("crane")


def test_weights_are_part_of_the_settings():
    own = Own()
    before = Network(own, image_size=32).settings()["network"]["weights"]
    with torch.no_grad():
        own.answer.bias += 1
    assert Network(own, image_size=32).settings()["network"]["weights"] != before


def test_what_is_assumed_is_said():
    assert network(Own(), mean=(0.5,) * 3).assumed == ("image_size", "std")
    found = network(Own(), image_size=32, mean=(0.5,) * 3, std=(1,) * 3)
    assert found.assumed == () and found.preprocessing() == (
        "32 x 32 pixels (crop), mean (0.5, 0.5, 0.5), std (1.0, 1.0, 1.0)"
    )
    assert "mean, std assumed: give mean=, std=" in network(Own(), image_size=32).preprocessing()


class NoPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)
        self.fc = nn.Linear(4 * 16 * 16, 3)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: network("resnet18", "random", blocks=["layer9"]), "no block 'layer9'.*the nearest: layer[1-4], layer"),
        (lambda: network("resnet18", "random", blocks=["layer3", "layer2"]), "not in the order they are computed"),
        (lambda: network("vgg11", "random", image_size=64, head="classifier"), "is a Sequential, not one linear layer"),
        (lambda: network("resnet18", "random", head="head"), "has no head 'head'; its linear layers: fc"),
        (lambda: network("squeezenet1_1", "random"), "has no linear layer"),
        (lambda: Network(NoPool(), image_size=32), "has no average pool between"),
        (lambda: network("resnet19", "random"), "torchvision has no model 'resnet19'; the nearest: resnet1"),
        (lambda: network("resnet18", "random", classes=["a", "b"]), "2 class names, but the head 'fc' .* has 1000"),
        (lambda: network("resnet18", "nowhere.pt"), "nowhere.pt does not exist"),
        (lambda: network(Own(), "random"), "your module comes with its own"),
        (lambda: network(Own().half()), "Own has float16 weights, explanations are float32: give module.float()"),
        (lambda: network("resnet18", "random", fit="squeeze"), "fit must be one of crop, stretch"),
        (
            lambda: network("vit_b_16", "random", image_size=64),
            "does not run on 3 x 64 x 64 images: Wrong image height",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        make()
    assert "\n" not in str(error.value)


# --- weights from files -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    from torchvision.models import resnet18

    torch.manual_seed(3)
    return resnet18(num_classes=7)


@pytest.mark.parametrize("kind", ["safetensors", "pt", "wrapped", "prefixed"])
def test_a_state_dict_from_a_file(resnet, kind, tmp_path):
    state = resnet.state_dict()
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(state, path)
    elif kind == "prefixed":
        torch.save({f"model._orig_mod.module.{name}": value for name, value in state.items()}, path)
    else:
        torch.save({"epoch": 3, "state_dict": state} if kind == "wrapped" else state, path)
    found = network("resnet18", path, classes=list("abcdefg"), image_size=64)
    x = noise(found)
    with torch.no_grad():
        torch.testing.assert_close(found(x), resnet.eval()(x), rtol=1e-4, atol=1e-5)
    assert found.classes == tuple("abcdefg") and found.mean == (0.485, 0.456, 0.406)


def test_a_state_dict_without_bias(resnet, tmp_path):
    state = {name: value for name, value in resnet.state_dict().items() if name != "fc.bias"}
    save_file(state, tmp_path / "w.safetensors")
    assert network("resnet18", tmp_path / "w.safetensors", image_size=64).b is None


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_dropped(arch, tmp_path):
    """A fine-tuned network whose auxiliary heads were replaced, too; its input is transformed as ImageNet's was."""
    from torchvision import models

    theirs = models.get_model(arch, weights=None, init_weights=False, aux_logits=True, transform_input=True)
    theirs.fc = nn.Linear(theirs.fc.in_features, 7)
    for name in ("AuxLogits",) if arch == "inception_v3" else ("aux1", "aux2"):
        setattr(theirs, name, nn.Linear(3, 7))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    found = network(arch, tmp_path / "w.pth", image_size=96)
    x = noise(found)
    with torch.no_grad():
        torch.testing.assert_close(found(x), theirs.eval()(x), rtol=1e-3, atol=1e-5)
    assert found.module.transform_input


def test_a_network_without_v1_weights():
    from kmex_utils.backbones import weights_entry

    assert weights_entry("resnet50").name == "IMAGENET1K_V1"
    assert weights_entry("regnet_y_128gf").name == "IMAGENET1K_SWAG_E2E_V1"


def test_files_that_do_not_fit(resnet, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(resnet.state_dict(), path)
    with pytest.raises(ValueError, match=r"do not fit resnet50: layer1.0.conv1.weight is \[64, 64, 3, 3\], not"):
        network("resnet50", path, image_size=64)
    with pytest.raises(ValueError, match=r"6 class names, but the head 'fc' in .* has 7 outputs"):
        network("resnet18", path, classes=list("abcdef"), image_size=64)
    torch.save(resnet, path)
    with pytest.raises(ValueError, match="holds pickled objects, which may run code"):
        network("resnet18", path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a readable state dict"):
        network("resnet18", path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="is not a state dict"):
        network("resnet18", path)
    broken = {name: value.clone() for name, value in resnet.state_dict().items()}
    broken["conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(broken, path)
    with pytest.raises(ValueError, match=r"NaN or infinite weights \(conv1.weight"):
        network("resnet18", path, image_size=64)


def test_the_librarys_size_and_normalisation():
    found = network("efficientnet_b1", "random")
    assert found.image_size == 240 and found.std == (0.229, 0.224, 0.225) and found.classes[0] == "0"


def test_a_row_of_the_table():
    row = summary("shufflenet_v2_x0_5")
    assert float(row["Theorem 1 residual"]) < 1e-5 and row["head"] == "fc (bias)"
