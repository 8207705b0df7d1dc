"""What an adversary gives to shell, functions and files: done rightly, or refused in one line that names the fix."""

import contextlib
import copy
import io
import json
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bad_inputs import FOLDERS, WEIGHTS, good, image, small_cnn, weights
from PIL import Image
from torch import nn

import kmex_utils as kmex
from kmex_utils import cli, data, networks, paths, store
from kmex_utils.data import Input, reading
from kmex_utils.explanation import fit

FEW = {"prototypes_per_class": 1, "restarts": 1, "device": "cpu", "image_size": 32, "mean": 0.5, "std": 0.25}
PYTHONS_OWN = re.compile(
    r"Traceback|'NoneType'|has no attribute|not supported between|unexpected keyword|not iterable|codec"
)


def one_line(text):
    """A line of words for a user, not Python's own, of a length that is read."""
    lines = str(text).strip().splitlines()
    assert len(lines) == 1 and 10 < len(lines[0]) < 700, text
    assert not PYTHONS_OWN.search(lines[0]), text
    return lines[0]


def made(name, root):
    change, said, count, classes = FOLDERS[name]
    change(good(root))
    return said, count, classes.split()


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """`~` is a folder of the test's."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# --- folders ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, tmp_path):
    said, count, classes = made(name, tmp_path / "in")
    lines = []
    options = {"strict": False, "needs_labels": False, "data": None, "log": lines.append}
    if said.startswith("error: "):
        with pytest.raises((ValueError, OSError)) as error:
            data.load(tmp_path / "in", Input(8, 0, 1), **options)
        assert re.search(said.removeprefix("error: "), one_line(error.value))
        return
    dataset = data.load(tmp_path / "in", Input(8, 0, 1), **options)
    assert len(dataset.train) + len(dataset.test) == count and list(dataset.classes) == classes
    assert not said or any(re.search(said, one_line(line)) for line in lines), lines
    assert said or not lines, "of what is good nothing is said"


@pytest.mark.parametrize("name", ["longfile", "longclass", "badutf8class", "newline", "single", "oneeach"])
def test_folders_from_explaining_to_exporting(name, tmp_path):
    """One file name stops nothing; too few images are told."""
    made(name, tmp_path / "in")
    how = FEW | {"prototypes_per_class": 2 if name in ("single", "oneeach") else 1}
    if name in ("single", "oneeach"):
        with pytest.raises(ValueError, match="lower prototypes_per_class") as error:
            kmex.explain(small_cnn(), tmp_path / "in", log=str, **how)
        one_line(error.value)
        return
    explained = kmex.explain(small_cnn(), tmp_path / "in", log=str, **how)
    out = explained.export(tmp_path / "export", log=str)
    table = pd.read_parquet(out / "images.parquet")
    assert set(table.file) == set(explained.names) and table.error.isna().all()
    for name in table.file:
        assert (out / "maps" / ("/".join(map(store.short, name.split("/"))) + ".npz")).is_file()
    assert len(list(out.glob("maps/**/*.npz"))) == len(table), "no two images have one name"


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    for i in range(8):
        image(tmp_path / f"{i}.png", i)
    at_once, most, lock = 0, 0, threading.Lock()
    rgb = reading.rgb

    def counted(*args):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        threading.Event().wait(0.02)
        with lock:
            at_once -= 1
        return rgb(*args)

    monkeypatch.setattr(reading, "rgb", counted)
    files = sorted(tmp_path.glob("*.png"))
    for limit, expected in ((0, {1}), (2**25, set(range(2, 9)))):
        most = 0
        monkeypatch.setattr(reading, "LARGE", limit)
        assert len(list(reading.read_many(files, Input(8, 0, 1), reading.Reading(), names=[*map(str, files)]))) == 8
        assert most in expected


def test_pictures_do_not_become_images(tmp_path):
    """Of an explanation, an export or a panel among the photos."""
    photos = good(tmp_path / "in")
    explained = kmex.explain(small_cnn(), photos, log=str, **FEW)
    explained.save(photos / "explained")
    explained.export(photos / "explained" / "export", maps="png", log=str)
    assert data.load(photos, strict=False, data=None, log=str, needs_labels=False).classes == ("cat", "dog", "ship")
    with pytest.raises(ValueError, match="lies among the images of .*: choose another") as error:
        explained.export(photos / "maps", maps="png", log=str)
    one_line(error.value)
    assert not (photos / "maps").exists()


# --- shell --------------------------------------------------------------------------------------------------------

ARCH = "shufflenet_v2_x0_5"
BASE = ["--model", ARCH, "--weights", "random", "--image-size", "64", "--device", "cpu", "--restarts", "1"]
QUICK = ["--prototypes-per-class", "1", "--start-block", "4"]
REFUSED = {
    "model typo": (["--model", "resnet5O"], "no model 'resnet5O'; the nearest: resnet50"),
    "model timm typo": (["--model", "timm/resnet5O"], "timm has no model 'resnet5O'; the nearest: resnet50"),
    "model path missing": (["--model", "runs/x/seed-0"], "no model .*for a saved network its folder"),
    "weights missing": (["--weights", "/nowhere.pt"], "/nowhere.pt does not exist: weights is"),
    "weights dir": (["--weights", "."], "is a folder: give the file with the state dict"),
    "classes missing": (["--classes", "/nowhere.txt"], "/nowhere.txt does not exist: `classes` is"),
    "classes wrong count": (["--classes", "{two}"], "2 class names, but the head 'fc' .* has 1000 outputs"),
    "classes latin-1": (["--classes", "{latin}"], "2 class names, but the head 'fc' .* has 1000 outputs"),
    "blocks unknown": (["--blocks", "layer9"], "has no block 'layer9'"),
    "blocks order": (["--blocks", "stage3", "stage2"], "are not in the order they are computed"),
    "blocks twice": (["--blocks", "stage3", "stage3"], "are not in the order they are computed"),
    "head unknown": (["--head", "fcc"], "has no head 'fcc'|fcc"),
    "image-size -1": (["--image-size", "-1"], "image_size must be at least 1 pixel"),
    "mean two values": (["--mean", "0.5", "0.5"], "mean and std must be of R, G and B, or one value"),
    "mean nan": (["--mean", "nan"], "mean must be numbers"),
    "mean inf": (["--mean", "inf"], "mean must be numbers"),
    "mean 1e300": (["--mean", "1e300"], "mean is of values in .0, 1."),
    "mean 255 scale": (["--mean", "123.675", "116.28", "103.53"], "mean is of values in .0, 1., .*: divide .* by 255"),
    "std negative": (["--std", "-1"], "std positive"),
    "std 255 scale": (["--std", "58.395", "57.12", "57.375"], "std is of values in .0, 1., .*: divide .* by 255"),
    "per-class 0": (
        ["--prototypes-per-class", "0"],
        "prototypes_per_class must be a whole number of at least 1, got 0",
    ),
    "per-class -3": (["--prototypes-per-class", "-3"], "prototypes_per_class must be a whole number of at least 1"),
    "per-class 1000": (["--prototypes-per-class", "1000"], "fewer than K/C = 1000: lower prototypes_per_class"),
    "held-out -0.1": (["--held-out", "-0.1"], "held_out must be a share"),
    "held-out nan": (["--held-out", "nan"], "held_out must be a share"),
    "held-out inf": (["--held-out", "inf"], "held_out must be a share"),
    "held-out 0.999": (
        ["--held-out", "0.999", "--prototypes-per-class", "2"],
        "lower prototypes_per_class or held_out",
    ),
    "restarts -1": (["--restarts", "-1"], "restarts must be a whole number of at least 1, got -1"),
    "restarts 10**6": (["--restarts", "1000000"], "restarts must be .* at most 1000, got 1000000"),
    "seed -1": (["--seed", "-1"], "seed must be a whole number of at least 0, got -1"),
    "seed 9223372036854775808": (["--seed", "9223372036854775808"], "seed must be .* at most 9223372036854775807"),
    "seed 1180591620717411303424": (["--seed", "1180591620717411303424"], "seed must be .* at most"),
    "fit-on -1": (["--fit-on", "-1"], "fit_on must be a whole number of at least 0, got -1"),
    "start-block 9": (["--start-block", "9"], "no block 9"),
    "start-block -1": (["--start-block", "-1"], "start_block must be a whole number of at least 0"),
    "device typo": (["--device", "cpuu"], "device 'cpuu' cannot be used here"),
    "device meta": (["--device", "meta"], "device 'meta' cannot be used here"),
    "scratch missing": (["--scratch", "/nowhere"], "scratch must be a folder that exists, got /nowhere"),
    "scratch a file": (["--scratch", "/etc/hostname"], "scratch must be a folder that exists"),
    "out below a file": (["--out", "/etc/hostname/x"], "/etc/hostname/x cannot be written .*: choose another folder"),
    "out in proc": (["--out", "/proc/x"], "/proc/x cannot be written .*: choose another folder"),
    "out empty": (["--out", ""], "exists: choose another --out"),
    "out of nobody": (["--out", "~nobody-of-this-name/x"], "user who is not known here: give the whole path"),
    "out too long": (["--out", "n" * 300], "cannot be written|File name too long"),
    "panel missing": (["--panel", "nofile.jpg"], "--panel nofile.jpg is neither a file nor in"),
    "panel dir": (["--panel", "cat"], "--panel cat is neither a file nor in"),
    "panel text": (["--panel", "/etc/hostname"], "--panel /etc/hostname cannot be read: not an image"),
    "target typo": (["--target", "catt"], "target must be a class of .*, got 'catt'"),
    "page -1": (["--page", "-1"], "--page takes a number of images, got -1"),
    "image-size 1.5": (["--image-size", "1.5"], "invalid int value: '1.5'"),
    "option without value": (["--model"], "expected one argument"),
}


def run(*command):
    """Status, output and the last line on stderr of a command in this process."""
    said, wrong = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(wrong):
        try:
            status = cli.main([str(part) for part in command])
        except SystemExit as end:
            status = end.code
            wrong = io.StringIO(wrong.getvalue().strip().splitlines()[-1])  # after argparse's usage
    return status, said.getvalue(), wrong.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return good(tmp_path_factory.mktemp("photos"))


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_computation(case, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(fit.Passed, "of", lambda *a, **k: pytest.fail("checked only after the computation"))
    (tmp_path / "two.txt").write_text("a\nb")
    (tmp_path / "latin.txt").write_bytes("Émeu\nb".encode("latin-1"))
    options, message = REFUSED[case]
    options = [option.format(two=tmp_path / "two.txt", latin=tmp_path / "latin.txt") for option in options]
    status, _, wrong = run("explain", photos, "--out", tmp_path / "out", *BASE, *QUICK, *options)
    assert status == 2 and re.search(message, one_line(wrong)), wrong
    assert not (tmp_path / "out").exists(), "nothing half-written"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--image-size", "1"],
        ["--image-size", "33"],
        ["--panel"],
        ["--seed", "9223372036854775807"],
        ["--classes", "{same}"],
    ],
)
def test_odd_and_right(options, photos, tmp_path):
    (tmp_path / "same.txt").write_text("same\n" * 1000)
    options = [option.format(same=tmp_path / "same.txt") for option in options]
    status, said, wrong = run("explain", photos, "--out", tmp_path / "out", *BASE, *QUICK, *options)
    if options == ["--image-size", "1"]:
        assert status == 2 and "blocks" in one_line(wrong), "at one pixel all resolutions are the same"
    else:
        assert status == 0 and "B4 " in said, wrong


@pytest.fixture(scope="module")
def saved(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "out"
    assert run("explain", photos, "--out", out, *BASE, *QUICK, "--export")[0] == 0
    return out


def state(folder):
    """Every file below a folder with its content."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("other", [["--prototypes-per-class", "2"], ["--seed", "3"], ["--image-size", "32"]])
