"""Networks by name: blocks, arguments, weights from each source, a head to train; what is refused."""

import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision import models

from kmex_utils.data import Input
from kmex_utils.networks import Network, for_training, network, theorem1_residual
from kmex_utils.networks.catalogue import channels, weights_entry, weights_file
from kmex_utils.networks.trace import noise

TAKEN = Input(64, (0.5,) * 3, (0.25,) * 3)
SMALL = "shufflenet_v2_x0_5"  # where any network will do: a thirtieth of resnet18's weights, and a head `fc` like its


@pytest.fixture
def x(generator):
    return torch.randn(2, 3, 64, 64, generator=generator)


def to_train(arch, classes=4, weights="scratch", input=TAKEN, **options):
    return for_training(arch, tuple(map(str, range(classes))), str(weights), input, **options)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- a network to train -------------------------------------------------------------------------------------------


def test_blocks_of_a_resnet():
    made = to_train("resnet34", 10)
    shapes = [tuple(x.shape[1:]) for x in made.activations(torch.zeros(1, 3, 96, 96))]
    assert shapes == [(64, 24, 24), (128, 12, 12), (256, 6, 6), (512, 3, 3)]
    assert made.classifier.bias is None and made.c.shape == (10, 512)
    assert channels("resnet34") == (64, 128, 256, 512)
    assert made.classes == tuple("0123456789") and made.named and made.input == TAKEN


@pytest.mark.parametrize("image_size", [32, 96])
def test_blocks_do_not_depend_on_the_image_size(image_size):
    """At 32 pixels a ResNet's last two blocks are 2 x 2 and 1 x 1."""
    made = to_train("resnet18", input=replace(TAKEN, image_size=image_size))
    assert made.blocks == ("layer1", "layer2", "layer3", "layer4") and made.input.image_size == image_size


