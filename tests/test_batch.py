"""The workflow: parameters, what depends on what, one at a time, kill and resume, a failing notebook, the outcome."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import papermill
import psutil
import pytest
import yaml
from conftest import NOTEBOOKS

from kmex_utils import cli, paths, store
from kmex_utils.paper import batch as workflow
from kmex_utils.paper import estimate

TINY = {
    "image_size": 32,
    "images_per_class": 20,
    "classes": "0,1,2",
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
    command = [sys.executable, "-m", "kmex_utils", "batch", str(config)]
    command += ["--runs", str(folder / "runs"), "--figures", str(folder / "figures"), *options]
    return start(command, cwd=paths.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)


def configuration(folder, parameters=TINY, name="mnist-mini", seeds=(0,), **more):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"datasets": {name: parameters}, "seeds": list(seeds), "threads": 1, **more}))
    return path


@pytest.mark.batch
@pytest.mark.parametrize("name", ["quick", "paper", "scratch", "efficientnet", "resnet"])
def test_the_workflow_gives_only_parameters_the_notebooks_take(name, tmp_path):
    config = paths.ROOT / "config" / f"{name}.yaml"
    text = batch(tmp_path, config, "all", "extras", "scaling", "--dry-run", "--printshellcmds").stdout
    commands = re.findall(r"process notebook .*/notebooks/(\S+)\.ipynb \S+ ('.+') \S+$", text, re.M)
    with_parts = "cub200" in yaml.safe_load(config.read_text())["datasets"]
    expected = 17 + with_parts
    assert len({notebook for notebook, _ in commands}) == expected, (
        "all but your own model's, and fidelity without parts"
    )
    trained, averaged = {}, {}
    for notebook, given in commands:
        takes = papermill.inspect_notebook(str(NOTEBOOKS / f"{notebook}.ipynb"))
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
    """Each name in the table is a parameter of that notebook."""
    for notebook, names in workflow.TAKES.items():
        assert set(names) <= set(papermill.inspect_notebook(str(NOTEBOOKS / f"{notebook}.ipynb"))), notebook
    wrong = configuration(tmp_path, {"epoch": 3})
    done = batch(tmp_path, wrong, "--dry-run")
    line = "error: no notebook takes epoch; did you mean epochs? (given for mnist-mini)\n"
    assert (done.returncode, done.stdout) == (2, line)


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_is_used_by_one_notebook_at_a_time(gpu, tmp_path, monkeypatch):
    """Where the driver's tool is found, Snakemake is given one GPU to lend."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.touch(mode=0o755 if gpu else 0o644)
    monkeypatch.setenv("PATH", str(tool.parent))
    given = workflow.command(tmp_path, ["--cores", "2"])
    assert ("gpu=1" in given) == gpu and given.count("--cores") == 1


