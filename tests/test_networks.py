"""Any network as blocks: against the network's own forward, the theorem, and what must be refused."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import kmex_utils as kmex
from kmex_utils import paths
from kmex_utils.data import Input
from kmex_utils.method.explainers import CNNAsSEM
from kmex_utils.networks import Network, for_training, load, network, theorem1_residual
from kmex_utils.networks.head import Tail, another, same

sys.path.insert(0, str(paths.ROOT / "benchmarks"))
from heads import settle

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


def noise(watched, n=2):
    size = watched.input.image_size
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


def settled(watched):
    """Random weights with the batch statistics of noise."""
    settle(watched.module, noise(watched, 4))
    return watched


def pixels(size):
    """An input of this size."""
    return Input(size, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "crop")


@pytest.mark.parametrize("arch", torchvision_blocks)
def test_architectures_of_torchvision(arch):
    watched = settled(network(arch, "random", image_size=64))
    x = noise(watched)
    with torch.no_grad():
        activations, y = watched.outputs(x)
        assert torch.equal(y, watched.module(x)), "the network's own prediction"
    assert list(watched.blocks) == torchvision_blocks[arch]
    assert [u.shape[2] for u in activations] == [16, 8, 4, 2]
    z = activations[-1].mean((2, 3))
    torch.testing.assert_close(z @ watched.c.T + watched.b, y, rtol=1e-3, atol=1e-4 * float(y.abs().max()))
    assert theorem1_residual(watched, x) < 1e-5
    assert watched.form == "linear" and (y[0] - y[1]).abs().max() > 1e-3 * y.abs().max(), "the images tell"


def test_blocks_are_the_networks_own_tensors():
    watched = settled(network("resnet50", "random", image_size=64))
    m, x = watched.module, noise(watched)
    with torch.no_grad():
        expected = [m.layer1(m.maxpool(m.relu(m.bn1(m.conv1(x)))))]
        for layer in (m.layer2, m.layer3, m.layer4):
            expected.append(layer(expected[-1]))
        for ours, theirs in zip(watched.activations(x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_h_is_what_the_pool_averages():
    """DenseNet's last ReLU is a function, not a module: h must come after it."""
    watched = settled(network("densenet121", "random", image_size=64))
    x = noise(watched)
    with torch.no_grad():
        h = watched.activations(x)[-1]
        torch.testing.assert_close(h, F.relu(watched.module.features(x)))
    assert (h >= 0).all()


def test_a_bias_is_a_constant_channel():
    """Without loss of generality: h with a channel of ones and c_j with the entry b_j is the same network."""
    watched = settled(network("mobilenet_v2", "random", image_size=64))
    watched.classifier.bias.copy_(torch.randn(1000))
    with torch.no_grad():
        activations, y = watched.outputs(noise(watched))
    sem = CNNAsSEM(watched.c, watched.b)
    h = sem.h(activations)
    assert h.shape[2] == sem.c.shape[1] == watched.c.shape[1] + 1 and (h[..., -1] == 1).all()
    torch.testing.assert_close(sem(activations), y, rtol=1e-4, atol=1e-5)
    without = CNNAsSEM(watched.c)(activations)
    assert (without - y).abs().max() > 1, "the bias matters here"
    torch.testing.assert_close(without + watched.b, y, rtol=1e-4, atol=1e-5)


def test_layer_normalisation_before_the_head_scales():
    """ConvNeXt: c_j = P(g w_j), P = I - 11'/D, one factor 1/s(z) an image, and t . w_j + b_j after it."""
    made = settled(network("convnext_tiny", "random", image_size=64))
    norm, head = made.module.classifier[0], made.module.classifier[2]
    for parameter in (norm.weight, norm.bias, head.bias):
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    x = noise(made)
    with torch.no_grad():
        activations, y = made.outputs(x)
        assert torch.equal(y, made.module(x)) and made.form == "scaled"
    weighted = norm.weight * head.weight
    torch.testing.assert_close(made.c, weighted - weighted.mean(1, keepdim=True), rtol=1e-3, atol=1e-4)
    z = activations[-1].mean((2, 3))
    scale = (z.var(1, unbiased=False, keepdim=True) + norm.eps).rsqrt()
    ours = scale * (z @ made.c.T) + norm.bias @ head.weight.T + head.bias
    torch.testing.assert_close(ours, y, rtol=1e-4, atol=1e-4)
    assert theorem1_residual(made, x) < 1e-5