def test_going_on_with_other_settings_changes_nothing(other, saved, photos):
    before = state(saved)
    status, _, wrong = run("explain", photos, "--out", saved, *BASE, *QUICK, "--export", "--resume", *other)
    assert status == 2 and "holds an explanation of other settings (" in one_line(wrong)
    assert "choose another --out" in wrong and state(saved) == before


def test_going_on_with_the_same_changes_nothing(saved, photos):
    before = state(saved)
    assert run("explain", photos, "--out", saved, *BASE, *QUICK, "--export", "--resume")[0] == 0
    assert state(saved) == before


def test_a_folder_has_one_writer(saved, photos, tmp_path):
    """The second is refused in one line and nothing is left."""
    pytest.importorskip("fcntl", reason="Windows has no such locks")
    before = state(saved)
    for folder in (saved, tmp_path / "new"):
        with store.alone(folder):  # a lock is of the opened folder, not of the process
            status, _, wrong = run("explain", photos, "--out", folder, *BASE, *QUICK, "--resume")
            assert status == 2 and "is being written by another process: wait for its end" in one_line(wrong)
    assert state(saved) == before and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["show", "{saved}", "nofile.png"], "nofile.png is neither a file nor"),
        (["show", "{saved}", "{photo}", "--out", "/proc/x"], "/proc/x cannot be written"),
        (["show", "{saved}", "{photo}", "--out", "{photos}/panels"], "lies among the images of .*: choose another"),
        (["show", "{photos}", "{photo}"], "holds no saved explanation: give a folder that explained.save"),
        (["export", "{saved}", "/nowhere", "--out", "{new}"], "/nowhere does not exist or is not a folder"),
        (["export", "{saved}", "{photos}", "--out", "{new}", "--device", "cpuu"], "device 'cpuu' cannot be used here"),
        (["export", "{saved}", "{photos}", "--out", "{new}", "--maps", "x"], "maps must be one of npz, png, none"),
        (["export", "{saved}", "{photos}", "--out", "{new}", "--target", "x"], "target must be a class of"),
        (["export", "{saved}", "{photos}", "--out", "/etc/hostname/x"], "cannot be written"),
        (["export", "{saved}", "{photos}", "--out", "{photos}/m", "--maps", "png"], "lies among the images"),
        (["measure", "{saved}", "{photos}", "--out", "/proc/x"], "/proc/x cannot be written"),
    ],
)
def test_commands_on_what_was_saved(command, message, saved, photos, tmp_path):
    names = {"saved": saved, "photos": photos, "photo": photos / "cat" / "0.png", "new": tmp_path / "new"}
    status, _, wrong = run(*[part.format(**names) for part in command])
    assert status == 2 and re.search(message, one_line(wrong)), wrong
    assert not (tmp_path / "new").exists() and not (photos / "panels").exists()