WRONG = {
    "no seeds": ("datasets: {mnist-mini: {}}\nthreads: 1", "the configuration needs `seeds`"),
    "empty seeds": ("datasets: {mnist-mini: {}}\nseeds: []\nthreads: 1", "the configuration needs `seeds`"),
    "seeds that are text": ("datasets: {mnist-mini: {}}\nseeds: ['0']\nthreads: 1", "the configuration needs `seeds`"),
    "own seeds": ("datasets: {mnist-mini: {seeds: 3}}\nseeds: [0]\nthreads: 1", "mnist-mini needs `seeds`"),
    "no threads": ("datasets: {mnist-mini: {}}\nseeds: [0]", "the configuration needs `threads`"),
    "no data sets": ("datasets: {}\nseeds: [0]\nthreads: 1", "needs `datasets`"),
    "a list of data sets": ("datasets: []\nseeds: [0]\nthreads: 1", "needs `datasets`"),
    "a number": (
        "datasets: {2024: {}}\nseeds: [0]\nthreads: 1",
        "2024 is not text but int to YAML: write it in quotes",
    ),
    "a path": ("datasets: {../up: {}}\nseeds: [0]\nthreads: 1", "'../up' cannot name a folder"),
    "a command": ('datasets: {"a$(touch PWNED)": {}}\nseeds: [0]\nthreads: 1', "cannot name a folder"),
    "a pattern": ('datasets: {"{seed}": {}}\nseeds: [0]\nthreads: 1', "cannot name a folder"),
    "a report elsewhere": ("datasets: {mnist-mini: {}}\nseeds: [0]\nthreads: 1\nreport: ../up", "report '../up'"),
    "an unknown key": (
        "datasets: {mnist-mini: {}}\nseed: [0]\nthreads: 1",
        "unknown in the configuration: seed; did you",
    ),
    "another type": (
        "datasets: {mnist-mini: {image: first}}\nseeds: [0]\nthreads: 1",
        "parameter image must be of type int, got 'first' (str) (given for mnist-mini)",
    ),
    "no shards": ("datasets: {mnist-mini: {shards: 0}}\nseeds: [0]\nthreads: 1", "shards must be a whole number of at"),
    "no GPUs": (
        "datasets: {mnist-mini: {}}\nseeds: [0]\nthreads: 1\ngpu: -1",
        "gpu must be a whole number of at least 0",
    ),
    "no parameters": ("datasets: {mnist-mini: 3}\nseeds: [0]\nthreads: 1", "must be parameters and their values"),
    "no YAML": ("datasets: [", "is not YAML"),
    "no text": ("datasets: \udcff", "is not YAML"),
    "no end": ("[" * 100_000, "more than 10 levels"),
    "an alias bomb": (
        "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 12)),
        "has aliases",
    ),
}


