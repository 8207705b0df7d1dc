"""State dicts in the checkpoints that people have; what a file is that holds none."""

import argparse
import json
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision import models

from kmex_utils.networks import for_training, load, network
from kmex_utils.networks.checkpoints import load_into, read
from kmex_utils.networks.network import IMAGENET

SMALL = "shufflenet_v2_x0_5"


def small():
    return models.get_model(SMALL, num_classes=7)


def own():
    """A network of one's own, in parts."""
    features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3, 2), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(OrderedDict(features=features, head=head))


class Training:
    """One step of a training, with the average of the weights beside it, which differs from them."""

    def __init__(self, module):
        self.module, self.ema = module, AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        self.optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        self.criterion = nn.CrossEntropyLoss(weight=torch.rand(module(torch.randn(2, 3, 64, 64)).shape[1]))
        self.criterion(module(torch.randn(2, 3, 64, 64)), torch.tensor([0, 1])).backward()
        self.ema.update_parameters(module)
        self.optimizer.step()
        self.ema.update_parameters(module)


class InParallel(nn.Module):
    """The features alone in parallel, as PyTorch's ImageNet example does."""

    def __init__(self, module):
        super().__init__()
        for name, part in module.named_children():
            setattr(self, name, part if isinstance(part, nn.Linear) else nn.DataParallel(part))


def lightning(training):
    """What `Trainer.save_checkpoint` writes of a module with `model`, `ema_model` and `criterion`."""
    whole = nn.ModuleDict({"model": training.module, "ema_model": training.ema, "criterion": training.criterion})
    return {
        "epoch": 3,
        "global_step": 40,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": whole.state_dict(),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [training.optimizer.state_dict()],
        "lr_schedulers": [],
        "hyper_parameters": {"lr": 0.1},
    }


def timms(training):
    """What timm's `CheckpointSaver` writes, without its arguments."""
    states = {"state_dict": training.module.state_dict(), "state_dict_ema": training.ema.module.state_dict()}
    return {"epoch": 3, "arch": "x", "optimizer": training.optimizer.state_dict(), "version": 2, **states}


def references(training):
    """What torchvision's references write, without their arguments; the average first."""
    states = {"model_ema": training.ema.state_dict(), "model": nn.DataParallel(training.module).state_dict()}
    return {**states, "optimizer": training.optimizer.state_dict(), "epoch": 3}


def timms_average(training):
    from timm.utils import ModelEmaV3

    return ModelEmaV3(training.module).state_dict()


CHECKPOINTS = {
    "in parallel": lambda t: nn.DataParallel(t.module).state_dict(),
    "compiled in parallel": lambda t: nn.DataParallel(torch.compile(t.module)).state_dict(),
    "parts in parallel": lambda t: InParallel(t.module).state_dict(),
    "a compiled part": lambda t: nn.ModuleList([torch.compile(t.module)]).state_dict(),
    "averaged": lambda t: AveragedModel(t.module, use_buffers=True).state_dict(),
    "timm's average": timms_average,
    "lightning": lightning,
    "timm": timms,
    "torchvision": references,
    "fsdp": lambda t: {f"_fsdp_wrapped_module.{name}": value for name, value in t.module.state_dict().items()},
    "nested": lambda t: {"ckpt": {"network": {"params": t.module.state_dict()}}, "step": 1},
    "beside its optimizer": lambda t: {**t.module.state_dict(), "optimizer": t.optimizer.state_dict(), "epoch": 1},
    "an attribute of another name": lambda t: nn.ModuleDict({"cnn": t.module, "loss": t.criterion}).state_dict(),
    "twice": lambda t: nn.ModuleDict({"model": t.module, "backbone": t.module}).state_dict(),
    "parameters": lambda t: {**dict(t.module.named_parameters()), **dict(t.module.named_buffers())},
}


