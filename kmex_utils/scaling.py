"""What the engine costs: fits and explanations against the naive route and other libraries, on the reader's machine.

Every way of fitting runs in a process of its own, so that peak memory is its own and libraries that bring their own
OpenMP do not meet; the ways take turns, and medians are quoted.
"""

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context

import numpy as np
import pandas as pd
import torch

from . import hardware
from .attribution import attributions
from .backbones import Backbone, resnet
from .composite import CompositeRows, Normalisation, composite
from .datasets import load
from .explainers import EncoderKMeans
from .kmeans import Clusters, Prototypes, kmeans


@dataclass(frozen=True)
class Case:
    """One fit: ``images`` of a class at 224 px, clustered from ``start_block`` on."""

    name: str
    images: int = 30
    start_block: int = 2
    k: int = 10
    restarts: int = 10


@cache
def backbone() -> Backbone:
    """A ResNet34 with random weights whose batch normalisation has seen some digits."""
    network = resnet("resnet34", 200, "scratch", seed=0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(digits(32))
    return network.eval().requires_grad_(False)


def digits(count: int, of: int = 3) -> torch.Tensor:
    """The first embedded digits of a kind at 224 px, [count, 3, 224, 224]."""
    data = load("mnist-mini", image_size=224)
    index = (data.train.labels == of).nonzero().flatten()
    if count > len(index):
        raise ValueError(f"the embedded data has {len(index)} images of a class, fewer than {count}: lower images")
    return data.normalise(data.train.pixels[index[:count].numpy()])


@cache
def _blocks(case: Case) -> list[torch.Tensor]:
    return [
        torch.cat(x)
        for x in zip(
            *(backbone().activations(x)[case.start_block - 1 :] for x in digits(case.images).split(16)), strict=True
        )
    ]


def _matrix(case: Case) -> np.ndarray:
    """The composite's rows, made image by image so that nothing but the matrix itself is large."""
    size = _size(case)
    q = np.empty((case.images, size["n_rows"] // case.images, size["n_channels"]), np.float32)
    for i in range(case.images):
        q[i] = composite([x[i : i + 1] for x in _blocks(case)])[0].numpy()
    return q.reshape(-1, size["n_channels"])


def fit_ours(case: Case, seed: int) -> float:
    """Inertia by this package's engine."""
    return kmeans(CompositeRows(_blocks(case), Normalisation()), case.k, restarts=case.restarts, seed=seed).inertia


def fit_sklearn(case: Case, seed: int) -> float:
    """Inertia by the materialised composite and scikit-learn's ``KMeans``."""
    from sklearn.cluster import KMeans

    return KMeans(case.k, n_init=case.restarts, random_state=seed, copy_x=False).fit(_matrix(case)).inertia_


def fit_minibatch(case: Case, seed: int) -> float:
    """Inertia by the materialised composite and scikit-learn's ``MiniBatchKMeans``."""
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(case.k, n_init=case.restarts, random_state=seed).fit(_matrix(case)).inertia_


def fit_faiss(case: Case, seed: int) -> float:
    """Inertia by the materialised composite and faiss (random starts, 25 iterations, as is its default)."""
    import faiss

    q = _matrix(case)
    found = faiss.Kmeans(
        q.shape[1], case.k, nredo=case.restarts, seed=seed, max_points_per_centroid=len(q), min_points_per_centroid=1
    )
    found.train(q)
    return float(found.index.search(q, 1)[0].astype(np.float64).sum())


FITS: dict[str, Callable[[Case, int], float]] = {
    "ours": fit_ours,
    "sklearn": fit_sklearn,
    "faiss": fit_faiss,
    "minibatch": fit_minibatch,
}


def _prepare(threads: int) -> None:
    hardware.set_threads(threads)
    if threads:
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)


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


def _fit(name: str, case: Case, seed: int) -> Measured:
    _blocks(case)  # the activations are given, not part of the fit
    return measure(partial(FITS[name], case, seed))


def compare_fits(cases: Sequence[Case], repeats: int = 3, threads: int = 0) -> pd.DataFrame:
    """Each case by each of :data:`FITS`, turn by turn, a new seed each time; medians over ``repeats``.

    The first fit of each is not counted. Inertia is the median over the seeds; memory the median of the peaks.
    """
    from tqdm.auto import tqdm

    rows = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(_process(threads)) for name in FITS}
        for case in tqdm(cases, "fits", leave=False):
            found = {name: [] for name in FITS}
            for seed in range(repeats):
                for name, worker in workers.items():
                    if seed == 0:
                        worker.submit(_fit, name, Case("warm-up", 2, 4, 2, 1), 0).result()
                    found[name].append(worker.submit(_fit, name, case, seed).result())
            of = {
                (name, what): statistics.median(getattr(m, what) for m in values)
                for name, values in found.items()
                for what in ("seconds", "mib", "value")
            }
            rows.append(
                {
                    "case": case.name,
                    **_size(case),
                    "k": case.k,
                    "restarts": case.restarts,
                    "ours_s": of["ours", "seconds"],
                    "sklearn_s": of["sklearn", "seconds"],
                    "faiss_s": of["faiss", "seconds"],
                    "sklearn_over_ours": of["sklearn", "seconds"] / of["ours", "seconds"],
                    "ours_mib": of["ours", "mib"],
                    "sklearn_mib": of["sklearn", "mib"],
                    "ours_inertia": of["ours", "value"],
                    "sklearn_inertia": of["sklearn", "value"],
                    "faiss_inertia": of["faiss", "value"],
                    "minibatch_s": of["minibatch", "seconds"],
                    "minibatch_inertia": of["minibatch", "value"],
                }
            )
    return pd.DataFrame(rows)


def _process(threads: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, get_context("spawn"), _prepare, (threads,))


def _size(case: Case) -> dict[str, int]:
    channels, strides = (64, 128, 256, 512), (4, 8, 16, 32)
    first = case.start_block - 1
    return {"n_rows": case.images * (224 // strides[first]) ** 2, "n_channels": sum(channels[first:])}


# --- explaining ------------------------------------------------------------------------------------------------


def explainers(x: Sequence[torch.Tensor], prototypes: int, classes: int) -> dict[int, EncoderKMeans]:
    """B4, B34 and B234 with prototypes drawn from the rows of some activations."""
    found = {}
    for b in (4, 3, 2):
        rows = CompositeRows(x[b - 1 :], Normalisation())
        index = torch.randint(len(rows), (prototypes,), generator=torch.Generator().manual_seed(b))
        vectors = rows.rows(index) * (1 + 0.01 * torch.randn(prototypes, 1, generator=torch.Generator().manual_seed(0)))
        labels = torch.arange(prototypes) * classes // prototypes
        nothing = torch.zeros(prototypes, dtype=torch.int64)
        known = Prototypes(vectors, labels, nothing, nothing, nothing, torch.zeros(classes))
        found[b] = EncoderKMeans(known, classes, b, Normalisation())
    return found


def naive_map(x: Sequence[torch.Tensor], explainer: EncoderKMeans) -> torch.Tensor:
    """The explanation map by the materialised composite, image by image."""
    p = explainer.prototypes.vectors
    half = p.square().sum(1) / 2
    images = [[part[i : i + 1] for part in x[explainer.start_block - 1 :]] for i in range(len(x[0]))]
    return torch.stack([(composite(part)[0] @ p.T - half).argmax(1) for part in images])


def compare_explanations(
    images: int = 8, prototypes: int = 2000, repeats: int = 7, threads: int = 0, steps: int = 50
) -> pd.DataFrame:
    """Explaining a batch against the bare forward pass, turn by turn; medians.

    ``cub-b234`` is B4, B34, B234 and the attribution through them, for all ``prototypes``. ``over_forward`` of ours
    and naive is what they take on top of a forward pass; captum's methods run their own passes, counted whole.
    """
    from captum.attr import IntegratedGradients, LayerGradCam
    from tqdm.auto import tqdm

    _prepare(threads)
    network = backbone()
    batch = digits(images)
    x = network.activations(batch)
    e = explainers(x, prototypes, len(network.c))
    y = network(batch)
    target = y.argmax(1)
    grad_cam = LayerGradCam(network, network.blocks[-1])
    integrated = IntegratedGradients(network)
    inputs = batch.clone().requires_grad_()
    methods = {
        "forward": lambda: network(batch),
        "ours": lambda: attributions(x, network.c, target, e),
        "naive": lambda: [naive_map(x, e[b]) for b in (4, 3, 2)],
        "grad-cam": lambda: grad_cam.attribute(inputs, target=target),
        "integrated-gradients": lambda: integrated.attribute(
            inputs, target=target, n_steps=steps, internal_batch_size=images
        ),
    }
    seconds = {name: [] for name in methods}
    for turn in tqdm(range(repeats + 1), "explanations", leave=False):
        for name, method in methods.items():
            if name == "integrated-gradients" and turn > 2:
                continue  # minutes, and steady
            start = time.perf_counter()
            method()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return pd.DataFrame(
        {
            "case": "cub-b234",
            "method": name,
            "seconds_per_image": value / images,
            "over_forward": value / medians["forward"],
        }
        for name, value in medians.items()
    )


# --- more rows than fit in memory ------------------------------------------------------------------------------


def synthetic(images: int, rank: int = 16) -> Callable[[int, int], list[torch.Tensor]]:
    """Made-up activations of B2, B3 and B4 at 224 px, computed anew from (seed, image) whenever they are read."""
    shapes = ((128, 28), (256, 14), (512, 7))
    generator = torch.Generator().manual_seed(0)
    mixes = [torch.randn(rank, channels, generator=generator) for channels, _ in shapes]
    means = torch.randn(10, rank, generator=generator)

    def read(start: int, stop: int) -> list[torch.Tensor]:
        if stop > images:
            raise IndexError(f"there are {images} images, not {stop}")
        parts = [[] for _ in shapes]
        for i in range(start, stop):
            generator = torch.Generator().manual_seed(i)
            for part, mix, (channels, side) in zip(parts, mixes, shapes, strict=True):
                concept = means[torch.randint(len(means), (side * side,), generator=generator)]
                code = concept + 0.5 * torch.randn(side * side, rank, generator=generator)
                part.append((code @ mix).relu_().view(side, side, channels).permute(2, 0, 1))
        return [torch.stack(part) for part in parts]

    return read


def _stream(images: int, k: int, iterations: int) -> dict[str, float]:
    read, images_read = synthetic(images), 0

    def counted(start: int, stop: int) -> list[torch.Tensor]:
        nonlocal images_read
        images_read += (stop - start) if stop - start > 1 else 0  # single images are k-means++'s draws
        return read(start, stop)

    rows = CompositeRows(counted, Normalisation(), images=images, keep=False)
    found: list[Clusters] = []

    def work() -> float:
        found.append(kmeans(rows, k, restarts=1, max_iterations=iterations, tolerance=0))
        return found[0].inertia

    measured = measure(work)
    passes = round(images_read / images)
    return {
        "n_rows": len(rows),
        "n_channels": rows.dim,
        "k": k,
        "iterations": found[0].iterations,
        "passes": passes,
        "seconds": measured.seconds,
        "seconds_per_pass_and_million_rows": measured.seconds / passes / len(rows) * 1e6,
        "process_peak_mib": measured.process_mib,
        "inertia_per_row": found[0].inertia / len(rows),
    }


def stream(n_rows: Sequence[int], k: int = 10, iterations: int = 5, threads: int = 0) -> Iterator[dict[str, float]]:
    """Cluster about ``n_rows`` synthetic composite rows that are never in memory, each in a process of its own.

    ``process_peak_mib`` is all of that process, PyTorch included; time counts every pass over the rows, with what it
    takes to make them.
    """
    for n in n_rows:
        with _process(threads) as worker:
            yield worker.submit(_stream, -(-n // 784), k, iterations).result()
