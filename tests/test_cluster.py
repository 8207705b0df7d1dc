"""The rules on a real scheduler: two SLURM nodes on this machine, of which one is lost. `make cluster` runs more."""

import os
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from conftest import small, untrained
from test_batch import TINY, batch, configuration, tables, wait_for

from kmex_utils import data, paths
from kmex_utils.paper.batch import TAKES
from kmex_utils.paper.runs import Run
from kmex_utils.paper.shards import work

WHOLE = bool(os.environ.get("KMEX_CLUSTER"))  # everything to both tables, not just fits
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
SHARDS = 4 if WHOLE else 2
CLUSTER = {**TINY, "classes": "0,1,2,3", "shards": SHARDS}


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A folder with a cluster, and the environment to use it in."""
    if missing := [name for name in NEEDED if not shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")]:
        pytest.skip(f"a SLURM cluster needs Debian's slurmctld, slurmd, slurm-client and munge ({', '.join(missing)})")
    if os.geteuid() != 0:
        pytest.skip("the daemons of the toy cluster run as root")
    folder = tmp_path_factory.mktemp("slurm")
    script = paths.ROOT / "tests" / "toy_cluster.sh"
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}:/usr/sbin"}
    environment["SLURM_CONF"] = str(folder / "slurm.conf")
    started = subprocess.run([script, "start", folder], env=environment, capture_output=True, text=True)
    if started.returncode:  # as in a container that forbids them
        subprocess.run([script, "stop", folder], check=True)
        pytest.skip(
            f"SLURM's daemons do not run here: {(started.stderr.strip() or 'no reason given').splitlines()[-1]}"
        )
    yield folder, environment
    subprocess.run([script, "stop", folder], check=True)


def profile(folder):
    """The repository's, with what this cluster lacks and the waits of a network left out."""
    content = yaml.safe_load((paths.ROOT / "config" / "slurm" / "config.yaml").read_text())
    assert content["slurm-requeue"] and {"shard_fit", "shard_maps", "train"} <= set(content["set-resources"])
    content |= {"jobs": 2, "latency-wait": 5, "slurm-logdir": str(folder / "logs")}
    content |= {"slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 3}
    content["default-resources"] = {"mem_mb": 1500, "runtime": 10, "slurm_partition": "main", "slurm_account": "toy"}
    del content["set-resources"]
    (folder / "profile").mkdir()
    (folder / "profile" / "config.yaml").write_text(yaml.safe_dump(content))
    return folder / "profile"


@pytest.fixture
def trained(tmp_path):
    """Two folders of runs with one network, which is not trained, and what notebook 4 is to do with it."""
    images = data.load("mnist-mini", small(), images_per_class=20, classes="0,1,2,3")
    network = untrained(images, seed=2)
    runs = [Run.of(tmp_path / place / "runs", "mnist-mini", 0) for place in ("here", "there")]
    for run in runs:
        run.save_training(network, images, {"data": images.settings, "prototypes_per_class": 5})
    return runs


@pytest.mark.batch
def test_a_lost_node_changes_nothing(nodes, tmp_path, request):
    """Nor does a command that is ended: its jobs go with it. What comes out is what one process here computes."""
    cluster, environment = nodes
    here, there = tmp_path / "here", tmp_path / "there"
    run = there / "runs" / "mnist-mini" / "seed-0"
    if WHOLE:
        for folder in (here, there):
            folder.mkdir()
        wanted = [f"mnist-mini/table{i}.csv" for i in (1, 2)]
        config = configuration(here, {**CLUSTER, "shards": 1})
        done = batch(here, config, *(str(here / "figures" / name) for name in wanted), "--cores", "2")
        assert done.returncode == 0, done.stdout
        targets = [str(there / "figures" / name) for name in wanted]
        compared = ["results-encoder.json", "B4.safetensors", "B34.safetensors", "B234.safetensors"]
    else:
        request.getfixturevalue("trained")
        compared = [f"shards/fit-{number}-of-{SHARDS}.safetensors" for number in range(1, SHARDS + 1)]
        given = {name: CLUSTER[name] for name in TAKES["04_encoder"] if name in CLUSTER}
        for number in range(1, SHARDS + 1):
            work("fit", number, {**given, "dataset": "mnist-mini", "seed": 0, "threads": 1, "runs": str(here / "runs")})
        targets = [str(run / name) for name in compared]

    def running():
        ask = ["squeue", "-h", "-t", "R", "-o", "%A %N"]
        lines = subprocess.check_output(ask, env=environment, text=True).splitlines()
        return [tuple(line.split()) for line in lines if "node" in line]

    config = configuration(there, CLUSTER, gpu=0)
    how = {"start": subprocess.Popen, "env": environment}
    command = [*targets, "--profile", str(profile(there))]
    stopped = batch(there, config, *command, **how)
    wait_for(running, stopped)
    stopped.send_signal(signal.SIGTERM)
    said, _ = stopped.communicate(timeout=120)
    assert "stopped (SIGTERM)" in said, said
    time.sleep(5)  # KillWait of the toy cluster
    assert not subprocess.check_output(["squeue", "-h"], env=environment, text=True)

    log = run / "shards" / f"fit-1-of-{SHARDS}.log"
    log.unlink(missing_ok=True)
    sent = batch(there, config, *command, **how)
    wait_for(lambda: log.exists() and running(), sent)  # at work
    job, node = running()[0]
    script = paths.ROOT / "tests" / "toy_cluster.sh"
    subprocess.run([script, "lose", cluster, node.removeprefix("node")], env=environment, check=True)
    said, _ = sent.communicate(timeout=560)
    assert sent.returncode == 0, said
    shown = subprocess.check_output(["scontrol", "show", "job", job], env=environment, text=True)
    assert "Restarts=1" in shown and f"NodeList={'node2' if node == 'node1' else 'node1'}" in shown, shown
    for file in compared:
        assert (run / file).read_bytes() == (here / "runs" / "mnist-mini" / "seed-0" / file).read_bytes(), file
    if WHOLE:
        for ours, expected in zip(tables(there), tables(here), strict=True):
            assert ours.equals(expected)
