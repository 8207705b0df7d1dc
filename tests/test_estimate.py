"""What a batch will take: images counted, stages priced from a pace, finished ones free, warnings and error lines."""

import math
import re
import shutil
from dataclasses import replace

import psutil
import pytest
import yaml

from kmex_utils import datasets, estimate, hardware, protopnet
from kmex_utils.activations import embed, keep
from kmex_utils.backbones import resnet

PACE = estimate.Pace(  # round numbers; blocks of two channels, with as many positions as channels in B1
    train=3.0, forward=1.0, flop=2.0, blocks=[(2, 4), (4, 2), (6, 1), (8, 1)], values=1000
)
SMALL = {"arch": "resnet18", "image_size": 32, "epochs": 2, "batch_size": 4, "weights": "scratch", "device": "cpu"}


@pytest.fixture
def priced(monkeypatch):
    """Stages at a known pace."""
    monkeypatch.setattr(estimate, "measure", lambda *_: PACE)

    def stages(tmp_path, **chosen):
        rows = estimate.stages("birds", chosen, [0, 1, 2], tmp_path / "runs")
        return {row["step"].split()[0]: row for row in rows}

    return stages


def command(tmp_path, capsys, chosen, name="birds", seeds=(0, 1)):
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"datasets": {name: chosen}, "seeds": list(seeds), "threads": 1}))
    status = estimate.main([str(config), "--runs", str(tmp_path / "runs")])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("choice", [{}, {"images_per_class": 2}, {"validation": 0.5}, {"classes": "red,blue*"}])
def test_images_are_counted_as_they_are_loaded(choice, folder, tmp_path):
    for name, chosen in (("birds", {"folder": str(folder), **choice}), ("mnist-mini", choice)):
        if "classes" in chosen and name == "mnist-mini":
            chosen = {"classes": "3,7"}
        loaded = datasets.load(name, **chosen, data=tmp_path / "data")
        if name == "mnist-mini" and chosen != {} and "classes" not in chosen:
            assert estimate.count(name, chosen)[2] == len(loaded.classes)
        assert estimate.count(name, chosen) == (len(loaded.train), len(loaded.test), len(loaded.classes))
