"""``kmex`` from the shell: what it leaves, and what it refuses before computing."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import kmex_utils as kmex
from kmex_utils import cli, paths
from kmex_utils.explanation import fit

ARCH = "shufflenet_v2_x0_5"
RANDOM = ["--model", ARCH, "--weights", "random", "--image-size", "64", "--device", "cpu"]
QUICK = ["--prototypes-per-class", "2", "--restarts", "1", "--start-block", "4"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two classes that differ in colour."""
    generator = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("photos")
    for name, colour in (("temple", (200, 120, 30)), ("flower", (120, 30, 200))):
        (root / name).mkdir()
        for i in range(6):
            pixels = generator.normal(colour, 40, (70, 80, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def saved(photos, tmp_path_factory):
    """What `kmex explain` leaves with everything asked for."""
    out = tmp_path_factory.mktemp("saved") / "explained"
    normalisation = ["--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2", "--scale", "1"]
    products = ["--panel", str(photos / "flower" / "00.png"), "temple/00.png", "--report", "--page", "3", "--export"]
    command = ["explain", str(photos), *RANDOM, *QUICK, *normalisation, *products, "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(command) == 0
    assert "B4 " in said.getvalue() and "cosine, class" in said.getvalue()
    return out


def test_explain_leaves_what_was_asked_for(saved):
    for product in (
        "B4.safetensors",
        "KMEx-2.safetensors",
        "table.csv",
        "network.json",
        "explained.json",
        "panel-flower-00.png",
        "panel-temple-00.png",
        "report.html",
        "page.html",
    ):
        assert (saved / product).stat().st_size > 100, product
    taken_in = json.loads((saved / "network.json").read_text())["input"]
    assert (taken_in["mean"], taken_in["std"]) == ([0.5] * 3, [0.2] * 3)
    assert json.loads((saved / "explained.json").read_text())["scale"] == "1"
    assert len(pd.read_parquet(saved / "export" / "images.parquet")) == 12


def test_new_images_are_shown_and_exported_from_what_was_saved(saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit, "explain", lambda *a, **k: pytest.fail("fitted again"))
    (tmp_path / "new").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (90, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "new" / f"{i}.png")
    new = [str(tmp_path / "new" / f"{i}.png") for i in (0, 1)]
    assert cli.main(["show", str(saved), *new, "--out", str(tmp_path / "panels")]) == 0
    panels = [tmp_path / "panels" / f"panel-{i}.png" for i in (0, 1)]
    assert capsys.readouterr().out.split() == [str(panel) for panel in panels]
    assert all(Image.open(panel).size[0] > 100 for panel in panels)
    contrast = ["--target", "0", "1"]
    assert cli.main(["show", str(saved), new[0], *contrast, "--overlay", "--out", str(tmp_path / "laid")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "laid" / f"{name}-0.png") for name in ("panel", "map", "attribution")
    ]
    assert Image.open(tmp_path / "laid" / "map-0.png").size == (60, 90)
    folders = ["export", str(saved), str(tmp_path / "new"), *contrast, "--out", str(tmp_path / "maps")]
    assert cli.main([*folders, "--maps", "png", "--device", "cpu"]) == 0
    table = pd.read_parquet(tmp_path / "maps" / "images.parquet")
    assert len(table) == 3 and set(table.target) == {"0 − 1"}
    assert cli.main(folders) == 2 and "exists" in capsys.readouterr().err


def test_saved_small_it_is_shown_with_the_networks_file(photos, tmp_path, capsys):
    torch.save(kmex.network(ARCH, "random", image_size=64, seed=5).module.state_dict(), tmp_path / "weights.pt")
    out, file = tmp_path / "small", str(tmp_path / "weights.pt")
    model = ["--model", ARCH, "--weights", file, "--image-size", "64", "--device", "cpu"]
    assert cli.main(["explain", str(photos), *model, *QUICK, "--small", "--out", str(out)]) == 0
    assert not (out / "weights.safetensors").exists() and (out / "head.safetensors").exists()
    image = str(photos / "flower" / "00.png")
    assert cli.main(["show", str(out), image]) == 2 and "give weights=" in capsys.readouterr().err
    assert cli.main(["show", str(out), image, "--weights", file]) == 0 and (out / "panel-00.png").exists()


def test_arguments_of_the_architecture(photos, tmp_path):
    pytest.importorskip("timm")
    out = ["--model", "timm/resnet18", "--arch-args", '{"layers": [1, 1, 1, 1]}', "--out", str(tmp_path / "out")]
    assert cli.main(["explain", str(photos), *RANDOM, *QUICK, *out]) == 0
    reference = json.loads((tmp_path / "out" / "network.json").read_text())["reference"]
    assert reference["arch_args"] == {"layers": [1, 1, 1, 1]}


def test_what_is_wrong_is_one_line_before_the_computation(photos, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fit, "explain", lambda *a, **k: pytest.fail("checked only after the computation"))
    (tmp_path / "bad.png").write_text("not an image")
    for command, message in (
        (
            [*RANDOM, "--out", str(saved)],
            f"error: {saved} exists: choose another --out, or give --resume to go on in it",
        ),
        ([*RANDOM, "--model", "resnet19"], "resnet19"),
        ([*RANDOM, "--panel", "nowhere.png"], "--panel nowhere.png is neither a file nor in"),
        ([*RANDOM, "--panel", str(tmp_path / "bad.png")], "bad.png cannot be read: not an image"),
        ([*RANDOM, "--target", "doggo"], f"target must be a class of {ARCH}, got 'doggo'"),
    ):
        assert cli.main(["explain", str(photos), "--out", str(tmp_path / "new"), *command]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for command, message in (
        (["show", str(tmp_path / "nothing"), "a.png"], "nothing"),
        (["show", str(saved), "nowhere.png"], "nowhere.png is neither a file nor"),
        (["batch", str(tmp_path / "nothing.yaml")], "nothing.yaml does not exist"),
        (["estimate", str(tmp_path / "nothing.yaml")], "nothing.yaml does not exist"),
    ):
        assert cli.main(command) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    for command in (["explain", "photos", "--restart-s", "1"], ["explain", "photos", "--arch-args", "{"], []):
        with pytest.raises(SystemExit) as end:
            cli.main(command)
        assert end.value.code == 2


def test_what_a_batch_needs_beside_the_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "snakemake", None)
    for said in ("pip install 'kmex-utils[batch]'", "belong to the repository"):
        for command in ("batch", "estimate"):
            assert cli.main([command, str(paths.ROOT / "config" / "quick.yaml")]) == 2
            error = capsys.readouterr().err
            assert said in error and error.count("\n") == 1
        monkeypatch.setattr(paths, "ROOT", tmp_path)


def test_the_installed_command_answers_at_once():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kmex_utils", "--version"], capture_output=True, text=True
    )
    assert done.stdout == f"kmex {kmex.__version__}\n"
    assert "torch" not in done.stderr
