"""The network to train, by name: blocks, weights from each source, what is refused."""

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from kmex_utils.architectures import build, unloaded, weights_file
from kmex_utils.networks import Network, theorem1_residual
from kmex_utils.store import save_tensors


@pytest.fixture
def x(generator):
    return torch.randn(2, 3, 64, 64, generator=generator)


@pytest.mark.parametrize("arch", ["mobilenet_v2", "timm/tf_efficientnet_lite0", "shufflenet_v2_x1_0"])
def test_a_chain_of_modules_computes_what_its_library_does(arch, x):
    """The blocks are those of the network watched as it is, and so are their outputs."""
    backbone = build(arch, 1000, seed=5).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        if arch.startswith("timm/"):
            import timm

            whole = timm.create_model(arch.removeprefix("timm/"))
        else:
            whole = models.get_model(arch)
    network = Network(whole, image_size=224)
    ours, theirs = backbone.activations(x), network.activations(x)
    assert len(ours) == len(theirs) == 4
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-4, atol=1e-4 * float(reference.abs().max()))
    assert backbone.b is None
    assert theorem1_residual(backbone, x) < 1e-5


def test_resnets_are_cut_alike_by_name_and_from_a_file(tmp_path, x):
    """From a state dict of the library's, in either format; the classifier is fresh."""
    theirs = models.resnet18()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    for name in ("theirs.pth", "theirs.safetensors"):
        backbone = build("resnet18", 4, str(tmp_path / name), seed=2).eval()
        assert list(backbone.state_dict()) == list(build("resnet18", 4).state_dict())
        assert torch.equal(backbone.blocks[3][1].conv2.weight, theirs.layer4[1].conv2.weight)
        assert torch.equal(backbone.c, build("resnet18", 4, seed=2).c)
        z = backbone.activations(x)[-1].mean((2, 3))
        assert torch.allclose(theirs.fc(z), theirs.eval()(x), atol=1e-5)


def test_a_training_goes_on_from_another(tmp_path):
    """The blocks of the file, its classifier where it has the same classes; anything else is refused."""
    path = tmp_path / "backbone.safetensors"
    before = build("resnet18", 4, seed=1)
    save_tensors(path, before.state_dict(), {"arch": "resnet18"})
    same, other = build("resnet18", 4, str(path), seed=2), build("resnet18", 7, str(path), seed=2)
    for name, value in before.state_dict().items():
        assert torch.equal(same.state_dict()[name], value)
        assert name == "classifier.weight" or torch.equal(other.state_dict()[name], value)
    assert torch.equal(other.c, build("resnet18", 7, seed=2).c)
    with pytest.raises(ValueError, match="does not fit resnet34: it lacks"):
        build("resnet34", 4, str(path))


def test_what_is_loaded_later_has_the_same_names():
    """A ResNet's weights are not drawn; any other's are, and replaced."""
    for arch in ("resnet18", "mobilenet_v2"):
        empty, full = unloaded(arch, 4, bias=True), build(arch, 4, bias=True)
        assert list(empty.state_dict()) == list(full.state_dict())
        empty.load_state_dict(full.state_dict(), assign=True)
        assert torch.equal(empty.c, full.c) and torch.equal(empty.b, full.b)


def test_timms_weights_from_the_expected_place(tmp_path, monkeypatch, no_network):
    """Hugging Face's cache, as it lies after a download; without it one line."""
    import timm
    from huggingface_hub import constants, file_download

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for part in (constants, file_download):
        monkeypatch.setattr(part, "HF_HUB_CACHE", str(tmp_path), raising=False)
    folder, size = weights_file("timm/tf_efficientnet_lite0")
    with pytest.raises(ConnectionError, match=r"timm cannot load 'tf_efficientnet_lite0' .*give weights, a file"):
        build("timm/tf_efficientnet_lite0", 4, "imagenet")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(8)
        theirs = timm.create_model("tf_efficientnet_lite0")
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(theirs.state_dict(), snapshot / "model.safetensors")
    backbone = build("timm/tf_efficientnet_lite0", 4, "imagenet")
    assert torch.equal(backbone.blocks[0][0].weight, theirs.conv_stem.weight)
    assert size == pytest.approx((snapshot / "model.safetensors").stat().st_size, rel=0.01)


@pytest.mark.parametrize(
    ("arch", "weights", "kind", "message"),
    [
        ("vgg11", "scratch", ValueError, r"vgg11 is not of the paper's form .*classifier.0 \(Linear\)"),
        ("densenet121", "scratch", ValueError, "densenet121 is not a chain of modules"),
        ("resnet35", "scratch", ValueError, "torchvision has no model 'resnet35'; the nearest: .*resnet34"),
        ("timm/resnet35", "scratch", ValueError, "timm has no model 'resnet35'"),
        ("resnet18", "imagnet", ValueError, "weights must be 'imagenet', 'scratch', a backbone.safetensors"),
        ("resnet18", "nowhere/file.safetensors", FileNotFoundError, "file.safetensors does not exist"),
    ],
)
def test_what_cannot_be_trained_is_one_line(arch, weights, kind, message):
    with pytest.raises(kind, match=message):
        build(arch, 4, weights)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    torch.save(models.mobilenet_v2().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other.pth do not fit resnet18: .* missing \(conv1.weight"):
        build("resnet18", 4, str(tmp_path / "other.pth"))