# --- files of weights ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", WEIGHTS)
def test_files_of_weights(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = small_cnn()
    file = weights(name, tmp_path / name, module)
    if WEIGHTS[name]:
        with pytest.raises(ValueError, match=WEIGHTS[name]) as error:
            explained = networks.network(small_cnn(), file, image_size=32)
            kmex.explain(explained, good(tmp_path / "in"), **{k: FEW[k] for k in list(FEW)[:3]}, log=str)
        assert "weights_only" not in one_line(error.value)
    else:
        taken = networks.network(small_cnn(), file, image_size=32).module.state_dict()
        for key, value in module.state_dict().items():
            expected = torch.zeros_like(value) if name == "allzero.pt" else value
            assert torch.allclose(taken[key], expected, atol=1e-3), key
    assert not (tmp_path / "ran").exists(), "nothing in a file runs"


def test_weights_of_no_class(tmp_path):
    file = weights("zeroclasses.pt", tmp_path / "w.pt", kmex.network(ARCH, "random", image_size=32).module)
    with pytest.raises(ValueError, match="the head 'fc' in .* has no outputs: give weights of a network with classes"):
        kmex.network(ARCH, file, image_size=32)


def test_a_file_of_tensors_without_sound_settings(tmp_path):
    from safetensors.torch import save

    for settings, message in (
        (None, "carries no settings"),
        ({"other": "x"}, "carries no settings"),
        ({"settings": "{"}, "is not readable JSON"),
        ({"settings": "[1]"}, "carries no settings"),
        ({"settings": "[" * 100_000}, "is not readable JSON"),
    ):
        (tmp_path / "a.safetensors").write_bytes(save({"a": torch.ones(1)}, settings))
        with pytest.raises(ValueError, match=f"a.safetensors {message}") as error:
            store.load_tensors(tmp_path / "a.safetensors")
        one_line(error.value)


# --- functions ----------------------------------------------------------------------------------------------------


def spoiled(value, where):
    module = small_cnn()
    with torch.no_grad():
        dict(module.named_parameters())[where].fill_(value)
    return module


class Divides(nn.Module):
    """Not a number for dark images, a number for the noise that a network is watched on."""

    def __init__(self):
        super().__init__()
        self.inner = small_cnn()

    def forward(self, x):
        y = self.inner(x)
        return y + 0 * torch.where(x.std() < 1e-6, torch.nan, 0.0)


IN_ONE_LINE = {
    "NaN module": (
        lambda: {"network": spoiled(torch.nan, "0.weight")},
        ValueError,
        "NaN or infinite weights .0.weight",
    ),
    "NaN head only": (lambda: {"network": spoiled(torch.nan, "8.bias")}, ValueError, "NaN or infinite weights .8.bias"),
    "infinite head": (lambda: {"network": spoiled(torch.inf, "8.bias")}, ValueError, "NaN or infinite weights .8.bias"),
    "network(None)": (lambda: {"network": None}, TypeError, "model is a name, a folder or an nn.Module, got None"),
    "network(5)": (lambda: {"network": 5}, TypeError, "model is a name, a folder or an nn.Module, got 5"),
    "no average pool": (
        lambda: {"network": nn.Sequential(nn.Flatten(), nn.Linear(3072, 3))},
        ValueError,
        "has no|is not a CNN of eq. 1",
    ),
    "image_size=10**6": (lambda: {"image_size": 10**6}, ValueError, "at most 8,192, a number or .H, W., got 1000000"),
    "network(Linear)": (lambda: {"network": nn.Linear(3, 3)}, ValueError, "does not run on 3 x 32 x 32 images"),
    "network(1-channel)": (lambda: {"network": small_cnn(2)}, ValueError, "does not run on 3 x 32 x 32 images"),
    "network(float64)": (lambda: {"network": small_cnn().double()}, ValueError, "give module.float"),
    "network(meta)": (lambda: {"network": small_cnn().to("meta")}, ValueError, "without values"),
    "classes=5": (lambda: {"classes": 5}, ValueError, "got int: `classes` is a list"),
    "image_size='64'": (lambda: {"image_size": "64"}, ValueError, "image_size must be at least 1 pixel"),
    "image_size=64.0": (lambda: {"image_size": 64.0}, ValueError, "image_size must be at least 1 pixel"),
    "image_size=-5": (lambda: {"image_size": -5}, ValueError, "image_size must be at least 1 pixel"),
    "mean='x'": (lambda: {"mean": "x"}, ValueError, "mean must be numbers"),
    "mean=[.5,.5]": (lambda: {"mean": [0.5, 0.5]}, ValueError, "of R, G and B, or one value"),
    "std=0": (lambda: {"std": [0, 0, 0]}, ValueError, "std positive"),
    "blocks='layer2'": (lambda: {"blocks": "layer2"}, ValueError, "has no block 'layer2'"),
    "blocks=[99]": (lambda: {"blocks": [99]}, ValueError, "has no block"),
    "folder=None": (lambda: {"images": None}, TypeError, "give a known name, a folder"),
    "folder=5": (lambda: {"images": 5}, TypeError, "give a known name, a folder"),
    "start_block='B4'": (lambda: {"start_block": "B4"}, ValueError, "start_block must be a whole number"),
    "start_block=9": (lambda: {"start_block": 9}, ValueError, "no block 9"),
    "prototypes_per_class='2'": (
        lambda: {"prototypes_per_class": "2"},
        ValueError,
        "prototypes_per_class must be a whole",
    ),
    "prototypes_per_class=nan": (
        lambda: {"prototypes_per_class": float("nan")},
        ValueError,
        "prototypes_per_class must be a whole",
    ),
    "prototypes_per_class=True": (lambda: {"prototypes_per_class": True}, ValueError, "must be a whole number"),
    "held_out='0.2'": (lambda: {"held_out": "0.2"}, ValueError, "held_out must be a share"),
    "restarts='x'": (lambda: {"restarts": "x"}, ValueError, "restarts must be a whole number"),
    "seed=1.5": (lambda: {"seed": 1.5}, ValueError, "seed must be a whole number of at least 0, got 1.5"),
    "seed='a'": (lambda: {"seed": "a"}, ValueError, "seed must be a whole number"),
    "seed=-1": (lambda: {"seed": -1}, ValueError, "seed must be a whole number"),
    "batch_size=0": (lambda: {"batch_size": 0}, ValueError, "batch_size must be a whole number of at least 1, got 0"),
    "batch_size=-1": (lambda: {"batch_size": -1}, ValueError, "batch_size must be a whole number of at least 1"),
    "batch_size=1.5": (lambda: {"batch_size": 1.5}, ValueError, "batch_size must be a whole number"),
    "scale='2'": (lambda: {"scale": "2x"}, ValueError, "scale must be one of"),
    "scale=2": (lambda: {"scale": 2}, ValueError, "scale must be one of"),
    "align_corners='no'": (lambda: {"align_corners": "no"}, ValueError, "align_corners must be True or False"),
    "device=''": (lambda: {"device": ""}, ValueError, "device '' cannot be used here"),
    "device='meta'": (lambda: {"device": "meta"}, ValueError, "device 'meta' cannot be used here"),
}


@pytest.mark.parametrize("case", IN_ONE_LINE)
def test_explain_in_one_line(case, photos, monkeypatch):
    values, kind, message = IN_ONE_LINE[case]
    given = {"network": None, "images": photos, **FEW, "log": str, **values()}
    network = given.pop("network") if "network" in values() else small_cnn()
    monkeypatch.setattr(fit.Passed, "of", lambda *a, **k: pytest.fail("checked only after the computation"))
    with pytest.raises(kind, match=message) as error:
        kmex.explain(network, **{key: value for key, value in given.items() if key != "network"})
    one_line(error.value)


def test_scores_that_are_no_numbers(tmp_path):
    for name in ("a", "b"):
        for i in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (9, 9)).save(tmp_path / name / f"{i}.png")
    with pytest.raises(ValueError, match="NaN or infinite values: check the images and the weights") as error:
        kmex.explain(Divides(), tmp_path, log=str, **FEW)
    one_line(error.value)