def outputs(module, size=64):
    with torch.no_grad():
        return module.eval()(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    made = {build: Training(build()) for build in (small, own)}
    for training in made.values():
        assert not torch.allclose(outputs(training.module), outputs(training.ema), rtol=1e-2)
    return made


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("build", [small, own])
def test_the_weights_inside_a_checkpoint(trained, kind, build, tmp_path):
    """Those of the network and not their average, by a library's name and for a module of one's own."""
    if kind == "timm's average":
        pytest.importorskip("timm", reason="timm is an optional extra")
    training = trained[build]
    content = CHECKPOINTS[kind](training)
    torch.save(content, tmp_path / "last.ckpt")
    model = SMALL if build is small else own()
    for weights in (tmp_path / "last.ckpt", content):
        made = network(model, weights, image_size=64)
        torch.testing.assert_close(outputs(made), outputs(training.module), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_module_takes_weights_of_plain_and_of_other_ones(trained, wrap):
    plain = trained[own].module.state_dict()
    for weights in (plain, {f"model._orig_mod.module.{name}": value for name, value in plain.items()}):
        module = own()
        load_into(wrap(module), weights, "own", "file")  # not run: compiling takes seconds
        assert torch.equal(outputs(module), outputs(trained[own].module))


def test_an_average_alone_is_taken(trained, tmp_path):
    training = trained[small]
    torch.save({"epoch": 1, "state_dict_ema": training.ema.state_dict()}, tmp_path / "ema.pth")
    made = network(SMALL, tmp_path / "ema.pth", image_size=64)
    torch.testing.assert_close(outputs(made), outputs(training.ema.module), rtol=1e-4, atol=1e-5)
    made = network(SMALL, references(training)["model_ema"], image_size=64)
    torch.testing.assert_close(outputs(made), outputs(training.ema.module), rtol=1e-4, atol=1e-5)


def test_two_networks_in_a_checkpoint_are_not_guessed_between(trained):
    """Those with another number of classes neither; a teacher that has no such names is no matter."""
    student, teacher = trained[small].module, models.get_model(SMALL)
    both = nn.ModuleDict({"student": student, "teacher": teacher}).state_dict()
    which = r"the given mapping holds several state dicts that fit equally \('student.', 'teacher.'\): save or give one"
    with pytest.raises(ValueError, match=which):
        network(SMALL, both, image_size=64)
    both = nn.ModuleDict({"teacher": models.resnet18(), "student": student}).state_dict()
    torch.testing.assert_close(outputs(network(SMALL, both, image_size=64)), outputs(student), rtol=1e-4, atol=1e-5)


def test_training_starts_from_a_checkpoint(trained, tmp_path):
    torch.save(lightning(trained[small]), tmp_path / "last.ckpt")
    made = for_training(SMALL, tuple("abcde"), str(tmp_path / "last.ckpt"), IMAGENET, seed=2)
    fresh = for_training(SMALL, tuple("abcde"), "scratch", IMAGENET, seed=2)
    theirs = trained[small].module.state_dict()
    for name, value in made.module.state_dict().items():
        assert torch.equal(value, fresh.module.fc.weight if name == "fc.weight" else theirs[name]), name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.conv5.0.weight"), r"do not fit \w+: 1 missing \(conv5.0.weight\)$"),
        (
            lambda s: s.update({"model.conv1.0.weight": torch.ones(24, 3, 5, 5)}),
            r"do not fit \w+: conv1.0.weight is \[24, 3, 5, 5\], not \[24, 3, 3, 3\]$",
        ),
        (
            lambda s: s.update({"model.conv1.0.weight": torch.ones(24, 3, 3, 3, dtype=torch.int8)}),
            r"do not fit \w+: conv1.0.weight is torch.int8, not torch.float32$",
        ),
        (
            lambda s: [s.pop(f"model.fc.{kind}") for kind in ("weight", "bias")],
            r"2 missing \(fc.weight, fc.bias\); these are of an encoder without its head: train one, as notebook 1",
        ),
        (lambda s: s.update({"model.se.weight": torch.ones(1)}), r"do not fit \w+: 1 unknown \(se.weight\)$"),
        (lambda s: s["model.conv5.0.weight"].fill_(torch.inf), r"NaN or infinite weights \(conv5.0.weight …\)$"),
        (
            lambda s: s.update({"model.conv5.0.weight": torch.full((1024, 192, 1, 1), 1e300, dtype=torch.float64)}),
            r"NaN or infinite weights \(conv5.0.weight …\)$",
        ),
    ],
)
def test_what_does_not_fit_is_told_without_what_lies_beside_it(trained, change, message):
    content = lightning(trained[small])
    content["state_dict"] = {
        name: value.clone() for name, value in content["state_dict"].items() if not name.startswith("ema")
    }
    change(content["state_dict"])
    with pytest.raises(ValueError, match=message):
        network(SMALL, content, image_size=64)


