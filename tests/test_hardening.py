"""Kills and full disks at random moments: what comes out is what an uninterrupted run leaves, to the last bit.

``KMEX_HARDENING`` is how often the batch is killed, the export is killed, and the disk is full: ``make hardening``
takes 50, 20 and 10, the suite 2, 1 and 1. The moments are drawn from the time that an uninterrupted run takes.
"""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

import kmex_utils as kmex
from kmex_utils import data, paths, store

KILLS, EXPORTS, DISKS = map(int, os.environ.get("KMEX_HARDENING", "2 1 1").split())
KINDS = ["command", "kernel", "SIGTERM", "groups", "SIGINT"]
SMALLEST = {"image_size": 32, "images_per_class": 6, "classes": "0,1", "arch": "shufflenet_v2_x0_5", "epochs": 2}
SMALLEST |= {"batch_size": 4, "precision": "float32", "restarts": 1, "prototypes_per_class": 1, "joint_epochs": 1}
PRODUCT = "figures/mnist-mini/table1.csv" if KILLS >= 50 else "runs/mnist-mini/seed-0/results-train.json"
pytestmark = pytest.mark.hardening


def started(*command, limit=0):
    """The command in a group of its own; ``limit`` (bytes): no file grows beyond it, as on a full disk."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "kmex_utils", *map(str, command)],
        cwd=paths.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=limited if limit else None,
    )


def batch(folder, **more):
    config = folder.parent / "config.yaml"
    config.write_text(yaml.safe_dump({"datasets": {"mnist-mini": SMALLEST}, "seeds": [0], "threads": 1}))
    where = ["--runs", folder / "runs", "--figures", folder / "figures", "--cores", "1"]
    return started("batch", config, *where, folder / PRODUCT, **more)


def kill(process, kind):
    """Kill what ``kind`` names and wait for all that the command started to end; returns what it printed."""
    family = psutil.Process(process.pid).children(recursive=True)
    if kind == "kernel":
        while process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            kernels = [child for child in family if "ipykernel_launcher" in " ".join(commandline(child))]
            if kernels:
                kernels[0].kill()
                break
            time.sleep(0.1)
    elif kind == "groups":
        for group in {process.pid, *(os.getpgid(child.pid) for child in family if child.is_running())}:
            os.killpg(group, signal.SIGKILL)
    else:
        process.send_signal(signal.SIGKILL if kind == "command" else getattr(signal, kind))
    text, _ = process.communicate(timeout=None if kind == "kernel" else 60)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, f"{kind}: {[commandline(child) for child in alive]} outlived the command"
    return text


def commandline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def same(whole, cut):
    """Tensors and tables are equal, file by file; nothing temporary is left."""
    files = {path.relative_to(whole) for path in whole.rglob("*") if path.suffix in (".safetensors", ".csv", ".json")}
    assert files == {
        path.relative_to(cut) for path in cut.rglob("*") if path.suffix in (".safetensors", ".csv", ".json")
    }
    for file in files:
        if file.suffix == ".safetensors":
            ours, theirs = (store.load_tensors(root / file)[0] for root in (cut, whole))
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours), file
        elif file.suffix == ".csv":
            assert (cut / file).read_bytes() == (whole / file).read_bytes()
        elif file.name.startswith("results-"):
            assert store.load_json(cut / file)["records"] == store.load_json(whole / file)["records"]
    left = [path for path in cut.rglob(".*") if store.TEMPORARY.fullmatch(path.name)]
    assert not left and not list(cut.rglob("training*.safetensors"))


def test_a_batch_that_is_killed_or_finds_no_room_loses_nothing(tmp_path):
    generator, begun = random.Random(0), time.monotonic()
    events = [KINDS[i % len(KINDS)] for i in range(KILLS)] + ["disk"] * DISKS
    generator.shuffle(events)
    whole, counted = tmp_path / "whole", Counter()
    process = batch(whole)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    takes, rounds = time.monotonic() - begun, 0
    while events:
        cut, rounds = tmp_path / f"cut{rounds}", rounds + 1
        while True:
            kind = events[-1] if events else "none"
            process = batch(cut, limit=int(10 ** generator.uniform(4.5, 6)) if kind == "disk" else 0)
            moment = generator.uniform(0, takes) if kind not in ("none", "disk") else None
            try:
                text, _ = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                text = kill(process, kind)
            if process.returncode == 0:
                break
            assert kind != "none", text
            counted[events.pop()] += 1
            last = text.rstrip().splitlines()[-1] if text.strip() else ""
            if kind == "kernel":
                assert re.match(r"FAILED .*ipynb, cell \[\d+\]: (KernelDied: .* memory ran out|it was ended)", last), (
                    text
                )
            elif kind == "disk":
                assert last.startswith(("FAILED ", "error: ")), text
            elif kind.startswith("SIG"):
                assert not last or last.startswith(("stopped (", "KeyboardInterrupt")), text
        same(whole, cut)
        shutil.rmtree(cut)
    print(f"\nbatch: {dict(counted)} in {rounds} rounds, {(time.monotonic() - begun) / 60:.1f} minutes")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small explanation, and a folder of images for it."""
    root = tmp_path_factory.mktemp("export")
    digits = data.load("mnist-mini", images_per_class=20, classes="0,1", log=lambda line: None)
    for i in range(len(digits.train)):
        (root / "images").mkdir(exist_ok=True)
        Image.fromarray(digits.train.rgb(i)).save(root / "images" / f"{i:03d}.png")
        (root / "by class" / str(int(digits.train.labels[i]))).mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.train.rgb(i)).save(root / "by class" / str(int(digits.train.labels[i])) / f"{i}.png")
    how = {"prototypes_per_class": 2, "restarts": 1, "start_block": 4}
    network = kmex.network("shufflenet_v2_x0_5", weights="random", image_size=64)
    kmex.explain(network, root / "by class", device="cpu", **how).save(root / "explained")
    return root