def test_classes_may_be_numbers(photos, tmp_path):
    explained = kmex.explain(small_cnn(), photos, log=str, classes=[1, 2, 3], **FEW)
    assert explained.network.classes == ("1", "2", "3")
    explained.panel(0)


@pytest.fixture(scope="module")
def explained(photos):
    return kmex.explain(small_cnn(), photos, log=str, **FEW)


CALLS = {
    "panel(-1)": (lambda e, out: e.panel(-1), IndexError, "image must be an index of the 12 images, got -1"),
    "panel(10**9)": (lambda e, out: e.panel(10**9), IndexError, "image must be an index of the 12 images"),
    "panel(None)": (lambda e, out: e.panel(None), TypeError, "image is an index, a name, a file or pixels, got None"),
    "panel('nofile')": (lambda e, out: e.panel("nofile"), ValueError, "nofile is neither a file nor an image of"),
    "panel(empty array)": (lambda e, out: e.panel(np.zeros((0, 9, 3), np.uint8)), TypeError, "images must be Pillow"),
    "panel target=3 (int)": (lambda e, out: e.panel(0, target=3), ValueError, "target must be a class of"),
    "panel target=1.5": (lambda e, out: e.panel(0, target=1.5), ValueError, "target must be"),
    "panel start_blocks=[9]": (lambda e, out: e.panel(0, [9]), ValueError, "start blocks run from 1 to 3, got 9"),
    "panel PIL mode F": (lambda e, out: e.panel(Image.new("F", (9, 9))), ValueError, "give window="),
    "report max_bytes=10": (lambda e, out: e.report(out / "r", max_bytes=10), ValueError, "more than max_bytes = 10"),
    "report panels nofile": (lambda e, out: e.report(out / "r", ["nofile"]), ValueError, "nofile is neither a file"),
    "report panels str": (lambda e, out: e.report(out / "r", "cat/0.png"), TypeError, "give .'cat/0.png'."),
    "report panels=0": (lambda e, out: e.report(out / "r", 0), TypeError, r"give \[0\]"),
    "report path dir": (lambda e, out: e.report(out), FileExistsError, "is a folder: choose another name"),
    "report path dir overwrite": (
        lambda e, out: e.report(out, overwrite=True),
        FileExistsError,
        "is a folder: choose another name",
    ),
    "report in proc": (lambda e, out: e.report("/proc/x/r.html"), ValueError, "/proc/x cannot be written"),
    "page in proc": (lambda e, out: e.page("/proc/x/r.html"), ValueError, "/proc/x cannot be written"),
    "export maps=x": (lambda e, out: e.export(out / "e", maps="x"), ValueError, "maps must be one of npz, png, none"),
    "export batch 0": (lambda e, out: e.export(out / "e", batch_size=0), ValueError, "batch_size must be a whole"),
    "export batch -1": (lambda e, out: e.export(out / "e", batch_size=-1), ValueError, "batch_size must be a whole"),
    "export batch '8'": (lambda e, out: e.export(out / "e", batch_size="8"), ValueError, "batch_size must be a whole"),
    "export images nowhere": (lambda e, out: e.export(out / "e", "/nowhere"), FileNotFoundError, "give a folder of"),
    "export dir exists": (lambda e, out: e.export(out), FileExistsError, "exists: choose another folder"),
    "export device typo": (lambda e, out: e.export(out / "e", device="cpuu"), ValueError, "device 'cpuu' cannot"),
    "explorer start_block 9": (lambda e, out: e.explorer(0, 9), ValueError, "start_block must be one of"),
    "explorer image -1": (lambda e, out: e.explorer(-1), IndexError, "image must be an index of"),
    "save in proc": (
        lambda e, out: e.save("/proc/x"),
        ValueError,
        "/proc/x cannot be written .*: choose another folder",
    ),
    "save onto file": (
        lambda e, out: e.save("/etc/hostname"),
        ValueError,
        "cannot be written .*: choose another folder",
    ),
    "save of nobody": (lambda e, out: e.save("~nobody-of-this-name"), ValueError, "user who is not known here"),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_in_one_line(case, explained, tmp_path):
    call, kind, message = CALLS[case]
    (tmp_path / "out").mkdir()
    with pytest.raises(kind, match=message) as error:
        call(explained, tmp_path / "out")
    one_line(error.value)
    assert not list((tmp_path / "out").iterdir()), "nothing half-written"


def test_home_is_expanded_everywhere(explained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    assert explained.save("~/saved") == home / "saved" and kmex.load("~/saved", small_cnn()).classes
    assert explained.report("~/r.html") == home / "r.html"
    assert explained.page("~/p.html", 1) == home / "p.html"
    assert explained.export("~/maps", log=str) == home / "maps"
    assert not (tmp_path / "~").exists()


# --- folders of explanations --------------------------------------------------------------------------------------


def test_an_edit_killed_while_saving_leaves_the_old_state_or_the_new(explained, photos, tmp_path, monkeypatch):
    """At any replacement of a file, and after it."""
    module = explained.network.module
    fitted = kmex.explain(copy.deepcopy(module), photos, log=str, **FEW | {"prototypes_per_class": 2})
    old = kmex.load(fitted.save(tmp_path / "a"), copy.deepcopy(module), photos)
    old.edits.rename(1, 0, "beak")
    old.save(tmp_path / "a")
    edited = kmex.load(tmp_path / "a", copy.deepcopy(module), photos)
    edited.edits.disable(1, 1)
    rows = {repr(e.edits): list(e.table.index) for e in (old, edited)}
    assert "B123, edited" in rows[repr(edited.edits)]
    replace, seen = store.os.replace, set()
    for killed_at in range(20):
        left = [killed_at]

        def killing(*args, left=left):
            if left[0] == 0:
                signal.raise_signal(signal.SIGINT)
            left[0] -= 1
            replace(*args)

        old.save(tmp_path / "a")
        with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
            patched.setattr(store.os, "replace", killing)
            edited.save(tmp_path / "a")
        found = kmex.load(tmp_path / "a", copy.deepcopy(module))
        assert list(found.table.index) == rows[repr(found.edits)]
        seen.add(repr(found.edits))
        if left[0] > 0:  # it had come to its end
            break
    assert seen == set(rows) and killed_at > 2


@pytest.fixture
def tampered(explained, tmp_path):
    """A saved explanation, a function that changes a file of JSON in it, and one that loads it."""
    explained.save(tmp_path / "saved")

    def change(name, edit):
        content = json.loads((tmp_path / "saved" / name).read_text())
        edit(content)
        (tmp_path / "saved" / name).write_text(json.dumps(content))

    return tmp_path / "saved", change, lambda: kmex.load(tmp_path / "saved", small_cnn())


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("explained.json", lambda c: c.clear(), "is not of a whole saved explanation: save it again"),
        ("explained.json", lambda c: c.update(classes="cat"), "is not of a whole saved explanation"),
        ("explained.json", lambda c: c.update(classes=["a"]), "is of other classes"),
        ("explained.json", lambda c: c.update(classes=[1, 2, 3]), "is not of a whole saved explanation|other classes"),
        ("explained.json", lambda c: c.update(edits=5), "a saved edit does not fit|is not of a whole"),
        ("explained.json", lambda c: c.update(edits=[5]), "a saved edit does not fit the prototypes"),
        ("explained.json", lambda c: c.update(edits=[{"edit": "run"}]), "a saved edit does not fit the prototypes"),
        ("explained.json", lambda c: c.pop("network"), "is not of a whole saved explanation"),
        ("explained.json", lambda c: c.pop("dataset"), "is not of a whole saved explanation"),
        ("explained.json", lambda c: c.update(stand_in_classes=[99]), "is not of a whole saved explanation"),
        ("network.json", lambda c: c.update(blocks=["../../etc", "h"]), "has no block"),
        ("network.json", lambda c: c.update(head="__class__"), "has no|head"),
        ("network.json", lambda c: c.update(input={"image_size": 10**9, "mean": [0], "std": [1]}), "image_size"),
        ("network.json", lambda c: c.update(scores=[[1e9]]), "gives other scores"),
        ("network.json", lambda c: c.update(classes=["a"] * 9), "9 class names, but the head"),
    ],
)
def test_a_tampered_folder_is_one_line(name, edit, message, tampered):
    _, change, load = tampered
    change(name, edit)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        load()
    one_line(error.value)