def test_halves_and_doubles_are_taken(trained):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        state = {name: value.to(dtype) for name, value in trained[small].module.state_dict().items()}
        made = network(SMALL, state, image_size=64)
        for name, value in made.module.state_dict().items():
            assert torch.equal(value, state[name].to(value.dtype))


# --- the state dict itself ----------------------------------------------------------------------------------------


def test_a_network_of_given_weights_is_saved_with_them(trained, tmp_path):
    made = network(SMALL, trained[small].module.state_dict(), classes=tuple("abcdefg"), image_size=64)
    made.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(outputs(again), outputs(made)) and again.assumed == ("mean", "std")
    given = made.module.state_dict()["fc.weight"]
    trained[small].module.fc.weight.data.add_(1)
    assert not torch.equal(given, trained[small].module.fc.weight), "they are copied"
    trained[small].module.fc.weight.data.sub_(1)


@pytest.mark.parametrize(
    ("weights", "kind", "message"),
    [
        ({}, ValueError, "the given mapping is not a state dict: names with tensors"),
        ({"state_dict": {"epoch": 3}}, ValueError, "the given mapping is not a state dict: names with tensors"),
        ({"fc.weight": [1.0]}, ValueError, "the given mapping is not a state dict: names with tensors"),
        (own(), TypeError, r"got Sequential: give model.state_dict\(\)"),
        (None, TypeError, r"got NoneType: give model.state_dict\(\)"),
        (models.ResNet18_Weights.DEFAULT, TypeError, "got ResNet18_Weights"),
    ],
)
@pytest.mark.parametrize("model", [SMALL, own()])
def test_weights_that_are_no_state_dict(weights, kind, message, model):
    with pytest.raises(kind, match=message) as error:
        network(model, weights)
    assert "\n" not in str(error.value)


# --- what a file is -----------------------------------------------------------------------------------------------


def of_bytes(content):
    return lambda path: path.write_bytes(content)


def torchscript(path):
    with warnings.catch_warnings(action="ignore"):  # deprecated, yet in use
        torch.jit.script(own()).save(path)


def exported(path):
    torch.export.save(torch.export.export(own().eval(), (torch.zeros(1, 3, 16, 16),)), path)


