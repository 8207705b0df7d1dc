"""Settings, artefacts, and what refuses to be mixed or read."""

import json
import subprocess
import sys

import pytest
import torch

from kmex_utils import paths, store
from kmex_utils.backbones import resnet
from kmex_utils.kmeans import Prototypes
from kmex_utils.parameters import checked
from kmex_utils.runs import Run, trained_seeds


@pytest.fixture
def run(tmp_path):
    run = Run.of(tmp_path, "mnist-mini", 0)
    data = {"image_size": 32, "images_per_class": 3}
    run.save_backbone(resnet("resnet18", 10), {"arch": "resnet18", "classes": list("0123456789"), "data": data})
    run.save_embeddings(train=(torch.randn(4, 512), torch.arange(4)))
    return run


def prototypes():
    zeros = torch.zeros(10, dtype=torch.int64)
    return Prototypes(torch.randn(10, 512), torch.arange(10), zeros, zeros, zeros, torch.zeros(10))


def test_a_run_comes_back(run):
    backbone = run.backbone()
    assert not any(p.requires_grad for p in backbone.parameters())
    assert torch.equal(backbone.c, resnet("resnet18", 10).c)
    assert torch.equal(run.c(), backbone.c)
    assert run.load_dataset().train.pixels.shape == (30, 1, 32, 32)
    z, labels = run.embeddings("train")
    assert z.shape == (4, 512) and labels.tolist() == [0, 1, 2, 3]
    assert trained_seeds(run.runs, "mnist-mini") == [0]


def test_a_bias_comes_back(run):
    settings = {k: v for k, v in run.settings().items() if k != "backbone"}
    saved = resnet("resnet18", 10, bias=True)
    run.save_backbone(saved, {**settings, "bias": True})
    assert torch.equal(run.backbone().b, saved.b)


def test_parts_of_another_training_are_refused(run):
    run.save_prototypes("B4", prototypes(), {"per_class": 1})
    run.save_results("kmex", [("KMEx (K/C=1)", "accuracy", "test", 90.0)])
    assert run.prototypes("B4", "04_encoder")[1]["per_class"] == 1
    assert run.results("kmex", "03_kmex")[0]["value"] == 90.0
    settings = run.settings()
    run.save_backbone(resnet("resnet18", 10, seed=9), {k: v for k, v in settings.items() if k != "backbone"})
    for read, notebook in (
        (lambda: run.prototypes("B4", "04_encoder"), "04_encoder"),
        (lambda: run.results("kmex", "03_kmex"), "03_kmex"),
        (lambda: run.embeddings("train"), "01_train"),
    ):
        with pytest.raises(ValueError, match=f"was made from another backbone: run notebook {notebook} again"):
            read()


def test_missing_parts_name_the_notebook(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 01_train with dataset=mnist and seed=3"):
        Run.of(tmp_path, "mnist", 3).backbone()
    with pytest.raises(FileNotFoundError, match="run notebook 04_encoder"):
        run.prototypes("B234", "04_encoder")
    with pytest.raises(FileNotFoundError, match="no trained backbone under"):
        trained_seeds(tmp_path, "mnist")
    with pytest.raises(ValueError, match="cannot name a folder"):
        Run.of(tmp_path, "../elsewhere", 0)


def test_weights_that_are_not_finite_are_refused(run):
    backbone = resnet("resnet18", 10)
    with torch.no_grad():
        backbone.blocks[1][0].conv1.weight[0, 0, 0, 0] = torch.nan
    run.save_backbone(backbone, {k: v for k, v in run.settings().items() if k != "backbone"})
    with pytest.raises(ValueError, match=r"holds NaN or infinite weights \(blocks.1.0.conv1.weight"):
        run.backbone()


def test_a_checkpoint_of_another_network_is_refused(run):
    settings = {**run.settings(), "arch": "resnet34"}
    del settings["backbone"]
    run.save_backbone(resnet("resnet18", 10), settings)
    with pytest.raises(ValueError, match="does not fit resnet34 with 10 classes .*: train again"):
        run.backbone()


def test_a_damaged_file_is_named(run):
    path = run.folder / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"backbone.safetensors is not a readable safetensors file"):
        run.backbone()
    (run.folder / "results-kmex.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        run.results("kmex", "03_kmex")


def test_other_safetensors_are_refused(run):
    store.save_tensors(run.folder / "B4.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"does not hold prototypes \(found x\)"):
        run.prototypes("B4", "04_encoder")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, run.folder / "B34.safetensors")
    with pytest.raises(ValueError, match="carries no settings"):
        run.prototypes("B34", "04_encoder")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), store.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- the parameters cell -----------------------------------------------------------------------------------------

CELL = (
    'dataset: str = "mnist"  # a name\nseed: int = 0\nrate: float = 0.1\nblocks: list[int] = [4, 2]\ncrop: bool = False'
)
VALUES = {"dataset": "mnist", "seed": 0, "rate": 0.1, "blocks": [4, 2], "crop": False}


def test_parameters_in_force_are_returned():
    assert checked([CELL, "import torch"], {**VALUES, "torch": torch}) == VALUES
    assert checked([CELL, "# Parameters\nseed = 3\nrate = 1\n"], {**VALUES, "seed": 3, "rate": 1})["rate"] == 1.0


def test_a_typo_is_caught_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown parameter 'sede': did you mean 'seed'"):
        checked([CELL, "# Parameters\nsede = 3\n"], {**VALUES, "sede": 3})


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "three"), ("seed", 1.5), ("seed", True), ("crop", 1), ("blocks", 4), ("blocks", ["4"])]
)
def test_wrong_types_are_caught(name, value):
    with pytest.raises(ValueError, match=f"parameter {name} must be"):
        checked([CELL], {**VALUES, name: value})


# --- the package ---------------------------------------------------------------------------------------------------


def test_the_methods_need_only_torch_torchvision_and_scikit_learn():
    """As on a bare machine: everything but figures, tables and the batch imports without the notebooks' packages."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"pandas", "seaborn", "matplotlib", "umap", "papermill", "safetensors", "tqdm"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import kmex_utils
from kmex_utils import (activations, attribution, backbones, composite, datasets, explainers, export, hardware, images,
                        interpretation, kmeans, measures, networks, parameters, paths, posthoc, protopnet, runs, store,
                        subsets, training)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_path_of_this_machine_in_results(run):
    run.save_results("sem", [("CNN", "theorem1_residual", "test", 1e-7)])
    assert str(paths.ROOT) not in (run.folder / "results-sem.json").read_text()
    assert json.loads((run.folder / "results-sem.json").read_text())["records"][0]["value"] == 1e-7
