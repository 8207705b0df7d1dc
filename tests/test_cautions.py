"""What is said of an explainer that falls far below the network."""

import pandas as pd
import pytest

import kmex_utils as kmex
from kmex_utils.method.composite import Normalisation

pytest_plugins = ("tests.fixtures_explained",)
COLUMN = "accuracy, held out (%)"


@pytest.fixture
def told(explained, monkeypatch):
    """Cautions of the explanation, were its accuracies these, on so many held-out images."""

    def told(n=100, scale="1", **accuracy):
        monkeypatch.setitem(explained.settings, "held_out_images", n)
        monkeypatch.setattr(explained, "table", pd.DataFrame({COLUMN: accuracy}))
        for explainer in explained.explainers.values():
            monkeypatch.setattr(explainer, "normalisation", Normalisation(scale=scale))
        return explained.cautions()

    return told


def test_by_default_blocks_weigh_the_same(explained):
    assert {explainer.normalisation.scale for explainer in explained.explainers.values()} == {"1"}


def test_close_to_the_network_nothing_is_said(told):
    assert told(CNN=97.0, B4=97.0, B34=95.0, B234=87.0) == {}


def test_the_likely_cause_is_named(told):
    (line,) = told(CNN=97.0, B4=97.0, B34=95.0, B234=58.0, scale="1/D").values()
    assert line.startswith("B234 is right on 58 % of the held-out images, the network on 97 %") and "scale='1'" in line
    (line,) = told(CNN=97.0, B4=97.0, B34=95.0, B234=58.0).values()
    assert line.endswith("believe B34)")
    lines = told(CNN=97.0, B4=70.0, B34=60.0, B234=58.0)
    assert list(lines) == [4, 3, 2] and all(line.endswith("prototypes_per_class may help)") for line in lines.values())


def test_a_network_whose_classes_are_others_is_replaced_by_the_best(told):
    (line,) = told(**{"KMEx (K/C=3)": 90.0}, B4=91.0, B34=90.0, B234=40.0).values()
    assert "B4 on 91 %" in line


def test_ten_points_of_few_images_are_nothing(told):
    """4 of 6 beside 6 of 6: the standard error of the difference is 19 points."""
    assert told(n=6, CNN=100.0, B4=100.0, B34=100.0, B234=66.7) == {}
    assert list(told(n=60, CNN=100.0, B4=100.0, B34=100.0, B234=66.7)) == [2]


def test_it_is_said_where_the_map_is_shown(told, explained, tmp_path):
    assert told(CNN=97.0, B4=97.0, B34=95.0, B234=8.0, scale="1/D")
    assert "B234 is right on 8 %" in explained.panel(0).get_supxlabel().replace("\n", " ")
    assert "B234" not in explained.panel(0, [4, 3]).get_supxlabel()
    assert "B234 is right on 8 %" in explained.report(tmp_path / "report.html").read_text()


def test_it_is_remembered(resnet, photos, tmp_path):
    said = []
    options = {"prototypes_per_class": 2, "held_out": 0.25, "restarts": 1, "device": "cpu", "log": said.append}
    explained = kmex.explain(resnet, photos, **options)
    assert explained.settings["held_out_images"] == 6
    explained.table.loc["B234", COLUMN] = 0.0
    explained.table.loc["CNN", COLUMN] = 100.0
    explained.save(tmp_path / "saved")
    assert kmex.load(tmp_path / "saved", resnet.module).cautions()[2] == explained.cautions()[2]
