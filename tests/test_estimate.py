"""What a batch will take, beside what loading, training and keeping activations really do."""

import math
import shutil

import numpy as np
import psutil
import pytest
import torch
import yaml

from kmex_utils import datasets, estimate, protopnet
from kmex_utils.activations import WHERE, keep
from kmex_utils.backbones import resnet

CPU = torch.device("cpu")
TINY = {"arch": "resnet18", "image_size": 32, "epochs": 2, "batch_size": 4, "weights": "scratch", "device": "cpu"}
BLOCKS = [(64, 64), (128, 16), (256, 4), (512, 1)]
PACE = estimate.Pace(train=1000.0, forward=1.0, flop=math.inf, blocks=BLOCKS, values=10)  # clustering is free


def steps(runs, chosen, seeds=(0,), name="birds"):
    return {row["step"].split()[0]: row for row in estimate.stages(name, chosen, list(seeds), runs)}


def command(tmp_path, capsys, entries, seeds=(0, 1)):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"datasets": entries, "seeds": list(seeds), "threads": 1}))
    status = estimate.main([str(config), "--runs", str(tmp_path / "runs")])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("choice", [{}, {"images_per_class": 2}, {"validation": 0.5}])
def test_images_are_counted_as_they_are_loaded(choice, folder, tmp_path):
    for name, more in (("birds", {"folder": str(folder)}), ("mnist-mini", {}), ("mnist-mini", {"classes": "3,7"})):
        loaded = datasets.load(name, **choice, **more, data=tmp_path)
        assert estimate.count(name, {**choice, **more}) == (len(loaded.train), len(loaded.test), len(loaded.classes))


@pytest.mark.parametrize("frozen", ["anew", "once"])
def test_protopnet_passes_each_image_as_often(frozen, folder, tmp_path, monkeypatch):
    schedule = {"warm_epochs": 2, "joint_epochs": 3, "push_start": 1, "push_every": 2, "last_passes": 3}
    images = datasets.load("birds", folder, image_size=32, data=tmp_path)
    options = protopnet.Options(**schedule, frozen_features=frozen, batch_size=4)
    network = protopnet.Network(resnet("resnet18", 2), 2, 1, options)
    passed = {True: 0, False: 0}

    def count(block, inputs):
        passed[torch.is_grad_enabled()] += len(inputs[0])

    network.blocks[0].register_forward_pre_hook(count)
    checkpoint = tmp_path / "state.safetensors"
    protopnet.train(network, images, options, seed=0, checkpoint=checkpoint, made_by={}, report=lambda line: None)
    for split in ("train", "test"):
        protopnet.evaluate(network, images, split)
    monkeypatch.setattr(estimate, "measure", lambda *_: PACE)
    row = steps(tmp_path, {"folder": str(folder), **schedule, "frozen_features": frozen})["5"]
    assert row["seconds"] == 1000 * passed[True] + passed[False] - 1  # one image goes through to see that it fits


def test_training_and_clustering_by_hand(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "measure", lambda *_: PACE)
    rows = steps(tmp_path, {"folder": str(folder), **TINY}, seeds=(0, 1, 2))
    assert rows["1"]["seconds"] == 3 * (2 * 12 * 1000 + 18)  # two epochs of 12 images; then 12 and 6 are embedded
    monkeypatch.setattr(estimate, "measure", lambda *_: PACE._replace(flop=2.0))  # a multiply-add a second
    chosen = {"folder": str(folder), "restarts": 3, "start_blocks": [4, 3], "prototypes_per_class": 2}
    rows = steps(tmp_path, chosen)
    kmeans, compared = 12 * 3 * 40, 18 * 2  # for each prototype of a class
    assert rows["3"]["seconds"] == 512 * (1 + 5) * (kmeans + compared)
    assert rows["4"]["seconds"] == 18 + (512 + 512 + 256 * 4) * 2 * (kmeans + compared)


@pytest.mark.parametrize("where", WHERE)
def test_room_for_activations_is_what_they_take(where, folder, tmp_path):
    images = datasets.load("birds", folder, image_size=32, data=tmp_path)
    backbone, held = resnet("resnet18", 2), 0
    for split in ("train", "test"):
        kept = keep(backbone, images, split, 2, where, folder=tmp_path / "kept")
        held += sum(x.nbytes for x in kept.read(torch.arange(len(kept)), 2))
    on_disk = sum(np.load(file).nbytes for file in tmp_path.glob("kept/*"))
    chosen = {"folder": str(folder), **TINY}
    row, nowhere = (steps(tmp_path, {**chosen, "activations_in": w})["4"] for w in (where, "nowhere"))
    assert row["bytes"] - nowhere["bytes"] == on_disk
    assert row["memory"] == (held if where == "memory" else 0)


def test_decoded_images_are_counted_until_they_are_there(folder, tmp_path):
    chosen = {"folder": str(folder), **TINY, "data": str(tmp_path)}
    config = {"datasets": {"birds": {**chosen, "seeds": [3, 4]}}, "seeds": [0]}
    before, _ = estimate.plan(config, tmp_path / "runs")
    images = datasets.load("birds", folder, image_size=32, data=tmp_path)
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


def test_what_does_not_fit_is_said(folder, tmp_path, capsys):
    free, ram = shutil.disk_usage(tmp_path).free, psutil.virtual_memory().total
    places = tmp_path / "not/yet", tmp_path
    assert not list(estimate.warnings([(place, 0.3 * free) for place in places], ram))
    disk, memory = estimate.warnings([(place, 0.7 * free) for place in places], 2 * ram)
    assert str(tmp_path) in disk and "free" in disk
    assert "activations_in: disk-half" in memory
    entry = {"folder": str(folder), **TINY, "prototype_depth": 10**13, "data": str(tmp_path)}
    status, text, _ = command(tmp_path, capsys, {"birds": entry})
    assert status == 0 and text.splitlines()[-1].startswith("WARNING") and "disk" in text


def test_what_cannot_run_is_one_line(folder, tmp_path, capsys):
    wrong = [
        ({"minst": {}}, "unknown dataset 'minst'"),
        ({"birds": {"folder": str(tmp_path / "none")}}, "does not exist"),
        ({"birds": {"folder": str(folder), "arch": "resnet43"}}, "torchvision has no model 'resnet43'"),
        (["mnist"], "needs `datasets`"),
    ]
    for entries, said in wrong:
        status, out, line = command(tmp_path, capsys, entries)
        assert (status, out) == (2, "") and said in line and line.count("\n") == 1
