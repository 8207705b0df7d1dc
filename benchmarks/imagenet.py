"""One class of ImageNet measured end to end on this machine, and what all of it would take.

    python benchmarks/imagenet.py FOLDER --out figures/scaling

FOLDER has photographs, which stand for one class: 1,300 of them, as in ImageNet, or as many as there are. They are
read, passed through a ResNet18's encoder at 224 pixels, clustered from B2 (784 rows an image), and mapped with the
prototypes of 1,000 classes. Random weights serve: what is measured are times and bytes. Writes ``imagenet.csv``, a row
a measurement.
"""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch
from tqdm.auto import tqdm

from kmex_utils import hardware, paths
from kmex_utils.data import Dataset, own_input
from kmex_utils.data.dataset import Images
from kmex_utils.data.reading import Streamed
from kmex_utils.explanation.passed import Passed
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.explainers import EncoderKMeans
from kmex_utils.method.kmeans import kmeans
from kmex_utils.method.prototypes import Prototypes
from kmex_utils.networks import for_training

CLASSES, IMAGES, START_BLOCK = 1000, 1300, 2
SUFFIXES = {".jpg", ".jpeg", ".png"}


def main() -> None:
    """Measure, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs, in folders or not")
    parser.add_argument("--out", type=Path, default=Path("figures/scaling"), help="folder of the table")
    parser.add_argument("--images", type=int, nargs="*", default=[325, 650, IMAGES], help="of a class, each fitted")
    parser.add_argument("--prototypes-per-class", type=int, nargs="*", default=[5, 10, 20], help="K/C, each fitted")
    parser.add_argument("--restarts", type=int, default=10, help="of k-means")
    parser.add_argument("--mapped", type=int, default=64, help="images whose maps are timed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args()
    threads, rows = hardware.set_threads(given.threads), []

    def measured(step: str, images: int, k: int, start: float, iterations: int = 0) -> None:
        seconds, peak = time.perf_counter() - start, hardware.peak_memory()
        rows.append(
            {"step": step, "images": images, "k": k, "seconds": seconds, "iterations": iterations, "peak_gib": peak}
        )
        tqdm.write(str(rows[-1]))

    files = sorted(file for file in paths.expanded(given.folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    most = min(max(given.images), len(files))
    if not most:
        parser.error(f"no photographs in {given.folder}")
    input = own_input("imagenet")
    train, test = (
        Images(Streamed(part, input, [file.name for file in part]), torch.zeros(len(part), dtype=torch.int64), ())
        for part in (files[:most], [])
    )
    photographs = Dataset("photographs", ("a class",), train, test, input)
    network = for_training("resnet18", ("a", "b"), "scratch", photographs.input, seed=0).eval()

    start = time.perf_counter()
    passed = Passed.of(network, photographs, START_BLOCK, splits=["train"])
    measured("read and pass", most, 0, start)
    cases = [(n, 10) for n in sorted({min(n, most) for n in given.images})]
    cases += [(min(min(given.images), most), k) for k in given.prototypes_per_class if k != 10]
    for n, k in cases:
        start = time.perf_counter()
        clusters = kmeans(passed.rows(torch.arange(n), START_BLOCK, Normalisation()), k, restarts=given.restarts)
        measured("fit", n, k, start, clusters.iterations)
    some = passed.rows(torch.arange(min(given.mapped, most)), START_BLOCK, Normalisation())
    k = 10 * CLASSES
    index = torch.randint(len(some), (k,), generator=torch.Generator().manual_seed(0))
    unknown = torch.zeros(k, dtype=torch.int64)
    drawn = Prototypes(some.rows(index), torch.arange(k) // 10, unknown, unknown, unknown, torch.zeros(CLASSES))
    start = time.perf_counter()
    EncoderKMeans(drawn, CLASSES, START_BLOCK, Normalisation()).sim(some)
    measured("map", some.images, 10, start)
    table = pd.DataFrame(rows).assign(threads=threads, machine=hardware.machine())
    paths.resolve(given.out).mkdir(parents=True, exist_ok=True)
    table.to_csv(paths.resolve(given.out) / "imagenet.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