def test_blocks_are_torchvisions_network():
    made = to_train("resnet18", 1000, seed=5)
    torch.manual_seed(5)
    theirs = models.resnet18().eval()
    theirs.fc = made.classifier
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(made(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("arch", ["mobilenet_v2", "timm/tf_efficientnet_lite0", "shufflenet_v2_x1_0", "densenet121"])
def test_a_network_to_train_computes_what_its_library_does(arch, x):
    """The blocks are those of the network watched as it is, and so are their outputs."""
    made = to_train(arch, 1000, seed=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if arch.startswith("timm/"):
            timm = pytest.importorskip("timm", reason="timm is an optional extra")
            whole = timm.create_model(arch.removeprefix("timm/"))
        else:
            whole = models.get_model(arch)
    watched = Network(whole)
    ours, theirs = made.activations(x), watched.activations(x)
    assert len(ours) == len(theirs) == 4 and made.blocks == watched.blocks
    for activation, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(activation, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert made.b is None
    assert theorem1_residual(made, x) < 1e-5


@pytest.mark.parametrize("arch", ["densenet121", "shufflenet_v2_x1_0", "googlenet", "efficientnet_b0"])
def test_a_step_of_training_reaches_every_parameter(arch, x):
    """Networks that are no chain of modules, too; the scores are those of the library's own forward."""
    made = to_train(arch)
    assert not made.training and not any(p.requires_grad for p in made.parameters())
    made.train().requires_grad_(True)
    torch.manual_seed(0)
    y = made(x)
    torch.manual_seed(0)
    assert torch.equal(y, made.module(x))
    F.cross_entropy(y, torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters())
    assert sum(bool(p.grad.any()) for p in made.parameters()) > 0.9 * len([*made.parameters()])


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_what_is_trained_does_not_transform_its_input(arch):
    made = to_train(arch, input=replace(TAKEN, image_size=96))
    assert made.module.transform_input is False and "aux" not in " ".join(made.module.state_dict()).lower()


def test_initialisation_is_seeded_and_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    once, again, other = (to_train(SMALL, 3, seed=seed) for seed in (1, 1, 2))
    assert same(once, again) and not same(once, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_with_bias():
    with_bias, without = to_train(SMALL, seed=1, bias=True), to_train(SMALL, seed=1)
    assert with_bias.b.shape == (4,) and without.b is None
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(with_bias(x), with_bias.classifier(with_bias.encode(x).mean((2, 3))))


@pytest.mark.parametrize(
    ("arch", "weights", "kind", "message"),
    [
        (
            "mobilenet_v3_small",
            "scratch",
            ValueError,
            "not of the paper's form .* its head is gated, not one linear",
        ),
        ("resnet35", "scratch", ValueError, "torchvision has no model 'resnet35'; the nearest: .*resnet34"),
        ("timm/resnet35", "scratch", ValueError, "timm has no model 'resnet35'"),
        ("resnet18", "imagnet", FileNotFoundError, "imagnet does not exist: weights is 'imagenet', 'random' or a file"),
        ("resnet18", "nowhere/file.safetensors", FileNotFoundError, "file.safetensors does not exist"),
        ("inception_v3", "scratch", ValueError, "inception_v3 does not run on 3 x 64 x 64 images: "),
    ],
)
def test_what_cannot_be_trained_is_one_line(arch, weights, kind, message):
    if arch.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    with pytest.raises(kind, match=message) as error:
        to_train(arch, weights=weights)
    assert "\n" not in str(error.value)


# --- arguments ----------------------------------------------------------------------------------------------------

LAYERS = {"layers": [1, 1, 1, 2]}


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="timm is an optional extra")


def test_a_network_with_arguments(timm, tmp_path, x):
    """To train from a file without a head, in half precision as it may be; to explain with its own head."""
    torch.manual_seed(6)
    theirs = timm.create_model("test_resnet", layers=(1, 1, 1, 2))
    state = {name: value for name, value in theirs.state_dict().items() if not name.startswith("fc.")}
    halved = {name: value.half() if value.dim() == 4 else value for name, value in state.items()}
    save_file(halved, tmp_path / "w.safetensors")
    made = to_train("timm/test_resnet", weights=tmp_path / "w.safetensors", arch_args=LAYERS, seed=2)
    assert made.c.shape == (4, 96) and torch.equal(made.c, to_train("timm/test_resnet", arch_args=LAYERS, seed=2).c)
    for name, value in made.module.state_dict().items():
        assert name == "fc.weight" or torch.equal(value, halved[name].to(value.dtype)), name
    assert channels("timm/test_resnet", LAYERS) == (32, 48, 192, 96)
    save_file(theirs.state_dict(), tmp_path / "whole.safetensors")
    whole = network(
        "timm/test_resnet", tmp_path / "whole.safetensors", arch_args={"layers": (1, 1, 1, 2)}, image_size=64
    )
    torch.testing.assert_close(whole(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)
    assert whole.reference["arch_args"] == LAYERS
    with pytest.raises(
        ValueError, match=r"do not fit timm/test_resnet: 10 missing \(layer1.1.conv1.weight, .* …\), 10 "
    ):
        network("timm/test_resnet", tmp_path / "whole.safetensors", arch_args={"layers": [2, 1, 1, 1]})


def test_arguments_of_torchvisions(x):
    made = network("mobilenet_v2", "random", arch_args={"width_mult": 0.5, "num_classes": 7}, image_size=64)
    assert made(x).shape == (2, 7) and channels("mobilenet_v2", {"width_mult": 0.5})[0] == 16


@pytest.mark.parametrize(
    "name",
    [
        *("pretrained", "weights", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"),
        *("progress", "scriptable", "exportable", "features_only", "pretrained_strict", "out_indices", "pruned"),
        *("feature_cfg", "no_jit", "device", "nonsense"),
    ],
)
@pytest.mark.parametrize("arch", [SMALL, "timm/test_resnet", "timm/regnety_002"])
def test_only_arguments_of_the_networks_class_pass(arch, name):
    """None of those with which a library loads, fetches or wraps; nothing is tried first."""
    if arch.startswith("timm/"):
        pytest.importorskip("timm", reason="timm is an optional extra")
    with pytest.raises(ValueError, match=f"{arch} takes no '{name}' in arch_args, but any of .*num_classes"):
        network(arch, "random", arch_args={name: "x"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([1], r"arch_args must be names and values, as \{'layers': \[2, 2, 2, 3\]\}, got \[1\]"),
        ({"norm_layer": nn.GroupNorm}, "arch_args must be plain data"),
        ({"zero_init_residual": float("nan")}, "arch_args must be plain data"),
        ({"layers": [2, 2, 2, 3]}, "resnet18 cannot be made with arch_args .*multiple values"),
        ({"groups": "two"}, "resnet18 cannot be made with arch_args {'groups': 'two'}"),
    ],
)
def test_arguments_that_are_not_taken_are_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        network("resnet18", "random", arch_args=arguments)
    assert "\n" not in str(error.value)


def test_arguments_go_with_a_name():
    with pytest.raises(ValueError, match="arch_args goes with a model's name; your module comes with its own"):
        network(models.resnet18(), arch_args={"groups": 1})


# --- weights of the library ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    return tmp_path / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"


def test_imagenet_weights_from_the_expected_place(hub):
    theirs = models.get_model(SMALL)
    torch.save(theirs.state_dict(), hub)
    assert weights_file(SMALL)[0] == hub
    made = to_train(SMALL, weights="imagenet", seed=3)
    assert torch.equal(made.module.conv1[0].weight, theirs.conv1[0].weight)
    assert torch.equal(made.c, to_train(SMALL, seed=3).c), "the head is fresh"
    with pytest.raises(ValueError, match=rf"do not fit {SMALL}: fc.weight is \[1000, 1024\], not \[5, 1024\]"):
        network(SMALL, arch_args={"num_classes": 5})


def test_damaged_imagenet_weights_are_named(hub):
    hub.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"shufflenetv2_x0.5-f707e7126e.pth is damaged .*; delete it"):
        to_train(SMALL, weights="imagenet")


def test_missing_imagenet_weights_are_one_clear_line(hub, no_network):
    with pytest.raises(
        ConnectionError, match=rf"put https://\S+/shufflenetv2_x0.5-f707e7126e.pth at {hub}, or train from scratch"
    ):
        to_train(SMALL, weights="imagenet")


def test_timms_weights_from_the_expected_place(timm, tmp_path, monkeypatch, no_network):
    """Hugging Face's cache, as it lies after a download; without it one line."""
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for part in (constants, file_download):
        monkeypatch.setattr(part, "HF_HUB_CACHE", str(tmp_path), raising=False)
    folder, size = weights_file("timm/tf_efficientnet_lite0")
    with pytest.raises(ConnectionError, match=r"timm cannot load 'tf_efficientnet_lite0' .*give weights, a file"):
        to_train("timm/tf_efficientnet_lite0", weights="imagenet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        theirs = timm.create_model("tf_efficientnet_lite0")
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(theirs.state_dict(), snapshot / "model.safetensors")
    made = to_train("timm/tf_efficientnet_lite0", weights="imagenet")
    assert torch.equal(made.module.conv_stem.weight, theirs.conv_stem.weight)
    assert size == pytest.approx((snapshot / "model.safetensors").stat().st_size, rel=0.01)
    pretrained = network("timm/tf_efficientnet_lite0")
    assert pretrained.named and len(pretrained.classes) == 1000 and not pretrained.assumed


def test_without_timm_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"'timm/resnet18' needs timm, .*pip install 'kmex-utils\[timm\]'"):
        network("timm/resnet18", "random")


def test_a_network_without_v1_weights():
    assert weights_entry("resnet50").name == "IMAGENET1K_V1"
    assert weights_entry("regnet_y_128gf").name == "IMAGENET1K_SWAG_E2E_V1"


def test_the_librarys_size_and_normalisation():
    made = network("efficientnet_b1", "random")
    assert (made.input.image_size, made.input.fit) == (240, "crop")
    assert made.input.std == (0.229, 0.224, 0.225) and made.classes[0] == "0" and not made.named


# --- weights from files -------------------------------------------------------------------------------------------


def test_training_starts_from_a_file(tmp_path, x):
    """From a state dict of the library's, in either format; the head is fresh."""
    theirs, fresh = models.get_model(SMALL), to_train(SMALL, seed=2)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    for name in ("theirs.pth", "theirs.safetensors"):
        made = to_train(SMALL, weights=tmp_path / name, seed=2)
        assert list(made.state_dict()) == list(fresh.state_dict())
        assert torch.equal(made.module.conv5[0].weight, theirs.conv5[0].weight)
        assert torch.equal(made.c, fresh.c)
        z = made.encode(x).mean((2, 3))
        assert torch.allclose(theirs.eval().fc(z), theirs(x), atol=1e-5)


def test_a_training_goes_on_from_another(tmp_path):
    """All of the file but its head, and this where it has the same shapes; anything else is refused."""
    before, path = to_train(SMALL, seed=1), tmp_path / "weights.safetensors"
    before.save(tmp_path)
    again, seven = to_train(SMALL, weights=path, seed=2), to_train(SMALL, 7, path, seed=2)
    biased = to_train(SMALL, weights=path, seed=2, bias=True)
    again, *others = (network.state_dict() for network in (again, seven, biased))
    for name, value in before.state_dict().items():
        assert torch.equal(again[name], value)
        assert name == "module.fc.weight" or all(torch.equal(other[name], value) for other in others)
    assert torch.equal(seven.c, to_train(SMALL, 7, seed=2).c)
    assert torch.equal(biased.c, to_train(SMALL, seed=2, bias=True).c)
    with pytest.raises(ValueError, match=r"do not fit mnasnet0_5: 260 missing \(layers.0.weight, .* …\), .* unknown"):
        to_train("mnasnet0_5", weights=path)


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(3)
    return models.resnet18(num_classes=7)


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
    made = network("resnet18", path, classes=list("abcdefg"), image_size=64)
    x = noise(made.input)
    with torch.no_grad():
        torch.testing.assert_close(made(x), resnet.eval()(x), rtol=1e-4, atol=1e-5)
    assert made.classes == tuple("abcdefg") and made.input.mean == (0.485, 0.456, 0.406)


def test_a_state_dict_without_bias(resnet, tmp_path):
    state = {name: value for name, value in resnet.state_dict().items() if name != "fc.bias"}
    save_file(state, tmp_path / "w.safetensors")
    assert network("resnet18", tmp_path / "w.safetensors", image_size=64).b is None


@pytest.mark.parametrize("arch", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_dropped(arch, tmp_path):
    """A fine-tuned network whose auxiliary heads were replaced, too; its input is transformed as ImageNet's was."""
    theirs = models.get_model(arch, weights=None, init_weights=False, aux_logits=True, transform_input=True)
    theirs.fc = nn.Linear(theirs.fc.in_features, 7)
    for name in ("AuxLogits",) if arch == "inception_v3" else ("aux1", "aux2"):
        setattr(theirs, name, nn.Linear(3, 7))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    made = network(arch, tmp_path / "w.pth", image_size=96)
    x = noise(made.input)
    with torch.no_grad():
        torch.testing.assert_close(made(x), theirs.eval()(x), rtol=1e-3, atol=1e-5)
    assert made.module.transform_input


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


def test_files_match_by_name_never_by_shape_or_order(resnet, tmp_path):
    """The same tensors in the same order under other names: up to three of the names, and how many."""
    state = {name.replace("layer1", "stage1"): value for name, value in resnet.state_dict().items()}
    save_file(state, tmp_path / "w.safetensors")
    said = r"20 missing \(layer1.0.conv1.weight, layer1.0.bn1.weight, layer1.0.bn1.bias …\), 20 unknown \(stage1.0.bn1"
    for refused in (network, lambda arch, path: to_train(arch, weights=path)):
        with pytest.raises(ValueError, match="w.safetensors do not fit resnet18: " + said):
            refused("resnet18", tmp_path / "w.safetensors")
    own = Network(models.resnet18(num_classes=7), input=TAKEN)
    with pytest.raises(ValueError, match="do not fit ResNet: " + said):
        network(own.module, tmp_path / "w.safetensors")
    del state["stage1.0.bn1.bias"], state["fc.bias"]
    one = {name.replace("stage1", "layer1"): value for name, value in state.items()} | {"extra": torch.ones(1)}
    save_file(one, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"do not fit resnet18: 1 missing \(layer1.0.bn1.bias\), 1 unknown \(extra\)$"):
        network("resnet18", tmp_path / "w.safetensors")
