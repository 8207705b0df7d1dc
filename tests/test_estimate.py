"""What a batch will take, beside what loading, training and keeping activations really do."""

import math
import re
import shutil
from dataclasses import replace

import psutil
import pytest
import torch
import yaml
from conftest import small

from kmex_utils import cli, data
from kmex_utils.explanation import activations
from kmex_utils.explanation.activations import STORES, keep
from kmex_utils.networks import for_training
from kmex_utils.paper import estimate
from kmex_utils.store import room
from kmex_utils.training import protopnet

ARCH = "shufflenet_v2_x0_5"  # small and of the paper's form
TINY = {"arch": ARCH, "image_size": 32, "epochs": 2, "batch_size": 4, "weights": "scratch", "device": "cpu"}
BLOCKS = [(24, 64), (48, 16), (96, 4), (1024, 1)]
PACE = estimate.Pace(train=1000.0, forward=1.0, flop=math.inf, blocks=BLOCKS, values=10)  # clustering is free


@pytest.fixture
def birds(folder, tmp_path):
    """The folder as notebook 1 loads it, at 32 px."""
    return data.load(folder, replace(data.own_input("birds"), image_size=32), name="birds", data=tmp_path)


def steps(runs, chosen, seeds=(0,), name="birds"):
    return {row["step"].split()[0]: row for row in estimate.stages(name, chosen, list(seeds), runs)}


def command(tmp_path, capsys, entries, seeds=(0, 1)):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"datasets": entries, "seeds": list(seeds), "threads": 1}))
    status = cli.main(["estimate", str(config), "--runs", str(tmp_path / "runs")])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("choice", [{}, {"images_per_class": 2}, {"validation": 0.5}])
def test_images_are_counted_as_they_are_loaded(choice, folder, tmp_path):
    for name, more in (("birds", {"folder": str(folder)}), ("mnist-mini", {}), ("mnist-mini", {"classes": "3,7"})):
        chosen = {**choice, **more}
        loaded = data.load(more.get("folder", name), small(), **choice, classes=more.get("classes", ""), data=tmp_path)
        assert estimate.images(name, chosen)[:3] == (len(loaded.train), len(loaded.test), len(loaded.classes))


def test_held_out_images_are_counted_as_they_are_loaded(folder, tmp_path):
    shutil.rmtree(folder / "test")
    chosen = {"folder": str(folder / "train"), "held_out": 0.5}
    loaded = data.load(folder / "train", small(), held_out=0.5, data=tmp_path)
    assert estimate.images("birds", chosen) == (len(loaded.train), len(loaded.test), 2, 224) == (6, 6, 2, 224)


@pytest.mark.parametrize("frozen", ["anew", "once"])
def test_protopnet_passes_each_image_as_often(frozen, folder, birds, tmp_path, monkeypatch):
    schedule = {"warm_epochs": 2, "joint_epochs": 3, "push_start": 1, "push_every": 2, "last_passes": 3}
    options = protopnet.Options(**schedule, frozen_features=frozen, batch_size=4)
    features = for_training(ARCH, birds.classes, "scratch", birds.input)
    network = protopnet.TrainableProtoPNet(features, 1, options)
    passed = {True: 0, False: 0}

    def count(module, inputs):
        passed[torch.is_grad_enabled()] += len(inputs[0])

    features.module.conv1.register_forward_pre_hook(count)
    checkpoint = tmp_path / "state.safetensors"
    protopnet.train(network, birds, options, seed=0, checkpoint=checkpoint, made_by={}, log=lambda line: None)
    for split in ("train", "test"):
        protopnet.evaluate(network, birds, split)
    monkeypatch.setattr(estimate, "measure", lambda *_: PACE)
    row = steps(tmp_path, {"folder": str(folder), **schedule, "frozen_features": frozen})["5"]
    assert row["seconds"] == 1000 * passed[True] + passed[False] - 1  # one image goes through to see that it fits


@pytest.mark.parametrize("store", STORES)
def test_room_for_activations_is_what_they_take(store, folder, birds, tmp_path, monkeypatch):
    network, held, files = for_training(ARCH, birds.classes, "scratch", birds.input), 0, []
    monkeypatch.setattr(activations, "room", lambda *wanted: files.append(room(*wanted)) or files[-1])
    for split in ("train", "test"):
        kept = keep(network, birds, split, 2, store, folder=tmp_path / "kept")
        held += sum(x.nbytes for x in kept.read(torch.arange(len(kept)), 2))
    on_disk = sum(file.nbytes for file in files)
    assert not list(tmp_path.glob("kept/*")), "the files have no names that a kill could leave"
    chosen = {"folder": str(folder), **TINY}
    row, nowhere = (steps(tmp_path, {**chosen, "store": where})["4"] for where in (store, "nowhere"))
    assert row["bytes"] - nowhere["bytes"] == on_disk
    assert row["memory"] == (held if store == "memory" else 0)


def test_decoded_images_are_counted_until_they_are_there(folder, tmp_path, request):
    chosen = {"folder": str(folder), **TINY, "data": str(tmp_path)}
    config = {"datasets": {"birds": {**chosen, "seeds": [3, 4]}}, "seeds": [0]}
    before, _ = estimate.plan(config, tmp_path / "runs")
    images = request.getfixturevalue("birds")
    after, _ = estimate.plan(config, tmp_path / "runs")
    assert before["bytes"].sum() - after["bytes"].sum() == images.train.pixels.nbytes + images.test.pixels.nbytes
    assert len(before) == len(after) + 2
    assert set(after["seeds"]) == {"2 of 2"}  # the data set's own


