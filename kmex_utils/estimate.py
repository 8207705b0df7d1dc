"""What a batch will take, before it starts: ``python -m kmex_utils.estimate config/paper.yaml``.

Time is extrapolated from a few training steps and forward passes on random input, measured on this machine beside
whatever else it does. Clustering is a rough figure: forty iterations of each restart, at the FLOP/s of the forward
pass. Left out are downloading and decoding, notebook 2 and those that draw, minutes each at most. A stage with a
result counts as finished; Snakemake also makes anew what other parameters or changed code have outdated.
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from . import datasets, hardware, paths
from .architectures import build, weights_file
from .protopnet import OPTIONS, Options

IMAGES = {"mnist-mini": (2_500, 1_500), "mnist": (60_000, 10_000), "stl10": (5_000, 8_000), "cub200": (5_994, 5_794)}
DOWNLOADS = {  # a file that is there once it is unpacked, and bytes with the archive
    "mnist": ("MNIST/raw/train-images-idx3-ubyte", 67e6),
    "stl10": ("stl10_binary/train_X.bin", 5.7e9),
    "cub200": ("CUB_200_2011/images.txt", 2.35e9),
}
ITERATIONS = 40  # of k-means


class Pace(NamedTuple):
    """Seconds an image takes in a training step and in a float32 forward pass, and what the network is."""

    train: float
    forward: float
    flop: float  # of a forward pass
    blocks: list[tuple[int, int]]  # channels and positions of B1 …
    values: int  # in its state


@cache
def measure(arch: str, image_size: int, batch_size: int, precision: str, device: torch.device) -> Pace:
    """Time a network for a few seconds; on a CPU in batches that shrink as images grow."""
    from torch.utils.flop_counter import FlopCounterMode

    if device.type == "cpu":
        batch_size = min(batch_size, max(4, min(64, 16 * 96**2 // image_size**2)))
    network = build(arch).to(device)
    x = torch.randn(batch_size, 3, image_size, image_size, device=device).contiguous(memory_format=torch.channels_last)
    label = torch.zeros(batch_size, dtype=torch.int64, device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.5)
    dtype = hardware.training_dtype(precision, device)

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            y = network(x)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(y.float(), label).backward()
        optimizer.step()

    train = _seconds(step, device) / batch_size
    with torch.no_grad():
        forward = _seconds(lambda: network.eval()(x), device) / batch_size
        with FlopCounterMode(display=False) as counter:
            blocks = [(h.shape[1], h[0, 0].numel()) for h in network.activations(x[:1])]
    values = sum(value.numel() for value in network.state_dict().values())
    return Pace(train, forward, counter.get_total_flops(), blocks, values)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The median of up to three calls after a first; fewer calls, one at least, where they take long."""
    taken: list[float] = []
    while not taken or (len(taken) < 4 and sum(taken) < 3):
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:] or taken)


def count(name: str, chosen: dict) -> tuple[int, int, int]:
    """Training images, test images and classes that a configuration's entry leaves; nothing is decoded.

    Which images of STL-10 or CUB-200 ``classes`` keeps is not known before the download: all are counted.

    Raises
    ------
    ValueError, FileNotFoundError
        An unknown name, or what :func:`kmex_utils.datasets.load` refuses.
    """
    if folder := chosen.get("folder"):
        source = datasets._folder(paths.resolve(folder))
    elif name in IMAGES:
        labels = [np.arange(n) % (200 if name == "cub200" else 10) for n in IMAGES[name]]
        names = tuple(map(str, np.unique(labels[0])))
        source = datasets._Source(names, *(datasets._Bytes(y, y, tuple(y)) for y in labels))
    else:
        raise ValueError(f"unknown dataset {name!r}: use one of {', '.join(IMAGES)}, or give `folder`")
    keep = datasets.matching(source.classes, chosen.get("classes", "") if folder or "mnist" in name else "")
    first = chosen.get("images_per_class", 0)
    train, test = (datasets._first_per_class(split.only(keep), first) for split in (source.train, source.test))
    if chosen.get("validation"):
        train, test = datasets._held_out(train, chosen["validation"])
    return len(train.labels), len(test.labels), len(keep)


