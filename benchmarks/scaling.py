"""What the engine costs on this machine: fits and explanations against the naive route and other libraries.

    python benchmarks/scaling.py --out figures/scaling

writes ``fit.csv``, ``explain.csv``, ``stream.csv`` and ``machine.md``. What it compares with is the extra `compare`:
pip install 'kmex-utils[compare]'. Every way of fitting runs in a process of its own, so that peak memory is its own and
libraries that bring their own OpenMP do not meet; the ways take turns, and medians are quoted.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from kmex_utils import hardware, paths
from kmex_utils.data import load, own_input
from kmex_utils.method.attribution import attribution, carried
from kmex_utils.method.composite import Normalisation, composite
from kmex_utils.method.explainers import EncoderKMeans
from kmex_utils.method.kmeans import Clusters, kmeans
from kmex_utils.method.operator import CompositeRows
from kmex_utils.method.prototypes import Prototypes
from kmex_utils.networks import Network, for_training
from kmex_utils.store import save_text

SIZE = 224  # pixels, as CUB-200 enters the paper's ResNet34
CHANNELS, STRIDES = (64, 128, 256, 512), (4, 8, 16, 32)  # of its blocks
CLASSES = 200


@dataclass(frozen=True)
class Case:
    """One fit: ``images`` of a class, clustered from ``start_block`` on."""

    name: str
    images: int = 30
    start_block: int = 2
    k: int = 10
    restarts: int = 10

    @property
    def size(self) -> dict[str, int]:
        """Rows and channels of the composite."""
        first = self.start_block - 1
        return {"n_rows": self.images * (SIZE // STRIDES[first]) ** 2, "n_channels": sum(CHANNELS[first:])}


@cache
def network() -> Network:
    """A ResNet34 with random weights whose batch normalisation has seen some digits."""
    classes = [str(c) for c in range(CLASSES)]
    random = for_training("resnet34", classes, "scratch", replace(own_input("mnist-mini"), image_size=SIZE), seed=0)
    for module in random.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        random.train()(digits(32))
    return random.eval().requires_grad_(False)


def digits(count: int, of: int = 3) -> torch.Tensor:
    """The first embedded digits of a kind, [count, 3, 224, 224]."""
    dataset = load("mnist-mini", replace(own_input("mnist-mini"), image_size=SIZE), classes=f"{of},{(of + 1) % 10}")
    index = (dataset.train.labels == dataset.classes.index(str(of))).nonzero().flatten()
    if count > len(index):
        raise ValueError(f"the embedded data has {len(index)} images of a class, fewer than {count}: lower images")
    return dataset.input(dataset.train.pixels[index[:count].numpy()])


# --- fitting ---------------------------------------------------------------------------------------------------


@cache
def blocks(case: Case) -> list[torch.Tensor]:
    """x(b) of a case's images, from its start block on."""
    parts = [network().activations(x)[case.start_block - 1 :] for x in digits(case.images).split(16)]
    return [torch.cat(x) for x in zip(*parts, strict=True)]