def test_a_gated_head_has_columns_of_each_image():
    """MobileNetV3: c_j(x) = W1' (gate * w2_j), gate = Hardswish(a) / a."""
    made = settled(network("mobilenet_v3_small", "random", image_size=64))
    first, last = made.module.classifier[0], made.module.classifier[3]
    x, j = noise(made), torch.tensor([3, 5])
    with torch.no_grad():
        activations, y = made.outputs(x)
        assert torch.equal(y, made.module(x)) and made.form == "gated"
    z = activations[-1].mean((2, 3))
    a = first(z)
    gate = F.hardswish(a) / a
    torch.testing.assert_close(made.columns(x, j), (gate * last.weight[j]) @ first.weight, rtol=1e-3, atol=1e-6)
    assert theorem1_residual(made, x) < 1e-5
    with pytest.raises(ValueError, match="do not hold for mobilenet_v3_small: its columns are each image's own"):
        print(made.c)


def test_a_head_that_tells_positions_apart():
    made = network("vgg11", "random", image_size=64)
    x = noise(made)
    with torch.no_grad():
        activations, y = made.outputs(x)
        assert torch.equal(y, made.module(x))
    assert not made.form and "classifier.0 (Linear)" in made.between
    assert [u.shape[2] for u in activations] == [16, 8, 4, 2]
    with pytest.raises(ValueError, match=f"Theorem 1 and eq. 11 do not hold for vgg11: {re.escape(made.between)}"):
        theorem1_residual(made, x)


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/efficientnet_b0", "timm/regnety_002"])
def test_timm(name):
    pytest.importorskip("timm", reason="timm is an optional extra")
    watched = settled(network(name, "random", image_size=64))
    x = noise(watched)
    with torch.no_grad():
        assert torch.equal(watched(x), watched.module(x))
    assert [u.shape[2] for u in watched.activations(x)] == [16, 8, 4, 2]
    assert theorem1_residual(watched, x) < 1e-5


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
    watched = Network(Own(), input=pixels(32), classes=list("abcd"))
    assert watched.head == "answer" and watched.blocks == ("first", "second") and watched.classes == tuple("abcd")
    x = noise(watched)
    with torch.no_grad():
        (first, h), y = watched.outputs(x)
        torch.testing.assert_close(first, watched.module.first(x))  # before the ReLU in place
        torch.testing.assert_close(y.softmax(1), watched.module(x)["probabilities"])
    assert h.shape == (2, 16, 8, 8) and theorem1_residual(watched, x) < 1e-5
    assert not any(p.requires_grad for p in watched.parameters())


def test_blocks_by_hand():
    watched = network("resnet18", "random", image_size=64, blocks=("layer2.0", "layer4"), head="fc")
    assert [tuple(u.shape[1:]) for u in watched.activations(noise(watched))] == [(128, 8, 8), (512, 2, 2)]


def test_another_pool_is_noticed():
    watched = Network(Own("max"), input=pixels(32))
    assert not watched.form and "a maximum over positions lies" in watched.between


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


@pytest.mark.parametrize("pool", POOLS)
def test_the_pool_is_found_however_it_is_written(pool):
    """The gate's pool does not pass for the one before the head."""
    watched = Network(Gated(pool), input=pixels(32))
    x = noise(watched)
    with torch.no_grad():
        assert watched.blocks == ("first", "second")
        activations, y = watched.outputs(x)
        assert activations[-1].shape == (2, 16, 8, 8) and torch.equal(y, watched.module(x))
    assert theorem1_residual(watched, x) < 1e-5


class Returning(nn.Module):
    """Two heads on one encoder; what it returns is for a subclass of a test to say."""

    def __init__(self, output, classes=4):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)
        self.fc, self.aux, self.last = nn.Linear(8, classes), nn.Linear(8, classes), nn.Conv2d(8, classes, 1)
        self.bn, self.output = nn.BatchNorm1d(8), output
        self.bn.running_mean.normal_()
        self.bn.running_var.uniform_(0.5, 2)
        self.bn.weight.data.normal_()
        self.bn.bias.data.normal_()

    def forward(self, x):
        h = self.conv(x).relu()
        return self.output(self, h, h.mean((2, 3)))


