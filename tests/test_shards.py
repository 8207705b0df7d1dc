"""Work in shards gives the numbers of one process, to the last bit, and a shard that is missing or other is named."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from conftest import small, untrained

from kmex_utils import data, paths, store
from kmex_utils.explanation.nearest import Nearest
from kmex_utils.explanation.passed import Passed, Shard
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.prototypes import Prototypes
from kmex_utils.paper import batch, shards
from kmex_utils.paper.runs import Run

HOW = {"seed": 3, "restarts": 2}


@pytest.fixture(scope="module")
def images():
    return data.load("mnist-mini", small(), images_per_class=6)


@pytest.fixture(scope="module")
def network(images):
    return untrained(images, seed=2)


@pytest.mark.parametrize("of", [1, 2, 3, 7, 10])
def test_shards_have_every_image_once_in_the_same_batches(of):
    """Of classes of unequal size, images without a class among them."""
    generator = torch.Generator().manual_seed(0)
    labels = {"train": torch.randint(-1, 9, (200,), generator=generator), "test": torch.zeros(95, dtype=torch.int64)}
    whole = Shard().batches(labels, 8)
    parts = [Shard(number, of).batches(labels, 8) for number in range(1, of + 1)]
    for split, batches in whole.items():
        assert [index.tolist() for part in parts for index in part[split]] == [index.tolist() for index in batches]
        assert sorted(i for index in batches for i in index.tolist()) == list(range(len(labels[split])))
    assert all(len(labels["train"][index].unique()) == 1 for index in whole["train"])
    for part in parts:
        assert len(torch.cat(part["train"])) > 0


def test_shards_are_counted_from_one():
    for number, of in ((0, 2), (3, 2), (1, 0)):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            Shard(number, of)


@pytest.mark.parametrize(("of", "store"), [(3, "memory"), (3, "nowhere"), (10, "memory")])
def test_together_they_are_the_whole(images, network, of, store):
    normalisation = Normalisation()
    whole = Passed.of(network, images, 2, store=store, batch_size=4)
    explainer = whole.fit_encoder(2, normalisation, 2, **HOW)
    maps = {split: whole.map(explainer, split) for split in ("train", "test")}
    nearest = whole.nearest(explainer, maps["train"])
    parts = [
        Passed.of(network, images, 2, store=store, batch_size=4, shard=Shard(number, of)) for number in range(1, of + 1)
    ]
    fitted = [part.fit_encoder(2, normalisation, 2, **HOW).prototypes for part in parts]
    for field in fields(Prototypes):
        together = torch.cat([getattr(of_part, field.name) for of_part in fitted])
        assert torch.equal(together, getattr(explainer.prototypes, field.name)), field.name
    seen = 0
    for part in parts:
        for split, of_all in maps.items():
            assert torch.equal(part.map(explainer, split), of_all[part.x[split].index])
            seen += len(part.x[split].index)
        of_part = part.nearest(explainer, part.map(explainer, "train"))
        own = torch.isin(explainer.prototypes.labels, torch.tensor(part.classes_here))
        for field in fields(Nearest):
            assert torch.equal(getattr(of_part, field.name)[own], getattr(nearest, field.name)[own]), field.name
    assert seen == len(images.train) + len(images.test)


def test_images_of_another_shard_are_refused(images, network):
    part = Passed.of(network, images, 4, shard=Shard(1, 2))
    with pytest.raises(IndexError, match="another shard"):
        part.x["train"].read(torch.tensor([len(images.train) - 1]), 4)


# --- from a run's folder ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(images, network, tmp_path_factory):
    run = Run.of(tmp_path_factory.mktemp("runs"), "mnist-mini", 3)
    run.save_training(network, images, {"data": images.settings, "prototypes_per_class": 2})
    return run


def given(run, count, **more):
    return {"dataset": run.name, "seed": run.seed, "runs": str(run.runs), "shards": count, "restarts": 2, **more}


@pytest.fixture(scope="module")
def settings(run):
    """Of notebook 4, and three shards that were made by them."""
    of_notebook = given(run, 3)
    for stage in ("fit", "maps"):
        for number in (3, 1, 2):
            shards.work(stage, number, of_notebook)
    return {**of_notebook, **{"norm": "position", "scale": "1/D", "align_corners": False, "grid": "shallowest"}} | {
        "store": "memory",
        "prototypes_per_class": 0,
        "start_blocks": [4, 3, 2],
    }


def test_gathered_they_are_what_one_process_computes(run, images, network, settings):
    """With notebook 4's own defaults, resolved in its place."""
    gathered, whole, printed = (
        shards.Gathered(run, images, settings),
        Passed.of(network, images, 2),
        Normalisation(scale="1/D"),
    )
    for b in (4, 3, 2):
        ours, expected = (passed.fit_encoder(b, printed, 2, **HOW) for passed in (gathered, whole))
        for field in fields(Prototypes):
            assert torch.equal(getattr(ours.prototypes, field.name), getattr(expected.prototypes, field.name))
        maps = {split: whole.map(expected, split) for split in ("train", "test")}
        for split, q_s in maps.items():
            assert torch.equal(gathered.map(ours, split).long(), q_s)
        nearest, near = gathered.nearest(ours, maps["train"]), whole.nearest(expected, maps["train"])
        for field in fields(Nearest):
            assert torch.equal(getattr(nearest, field.name), getattr(near, field.name)), field.name


def test_other_prototypes_than_the_shards_made_are_refused(run, images, settings):
    gathered = shards.Gathered(run, images, settings)
    with pytest.raises(ValueError, match="the shards were asked for other prototypes"):
        gathered.fit_encoder(4, Normalisation(scale="1/D"), 2, seed=3, restarts=5)
    other = shards.Gathered(run, images, {**settings, "restarts": 9})
    with pytest.raises(ValueError, match=r"fit-1-of-3 was made with other settings \(restarts\): start `kmex batch`"):
        other.explainer(4)
    file = run.folder / "shards" / "maps-2-of-3.safetensors"
    before = file.read_bytes()
    tensors, made_by = store.load_tensors(file)
    store.save_tensors(file, tensors, {**made_by, "fit": "of others"})
    stale = shards.Gathered(run, images, settings)
    with pytest.raises(ValueError, match=r"maps-2-of-3 was made with other settings \(fit\)"):
        stale.map(stale.explainer(4), "train")
    with pytest.raises(ValueError, match="maps-2-of-3"):  # again, and not from what was read before it
        stale.map(stale.explainer(4), "train")
    file.write_bytes(before)
    missing = shards.Gathered(run, images, {**settings, "shards": 2})
    with pytest.raises(
        FileNotFoundError, match="fit-1-of-2.safetensors does not exist: run notebook 04_encoder by `kmex"
    ):
        missing.explainer(4)


def test_more_shards_than_classes_are_one_line(run, tmp_path):
    """Said by the process, and again at the end of the batch from its log."""
    log = tmp_path / "shards" / "fit-1-of-11.log"
    command = [sys.executable, "-m", "kmex_utils.paper.process", "shard", "fit", "1", log, json.dumps(given(run, 11))]
    done = subprocess.run(
        [*command, run.runs], cwd=paths.ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    why = "ValueError: mnist-mini has 10 classes: at most as many shards, got 11"
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == f"FAILED {log.with_suffix('')}: {why}"
    assert list(batch.failures(tmp_path)) == [f"FAILED {log.with_suffix('')}: {why}"]
    log.write_text("")  # as a process leaves it that is killed
    [line] = batch.failures(tmp_path)
    assert "it was ended from outside: out of memory or of time?" in line
    log.write_text("done\n")
    assert not list(batch.failures(tmp_path))