def stages(name: str, chosen: dict, seeds: list[int], runs: Path) -> Iterator[dict]:
    """Rows for notebooks 1, 3, 4 and 5: what the results under ``runs`` leave to do, in seconds and bytes.

    ``memory``, in bytes, is what notebook 4 holds of activations.
    """
    recipe = datasets.RECIPES.get(name, datasets.RECIPES["folder"])
    train, test, classes = count(name, chosen)
    of = lambda key, default: chosen.get(key) or default  # noqa: E731
    size, batch_size = of("image_size", recipe.image_size), of("batch_size", recipe.batch_size)
    device = hardware.pick_device(of("device", "auto"))
    pace = measure(of("arch", "resnet34"), size, batch_size, of("precision", "auto"), device)
    both, depth = (train + test) * pace.forward, pace.blocks[-1][0]
    per_class, restarts = of("prototypes_per_class", recipe.prototypes_per_class), of("restarts", 10)

    def row(notebook: str, result: str, work: str, seconds: float, values: float, once=0.0, memory=0.0) -> dict:
        done = [(runs / name / f"seed-{seed}" / f"results-{result}.json").exists() for seed in seeds]
        left = len(seeds) - sum(done)
        amounts = {"seconds": left * seconds, "bytes": left * 4 * values + (left and once), "memory": left and memory}
        return {"data": name, "step": notebook, "work": work, "seeds": f"{left} of {len(seeds)}", **amounts}

    def clustering(entries: int, k: int) -> float:
        """Seconds for k-means of each class and for comparing both splits with all prototypes."""
        products = train * k * restarts * ITERATIONS + (train + test) * k * classes
        return 2 * entries * products * pace.forward / pace.flop

    epochs = of("epochs", recipe.epochs)
    work, seconds = f"{epochs} epochs of {train:,} images, {size} px", epochs * train * pace.train + both
    yield row("1 train", "train", work, seconds, pace.values + (train + test) * depth)

    choices = sorted({1, 5, recipe.prototypes_per_class})
    seconds = sum(clustering(depth, k) for k in choices)
    yield row("3 KMEx", "kmex", f"K/C = {choices}", seconds, classes * sum(choices) * depth)

    starts, where = of("start_blocks", [4, 3, 2]), of("activations_in", "memory")
    entries = [sum(d * positions for d, positions in pace.blocks[b - 1 :]) for b in starts]
    passes = len(starts) * (ITERATIONS + 1) if where == "nowhere" else 1
    seconds = passes * both + sum(clustering(n, per_class) for n in entries)
    values = classes * per_class * sum(d for b in starts for d, _ in pace.blocks[b - 1 :])
    disk = {"disk": 4, "disk-half": 2}.get(where, 0) * max(entries) * (train + test)
    memory = 4 * max(entries) * (train + test) * (where == "memory")
    work = f"start blocks {starts}, K/C = {per_class}"
    yield row("4 encoder", "encoder", work, seconds, values, disk, memory)

    given = {key: chosen[key] for key in ("push_start", "last_passes") if key in chosen}  # may be 0; below, 0 is unset
    given |= {k: chosen[k] for k in ("warm_epochs", "joint_epochs", "push_every", "frozen_features") if chosen.get(k)}
    options = replace(OPTIONS.get(name, Options()), **given)
    phases, depth = [phase for phase, *_ in options.plan()], of("prototype_depth", options.depth)
    joint = phases.count("joint")
    passes = 1 + phases.count("push") if options.frozen_features == "once" else len(phases) - joint
    seconds = train * (joint * pace.train + passes * pace.forward) + both + clustering(depth, per_class)
    values = classes * per_class * (depth * (1 + of("prototype_size", 1) ** 2) + classes)
    work = f"{joint} joint epochs, {passes} passes"
    yield row("5 ProtoPNet", "protopnet", work, seconds, pace.values + values + (train + test) * depth)