@pytest.mark.parametrize(
    "arch",
    ["timm/hf-hub:any/one", "timm/local-dir:/tmp", "timm/hf_hub:any/one", "os.system", "../resnet18", "torch.hub.load"],
)
def test_a_reference_leads_to_the_libraries_own_networks_alone(arch, tampered, no_network):
    folder, change, _ = tampered
    change("network.json", lambda c: c.update(reference={"arch": arch, "arch_args": {}, "weights": ""}))
    with pytest.raises(ValueError, match="has no model") as error:
        kmex.load(folder)
    one_line(error.value)


def mutations(tensors):
    """Of each tensor: another number, another shape, another type, other values."""
    for key, x in tensors.items():
        yield key, x[:0]
        yield key, x[None]
        if x.dim():
            yield key, x[:-1]
        yield key, x.double() + torch.nan
        if not x.is_floating_point():
            yield key, x.long() + 2**40
            yield key, -x.long() - 5


def test_tampered_prototypes_are_one_line_or_explain(explained, photos, tmp_path):
    """Whatever is wrong with a tensor is said when it is loaded, or does no harm."""
    explained.save(tmp_path)
    path = tmp_path / "B23.safetensors"
    tensors, settings = store.load_tensors(path)
    network, refused = small_cnn(), 0
    for key, value in mutations(tensors):
        store.save_tensors(path, {**tensors, key: value}, settings)
        try:
            loaded = kmex.load(tmp_path, network)
            loaded.interpretations(photos / "cat" / "0.png", [2])
        except ValueError as error:
            one_line(error)
            assert "B23" in str(error), key
            refused += 1
    assert refused > 25
    for name in ("B23.safetensors", "network.json", "explained.json", "table.csv"):
        store.save_tensors(path, tensors, settings)
        content = (tmp_path / name).read_bytes()
        for share in (0, 0.3, 0.9):
            (tmp_path / name).write_bytes(content[: int(share * len(content))])
            try:
                kmex.load(tmp_path, network)
            except (ValueError, FileNotFoundError) as error:
                one_line(error)
                assert Path(name).stem in str(error)
            else:
                pytest.fail(f"half of {name} was taken for the whole")
        (tmp_path / name).write_bytes(content)