def test_finished_stages_cost_nothing(folder, tmp_path, capsys):
    entry = {"birds": {"folder": str(folder), **TINY, "data": str(tmp_path)}}
    for seed in (0, 1):
        (tmp_path / f"runs/birds/seed-{seed}").mkdir(parents=True)
    (tmp_path / "runs/birds/seed-0/results-train.json").touch()
    _, text, _ = command(tmp_path, capsys, entry)
    assert "1 of 2" in text and "decode train" in text and "About 0 s" not in text
    for result in ("train", "kmex", "encoder", "protopnet"):
        for seed in (0, 1):
            (tmp_path / f"runs/birds/seed-{seed}/results-{result}.json").touch()
    status, text, _ = command(tmp_path, capsys, entry)
    assert status == 0 and text.count("0 of 2") == 4 and "decode" not in text
    assert "About 0 s, one notebook at a time, and 0 MB of disk" in text


def test_what_runs_have_recorded_is_what_a_step_takes(folder, tmp_path, capsys):
    """Of notebooks and shards that are done, for those that are not."""
    entry = {"birds": {"folder": str(folder), **TINY, "data": str(tmp_path), "shards": 2}}
    run = tmp_path / "runs/birds/seed-0"
    for file, seconds in (("01_train", 7200), ("shards/fit-1-of-2", 3600), ("shards/fit-2-of-2", 5400)):
        (run / "cost" / file).parent.mkdir(parents=True, exist_ok=True)
        (run / f"cost/{file}.tsv").write_text(f"s\th:m:s\tmax_rss\n{seconds}\t-\t100\n")
    (run / "results-train.json").touch()
    (run / "shards").mkdir()
    (run / "shards/fit-1-of-2.safetensors").touch()
    rows = steps(tmp_path / "runs", entry["birds"], seeds=(0, 1, 2))
    assert rows["1"]["seconds"] == 2 * 7200 and rows["1"]["jobs"] == 2
    shards = {row["step"]: row for row in estimate.stages("birds", entry["birds"], [0, 1, 2], tmp_path / "runs")}
    assert (shards["4 fit"]["jobs"], shards["4 fit"]["seconds"]) == (5, 5 * 4500)
    assert shards["4 maps"]["jobs"] == 6 and "as recorded" not in shards["4 maps"]["work"]
    _, text, _ = command(tmp_path, capsys, entry, seeds=(0, 1, 2))
    assert "2 epochs of 12 images, 32 px, as recorded" in text and "one notebook at a time" in text
    hours = [float(re.search(r"About ([\d.]+) h", text)[1])]
    config = str(tmp_path / "config.yaml")
    assert cli.main(["estimate", config, "--runs", str(tmp_path / "runs"), "--jobs", "2"]) == 0
    hours += [float(re.search(r"About ([\d.]+) h, 2 jobs at a time", capsys.readouterr().out)[1])]
    assert hours == pytest.approx([(2 * 7200 + 5 * 4500) / 3600, (7200 + 3 * 4500) / 3600], abs=0.2)
    assert cli.main(["estimate", config, "--jobs", "0"]) == 2


def test_shards_take_what_the_notebook_does(folder, tmp_path):
    """But that the network passes all images again for the maps."""
    chosen = {"folder": str(folder), **TINY}
    whole = steps(tmp_path, chosen)["4"]
    parts = {row["step"]: row for row in estimate.stages("birds", {**chosen, "shards": 2}, [0], tmp_path)}
    assert parts["4 fit"]["memory"] + parts["4 maps"]["memory"] == whole["memory"]
    assert (parts["4 fit"]["jobs"], whole["jobs"]) == (2, 1)


def test_what_does_not_fit_is_said(folder, tmp_path, capsys):
    free, ram = shutil.disk_usage(tmp_path).free, psutil.virtual_memory().total
    places = tmp_path / "not/yet", tmp_path
    assert not list(estimate.warnings([(place, 0.3 * free) for place in places], ram))
    disk, memory = estimate.warnings([(place, 0.7 * free) for place in places], 2 * ram)
    assert str(tmp_path) in disk and "free" in disk
    assert "store: disk-half" in memory
    entry = {"folder": str(folder), **TINY, "prototype_depth": 10**13, "data": str(tmp_path)}
    status, text, _ = command(tmp_path, capsys, {"birds": entry})
    assert status == 0 and text.splitlines()[-1].startswith("WARNING") and "disk" in text


def test_what_cannot_run_is_one_line(folder, tmp_path, capsys):
    wrong = [
        ({"minst": {}}, "unknown dataset 'minst'"),
        ({"birds": {"folder": str(tmp_path / "none")}}, "does not exist"),
        ({"birds": {"folder": str(folder), "arch": "resnet43"}}, "resnet43"),
        (["mnist"], "needs `datasets`"),
    ]
    for entries, said in wrong:
        status, out, line = command(tmp_path, capsys, entries)
        assert (status, out) == (2, "") and said in line and line.count("\n") == 1