def to_fetch(name: str, chosen: dict) -> Iterator[tuple[Path, str, float]]:
    """What has yet to be downloaded or decoded: a file or pattern, what it is, bytes."""
    recipe = datasets.RECIPES.get(name, datasets.RECIPES["folder"])
    data, folder = paths.resolve(chosen.get("data", paths.DATA)), chosen.get("folder")
    if name in DOWNLOADS and not folder:
        yield data / DOWNLOADS[name][0], "download", DOWNLOADS[name][1]
    size, (train, test, _) = chosen.get("image_size") or recipe.image_size, count(name, chosen)
    held_out = "validation" if chosen.get("validation") else "test"
    for split, images in (("train", train), (held_out, test)) if folder or name == "cub200" else ():
        yield data / "cache" / f"{name}-{split}-{size}-*.npy", f"decode {split}", images * 3 * size**2
    if "imagenet" in (chosen.get("weights") or recipe.weights, chosen.get("features_from")):
        file, size = weights_file(chosen.get("arch") or "resnet34")
        yield file, "ImageNet weights", size


def warnings(needs: list[tuple[Path, float]], memory: float) -> Iterator[str]:
    """A line for each disk on which the bytes needed in folders are not free, and one for memory that is not there."""
    import psutil

    disks: dict[int, list[tuple[Path, float]]] = {}
    for folder, size in needs:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        disks.setdefault(there.stat().st_dev, []).append((there, size))
    for parts in disks.values():
        free, needed = shutil.disk_usage(parts[0][0]).free, sum(size for _, size in parts)
        if needed > free:
            yield f"WARNING: {_bytes(needed)} needed on the disk of {parts[0][0]}, {_bytes(free)} free"
    if memory > (ram := psutil.virtual_memory().total):
        need = f"notebook 4 needs {_bytes(memory)} of memory, this machine has {_bytes(ram)}"
        yield f"WARNING: {need}: set `activations_in: disk-half`"


def plan(config: dict, runs: Path) -> tuple[pd.DataFrame, list[str]]:
    """The rows of every data set, and warnings; ``config`` as Snakemake reads it."""
    if not isinstance(config.get("datasets"), dict) or not isinstance(config.get("seeds"), list):
        raise ValueError("the configuration needs `datasets`, each a name with its parameters, and a list of `seeds`")
    hardware.set_threads(config.get("threads", 0))
    rows, needs = [], {}
    for name, chosen in config["datasets"].items():
        chosen = chosen or {}
        steps = list(stages(name, chosen, chosen.get("seeds", config["seeds"]), runs))
        for file, what, size in to_fetch(name, chosen) if any(step["seconds"] for step in steps) else ():
            if file not in needs and not any(file.parent.glob(file.name)):
                needs[file] = size
                rows.append({"data": name, "step": what, "bytes": size})
        rows += steps
    table = pd.DataFrame(rows).fillna({"work": "", "seeds": "", "seconds": 0.0, "memory": 0.0})
    results = table.loc[table["seeds"] != "", "bytes"].sum()
    return table, list(warnings([*needs.items(), (runs, results)], table["memory"].max()))


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    """Print what a batch would take on this machine, from where its results stand. Returns the exit status."""
    from snakemake.common.configfile import load_configfile
    from snakemake.exceptions import WorkflowError

    parser = argparse.ArgumentParser(prog="python -m kmex_utils.estimate", description=main.__doc__)
    parser.add_argument("config", type=Path, help="config/quick.yaml, config/paper.yaml or your own")
    parser.add_argument("--runs", type=Path, default=paths.RUNS, help="folder of results (default: runs)")
    options = parser.parse_args(arguments)
    if not options.config.is_file():
        parser.error(f"{options.config} does not exist")
    try:
        table, lines = plan(load_configfile(options.config), options.runs.resolve())
    except (ValueError, OSError, ImportError, WorkflowError, torch.OutOfMemoryError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return 2
    shown = table[["data", "step", "work", "seeds"]].copy()
    for column, text, unit in (("time", _time, "seconds"), ("disk", _bytes, "bytes"), ("memory", _bytes, "memory")):
        shown[column] = [text(value) if value else "" for value in table[unit]]
    print(shown.to_markdown(index=False, disable_numparse=True))
    total, disk = _time(table["seconds"].sum()), _bytes(table["bytes"].sum())
    print(f"\nAbout {total}, one notebook at a time, and {disk} of disk ({hardware.machine()}).", *lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
