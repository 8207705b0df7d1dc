"""Settings, artefacts, and what refuses to be mixed or read."""

import json

import pytest
import torch
from conftest import small

from kmex_utils import data, networks, paths, store
from kmex_utils.method.explainers import KMEx
from kmex_utils.method.prototypes import Prototypes
from kmex_utils.paper.runs import Run, trained_seeds

ARCH = "shufflenet_v2_x0_5"  # small and of the paper's form


@pytest.fixture(scope="module")
def digits():
    return data.load("mnist-mini", small(), images_per_class=3)


def trained(digits, seed=0, bias=False):
    return networks.for_training(ARCH, digits.classes, "scratch", digits.input, seed=seed, bias=bias).eval()


SETTINGS = {"arch": ARCH, "classes": list("0123456789"), "prototypes_per_class": 5}


@pytest.fixture
def run(tmp_path, digits):
    run = Run.of(tmp_path, "mnist-mini", 0)
    run.save_training(trained(digits), digits, {**SETTINGS, "data": digits.settings})
    run.save_embeddings(train=(torch.randn(4, 1024), torch.arange(4)))
    return run


def kmex():
    zeros = torch.zeros(10, dtype=torch.int64)
    return KMEx(Prototypes(torch.randn(10, 1024), torch.arange(10), zeros, zeros, zeros, torch.zeros(10)), 10)


def add_kmex(run):
    explained = run.explained()
    explained.save(run.folder, only=[explained.add_kmex(kmex(), seed=0, restarts=1)])
    return explained


def test_a_run_comes_back(run, digits):
    network = run.network()
    assert not any(p.requires_grad for p in network.parameters())
    assert torch.equal(network.c, trained(digits).c)
    assert network.input == digits.input and network.classes == digits.classes
    again = run.dataset()
    assert again.train.pixels.shape == (30, 1, 32, 32) and (again.train.pixels == digits.train.pixels).all()
    z, labels = run.embeddings("train")
    assert z.shape == (4, 1024) and labels.tolist() == [0, 1, 2, 3]
    assert trained_seeds(run.runs, "mnist-mini") == [0]
    assert Run.at(run.folder) == run


def test_a_bias_comes_back(run, digits):
    saved = trained(digits, bias=True)
    run.save_training(saved, digits, SETTINGS)
    assert torch.equal(run.network().b, saved.b)


def test_a_recipe_edited_later_leaves_a_run_as_it_was(run, monkeypatch):
    """What was done is stored, not what was asked for."""
    monkeypatch.setattr("kmex_utils.data.dataset._OWN_INPUTS", {})
    assert run.dataset().input.image_size == 32 and run.settings()["prototypes_per_class"] == 5


def test_explainers_are_added_one_by_one(run):
    assert run.explained().kmex == {}
    vectors = add_kmex(run).kmex[1].prototypes.vectors
    assert torch.equal(run.explained(needs={"KMEx-1": "03_kmex"}).kmex[1].prototypes.vectors, vectors)


def test_parts_of_another_training_are_refused(run, digits):
    add_kmex(run)
    kept = (run.folder / "KMEx-1.safetensors").read_bytes()
    run.save_results("kmex", [("KMEx (K/C=1)", "accuracy", "test", 90.0)])
    assert run.results("kmex", "03_kmex")[0]["value"] == 90.0
    run.save_training(trained(digits, seed=9), digits, SETTINGS)
    assert not (run.folder / "KMEx-1.safetensors").exists(), "prototypes go with the network they are of"
    for read, notebook in (
        (lambda: run.results("kmex", "03_kmex"), "03_kmex"),
        (lambda: run.embeddings("train"), "01_train"),
    ):
        with pytest.raises(ValueError, match=f"was made from another network: run notebook {notebook} again"):
            read()
    (run.folder / "KMEx-1.safetensors").write_bytes(kept)
    with pytest.raises(ValueError, match="KMEx-1.safetensors was made from another network"):
        run.explained()


def test_missing_parts_name_the_notebook(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 01_train with dataset=mnist and seed=3"):
        Run.of(tmp_path, "mnist", 3).network()
    with pytest.raises(FileNotFoundError, match="run notebook 04_encoder with dataset=mnist-mini and seed=0"):
        run.explained(needs={"B234": "04_encoder"})
    with pytest.raises(FileNotFoundError, match="no trained network under"):
        trained_seeds(tmp_path, "mnist")
    with pytest.raises(ValueError, match="cannot name a folder"):
        Run.of(tmp_path, "../elsewhere", 0)
    with pytest.raises(FileNotFoundError, match="is not the folder of a run"):
        Run.at(tmp_path)


def test_a_run_of_the_version_before_is_refused(tmp_path):
    run = Run.of(tmp_path, "mnist", 0)
    store.save_tensors(run.folder / "backbone.safetensors", {"x": torch.zeros(1)}, {})
    with pytest.raises(ValueError, match=r"seed-0 is a run of version 0.1, which is no longer read: run notebook 01"):
        run.network()


def test_weights_that_are_not_finite_are_refused(run, digits):
    network = trained(digits)
    with torch.no_grad():
        network.module.stage2[0].branch2[0].weight[0, 0, 0, 0] = torch.nan
    run.save_training(network, digits, SETTINGS)
    with pytest.raises(ValueError, match=r"NaN or infinite weights \(stage2.0.branch2.0.weight"):
        run.network()


def test_a_damaged_file_is_named(run):
    add_kmex(run)
    (run.folder / "KMEx-1.safetensors").write_bytes((run.folder / "KMEx-1.safetensors").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"KMEx-1.safetensors is not a readable safetensors file"):
        run.explained()
    path = run.folder / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"weights.safetensors is not a readable"):
        run.network()
    (run.folder / "results-kmex.json").write_text("{")
    with pytest.raises(ValueError, match="not readable JSON"):
        run.results("kmex", "03_kmex")


def test_other_safetensors_are_refused(run):
    explained = add_kmex(run)
    made = {"weights": explained.network.fingerprint, "classes": SETTINGS["classes"], "prototypes_per_class": 1}
    store.save_tensors(run.folder / "KMEx-1.safetensors", {"x": torch.zeros(1)}, made)
    with pytest.raises(ValueError, match=r"does not hold prototypes: it lacks 'vectors'"):
        run.explained()
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, run.folder / "KMEx-1.safetensors")
    with pytest.raises(ValueError, match="carries no settings"):
        run.explained()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), store.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_no_path_of_this_machine_in_results(run):
    run.save_results("sem", [("CNN", "theorem1_residual", "test", 1e-7)])
    for file in run.folder.glob("*.json"):
        assert str(paths.ROOT) not in file.read_text(), file.name
    assert json.loads((run.folder / "results-sem.json").read_text())["records"][0]["value"] == 1e-7
