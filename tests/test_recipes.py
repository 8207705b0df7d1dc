"""Every block of docs/recipes.md runs as it stands, and gives what its sentence says."""

import re
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import kmex_utils as kmex
from kmex_utils import paths
from kmex_utils.evaluation.certainty import certainty
from kmex_utils.networks.catalogue import weights_file

pytest_plugins = ("tests.fixtures_explained",)

PAGE = (paths.ROOT / "docs" / "recipes.md").read_text()
RECIPES = dict(re.findall(r"^## ([^\n]+)\n\n[^\n]+\n\n```python\n(.+?)```$", PAGE, re.M | re.S))


@pytest.fixture(scope="module")
def place(photos, tmp_path_factory):
    """The folder they run in: six photographs of each class, a new one, and random weights where the library's lie."""
    from huggingface_hub import constants, file_download
    from torchvision.models import resnet18

    root = tmp_path_factory.mktemp("recipes")
    for name in ("flower", "temple"):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(6):
            shutil.copy(photos / name / f"{i:02d}.png", root / "photos" / name)
    Image.open(photos / "temple" / "11.png").save(root / "new.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "_hub_dir", str(root / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for module in (constants, file_download):
            patch.setattr(module, "HF_HUB_CACHE", str(root / "hub"), raising=False)
        (root / "hub" / "checkpoints").mkdir(parents=True)
        torch.manual_seed(0)
        torch.save(resnet18().state_dict(), weights_file("resnet18")[0])
        patch.chdir(root)
        exec(RECIPES["A network of torchvision"], {})
        yield root
    plt.close("all")


@pytest.fixture
def run(place, monkeypatch):
    def run(recipe):
        names = {}
        monkeypatch.chdir(place)
        exec(compile(RECIPES[recipe], recipe, "exec"), names)
        return names

    return run


def test_blocks_are_short_and_all_are_here():
    assert PAGE.count("```python") == PAGE.count("\n## ") == len(RECIPES)
    assert {len(code.splitlines()) <= 12 for code in RECIPES.values()} == {True}
    source = Path(__file__).read_text()
    assert [recipe for recipe in RECIPES if f'"{recipe}"' not in source] == []


def test_torchvision(place):
    """Its block made what others load."""
    explained = kmex.load(place / "my-prototypes")
    assert explained.network.classes[0] == "tench" and explained.classes == ("flower", "temple")
    assert [explained.name(b) for b in explained.start_blocks] == ["B4", "B34", "B234"]


def test_timm(run):
    timm = pytest.importorskip("timm", reason="timm is an optional extra")
    folder, _ = weights_file("timm/resnet18.a1_in1k")
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    save_file(timm.create_model("resnet18").state_dict(), snapshot / "model.safetensors")
    names = run("A network of timm")
    assert names["network"].named and names["network"].classes[0].startswith("tench")
    assert {"KMEx (K/C=5)", "B4", "B234"} <= set(names["explained"].table.index)


def test_own_module(run):
    names = run("Your own module")
    assert np.array_equal(names["again"].labels("new.jpg").labels, names["explained"].labels("new.jpg").labels)
    assert names["network"].input.std == (0.5, 0.5, 0.5) and names["network"].form == "linear"


def test_data_set_of_torch(run):
    explained = run("A data set of torch")["explained"]
    assert explained.classes == ("flower", "temple")
    assert (len(explained.dataset.train), len(explained.dataset.test)) == (6, 6)


def test_server(run, place):
    names = run("A server without a screen")
    width, height = names["figure"].get_size_inches()
    with Image.open(place / "panel.png") as image:
        assert image.size == (int(150 * width), int(150 * height)) and np.ptp(np.asarray(image)) > 200


def test_contrast(run, place):
    names = run("This class and not that one, on the picture itself")
    explained, part = names["explained"], names["part"]
    tench, goldfish = explained.seen(explained.picture("new.jpg")).y[0, :2] - explained.network.b[:2]
    assert part.total == pytest.approx(float(tench - goldfish), rel=1e-3)
    assert Image.open(place / "overlay.png").size == Image.open("new.jpg").size
    assert (place / "contrast.png").stat().st_size > 5000


def test_tomorrow(run, place):
    run("Tomorrow, with new images")
    table = pd.read_parquet(place / "maps" / "images.parquet")
    assert len(table) == 12 and (place / "new.png").stat().st_size > 10_000
    with np.load(place / "maps" / "maps" / "temple" / "03.png.npz") as arrays:
        expected = kmex.load(place / "my-prototypes").interpretations(place / "photos" / "temple" / "03.png", [2])
        assert np.array_equal(arrays["B234"], expected[0].map)


def test_scikit_learn(run):
    pytest.importorskip("sklearn", reason="scikit-learn is an optional extra")
    search = run("KMEx as a classifier of scikit-learn")["search"]
    scores = search.cv_results_["mean_test_score"]
    assert scores[0] < scores[1] < scores[2] == search.best_score_ and search.best_score_ > 0.9


def test_captum(run):
    pytest.importorskip("captum", reason="captum is an optional extra")
    names = run("Metrics of captum")
    ours = names["explained"].labels("new.jpg", 4).attribution
    np.testing.assert_allclose(names["att"][0, 1], ours, rtol=1e-4, atol=1e-7)


def test_quantus(run):
    pytest.importorskip("quantus", reason="needs Quantus: pip install quantus")
    (score,) = run("Metrics of Quantus")["scores"]
    assert 0 < score < 1


def test_scikit_image(run):
    pytest.importorskip("skimage", reason="needs scikit-image: pip install scikit-image")
    names = run("Segments for scikit-image and napari")
    areas = [region.area for region in names["regionprops"](names["labels"])]
    assert sum(areas) == 224 * 224 and len(areas) == len(names["table"])


@pytest.mark.slow
def test_how_faithful_and_how_sure(run):
    names = run("How faithful, and how sure")
    methods = ["B4", "B34", "B234", "CAM", "centre", "edges", "random pixels"]
    assert names["faithful"].method.drop_duplicates().tolist() == methods
    road = names["faithful"].query("measure == 'ROAD'").set_index("method")
    assert road.value.between(0, 1).all() and road.value["random pixels"] == road.null["random pixels"]
    kept = names["sure"].query("measure == 'prototype'").set_index("explainer")
    last = certainty(names["explained"], names["explained"].explainers[4], 2, restarts=3)
    assert kept.value["B4"] == pytest.approx(last.mean().item(), abs=1e-6)
