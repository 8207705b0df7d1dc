"""What a batch will take, before it starts: ``kmex estimate config/paper.yaml``.

Where runs of a data set have recorded what a step took by these settings, that is its time. Else it is extrapolated
from a few training steps and forward passes on random input, measured on this machine beside whatever else it does.
Clustering is then a rough figure: forty iterations of each restart, at the FLOP/s of the forward pass. Left out are
downloading and decoding, notebook 2 and those that draw, minutes each at most. A stage counts as finished where its
result is there and of these settings; Snakemake also makes anew what changed code has outdated.
"""

import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from .. import data, hardware, networks, paths
from ..networks import catalogue
from ..parameters import whole
from ..training.protopnet import OPTIONS, Options
from ..training.recipe import recipe
from .batch import TAKES, configuration

DOWNLOADS = {  # a file that is there once it is unpacked, and bytes with the archive
    "mnist": ("MNIST/raw/train-images-idx3-ubyte", 67e6),
    "stl10": ("stl10_binary/train_X.bin", 5.7e9),
    "cub200": ("CUB_200_2011/images.txt", 2.35e9),
}
ITERATIONS = 40  # of k-means
OF_A_RUN = ("dataset", "seed", "threads", "runs")  # parameters that no entry sets
MEASURED = 3.0  # seconds of steps and of passes at most; one may take longer

Chosen = Mapping[str, Any]  # a data set's entry in the configuration; 0 and "" stand for what is not set


class Pace(NamedTuple):
    """Seconds an image takes in a training step and in a float32 forward pass, and what the network is."""

    train: float
    forward: float
    flop: float  # of a forward pass
    blocks: list[tuple[int, int]]  # channels and positions of B1 …
    values: int  # in its state