OUTPUTS = {
    "negated": lambda m, h, z: -m.fc(z),
    "two heads averaged": lambda m, h, z: (m.fc(z) + m.aux(z)) / 2,
    "F.linear": lambda m, h, z: F.linear(z, m.fc.weight, m.fc.bias),
    "matrix product": lambda m, h, z: z @ m.fc.weight.T,
    "einsum": lambda m, h, z: torch.einsum("nd,cd->nc", z, m.aux.weight),
    "convolution after the pool": lambda m, h, z: m.last(z[..., None, None]).flatten(1),
    "convolution before the pool": lambda m, h, z: m.last(h).mean((2, 3)),
    "batch normalisation": lambda m, h, z: m.fc(m.bn(z)),
    "with features": lambda m, h, z: (m.fc(z), z),
    "temperature": lambda m, h, z: m.fc(z) / 0.07,
    "in a dictionary": lambda m, h, z: {"logits": m.fc(z)},
    "squeezed": lambda m, h, z: m.fc(F.adaptive_avg_pool2d(h, 1).squeeze()),
    "channels last": lambda m, h, z: m.fc(h.permute(0, 2, 3, 1).mean((1, 2))),
    "tokens": lambda m, h, z: m.fc(h.flatten(2).transpose(1, 2).mean(1)),
}


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_is_explained_is_what_the_module_returns(output):
    torch.manual_seed(0)
    made = Network(Returning(OUTPUTS[output]).eval(), input=pixels(32))
    x = noise(made, 5)
    with torch.no_grad():
        returned = made.module(x)
        returned = returned[0] if isinstance(returned, tuple) else returned
        returned = returned["logits"] if isinstance(returned, dict) else returned
        activations, y = made.outputs(x)
        torch.testing.assert_close(y, returned)
        torch.testing.assert_close(activations[-1], made.module.conv(x).relu())
        b = 0 if made.b is None else made.b
        torch.testing.assert_close(activations[-1].mean((2, 3)) @ made.c.T + b, returned, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(made(x[:1]), returned[:1])
    assert made.form == "linear" and theorem1_residual(made, x) < 1e-5


@pytest.mark.parametrize(
    "pool",
    [
        lambda h: F.adaptive_max_pool2d(h, 1),
        lambda h: F.conv2d(h, torch.linspace(-1, 2, 2048).view(8, 1, 16, 16), groups=8),
    ],
)
def test_one_position_made_of_many_is_no_average(pool):
    made = Network(Returning(lambda m, h, z: m.fc(pool(h).flatten(1))), input=pixels(32))
    with torch.no_grad():
        assert torch.equal(made(noise(made)), made.module(noise(made)))
    assert not made.form and made.between and [tuple(u.shape[2:]) for u in made.activations(noise(made))] == [(16, 16)]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sigmoid"])
def test_probabilities_are_undone(name):
    f = torch.sigmoid if name == "sigmoid" else getattr(F, name)
    how = {} if name == "sigmoid" else {"dim": 1}
    made = Network(Returning(lambda m, h, z: f(m.fc(z), **how)), input=pixels(32))
    x = noise(made)
    with torch.no_grad():
        assert made.activation == name and made.head == "fc"
        torch.testing.assert_close(f(made(x), **how), made.module(x))
        torch.testing.assert_close(
            made.probabilities(made(x)), f(made(x), **how) if name != "log_softmax" else made.module(x).exp()
        )


@pytest.mark.parametrize("output", [lambda m, h, z: m.fc(z), lambda m, h, z: m.fc(z).sigmoid()[:, 0]])
def test_one_score_decides_between_two_classes_by_its_sign(output):
    made = Network(Returning(output, 1), input=pixels(32), classes=["no", "yes"])
    x = noise(made, 6)
    with torch.no_grad():
        y, score = made(x), made.module.fc(made.activations(x)[-1].mean((2, 3)))[:, 0]
        torch.testing.assert_close(y.softmax(1)[:, 1], score.sigmoid())
    assert y.shape == (6, 2) and torch.equal(y.argmax(1), (score > 0).long()) and made.c.shape == (2, 8)
    torch.testing.assert_close(made.c[1], made.module.fc.weight[0] / 2)


def cosine(m, h, z):
    return 16 * F.normalize(m.aux(z)) @ F.normalize(m.fc.weight[:, :4], dim=1).T


def test_a_cosine_head_scales():
    """The embedding layer of an ArcFace-like head is not what is returned."""
    made = Network(
        Returning(lambda m, h, z: 16 * F.normalize(m.aux(z)) @ F.normalize(m.fc.weight[:, :4], dim=1).T),
        input=pixels(32),
    )
    x = noise(made)
    with torch.no_grad():
        assert torch.equal(made(x), made.module(x))
    m = made.module
    expected = 16 * F.normalize(m.fc.weight[:, :4], dim=1) @ m.aux.weight
    torch.testing.assert_close(made.c, expected, rtol=1e-4, atol=1e-5)
    assert made.form == "scaled" and theorem1_residual(made, x) < 1e-5


class Autocast(Returning):
    """Half precision within."""

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


def test_half_precision_within():
    """h and y are the module's own; its columns agree with them to what eight bits leave."""
    torch.manual_seed(0)
    made = Network(Autocast(OUTPUTS["F.linear"]), input=pixels(32))
    x = noise(made)
    with torch.no_grad():
        activations, y = made.outputs(x)
        assert torch.equal(y, made.module(x).float()) and y.dtype == activations[-1].dtype == torch.float32
    torch.testing.assert_close(made.c, made.module.fc.weight, rtol=2**-8, atol=1e-6)
    assert made.form == "linear" and theorem1_residual(made, x) < 2e-2


def test_a_compiled_module_is_watched_as_it_was(recwarn):
    torch.manual_seed(0)
    module = Returning(OUTPUTS["einsum"]).eval()
    made, x = Network(torch.compile(module), input=pixels(32)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(made(x), module(x))
    assert made.form == "linear" and not [w for w in recwarn if "compile" in str(w.message).lower()]


def test_several_scores_are_asked_about():
    module = Returning(lambda m, h, z: {"a": m.fc(z), "b": m.aux(z)})
    with pytest.raises(
        ValueError, match=r"returns several: output\['a'\] \(4 values\), output\['b'\] .* by head= .*fc, aux"
    ):
        Network(module, input=pixels(32))
    x, made = torch.randn(2, 3, 32, 32), Network(module, input=pixels(32), head="aux")
    assert torch.equal(made(x), module(x)["b"]) and torch.equal(made.c, module.aux.weight) and not made.note


class Two(nn.Module):
    """An ensemble."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (Returning(OUTPUTS["F.linear"]) for _ in range(2))

    def forward(self, x):
        return (self.a(x) + self.b(x)) / 2


def test_an_ensemble_is_refused():
    with pytest.raises(ValueError, match="not made of one encoder's feature maps; head= names another head"):
        Network(Two(), input=pixels(32))
    with pytest.raises(ValueError, match="is a TorchScript module.*give the nn.Module it was made of"):
        Network(torch.jit.trace(Two().eval(), torch.zeros(1, 3, 32, 32)), input=pixels(32))


def test_equal_names_are_told_apart():
    watched = Network(Own(), input=pixels(32), classes=["crane", "cat", "crane", "dog"])
    assert watched.classes == ("crane (0)", "cat", "crane (2)", "dog") and watched.named
    assert watched.output("crane (2)") == 2 and not Network(Own(), input=pixels(32)).named
    with pytest.raises(ValueError, match=r"target must be a class of Own, got 'crane': crane \([02]\), crane"):
        watched.output("crane")


def test_weights_are_part_of_the_settings():
    own = Own()
    before = Network(own, input=pixels(32)).settings()["network"]["weights"]
    with torch.no_grad():
        own.answer.bias += 1
    assert Network(own, input=pixels(32)).settings()["network"]["weights"] != before


def test_what_is_assumed_is_said():
    assert network(Own(), mean=(0.5,) * 3).assumed == ("image_size", "std")
    watched = network(Own(), image_size=32, mean=(0.5,) * 3, std=(1,) * 3)
    assert watched.assumed == () and watched.preprocessing() == (
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
        (
            lambda: network("vgg11", "random", image_size=64, head="features"),
            "'features' of vgg11 gives no scores",
        ),
        (lambda: network("resnet18", "random", head="head"), "has no head 'head'; its linear layers: fc"),
        (lambda: network("vit_b_16", "random"), "attention lies between its feature maps and its scores"),
        (lambda: network("resnet19", "random"), "torchvision has no model 'resnet19'; the nearest: resnet1"),
        (lambda: network("resnet18", "random", classes=["a", "b"]), "2 class names, but the head 'fc' .* has 1000"),
        (lambda: network("resnet18", "nowhere.pt"), "nowhere.pt does not exist"),
        (lambda: network(Own(), "random"), "your module comes with its own"),
        (lambda: network(Own().half()), "Own has float16 weights, explanations are float32: give module.float()"),
        (lambda: network("resnet18", "random", fit="squeeze"), "fit must be crop or stretch"),
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


# --- read while it runs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Own, lambda: Gated("view"), lambda: Gated("flatten")])
@pytest.mark.parametrize("training", [True, False])
def test_h_is_differentiable_in_either_mode(make, training):
    """The head on its mean gives the network's own scores, and the same gradients."""
    torch.manual_seed(0)
    watched = Network(make(), input=pixels(32)).train(training).requires_grad_(True)
    x, gradients = noise(watched, 4), []
    for y in (watched(x), watched.classifier(watched.encode(x).mean((2, 3)))):
        gradients.append(torch.autograd.grad(y.square().sum(), [*watched.parameters()]))
    torch.testing.assert_close(*gradients)


def test_a_block_changed_in_place_is_read_as_it_was_returned():
    """In the first pass and later ones, and where PyTorch does not count changes; a block left alone is not copied."""
    watched = Network(Own(), input=pixels(32))
    x, returned = noise(watched), []
    hook = watched.module.first.register_forward_hook(lambda module, x, output: returned.append(output))
    with torch.no_grad():
        expected = watched.module.first(x).clone()
        first, again = watched.activations(x)[0], watched.activations(x)[0]
    with torch.inference_mode():
        third = watched.activations(x)[0]
    hook.remove()
    assert all(torch.equal(read, expected) for read in (first, again, third)) and (expected < 0).any()
    assert not any(torch.equal(tensor, expected) for tensor in returned[1:]), "the layer did work in place"
    plain = Network(Gated("view"), input=pixels(32))
    with torch.no_grad():
        plain.module.first.register_forward_hook(lambda module, x, output: returned.append(output))
        assert plain.activations(x)[0] is returned[-1]


class Repeated(nn.Module):
    """One ReLU, called after every convolution."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in ((3, 4), (4, 6), (6, 8)))
        self.act = nn.ReLU()
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        for conv in self.convs:
            x = self.act(conv(x))
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("arch", "left"), [("resnet18", 0.01), ("vgg11", 1.0), ("densenet121", 0.01)])
def test_what_passes_share_before_h_changes_none_of_them(arch, left):
    """And saves what it is for, but in vgg11, whose ReLU changes every convolution's output in place."""
    watched = settled(network(arch, "random", image_size=64))
    head, through, before = watched._head, (watched.module, noise(watched)), {}
    for change, share in ((same, 1.0), (another, left), (another, left)):
        alone, shared = (Tail(head.h, head.y, change, before=given) for given in (None, before))
        flop = []
        for tail in (alone, shared):
            with FlopCounterMode(display=False) as counter:
                tail.run(*through)
            flop.append(counter.get_total_flops())
        assert torch.equal(alone.y, shared.y) and torch.equal(alone.h, shared.h)
        assert flop[1] <= share * flop[0]


def test_a_module_called_several_times(tmp_path):
    watched = Network(Repeated(), input=pixels(32))
    assert watched.blocks == ("act#0", "act#1", "act")
    x = noise(watched)
    assert [tuple(u.shape[1:]) for u in watched.activations(x)] == [(4, 16, 16), (6, 8, 8), (8, 4, 4)]
    by_hand = Network(watched.module, input=pixels(32), blocks=("act#1", "act"))
    assert torch.equal(by_hand.activations(x)[0], watched.activations(x)[1])
    watched.save(tmp_path)
    assert load(tmp_path, watched.module).blocks == watched.blocks


# --- saved and loaded ---------------------------------------------------------------------------------------------

CLASSES = tuple("abc")


@pytest.fixture(scope="module")
def trained():
    """A network after a step of training: nothing about it is as initialised."""
    trainable = for_training("resnet18", CLASSES, "scratch", pixels(32), seed=1).train().requires_grad_(True)
    x = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    F.cross_entropy(trainable(x), torch.arange(6) % 3).backward()
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter -= 0.01 * parameter.grad
    return trainable.eval().requires_grad_(False)


@pytest.fixture
def folder(trained, tmp_path):
    trained.save(tmp_path / "saved")
    return tmp_path / "saved"


def edited(folder, **values):
    settings = json.loads((folder / "network.json").read_text())
    (folder / "network.json").write_text(json.dumps({**settings, **values}))


def test_a_trained_network_comes_back(trained, folder):
    """Its blocks too, which at 32 pixels would be others; the caller's random state stays."""
    state = torch.get_rng_state()
    again, x = load(folder), noise(trained)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("name", "blocks", "head", "classes", "named", "assumed", "input", "reference", "fingerprint"):
        assert getattr(again, name) == getattr(trained, name), name
    for ours, theirs in zip(again.activations(x), trained.activations(x), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(again(x), trained(x)) and again.b is None
    assert not again.training and not any(p.requires_grad for p in again.parameters())
    assert again.settings() == trained.settings()


def test_the_library_takes_its_weights(trained, folder):
    from torchvision.models import resnet18

    state = load_file(folder / "weights.safetensors")
    theirs = resnet18(num_classes=3)
    theirs.fc.bias = None
    theirs.load_state_dict(state)
    theirs.to(memory_format=torch.channels_last)
    x = noise(trained)
    assert torch.equal(theirs.eval()(x), trained(x))
    without_head = {name: value for name, value in state.items() if not name.startswith("fc.")}
    missing, unexpected = resnet18().load_state_dict(without_head, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected


def test_a_folder_stands_for_a_name(trained, folder):
    """In the way it enters too; what is given besides wins."""
    assert network(folder)(noise(trained)).equal(trained(noise(trained)))
    changed = network(str(folder), classes=list("xyz"), blocks=("layer3", "layer4"), image_size=64)
    assert changed.classes == ("x", "y", "z") and changed.blocks == ("layer3", "layer4")
    assert (changed.input.image_size, changed.input.mean) == (64, trained.input.mean)
    with pytest.raises(ValueError, match="weights and arch_args go with a model's name; the network in .* has its own"):
        network(folder, "imagenet")


def test_weights_of_the_library_are_named_not_stored(tmp_path, monkeypatch):
    """As long as they are the library's; a changed one has them beside it."""
    from torchvision.models import resnet18

    torch.manual_seed(2)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(resnet18().state_dict(), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    pretrained = network("resnet18", image_size=64)
    assert pretrained.named and pretrained.classes[0] == "tench" and not pretrained.assumed
    folder, x = tmp_path / "saved", noise(pretrained)
    for_training("resnet18", CLASSES, "scratch", pixels(64)).save(folder)
    assert (folder / "weights.safetensors").exists(), "of what was saved there before"
    pretrained.save(folder)
    assert not (folder / "weights.safetensors").exists() and load(folder)(x).equal(pretrained(x))
    load(folder).save(tmp_path / "again")
    assert not (tmp_path / "again" / "weights.safetensors").exists()
    pretrained.classifier.bias += 1
    pretrained.save(folder)
    assert (folder / "weights.safetensors").exists() and load(folder)(x).equal(pretrained(x))


@pytest.mark.parametrize("arch", ["googlenet", "densenet121", "timm/tf_efficientnet_lite0"])
def test_other_networks_come_back(arch, tmp_path):
    if arch.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    made = settled(for_training(arch, CLASSES, "scratch", pixels(64), bias=True))
    made.save(tmp_path)
    again, x = load(tmp_path), noise(made)
    assert again.blocks == made.blocks and len(again.blocks) == 4
    for ours, theirs in zip(again.activations(x), made.activations(x), strict=True):
        assert torch.equal(ours, theirs)
    assert again(x).equal(made(x))


def test_a_module_of_ones_own_comes_back_with_the_module(tmp_path):
    torch.manual_seed(0)
    watched = Network(Own(), input=pixels(32), classes=list("abcd"))
    watched.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["network.json"]
    again, x = load(tmp_path, copy.deepcopy(watched.module)), noise(watched)
    assert again.classes == watched.classes and again(x).equal(watched(x))
    with pytest.raises(ValueError, match=r"Own in .* is a module of your own: give it, as load\(folder, module\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match="the weights of your module are not those that .*network.json was saved with"):
        load(tmp_path, Own())

    class Another(Own):
        def forward(self, x):
            return super().forward(x.flip(1))

    differs = Another()
    differs.load_state_dict(watched.module.state_dict())
    with pytest.raises(ValueError, match="has the weights saved in .* but gives other scores: its forward differs"):
        load(tmp_path, differs)


def test_it_comes_back_in_another_process(trained, folder):
    code = "import sys, torch; from kmex_utils import networks; n = networks.load(sys.argv[1]); "
    code += "x = torch.ones(1, 3, 32, 32); print(n.name, *n.classes, *n(x)[0].tolist())"
    out = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True).stdout
    name, *words = out.split()
    assert name == "resnet18" and tuple(words[:3]) == CLASSES
    torch.testing.assert_close(torch.tensor([*map(float, words[3:])]), trained(torch.ones(1, 3, 32, 32))[0])


RESNET = {"arch": "resnet18", "arch_args": {}, "weights": ""}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"classes": ["a", "b"]}, "2 class names, but the head 'fc' of resnet18 has 3 outputs"),
        ({"reference": {**RESNET, "arch": "resnet19"}}, "torchvision has no model 'resnet19'"),
        ({"reference": {**RESNET, "arch": "timm/hf-hub:any/one"}}, "timm has no model 'hf-hub:any/one'"),
        ({"reference": {**RESNET, "arch": ["resnet18"]}}, "network.json is not of a saved network .*: save it again"),
        ({"reference": {**RESNET, "arch": "mobilenet_v2"}}, "do not fit mobilenet_v2: .* missing .* unknown"),
        ({"reference": {**RESNET, "arch_args": {"weights": "DEFAULT"}}}, "resnet18 takes no 'weights' in arch_args"),
        ({"reference": {"arch": "resnet18"}}, "network.json is not of a saved network"),
        ({"reference": None}, "is a module of your own"),
        ({"input": {"image_size": 32}}, "network.json is not of a saved network"),
        ({"input": 32}, "network.json is not of a saved network"),
        ({"blocks": []}, ""),
        ({"blocks": ["layer9", "layer4"]}, "resnet18 has no block 'layer9'"),
        ({"blocks": [["layer1"], "layer4"]}, "network.json is not of a saved network"),
        ({"head": "layer4"}, "do not fit resnet18: fc.weight is .3, 512., not .1000, 512., 1 missing .fc.bias."),
        ({"fingerprint": "0" * 16}, "the weights of resnet18 are not those that .*network.json was saved with"),
        ({"scores": [[0.0] * 3] * 2}, "resnet18 has the weights saved in .* but gives other scores"),
        ({"scores": []}, "gives other scores"),
        ({"scores": [[None]]}, "network.json is not of a saved network"),
    ],
)
def test_tampered_settings_are_one_line(folder, values, message):
    edited(folder, **values)
    if not message:
        assert len(load(folder).blocks) == 1, "h alone"
        return
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_damaged_folders_are_one_line(trained, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved network: give the folder of a run or of a saved"):
        load(tmp_path)
    broken = copy.deepcopy(trained)
    broken.module.conv1.weight[0, 0, 0, 0] = torch.nan
    broken.save(tmp_path / "nan")
    advice = r"NaN or infinite weights \(conv1.weight …\): train again with a lower learning_rate"
    with pytest.raises(ValueError, match=advice):
        load(tmp_path / "nan")
    (folder / "weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="weights.safetensors is not a readable safetensors file"):
        load(folder)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="weights.safetensors does not exist"):
        load(folder)
    (folder / "network.json").write_text("{")
    with pytest.raises(ValueError, match="network.json is not readable JSON"):
        load(folder)
    (folder / "network.json").write_text("[1]")
    with pytest.raises(ValueError, match="network.json is not of a saved network"):
        load(folder)


def test_the_package_hands_it_out():
    assert kmex.network is network and kmex.Network is Network