def matrix(case: Case) -> np.ndarray:
    """The composite's rows, made image by image so that nothing but the matrix itself is large."""
    rows, channels = case.size.values()
    q = np.empty((case.images, rows // case.images, channels), np.float32)
    for i in range(case.images):
        q[i] = composite([x[i : i + 1] for x in blocks(case)])[0].numpy()
    return q.reshape(rows, channels)


def fit_ours(case: Case, seed: int) -> float:
    """Inertia by this package's engine."""
    return kmeans(CompositeRows(blocks(case), Normalisation()), case.k, restarts=case.restarts, seed=seed).inertia


def fit_sklearn(case: Case, seed: int) -> float:
    """Inertia by the materialised composite and scikit-learn's ``KMeans``."""
    from sklearn.cluster import KMeans

    return KMeans(case.k, n_init=case.restarts, random_state=seed, copy_x=False).fit(matrix(case)).inertia_


def fit_minibatch(case: Case, seed: int) -> float:
    """Inertia by the materialised composite and scikit-learn's ``MiniBatchKMeans``."""
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(case.k, n_init=case.restarts, random_state=seed).fit(matrix(case)).inertia_


def fit_faiss(case: Case, seed: int) -> float:
    """Inertia by the materialised composite and faiss (random starts, 25 iterations, as is its default)."""
    import faiss

    q = matrix(case)
    limits = {"max_points_per_centroid": len(q), "min_points_per_centroid": 1}
    clustering = faiss.Kmeans(q.shape[1], case.k, nredo=case.restarts, seed=seed, **limits)
    clustering.train(q)
    return float(clustering.index.search(q, 1)[0].astype(np.float64).sum())


FITS = {"ours": fit_ours, "sklearn": fit_sklearn, "faiss": fit_faiss, "minibatch": fit_minibatch}


@dataclass(frozen=True)
class Measured:
    """Seconds, peak memory on top of what was there before and of the whole process (MiB), what was returned."""

    seconds: float
    mib: float
    process_mib: float
    value: float


def measure(work: Callable[[], float]) -> Measured:
    """Time and peak memory of one call, memory sampled every two milliseconds."""
    import psutil

    process, peak, done = psutil.Process(), 0, threading.Event()
    psutil.heap_trim()  # memory freed before, but not yet given back, would hide what the call takes
    before = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        start = time.perf_counter()
        value = work()
        seconds = time.perf_counter() - start
    finally:
        done.set()
        watcher.join()
    return Measured(seconds, max(0, peak - before) / 2**20, peak / 2**20, value)


def measured_fit(method: str, case: Case, seed: int) -> Measured:
    """One fit; the activations are given, not part of it."""
    blocks(case)
    return measure(partial(FITS[method], case, seed))


def compare_fits(cases: Sequence[Case], repeats: int, threads: int) -> pd.DataFrame:
    """Each case by each of :data:`FITS`, turn by turn, a new seed each time; medians over ``repeats``.

    The first fit of each is not counted. Inertia is the median over the seeds; memory the median of the peaks.
    """
    rows = []
    with ExitStack() as stack:
        workers = {method: stack.enter_context(process(threads)) for method in FITS}
        for worker, method in zip(workers.values(), FITS, strict=True):
            worker.submit(measured_fit, method, Case("warm-up", 2, 4, 2, 1), 0).result()
        for case in tqdm(cases, "fits", leave=False):
            turns: dict[str, list[Measured]] = {method: [] for method in FITS}
            for seed in range(repeats):
                for method, worker in workers.items():
                    turns[method].append(worker.submit(measured_fit, method, case, seed).result())
            seconds = {method: statistics.median(fit.seconds for fit in fits) for method, fits in turns.items()}
            mib = {method: statistics.median(fit.mib for fit in fits) for method, fits in turns.items()}
            inertia = {method: statistics.median(fit.value for fit in fits) for method, fits in turns.items()}
            rows.append(
                {
                    "case": case.name,
                    **case.size,
                    "k": case.k,
                    "restarts": case.restarts,
                    **{f"{method}_s": seconds[method] for method in ("ours", "sklearn", "faiss")},
                    "sklearn_over_ours": seconds["sklearn"] / seconds["ours"],
                    **{f"{method}_mib": mib[method] for method in ("ours", "sklearn")},
                    **{f"{method}_inertia": inertia[method] for method in ("ours", "sklearn", "faiss")},
                    "minibatch_s": seconds["minibatch"],
                    "minibatch_inertia": inertia["minibatch"],
                }
            )
    return pd.DataFrame(rows)


def process(threads: int) -> ProcessPoolExecutor:
    """A fresh process with so many threads."""
    return ProcessPoolExecutor(1, get_context("spawn"), set_threads, (threads,))


def set_threads(threads: int) -> None:
    """CPU threads of PyTorch and of every other library; 0: as the environment says."""
    hardware.set_threads(threads)
    if threads:
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)


# --- explaining ------------------------------------------------------------------------------------------------


def explainers(x: Sequence[torch.Tensor], prototypes: int, classes: int) -> dict[int, EncoderKMeans]:
    """B4, B34 and B234 with prototypes drawn from the rows of some activations."""
    by_block = {}
    for b in (4, 3, 2):
        rows = CompositeRows(x[b - 1 :], Normalisation())
        index = torch.randint(len(rows), (prototypes,), generator=torch.Generator().manual_seed(b))
        vectors = rows.rows(index) * (1 + 0.01 * torch.randn(prototypes, 1, generator=torch.Generator().manual_seed(0)))
        labels = torch.arange(prototypes) * classes // prototypes
        unknown = torch.zeros(prototypes, dtype=torch.int64)
        drawn = Prototypes(vectors, labels, unknown, unknown, unknown, torch.zeros(classes))
        by_block[b] = EncoderKMeans(drawn, classes, b, Normalisation())
    return by_block


def attributions(
    x: Sequence[torch.Tensor], c_j: torch.Tensor, by_block: dict[int, EncoderKMeans]
) -> dict[int, torch.Tensor]:
    """The attributions of a batch by start block, for the columns c_j [N, D]."""
    maps = {b: explainer.sim(explainer.h(x)) for b, explainer in by_block.items()}
    return carried(attribution(x[-1], c_j), maps)


def naive_map(x: Sequence[torch.Tensor], explainer: EncoderKMeans) -> torch.Tensor:
    """The explanation map by the materialised composite, image by image."""
    p = explainer.prototypes.vectors
    half = p.square().sum(1) / 2
    images = [[part[i : i + 1] for part in x[explainer.start_block - 1 :]] for i in range(len(x[0]))]
    return torch.stack([(composite(part)[0] @ p.T - half).argmax(1) for part in images])


def compare_explanations(images: int, prototypes: int, repeats: int, threads: int, steps: int) -> pd.DataFrame:
    """Explaining a batch against the bare forward pass, turn by turn; medians.

    ``cub-b234`` is B4, B34, B234 and the attribution through them, for all ``prototypes``. ``over_forward`` of ours
    and naive is what they take on top of a forward pass; captum's methods run their own passes, counted whole.
    """
    from captum.attr import IntegratedGradients, LayerGradCam

    set_threads(threads)
    cnn, batch = network(), digits(images)
    x, y = cnn.outputs(batch)
    target = y.argmax(1)
    by_block = explainers(x, prototypes, len(cnn.c))
    grad_cam = LayerGradCam(cnn, cnn.module.get_submodule(cnn.blocks[-1]))
    integrated = IntegratedGradients(cnn)
    inputs = batch.clone().requires_grad_()
    methods: dict[str, Callable[[], Any]] = {
        "forward": lambda: cnn(batch),
        "ours": lambda: attributions(x, cnn.c[target], by_block),
        "naive": lambda: [naive_map(x, by_block[b]) for b in (4, 3, 2)],
        "grad-cam": lambda: grad_cam.attribute(inputs, target=target),
        "integrated-gradients": lambda: integrated.attribute(
            inputs, target=target, n_steps=steps, internal_batch_size=images
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in tqdm(range(repeats + 1), "explanations", leave=False):  # the first turn is not counted
        for name, method in methods.items():
            if name == "integrated-gradients" and turn > 2:
                continue  # minutes, and steady
            start = time.perf_counter()
            method()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    table = pd.DataFrame({"case": "cub-b234", "method": list(methods)})
    medians = np.array([statistics.median(values) for values in seconds.values()])
    return table.assign(seconds_per_image=medians / images, over_forward=medians / medians[0])


# --- more rows than fit in memory ------------------------------------------------------------------------------


def synthetic(images: int, rank: int = 16) -> Callable[[int, int], list[torch.Tensor]]:
    """Made-up activations of B2, B3 and B4, computed anew from (seed, image) whenever they are read."""
    shapes = [(channels, SIZE // stride) for channels, stride in zip(CHANNELS[1:], STRIDES[1:], strict=True)]
    generator = torch.Generator().manual_seed(0)
    mixes = [torch.randn(rank, channels, generator=generator) for channels, _ in shapes]
    means = torch.randn(10, rank, generator=generator)

    def read(start: int, stop: int) -> list[torch.Tensor]:
        if stop > images:
            raise IndexError(f"there are {images} images, not {stop}")
        parts: list[list[torch.Tensor]] = [[] for _ in shapes]
        for i in range(start, stop):
            generator = torch.Generator().manual_seed(i)
            for part, mix, (channels, size) in zip(parts, mixes, shapes, strict=True):
                concept = means[torch.randint(len(means), (size * size,), generator=generator)]
                code = concept + 0.5 * torch.randn(size * size, rank, generator=generator)
                part.append((code @ mix).relu_().view(size, size, channels).permute(2, 0, 1))
        return [torch.stack(part) for part in parts]

    return read


def stream_once(images: int, k: int = 10, iterations: int = 5) -> dict[str, float]:
    """Cluster the rows of made-up images that are never in memory."""
    read, images_read = synthetic(images), 0

    def counted(start: int, stop: int) -> list[torch.Tensor]:
        nonlocal images_read
        images_read += (stop - start) if stop - start > 1 else 0  # single images are k-means++'s draws
        return read(start, stop)

    rows = CompositeRows(counted, Normalisation(), images=images, keep=False)
    fits: list[Clusters] = []

    def work() -> float:
        fits.append(kmeans(rows, k, restarts=1, max_iterations=iterations, tolerance=0))
        return fits[0].inertia

    measured = measure(work)
    passes = round(images_read / images)
    return {
        "n_rows": len(rows),
        "n_channels": rows.dim,
        "k": k,
        "iterations": fits[0].iterations,
        "passes": passes,
        "seconds": measured.seconds,
        "seconds_per_pass_and_million_rows": measured.seconds / passes / len(rows) * 1e6,
        "process_peak_mib": measured.process_mib,
        "inertia_per_row": fits[0].inertia / len(rows),
    }


def stream(n_rows: Sequence[int], threads: int) -> Iterator[dict[str, float]]:
    """About ``n_rows`` made-up composite rows, each number in a process of its own.

    ``process_peak_mib`` is all of that process, PyTorch included; time counts every pass over the rows, with what it
    takes to make them.
    """
    rows_per_image = (SIZE // STRIDES[1]) ** 2
    for n in tqdm(n_rows, "streams", leave=False):
        with process(threads) as worker:
            yield worker.submit(stream_once, -(-n // rows_per_image)).result()


# --- the command -----------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = {"type": int, "nargs": "*"}
    parser.add_argument("--out", type=Path, default=Path("figures/scaling"), help="folder of the tables")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every fit")
    parser.add_argument("--class-images", type=int, default=30, help="of the class that the other cases vary")
    parser.add_argument("--images", default=[10, 90], help="of a class, beside that", **numbers)
    parser.add_argument("--prototypes-per-class", default=[5, 20], help="K/C, beside 10", **numbers)
    parser.add_argument("--start-blocks", default=[4, 3], help="beside 2 (B234)", **numbers)
    parser.add_argument("--restarts", type=int, default=10, help="of k-means")
    parser.add_argument("--batch", type=int, default=8, help="images explained at a time")
    parser.add_argument("--prototypes", type=int, default=2000, help="of all classes (CUB-200: 200 times 10)")
    parser.add_argument("--explanation-repeats", type=int, default=7, help="turns of every explanation")
    parser.add_argument("--gradient-steps", type=int, default=50, help="of Integrated Gradients")
    parser.add_argument("--stream-rows", default=[100_000, 1_000_000], help="rows never in memory", **numbers)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as the environment says")
    given = parser.parse_args()
    missing = [module for module in ("captum", "faiss", "psutil", "sklearn") if find_spec(module) is None]
    if missing:
        sys.exit(f"{', '.join(missing)} not installed: pip install 'kmex-utils[compare]'")
    out, threads = paths.resolve(given.out), given.threads
    machine = f"{hardware.machine()}, {hardware.set_threads(threads)} threads"
    base = Case("cub-class", given.class_images, restarts=given.restarts)
    cases = [base]
    cases += [replace(base, name=f"{n} images", images=n) for n in given.images]
    cases += [replace(base, name=f"K = {k}", k=k) for k in given.prototypes_per_class]
    cases += [replace(base, name=f"from B{b}", start_block=b) for b in given.start_blocks]
    try:
        fits = compare_fits(cases, given.repeats, threads)
        save_table(fits, out / "fit.csv")
        options = (given.batch, given.prototypes, given.explanation_repeats, threads, given.gradient_steps)
        save_table(compare_explanations(*options), out / "explain.csv")
        streams = pd.DataFrame(stream(given.stream_rows, threads))
        save_table(streams, out / "stream.csv")
    except ValueError as error:
        sys.exit(str(error))
    words = f"Measured on {machine}.\n"
    save_text(out / "machine.md", words)
    print(words, end="")


def save_table(table: pd.DataFrame, path: Path) -> None:
    """As CSV, numbers to five digits."""
    save_text(path, table.to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main()
