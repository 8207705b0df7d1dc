"""The Snakefile: parameters, one run at a time, kill and resume, a failing notebook."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import papermill
import pytest
import yaml

from kmex_utils import paths

TINY = {
    "image_size": 32,
    "images_per_class": 20,
    "arch": "resnet18",
    "epochs": 3,
    "batch_size": 20,
    "precision": "float32",
    "prototypes_per_class": 5,
    "joint_epochs": 1,
    "last_passes": 2,
    "restarts": 2,
    "group": "0,1,2",
    "image": 1,
}


def batch(folder, config, *options, start=subprocess.run, **more):
    command = [sys.executable, "-m", "kmex_utils.batch", str(config)]
    command += ["--runs", str(folder / "runs"), "--figures", str(folder / "figures"), *options]
    return start(command, cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def configuration(folder, parameters=TINY, name="mnist-mini", seeds=(0,)):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"datasets": {name: parameters}, "seeds": list(seeds), "threads": 1}))
    return path


@pytest.mark.batch
@pytest.mark.parametrize("name", ["quick", "paper", "scratch", "efficientnet"])
def test_the_workflow_gives_only_parameters_the_notebooks_take(name, tmp_path):
    config = paths.ROOT / "config" / f"{name}.yaml"
    text = batch(tmp_path, config, "all", "extras", "--dry-run", "--printshellcmds").stdout
    commands = re.findall(r"papermill .*/notebooks/(\S+)\.ipynb \S+ -y (.+)", text)
    assert len({notebook for notebook, _ in commands}) == 14, "all but the one for your own model"
    trained, averaged = {}, {}
    for notebook, given in commands:
        takes = papermill.inspect_notebook(str(paths.NOTEBOOKS / f"{notebook}.ipynb"))
        (parameters,) = [json.loads(part) for part in shlex.split(given)]
        assert set(parameters) <= set(takes), notebook
        if notebook == "01_train":
            trained.setdefault(parameters["dataset"], set()).add(parameters["seed"])
        if notebook == "07_accuracy":
            averaged[parameters["dataset"]] = set(parameters["seeds"])
    content = yaml.safe_load(config.read_text())
    seeds = {name: set((own or {}).get("seeds", content["seeds"])) for name, own in content["datasets"].items()}
    assert trained == averaged == seeds, "the data sets of the configuration, no other, each with its seeds"


@pytest.mark.batch
def test_what_the_configuration_may_set_exists(tmp_path):
    """Each name in the Snakefile's table is a parameter of that notebook."""
    text = (paths.ROOT / "Snakefile").read_text()
    takes = eval(re.search(r"TAKES = (\{.*?\n\})", text, re.S).group(1))
    for notebook, names in takes.items():
        assert set(names) <= set(papermill.inspect_notebook(str(paths.NOTEBOOKS / f"{notebook}.ipynb"))), notebook
    wrong = configuration(tmp_path, {"epoch": 3})
    done = batch(tmp_path, wrong, "--dry-run")
    assert done.returncode != 0 and "no notebook takes epoch" in done.stdout


@pytest.mark.batch
@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_is_used_by_one_notebook_at_a_time(gpu, tmp_path, monkeypatch):
    """Where the driver's tool is found; the run itself ends at its first cell, for want of a folder."""
    if not gpu and shutil.which("nvidia-smi"):
        pytest.skip("this machine has a GPU: what happens without one cannot be seen here")
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.touch(mode=0o755 if gpu else 0o644)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    done = batch(tmp_path, configuration(tmp_path, {"folder": str(tmp_path / "nowhere")}, "birds"))
    assert bool(re.search(r"Provided resources: gpu=.*1", done.stdout)) == gpu
    assert "nowhere/train does not exist" in done.stdout.splitlines()[-1]


def tables(folder):
    return [pd.read_csv(folder / "figures" / "mnist-mini" / f"table{i}.csv") for i in (1, 2)]


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.2)


@pytest.mark.batch
def test_kill_and_resume(tmp_path):
    """kill -9 in the middle of training: finished steps are kept, training continues, the tables are the same."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    only = [str(whole / "figures" / "mnist-mini" / f"table{i}.csv") for i in (1, 2)]
    done = batch(whole, configuration(whole), *only, "--cores", "2")
    assert done.returncode == 0, done.stdout

    config = configuration(cut)
    state = cut / "runs" / "mnist-mini" / "seed-0" / "training.safetensors"
    first = batch(cut, config, "--cores", "1", start=subprocess.Popen, start_new_session=True)
    wait_for(state.exists, first)
    second = batch(cut, config, "--cores", "1")
    assert second.returncode == 2 and "another run is at work in" in second.stdout
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(1)
    assert state.exists()

    # a second kill, after some steps are finished
    again = batch(cut, config, "--cores", "1", start=subprocess.Popen, start_new_session=True)
    results = cut / "runs" / "mnist-mini" / "seed-0"
    wait_for((results / "results-kmex.json").exists, again)
    time.sleep(2)
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    trained = (results / "backbone.safetensors").stat().st_mtime_ns

    last = batch(cut, config, "--cores", "2")
    assert last.returncode == 0, last.stdout
    assert (results / "backbone.safetensors").stat().st_mtime_ns == trained, "a finished step was repeated"
    for ours, expected in zip(tables(cut), tables(whole), strict=True):
        pd.testing.assert_frame_equal(ours, expected)
    executed = json.loads((results / "notebooks" / "01_train.ipynb").read_text())
    assert "resuming after epoch" in json.dumps(executed)
    pages = list((cut / "runs").glob("**/notebooks/*.html"))
    assert len(pages) == 9


@pytest.mark.batch
def test_a_failing_notebook_is_named_with_its_cell(tmp_path):
    run = tmp_path / "runs" / "mnist-mini" / "seed-0"
    wrong = configuration(tmp_path, {**TINY, "prototypes_per_class": 400, "epochs": 1})
    done = batch(tmp_path, wrong, str(run / "results-encoder.json"), "--cores", "1")
    assert done.returncode != 0
    partial = run / "notebooks" / "04_encoder.ipynb"
    assert re.search(rf"FAILED {partial}, cell \[\d+\]: ValueError: class '0' has \d+ training rows", done.stdout)
    cells = [cell for cell in json.loads(partial.read_text())["cells"] if cell["cell_type"] == "code"]
    assert any(cell["outputs"] for cell in cells), "the partial output is kept"