def cut(save, share):
    def save_cut(path):
        save(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return save_cut


def saved(content, **options):
    return lambda path: torch.save(content, path, **options)


def zipped(*names):
    def save(path):
        with zipfile.ZipFile(path, "w") as archive:
            for name in names:
                archive.writestr(name, b"x")

    return save


def damaged(path):
    """One byte of the list at a zip archive's end."""
    torch.save(STATE, path)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"PK\x01\x02")] ^= 1
    path.write_bytes(content)


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1\nsize 12345\n"
)
EXPORT = r"save model.state_dict\(\) alone, in PyTorch or as safetensors$"
PORT = "give the state dict of the same network in PyTorch$"
AGAIN = "download or save it again$"
LEGACY = {"_use_new_zipfile_serialization": False}
STATE = own().state_dict()
FILES = {
    "git lfs.pth": (of_bytes(POINTER), "is a Git LFS pointer, not the file itself: fetch that with `git lfs pull`"),
    "git lfs.safetensors": (of_bytes(POINTER), "is a Git LFS pointer"),
    "html.pth": (of_bytes(b"\n<!DOCTYPE html>\n<html lang='en'>"), "is a web page, not the file itself: download it"),
    "html.safetensors": (of_bytes(b"<html><head><title>404"), "is a web page"),
    "xml.pth": (of_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>"), "is a web page"),
    "error.pth": (of_bytes(b'{"error": "Repository not found"}'), "is JSON: give the file with the tensors"),
    # ModelProto: ir_version 8, producer_name pytorch
    "model.onnx": (of_bytes(b"\x08\x08\x12\x07pytorch\x1a\x052.1.0:\xaf"), f"is ONNX or a TensorFlow graph: {EXPORT}"),
    "saved_model.pb": (of_bytes(b"\x08\x01\x12\xb7\xd6\x17\x0a\xe0\xf0"), "is ONNX or a TensorFlow graph"),
    "model.h5": (of_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64)), f"is HDF5, as Keras writes it: {PORT}"),
    "model.keras": (zipped("config.json", "model.weights.h5"), f"is of Keras: {PORT}"),
    "model.ckpt.index": (of_bytes(bytes(40)), f"is of a TensorFlow checkpoint: {PORT}"),
    "model.ckpt.data-00000-of-00001": (of_bytes(b"\x3f" * 40), "is of a TensorFlow checkpoint"),
    "model.gguf": (of_bytes(b"GGUF\x03\0\0\0" + bytes(64)), f"is GGUF: {PORT}"),
    "arrays.npz": (lambda path: np.savez(path, a=np.ones(3)), f"is a NumPy archive: {EXPORT}"),
    "arrays.npy": (lambda path: np.save(path, np.ones(3)), f"is a NumPy array: {EXPORT}"),
    "scripted.pt": (torchscript, f"is a TorchScript archive: {EXPORT}"),
    "exported.pt2": (exported, f"is a program of torch.export: {EXPORT}"),
    "zipped.zip": (
        zipped("run/best.pth", "run/log.txt"),
        r"is a zip archive \('run/best.pth', 'run/log.txt'\): unpack it and give the file",
    ),
    "packed.pth.gz": (of_bytes(b"\x1f\x8b\x08\0" + bytes(40)), "is compressed: unpack it and give the file in it"),
    "module.pth": (
        saved(own()),
        rf"pickled objects, which may run code \(torch.nn.modules.container.Seq\w+\): {EXPORT}",
    ),
    "old module.pth": (saved(own(), **LEGACY), rf"pickled objects, which may run code \(\S+.Sequential\): {EXPORT}"),
    "arguments.pth": (
        saved({"model": STATE, "args": argparse.Namespace(lr=0.1)}),
        rf"holds pickled objects, which may run code \(argparse.Namespace\): {EXPORT}",
    ),
    "scalar.pth": (saved({"model": STATE, "best": np.float64(0.5)}), r"may run code \(numpy\S+.scalar\)"),
    "plain.pkl": (of_bytes(pickle.dumps({"a": np.ones(3)})), rf"holds pickled objects, which may run code: {EXPORT}"),
    "cut.pth": (cut(saved(STATE), 0.9), f"is cut short or damaged: {AGAIN}"),
    "damaged.pth": (damaged, f"is cut short or damaged: {AGAIN}"),
    "old cut.pth": (cut(saved(STATE, **LEGACY), 0.5), f"is not a readable state dict .*: {AGAIN}"),
    "cut.safetensors": (
        cut(lambda path: save_file(STATE, path), 0.9),
        f"is not a readable state dict .*file not fully covered.*: {AGAIN}",
    ),
    "empty.pth": (of_bytes(b""), f"is empty: {AGAIN}"),
    "empty.safetensors": (of_bytes(b""), f"is empty: {AGAIN}"),
    "noise.pth": (of_bytes(b"nothing"), f"is not a readable state dict .*: {AGAIN}"),
    "list.pth": (saved([torch.ones(1)]), "is not a state dict: names with tensors"),
    "number.pth": (saved(3), "is not a state dict: names with tensors"),
    "folder": (lambda path: path.mkdir(), "is a folder: give the file with the state dict in it$"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_no_state_dict_is_called_what_it_is(name, tmp_path, recwarn):
    save, message = FILES[name]
    save(tmp_path / name)
    recwarn.clear()
    with pytest.raises(ValueError, match=f"{name} .*{message}") as error:
        network(own(), tmp_path / name)
    assert "\n" not in str(error.value) and not re.search(
        "weights.only|trust|safe_globals", str(error.value), re.IGNORECASE
    )
    assert not recwarn.list


@pytest.mark.parametrize("content", [None, {"args": argparse.Namespace()}])
def test_nothing_advises_to_unpickle(content, tmp_path, monkeypatch):
    """Where the library's own file is damaged neither."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    file = tmp_path / "checkpoints" / "shufflenetv2_x0.5-f707e7126e.pth"
    torch.save(content, file) if content else file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"f707e7126e.pth is damaged \(.*Unsupported") as error:
        network(SMALL)
    assert not re.search("weights.only|trust|safe_globals", str(error.value), re.IGNORECASE)


class Runs:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_runs(legacy, tmp_path):
    content = {"state_dict": STATE, "x": Runs(str(tmp_path / "ran"))}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"may run code \(\w+.open\)"):
        read(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "a.bin", "a"])
def test_the_content_says_which_format_it_is(name, tmp_path):
    for save in (save_file, torch.save, lambda state, path: torch.save(state, path, **LEGACY)):
        save(STATE, tmp_path / name)
        found = read(tmp_path / name)
        assert found.keys() == STATE.keys() and all(torch.equal(found[key], STATE[key]) for key in STATE)


# --- in several files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_state_dict_in_several_files(trained, ending, tmp_path):
    """As Hugging Face's libraries divide it."""
    state = trained[small].module.state_dict()
    weight_map = {name: f"model-{i % 3}.{ending}" for i, name in enumerate(state)}
    for file in set(weight_map.values()):
        part = {name: state[name] for name in state if weight_map[name] == file}
        (save_file if ending == "safetensors" else torch.save)(part, tmp_path / file)
    index = tmp_path / f"model.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    made = network(SMALL, index, image_size=64)
    torch.testing.assert_close(outputs(made), outputs(trained[small].module), rtol=1e-4, atol=1e-5)
    (tmp_path / f"model-1.{ending}").unlink()
    with pytest.raises(FileNotFoundError, match=f"model-1.{ending} does not exist"):
        network(SMALL, index, image_size=64)


@pytest.mark.parametrize("outside", ["../secret.bin", "/etc/passwd", "deeper/a.bin"])
def test_files_elsewhere_are_not_read(outside, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": outside}}))
    with pytest.raises(ValueError, match=f"index.json names {outside}, which is not beside it"):
        read(index)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_an_index_that_is_none(content, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin1"))
    with pytest.raises(ValueError, match=r"index.json is no index of a state dict: give the file with the tensors$"):
        read(index)


# --- names and versions of the libraries' own ---------------------------------------------------------------------


def test_densenets_of_torchvision_have_older_names(tmp_path, monkeypatch):
    """Their files, as torchvision reads them: from the hub's folder, by path, and in parallel."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    torch.manual_seed(4)
    older = re.compile(r"(denselayer\d+\.(?:norm|conv))(\d)")
    state = {older.sub(r"\1.\2", name): value for name, value in models.densenet121().state_dict().items()}
    state = {name: value for name, value in state.items() if "num_batches_tracked" not in name}  # younger than they
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    file = tmp_path / "checkpoints" / models.DenseNet121_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save(state, file)
    theirs = outputs(models.densenet121(weights="DEFAULT"))
    in_parallel = {f"module.{name}": value for name, value in state.items()}
    for weights in ("imagenet", file, in_parallel):
        made = network("densenet121", weights, image_size=64)
        torch.testing.assert_close(outputs(made), theirs, rtol=1e-3, atol=1e-4)


def test_mnasnet_asks_for_a_version(tmp_path):
    """Which safetensors do not carry."""
    theirs = models.mnasnet0_5(num_classes=3)
    save_file(theirs.state_dict(), tmp_path / "w.safetensors")
    made = network("mnasnet0_5", tmp_path / "w.safetensors", image_size=64)
    torch.testing.assert_close(outputs(made), outputs(theirs), rtol=1e-4, atol=1e-5)
    made.save(tmp_path / "saved")
    assert torch.equal(outputs(load(tmp_path / "saved")), outputs(made))