def measure(chosen: Chosen, image_size: int, batch_size: int) -> Pace:
    """Time a network for a few seconds; on a CPU in batches that shrink as images grow."""
    from torch.utils.flop_counter import FlopCounterMode

    device = hardware.pick_device(chosen.get("device") or "auto")
    if device.type == "cpu":
        batch_size = min(batch_size, max(4, min(64, 16 * 96**2 // image_size**2)))
    taken_in = replace(data.own_input(""), image_size=image_size)
    arch, arch_args = chosen.get("arch") or "resnet34", chosen.get("arch_args")
    network = networks.for_training(arch, ("a", "b"), "scratch", taken_in, arch_args=arch_args).to(device)
    x = torch.randn(batch_size, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.zeros(batch_size, dtype=torch.int64, device=device)
    network.train().requires_grad_(True)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.5)
    dtype = hardware.training_dtype(chosen.get("precision") or "auto", device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = network(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(y.float(), label).backward()
        optimizer.step()

    train = _seconds(step, device) / batch_size
    network.eval()
    with torch.no_grad():
        forward = _seconds(lambda: network(x), device) / batch_size
        with FlopCounterMode(display=False) as counter:
            blocks = [(h.shape[1], h[0, 0].numel()) for h in network.activations(x[:1])]
    values = sum(value.numel() for value in network.state_dict().values())
    return Pace(train, forward, counter.get_total_flops(), blocks, values)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of up to three calls after a first; fewer calls, one at least, where they take long."""
    taken: list[float] = []
    while not taken or (len(taken) < 4 and sum(taken) < MEASURED):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:] or taken)


def images(name: str, chosen: Chosen) -> tuple[int, int, int, int]:
    """Training images, test images and classes of an entry, and pixels of an image."""
    counted = {key: chosen[key] for key in ("classes", "images_per_class", "validation") if chosen.get(key)}
    held_out = chosen.get("held_out", 0.2) if chosen.get("folder") else 0.0  # as notebook 1
    count = data.count(chosen.get("folder") or name, held_out=held_out, **counted)
    return *count, chosen.get("image_size") or data.own_input(name).size[0]


def of_these_settings(run: Path, notebook: str, chosen: Chosen) -> bool:
    """Whether notebook 1 and ``notebook``, as far as they were executed for a run, were given an entry's settings."""
    for name in ("01_train", notebook):
        with suppress(FileNotFoundError, ValueError, KeyError):  # it ran elsewhere, or is being written
            executed = json.loads((run / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))
            took = executed["metadata"]["papermill"]["parameters"]
            given = {key: value for key, value in took.items() if key not in OF_A_RUN}
            if given != {key: chosen[key] for key in TAKES[name] if key in chosen}:
                return False
    return True


def recorded(runs: Path, step: str, notebook: str, chosen: Chosen) -> float:
    """Seconds that a notebook or a shard took in runs of the data set by an entry's settings; 0: not recorded.

    The median; of a training that was continued only the last part is recorded. Notebook 4 counts where it has not just
    gathered shards.
    """
    if step == "04_encoder" and any(runs.glob("seed-*/shards")):
        return 0.0
    of_entry = [run for run in runs.glob("seed-*") if of_these_settings(run, notebook, chosen)]
    seconds = [pd.read_csv(file, sep="\t")["s"].iloc[0] for run in of_entry for file in run.glob(f"cost/{step}.tsv")]
    return float(statistics.median(seconds)) if seconds else 0.0


def stages(name: str, chosen: Chosen, seeds: list[int], runs: Path) -> Iterator[dict[str, Any]]:
    """Rows for notebooks 1, 3, 4 and 5: what the results under ``runs`` leave to do, in seconds and bytes.

    ``jobs`` may run at a time; ``memory``, in bytes, is what one of notebook 4 holds of activations.
    """
    defaults = recipe(name)
    train, test, classes, pixels = images(name, chosen)

    def of(key: str, default: Any) -> Any:
        return chosen.get(key) or default

    def row(step: str, notebook: str, work: str, seconds: float, values: float, **once: float) -> dict[str, Any]:
        """``values`` are float32 on disk for each seed; ``once`` bytes on ``disk`` and in ``memory``, job by job.

        A job takes ``seconds``: a notebook of a run or, of one in shards, ``fit`` or ``maps`` of a shard.
        """
        same = [run for run in folders if of_these_settings(run, notebook, chosen)]
        begun = [run for run in same if not (run / f"results-{notebook[3:]}.json").exists()]
        left = jobs = len(folders) - len(same) + len(begun)
        cost, stage = notebook, step.split()[1]
        if stage in ("fit", "maps"):
            cost = f"shards/{stage}-*-of-{shards}"
            jobs = shards * left - sum(len([*run.glob(f"{cost}.safetensors")]) for run in begun)
        if took := recorded(runs / name, cost, notebook, chosen):
            work, seconds = f"{work}, as recorded", took
        size = left * 4 * values + (jobs and once.get("disk", 0))
        amounts = {"seconds": jobs * seconds, "jobs": jobs, "bytes": size, "memory": jobs and once.get("memory", 0)}
        return {"data": name, "step": step, "work": work, "seeds": f"{left} of {len(seeds)}", **amounts}

    pace = measure(chosen, pixels, of("batch_size", defaults.batch_size))
    both, depth = (train + test) * pace.forward, pace.blocks[-1][0]
    prototypes_per_class, restarts = of("prototypes_per_class", defaults.prototypes_per_class), of("restarts", 10)
    shards, folders = of("shards", 1), [runs / name / f"seed-{seed}" for seed in seeds]

    def fitting(entries: int, prototypes: int) -> float:
        """Seconds for k-means of each class."""
        return 2 * entries * train * prototypes * restarts * ITERATIONS * pace.forward / pace.flop

    def comparing(entries: int, prototypes: int) -> float:
        """Seconds for comparing both splits with all prototypes."""
        return 2 * entries * (train + test) * prototypes * classes * pace.forward / pace.flop

    def clustering(entries: int, prototypes: int) -> float:
        return fitting(entries, prototypes) + comparing(entries, prototypes)

    epochs = of("epochs", defaults.epochs)
    work, seconds = f"{epochs} epochs of {train:,} images, {pixels} px", epochs * train * pace.train + both
    yield row("1 train", "01_train", work, seconds, pace.values + (train + test) * depth)

    choices = sorted({1, 5, defaults.prototypes_per_class})
    seconds = sum(clustering(depth, k) for k in choices)
    yield row("3 KMEx", "03_kmex", f"K/C = {choices}", seconds, classes * sum(choices) * depth)

    starts, store = of("start_blocks", [4, 3, 2]), of("store", "memory")
    entries = [sum(d * positions for d, positions in pace.blocks[b - 1 :]) for b in starts]
    anew = store == "nowhere"  # the network passes again whenever activations are read
    fit = train * pace.forward * (len(starts) * ITERATIONS if anew else 1)
    fit += sum(fitting(n, prototypes_per_class) for n in entries)
    maps = both * (len(starts) if anew else shards > 1)  # kept from the fit where there are no shards
    maps += sum(comparing(n, prototypes_per_class) for n in entries)
    values = classes * prototypes_per_class * sum(d for b in starts for d, _ in pace.blocks[b - 1 :])
    held = max(entries) * (train + test) / shards
    once = {"disk": {"disk": 4, "disk-half": 2}.get(store, 0) * held, "memory": 4 * held * (store == "memory")}
    work = f"start blocks {starts}, K/C = {prototypes_per_class}"
    if shards > 1:
        yield row("4 fit", "04_encoder", f"{work}, {shards} shards", fit / shards, values, **once)
        yield row("4 maps", "04_encoder", f"{train + test:,} images, {shards} shards", maps / shards, 0, **once)
    else:
        yield row("4 encoder", "04_encoder", work, fit + maps + (0 if anew else test * pace.forward), values, **once)

    given = {key: chosen[key] for key in ("push_start", "last_passes") if key in chosen}  # 0 is a value of these
    given |= {k: chosen[k] for k in ("warm_epochs", "joint_epochs", "push_every", "frozen_features") if chosen.get(k)}
    options = replace(OPTIONS.get(name, Options()), **given)
    phases, depth = [phase for phase, *_ in options.plan()], of("prototype_depth", options.depth)
    joint = phases.count("joint")
    passes = 1 + phases.count("push") if options.frozen_features == "once" else len(phases) - joint
    seconds = train * (joint * pace.train + passes * pace.forward) + both + clustering(depth, prototypes_per_class)
    values = classes * prototypes_per_class * (depth * (1 + of("prototype_size", 1) ** 2) + classes)
    values += pace.values + (train + test) * depth
    yield row("5 ProtoPNet", "05_protopnet", f"{joint} joint epochs, {passes} passes", seconds, values)


def to_fetch(name: str, chosen: Chosen) -> Iterator[tuple[Path, str, float]]:
    """What has yet to be downloaded or decoded: a file or pattern, what it is, bytes."""
    kept, folder = paths.resolve(chosen.get("data") or paths.DATA), chosen.get("folder")
    if name in DOWNLOADS and not folder:
        yield kept / DOWNLOADS[name][0], "download", DOWNLOADS[name][1]
    if (folder or name == "cub200") and not chosen.get("stream"):
        train, test, _, pixels = images(name, chosen)
        for split, count in (("train", train), ("validation" if chosen.get("validation") else "test", test)):
            yield kept / "cache" / f"{name}-{split}-{pixels}-*.npy", f"decode {split}", count * 3 * pixels**2
    if "imagenet" in (chosen.get("weights") or recipe(name).weights, chosen.get("features_from")):
        file, bytes_of_file = catalogue.weights_file(chosen.get("arch") or "resnet34")
        yield file, "ImageNet weights", bytes_of_file


def warnings(needs: list[tuple[Path, float]], memory: float) -> Iterator[str]:
    """A line for each disk on which the bytes needed in folders are not free, and one for memory that is not there."""
    import psutil

    disks: dict[int, list[tuple[Path, float]]] = {}
    for folder, needed in needs:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        disks.setdefault(there.stat().st_dev, []).append((there, needed))
    for parts in disks.values():
        free, total = shutil.disk_usage(parts[0][0]).free, sum(needed for _, needed in parts)
        if total > free:
            yield f"WARNING: {_bytes(total)} needed on the disk of {parts[0][0]}, {_bytes(free)} free"
    if memory > (ram := psutil.virtual_memory().total):
        need = f"notebook 4 needs {_bytes(memory)} of memory, this machine has {_bytes(ram)}"
        yield f"WARNING: {need}: set `store: disk-half`"


def plan(config: Mapping[str, Any], runs: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of every data set of a configuration, and warnings."""
    hardware.set_threads(config.get("threads", 0))
    rows, needs = [], dict[Path, float]()
    for name, entry in config["datasets"].items():
        chosen = entry or {}
        steps = list(stages(name, chosen, chosen.get("seeds", config["seeds"]), runs))
        for file, what, needed in to_fetch(name, chosen) if any(step["seconds"] for step in steps) else ():
            if file not in needs and not any(file.parent.glob(file.name)):
                needs[file] = needed
                rows.append({"data": name, "step": what, "bytes": needed})
        rows += steps
    table = pd.DataFrame(rows).fillna({"work": "", "seeds": "", "seconds": 0.0, "jobs": 1, "memory": 0.0})
    results = table.loc[table["seeds"] != "", "bytes"].sum()
    return table, list(warnings([*needs.items(), (runs, results)], table["memory"].max()))


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def show(config: Path, runs: Path, jobs: int = 1) -> None:
    """Print what a batch would take, ``jobs`` at a time on machines like this one, from where its results stand."""
    whole(1, jobs=jobs)
    try:
        table, lines = plan(configuration(config), runs)
    except torch.OutOfMemoryError as error:
        raise ValueError(str(error)) from None
    shown = table[["data", "step", "work", "seeds"]].copy()
    for column, text, unit in (("time", _time, "seconds"), ("disk", _bytes, "bytes"), ("memory", _bytes, "memory")):
        shown[column] = [text(value) if value else "" for value in table[unit]]
    print(shown.to_string(index=False))
    each = table["seconds"] / table["jobs"].clip(1)  # of a step's jobs
    total, disk = _time((each * np.ceil(table["jobs"] / jobs)).sum()), _bytes(table["bytes"].sum())
    how = "one notebook at a time" if jobs == 1 else f"{jobs} jobs at a time"
    print(f"\nAbout {total}, {how}, and {disk} of disk ({hardware.machine()}).", *lines, sep="\n")