@pytest.mark.parametrize(("text", "said"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("command", ["batch", "estimate"])
def test_a_wrong_configuration_is_one_line(command, text, said, tmp_path, monkeypatch, capsys):
    """Before anything runs or is made."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_bytes(text.encode("utf-8", "surrogateescape"))
    before = time.monotonic()
    assert cli.main([command, "config.yaml", "--runs", "runs"]) == 2
    out, line = capsys.readouterr()
    assert (out, line.count("\n")) == ("", 1) and said in line and time.monotonic() - before < 5
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("option", ["--runs", "--figures"])
@pytest.mark.parametrize("place", ["file/below", "/proc/below", "{braces}"])
def test_a_folder_that_cannot_be_written_is_one_line(option, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    folders = {"--runs": "runs", "--figures": "figures"} | {option: place}
    assert cli.main(["batch", str(configuration(tmp_path)), *(word for pair in folders.items() for word in pair)]) == 2
    _, line = capsys.readouterr()
    assert line.count("\n") == 1 and line.rstrip().endswith(f"choose another folder as {option}")


def test_temporaries_of_killed_processes_are_removed(tmp_path):
    """What is being written stays; so do the user's own hidden files."""
    left, own = tmp_path / "a" / ".table1-0123abcd.csv", tmp_path / ".mine-01.csv"
    left.parent.mkdir()
    for file in (left, own):
        file.touch()
    with store.replacing(tmp_path / "a" / "table1.csv") as writing:
        store.clean(tmp_path)
        assert writing.exists() and own.exists() and not left.exists()


def test_a_lock_is_of_all_that_inherit_it(tmp_path):
    """It outlives the process that took it, until the last child that inherited it ends."""
    file = store.lock(tmp_path / "lock")
    with subprocess.Popen(["sleep", "60"], pass_fds=[file.fileno()]) as child:
        file.close()
        with pytest.raises(BlockingIOError):
            store.lock(tmp_path / "lock", shared=True)
        child.kill()
    first, second = (store.lock(tmp_path / "lock", shared=True) for _ in range(2))
    with first, second, pytest.raises(BlockingIOError):
        store.lock(tmp_path / "lock", seconds=0.2)


def test_states_of_finished_trainings_are_removed(tmp_path):
    """Those with a result after them; one that was interrupted stays."""
    for seed, names in enumerate((["training", "results-train"], ["training"], ["results-train", "training"])):
        folder = tmp_path / "runs" / "digits" / f"seed-{seed}"
        folder.mkdir(parents=True)
        for i, name in enumerate(names):
            file = folder / f"{name}.{'safetensors' if name == 'training' else 'json'}"
            file.touch()
            os.utime(file, (i, i))
    workflow._forget(tmp_path / "runs", tmp_path / "figures", ["digits"])
    left = {file.parent.name for file in tmp_path.glob("runs/digits/*/training.safetensors")}
    assert left == {"seed-1", "seed-2"}


@pytest.mark.batch
def test_a_notebook_depends_on_what_it_imports(tmp_path):
    """Training on data, networks and the loop; not on the views of an explanation, nor on k-means."""
    text = batch(tmp_path, configuration(tmp_path), "all", "extras", "scaling", "--dry-run").stdout
    of = {
        rule: {file.removeprefix("kmex_utils/") for file in re.findall(rf"{paths.ROOT}/(\S+?\.py)", inputs)}
        for rule, inputs in re.findall(r"^rule (\w+):\n    input: (.+)$", text, re.M)
    }
    data = {"data/__init__.py", "data/dataset.py", "data/reading.py", "networks/head.py", "networks/checkpoints.py"}
    views = {f"explanation/{name}.py" for name in ("export", "report", "figure1")} | {"drawing.py", "paper/figures.py"}
    explained = {"method/kmeans.py", "method/products.py", "explanation/passed.py", "explanation/explained.py"}
    for rule, modules in (
        ("train", data | {"notebooks/01_train.py", "method/explainers.py", "explanation/activations.py"}),
        ("train", {"training/sgd.py", "training/loop.py", "training/batches.py"}),
        ("kmex", data | explained),
        ("encoder", data | explained | {"method/composite.py", "paper/runs.py"}),
        ("protopnet", data | {"training/protopnet/schedule.py", "training/loop.py", "method/kmeans.py"}),
        ("scaling", data | {"benchmarks/scaling.py", "method/kmeans.py", "method/operator.py"}),
        ("accuracy", {"paper/published.py"}),
        ("interpretation", {"explanation/figure1.py", "drawing.py", "method/attribution.py"}),
    ):
        assert modules <= of[rule], rule
    for rule in ("train", "kmex", "encoder", "protopnet"):
        assert not views & of[rule], rule
    assert not {"method/kmeans.py", "explanation/explained.py", "paper/runs.py"} & of["train"]
    assert not {"explanation/explained.py", "paper/runs.py", "training/sgd.py"} & of["protopnet"]
    assert not {"training/sgd.py", "training/protopnet/model.py"} & of["encoder"]


def tables(folder):
    return [pd.read_csv(folder / "figures" / "mnist-mini" / f"table{i}.csv") for i in (1, 2)]


def wait_for(condition, process, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.2)


def test_tables_are_compared_with_those_before(tmp_path):
    """By model, in points and cosines, means and standard deviations; rows that have no counterpart are said."""
    rows = [
        ["mnist-mini", "CNN", "accuracy", "test", 96.5, 0.2, 2, 99.4],
        ["mnist-mini", "ProtoPNet", "accuracy", "test", 96.0, 0.4, 2, 99.4],
        ["mnist-mini", "ProtoPNet", "accuracy", "train", 98.0, 0.3, 2, 100.0],
        ["mnist-mini", "ProtoPNet", "cos_class", "train", 0.88, 0.02, 2, 1.0],
    ]
    columns = ["dataset", "model", "metric", "split", "mean", "std", "n_seeds", "paper"]

    def written(name, **changed):
        content = [[*row[:4], *changed.get(f"{row[2]}_{row[3]}_{row[1]}", row[4:6]), *row[6:]] for row in rows]
        file = tmp_path / name / "table2.csv"
        file.parent.mkdir()
        pd.DataFrame(content, columns=columns).to_csv(file, index=False)
        return file

    file = written("now")
    assert list(workflow.comparison([file], {})) == []
    assert list(workflow.comparison([file], {file: file.read_bytes()})) == [
        "The tables are those there before, to the last digit."
    ]
    moved = written("then", accuracy_test_ProtoPNet=(96.2, 0.4), cos_class_train_ProtoPNet=(0.88, 0.021))
    first, last = workflow.comparison([file], {file: moved.read_bytes()})
    assert first == "ProtoPNet differs from the tables there before by at most 0.2 points and 0.001 in cosines."
    assert last.startswith("The others are the same. Another chip rounds otherwise, ")
    rows = rows[1:]
    fewer = written("fewer")
    first, *_ = workflow.comparison([file], {file: fewer.read_bytes()})
    assert "other models" in first
    committed = paths.FIGURES / "mnist-mini" / "table2.csv"
    assert workflow._committed(committed).startswith(b"dataset,model,")
    assert workflow._committed(committed.with_name("nothing.csv")) == workflow._committed(file) == b""


@pytest.mark.batch
def test_kill_and_resume(tmp_path):
    """kill -9 in the middle of training: finished steps are kept, training continues, the numbers are the same.

    So they are with notebook 4 in shards.
    """
    whole, cut = tmp_path / "My Documents", tmp_path / "2024_11"
    for folder in (whole, cut):
        folder.mkdir()
    only = [str(whole / "figures" / "mnist-mini" / f"table{i}.csv") for i in (1, 2)]
    only += [str(whole / "runs" / "mnist-mini" / "seed-0" / "notebooks" / "01_train.html")]
    done = batch(whole, configuration(whole), *only, "--cores", "2")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    for name in ("01_train", "07_accuracy"):
        assert len([line for line in lines if re.match(rf"\d\d:\d\d:\d\d (start|done) .*/{name}.ipynb", line)]) == 2
    assert len([line for line in lines if re.match(r"mnist-mini seed 0, epoch \d/3: loss", line)]) == 3
    assert any(re.match(r"CNN +\d+\.\d \(100\.0\) +\d+\.\d \(99\.4\) +0\.\d\d \(0\.48\)", line) for line in lines)
    assert f"Tables and figures: {whole}/figures/mnist-mini/." in done.stdout
    assert not re.search("jobs to execute|Building DAG|KeyboardInterrupt|over TCP", done.stdout)

    config, results = configuration(cut, {**TINY, "shards": 2}), cut / "runs" / "mnist-mini" / "seed-0"
    only, state = str(results / "results-encoder.json"), results / "training.safetensors"
    first = batch(cut, config, only, "--cores", "1", start=subprocess.Popen, start_new_session=True)
    wait_for((cut / "runs" / ".lock").exists, first)
    second = batch(cut, config, "--cores", "1")
    assert second.returncode == 2 and "another run is at work in" in second.stdout
    wait_for(state.exists, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(1)
    assert state.exists()

    # a second kill, after some steps are finished
    again = batch(cut, config, only, "--cores", "1", start=subprocess.Popen, start_new_session=True)
    wait_for(lambda: list(results.glob("shards/fit-*.safetensors")), again)
    os.killpg(again.pid, signal.SIGKILL)
    again.wait()
    trained = (results / "weights.safetensors").stat().st_mtime_ns

    last = batch(cut, config, only, "--cores", "2")
    assert last.returncode == 0, last.stdout
    assert (results / "weights.safetensors").stat().st_mtime_ns == trained, "a finished step was repeated"
    expected = whole / "runs" / "mnist-mini" / "seed-0"
    for name in ("weights", "embeddings", "B4", "B34", "B234"):
        assert (results / f"{name}.safetensors").read_bytes() == (expected / f"{name}.safetensors").read_bytes(), name
    for name in ("train", "encoder"):
        records, theirs = (store.load_json(run / f"results-{name}.json")["records"] for run in (results, expected))
        assert records == theirs
    executed = json.loads((results / "notebooks" / "01_train.ipynb").read_text())
    assert "resuming after epoch" in json.dumps(executed)
    assert len(list((whole / "runs").glob("**/notebooks/*.html"))) == 5

    # what is left, by what the runs recorded of their settings
    for changed, left in (({}, []), ({"restarts": 3}, ["3", "4", "5"]), ({"epochs": 4}, ["1", "3", "4", "5"])):
        rows = [
            row for row in estimate.stages("mnist-mini", {**TINY, **changed}, [0], whole / "runs") if row["seconds"]
        ]
        assert [row["step"][0] for row in rows] == left
        assert not any("recorded" in row["work"] for row in rows)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        ("os.kill(os.getpid(), 9)", "the kernel was killed (SIGKILL), most likely because memory ran out"),
        ("os._exit(3)", "the kernel ended with status 3"),
    ],
)
def test_a_kernel_that_dies_before_its_first_cell_is_named(end, why, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\n'ipykernel_launcher' in sys.orig_argv and {end}\n")
    command = [sys.executable, "-m", "kmex_utils.paper.process", "notebook", "notebooks/02_cnn_as_sem.ipynb"]
    out = tmp_path / "runs" / "notebooks" / "02_cnn_as_sem.ipynb"
    done = subprocess.run(
        [*command, out, "{}", tmp_path / "runs"],
        cwd=paths.ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
    )
    assert done.returncode == 1
    [line] = workflow.failures(tmp_path / "runs")
    assert line.startswith(f"FAILED {out}, cell [1]: KernelDied: {why}")


@pytest.mark.parametrize("end", ["of the command", "of the runner alone"])
def test_what_a_notebook_started_ends_with_it(end, tmp_path):
    cell = nbformat.v4.new_code_cell(
        "import subprocess, time\n"
        "started = subprocess.Popen(['sleep', '1000'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(f'{{started.pid}}\\n')\n"
        "time.sleep(1000)"
    )
    metadata = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), tmp_path / "waits.ipynb")
    command = [sys.executable, "-m", "kmex_utils.paper.process", "notebook", tmp_path / "waits.ipynb"]
    command += [tmp_path / "out" / "waits.ipynb", "{}", tmp_path / "out"]
    process = subprocess.Popen(command, cwd=paths.ROOT, stdin=subprocess.PIPE, process_group=0)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"), process)
    left = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    assert int((tmp_path / "pid").read_text()) in [child.pid for child in left]
    if end == "of the command":
        process.stdin.close()  # as the system does when the command ends, however it ends
    else:
        process.kill()
    process.wait(timeout=30)
    _, alive = psutil.wait_procs(left, timeout=30)
    assert not alive


@pytest.mark.batch
def test_names_with_spaces_and_other_letters(tmp_path):
    """Of the repository, the runs and the data set; in a locale that knows ASCII alone."""
    root = tmp_path / "My Späße $(touch PWNED)"
    for part in ("kmex_utils", "notebooks", "benchmarks"):
        shutil.copytree(paths.ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(paths.ROOT / "Snakefile", root)
    config = configuration(root, {"folder": "nothing here"}, "my digits")
    environment = {**os.environ, "PYTHONPATH": str(root), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-m", "kmex_utils", "batch", config, "--runs", "2024_11", "--cores", "1"]
    target = "2024_11/my digits/seed-0/training.json"
    done = subprocess.run([*command, target], cwd=root, env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    notebook = root / "2024_11" / "my digits" / "seed-0" / "notebooks" / "01_train.ipynb"
    assert done.returncode == 1 and re.search(r"/my digits/.*, cell \[\d+\]: ValueError: .*nothing here", last), last
    assert notebook.is_file() and not list(tmp_path.rglob("PWNED"))


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
    trained = (run / "notebooks" / "01_train.ipynb").read_text()  # which passed all images twice
    assert "embeddings" in trained and "widget" not in trained and "0%|" not in trained, "bars are of a live page"
