"""The benchmark compares the same thing: equal clusterings, equal maps, true sizes, counted passes."""

import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch

from kmex_utils import paths
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.operator import CompositeRows

sys.path.insert(0, str(paths.ROOT / "benchmarks"))
import scaling

CASE = scaling.Case("tiny", images=4, start_block=3, k=3, restarts=3)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Images of 64 pixels, where the benchmark has 224."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scaling, "SIZE", 64)
        yield


@pytest.mark.parametrize("name", ["sklearn", "faiss", "minibatch"])
def test_every_way_fits_the_same_rows(name):
    ours = scaling.fit_ours(CASE, 0)
    assert scaling.FITS[name](CASE, 0) == pytest.approx(ours, rel=0.05)


def test_sizes_are_those_of_the_activations():
    rows = CompositeRows(scaling.blocks(CASE), Normalisation())
    assert CASE.size == {"n_rows": len(rows), "n_channels": rows.dim}


def test_naive_map_is_ours():
    x = [part.float() for part in scaling.synthetic(2)(0, 2)]
    for explainer in scaling.explainers([x[0], *x], 40, 4).values():
        ours = explainer.sim(explainer.h([x[0], *x]))
        naive = scaling.naive_map([x[0], *x], explainer).view_as(ours)
        assert (ours == naive).float().mean() > 0.999


def test_measure_sees_time_and_memory():
    def work():
        kept = np.ones(50 * 2**20 // 8)
        for _ in range(20):
            kept += 1
        return float(kept[0])

    measured = scaling.measure(work)
    assert measured.value == 21
    assert 45 < measured.mib < 75
    assert measured.seconds > 0.005


def test_a_measurement_that_fails_ends():
    before = threading.active_count()
    with pytest.raises(ValueError, match="between 1 and the 4 rows"):
        scaling.measured_fit("ours", scaling.Case("x", 1, 4, 1000, 1), 0)
    assert threading.active_count() == before


def test_synthetic_activations_are_the_same_whenever_they_are_read():
    read = scaling.synthetic(5)
    once = read(0, 5)
    assert [tuple(x.shape) for x in once] == [(5, 128, 8, 8), (5, 256, 4, 4), (5, 512, 2, 2)]
    assert all(torch.equal(x[3:4], y) for x, y in zip(once, read(3, 4), strict=True))
    with pytest.raises(IndexError):
        read(4, 6)


def test_a_stream_is_clustered_in_counted_passes():
    row = scaling.stream_once(40, k=2, iterations=2)
    assert row["n_rows"] == 40 * 64 and row["iterations"] == 2
    # variance, first start, candidates and shrinking, two iterations, assessment
    assert row["passes"] == 1 + 1 + 2 + 2 + 1


def test_more_images_than_there_are_is_refused():
    with pytest.raises(ValueError, match="fewer than 300: lower images"):
        scaling.digits(300)


@pytest.mark.slow
def test_a_class_of_imagenet_is_measured_step_by_step(folder, tmp_path, monkeypatch, capsys):
    """Every photograph passed once, a fit of each size, maps by the prototypes of all classes."""
    import imagenet

    monkeypatch.setattr(imagenet, "CLASSES", 3)
    small = ["--images", "2", "50", "--prototypes-per-class", "4", "--restarts", "1", "--mapped", "2"]
    monkeypatch.setattr(sys, "argv", ["imagenet.py", str(folder), "--out", str(tmp_path), *small])
    imagenet.main()
    table = pd.read_csv(tmp_path / "imagenet.csv").fillna("")
    photographs = len([*folder.rglob("*.png"), *folder.rglob("*.jpg")])
    expected = [
        ("read and pass", photographs, 0),
        ("fit", 2, 10),
        ("fit", photographs, 10),
        ("fit", 2, 4),
        ("map", 2, 10),
    ]
    assert [*zip(table.step, table.images, table.k, strict=True)] == expected
    assert (table.seconds > 0).all() and (table.iterations[table.step == "fit"] > 0).all()
    monkeypatch.setattr(sys, "argv", ["imagenet.py", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        imagenet.main()
    assert "no photographs in" in capsys.readouterr().err