SCRIPT = "</script><img src=x onerror=alert(1)><b>"


def test_names_are_text_in_pages(photos, tmp_path):
    root = good(tmp_path / "in", (SCRIPT.replace("/", "∕"), "a{{7*7}}$\\frac{$", "c"))
    image(root / "c" / "<svg onload=alert(2)>.png")
    explained = kmex.explain(small_cnn(), root, log=str, **FEW)
    explained.edits.rename(1, 0, SCRIPT)
    for path in (explained.report(tmp_path / "r.html", [0]), explained.page(tmp_path / "p.html", 20)):
        text = path.read_text()
        assert "<img src=x" not in text and "<svg onload" not in text and "49" not in re.findall(r"a(\d\d)\$", text)
        assert "\\frac{$" in text or "\\\\frac{$" in text
        assert text.count("</script>") == (2 if path.name == "p.html" else text.count("<script"))
    loaded = kmex.load(explained.save(tmp_path / "s"), small_cnn(), root)
    assert loaded.edits.names(1)[0] == SCRIPT


def test_messages_to_the_explorer_are_checked(explained):
    traitlets = pytest.importorskip("traitlets", reason="comes with the explorer")
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    widget = explained.explorer().widget
    before = dict(widget.view)
    good_choice = dict(widget.choice)
    for changes in (
        {"image": -1},
        {"image": 10**9},
        {"image": "../../etc/passwd"},
        {"image": None},
        {"image": 1.0},
        {"start_block": 9},
        {"start_block": "1"},
        {"start_block": [1]},
        {"target": "nobody"},
        {"target": {"a": 1}},
        {"target": "0", "minus": "0"},
    ):
        with pytest.raises(traitlets.TraitError, match="choice cannot be") as error:
            widget.choice = good_choice | changes
        one_line(error.value)
    with pytest.raises(traitlets.TraitError):
        widget.choice = {}
    for name, values in (("selected", (-2, 10**6, 3)), ("wanted", ([-1], ["0"], [10**9], [None], [[0]]))):
        for value in values:
            with pytest.raises(traitlets.TraitError, match=f"{name} cannot be"):
                setattr(widget, name, value)
    assert widget.view == before and widget.choice == good_choice and widget.selected == -1
    widget.choice = good_choice | {"start_block": 3}
    assert widget.view["explainer"] == "B3"