def exported(folder):
    maps = {path.name: dict(np.load(path)) for path in folder.glob("maps/*.npz")}
    return {table: pq.read_table(folder / f"{table}.parquet") for table in ("images", "segments")}, maps


def test_an_export_that_is_killed_or_finds_no_room_loses_nothing(saved):
    generator, begun = random.Random(1), time.monotonic()

    def export(out, **more):
        return started("export", saved / "explained", saved / "images", "--out", out, "--resume", **more)

    assert export(saved / "whole").wait() == 0
    takes, events, rounds = time.monotonic() - begun, EXPORTS + DISKS, 0
    tables, maps = exported(saved / "whole")
    while events:
        out, rounds = saved / f"cut{rounds}", rounds + 1
        while True:
            limited = 0 < events <= DISKS
            process = export(out, limit=int(10 ** generator.uniform(1, 4)) if limited else 0)
            try:
                text, _ = process.communicate(timeout=generator.uniform(0, takes) if events and not limited else None)
            except subprocess.TimeoutExpired:
                process.kill()
                text, _ = process.communicate()
            if process.returncode == 0:
                break
            assert events, text
            assert not limited or (process.returncode == 2 and text.rstrip().splitlines()[-1].startswith("error: ")), (
                text
            )
            events -= 1
        ours, our_maps = exported(out)
        assert ours == tables and our_maps.keys() == maps.keys()
        for name in maps:
            assert all(np.array_equal(our_maps[name][key], value) for key, value in maps[name].items())
        assert not [path for path in out.rglob(".*") if store.TEMPORARY.fullmatch(path.name)]
        shutil.rmtree(out)
    minutes = (time.monotonic() - begun) / 60
    print(f"\nexport: {EXPORTS} kills, {DISKS} full disks in {rounds} rounds, {minutes:.1f} minutes")