# --- notebooks ----------------------------------------------------------------------------------------------------


def stepped(name, **given):
    """A notebook's cells with parameters, as papermill injects them, until the first error."""
    cells = re.split(r"^# %%.*\n", (paths.ROOT / "notebooks" / f"{name}.py").read_text(), flags=re.MULTILINE)
    tags = re.findall(r"^# %%(.*)$", (paths.ROOT / "notebooks" / f"{name}.py").read_text(), flags=re.MULTILINE)
    space = {"In": [], "__name__": "__main__", "nan": NAN}
    for tag, cell in zip(tags, cells[1:], strict=True):
        if "[markdown]" in tag:
            continue
        sources = [cell]
        if "parameters" in tag:
            sources.append("# Parameters\n" + "".join(f"{key} = {value!r}\n" for key, value in given.items()))
        for source in sources:
            space["In"].append(source)
            exec(compile(source, name, "exec"), space)


NAN = float("nan")
NOTEBOOKS = [
    ("01_train", {"epoch": 3}, "unknown parameter 'epoch': did you mean 'epochs'"),
    ("01_train", {"seed": 1.5}, "parameter seed must be of type int, got 1.5"),
    ("01_train", {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ("01_train", {"dataset": "mnits"}, "unknown dataset 'mnits': use one of mnist-mini"),
    ("01_train", {"images_per_class": -3}, "images_per_class must be a whole number of at least 0, got -3"),
    ("01_train", {"validation": 2.0}, "validation must be a share of the training images"),
    ("01_train", {"classes": "zebra"}, "no class matches 'zebra'; the classes are 0, 1"),
    ("01_train", {"device": "meta"}, "device 'meta' cannot be used here"),
    ("01_train", {"threads": -1}, "threads must be 0 or more, got -1"),
    ("01_train", {"precision": "float64"}, "precision must be auto, float32 or bfloat16"),
    ("01_train", {"momentum": NAN}, "learning_rate must be positive and momentum in"),
    ("01_train", {"learning_rate": -1.0}, "learning_rate must be positive and momentum in"),
    ("01_train", {"batch_size": 10**9}, "are fewer than one batch of 1000000000; lower batch_size"),
    ("01_train", {"padding": 20_000}, "padding pixels, at most the image's 32; got 0.0 and 20000"),
    ("01_train", {"flip": 5.0}, "flip must be a probability"),
    ("01_train", {"runs": "/proc/x"}, "/proc/x/mnist-mini/seed-0 cannot be written .*: choose another folder"),
    ("03_kmex", {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ("03_kmex", {"restarts": []}, "parameter restarts must be of type int"),
    ("04_encoder", {"start_blocks": []}, "parameter start_blocks must not be empty"),
    ("04_encoder", {"start_blocks": "432"}, "must be a list.int., got '432' .str.; from the shell: papermill -y"),
    ("04_encoder", {"start_blocks": 4}, "must be a list.int., got 4 .int.; from the shell: papermill -y"),
    (
        "04_encoder",
        {"scale": 1},
        "parameter scale must be of type str, got 1 .int.; from the shell: papermill -r scale 1",
    ),
    ("06_alignment", {"seeds": ["a"]}, "parameter seeds must be of type int, got 'a'"),
    ("06_alignment", {"seeds": [0, 7]}, "run notebook 01_train with dataset=mnist-mini and seed="),
    ("12_your_own_model", {"model": "resnet18"}, "give folder, the images to explain resnet18 on"),
    ("15_report", {"datasets": []}, "parameter datasets must not be empty"),
]


@pytest.mark.parametrize(("name", "given", "message"), NOTEBOOKS, ids=lambda value: str(value)[:40])
def test_notebooks_refuse_in_one_line(name, given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = {"images_per_class": 4, "image_size": 32, "arch": "resnet18", "batch_size": 8, "threads": 1}
    quick = quick if name == "01_train" else {}
    runs = {"runs": str(tmp_path / "runs")} if name != "12_your_own_model" else {}
    with (
        contextlib.redirect_stdout(io.StringIO()),
        pytest.raises((ValueError, FileNotFoundError), match=message) as error,
    ):
        stepped(name, **{**quick, **runs, **given})
    one_line(error.value)
    assert not list(tmp_path.rglob("*.safetensors")), "nothing is left"
