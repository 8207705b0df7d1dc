"""Prototypes disabled, merged, renamed: against a naive argmin over what is left, and back from disk."""

import copy
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch

import kmex_utils as kmex
from kmex_utils.evaluation.measured import measured
from kmex_utils.explanation.explorer import view
from kmex_utils.method.composite import composite

pytest_plugins = ("tests.fixtures_explained",)
HELD_OUT = "accuracy, held out (%)"
OPTIONS = {"prototypes_per_class": 4, "held_out": 0.25, "restarts": 1, "device": "cpu", "log": str}


@pytest.fixture(scope="module")
def four(resnet, photos):
    """K/C = 4: prototypes 0 to 3 of flowers, 4 to 7 of temples."""
    return kmex.explain(resnet, photos, **OPTIONS)


@pytest.fixture
def edited(four):
    """As it was fitted, and again afterwards."""
    yield four
    while four.edits.done:
        four.edits.undo()


def naive(explained, b, split, left, merged=None):
    """Rows materialised, the nearest of the prototypes left, and whether it is clear at a position."""
    pixels = explained.dataset.split(split).pixels
    x = explained.network.activations(explained.network.input(pixels))
    q = composite(x[b - 1 :], explained.explainers[b].normalisation).double()
    p = explained.explainers[b].prototypes.vectors.double()
    value, index = torch.cdist(q, p[left]).topk(2, largest=False)
    chosen = torch.tensor(left)[index[..., 0]]
    for k, first in (merged or {}).items():
        chosen[chosen == k] = first
    return chosen, value[..., 1] / value[..., 0] > 1.0001  # else rounding decides


def check(explained, b, left, merged=None):
    """Maps, accuracy and counts of both splits, from the naive assignment."""
    for split, column in (("train", "accuracy, images of the prototypes (%)"), ("test", HELD_OUT)):
        expected, clear = naive(explained, b, split, left, merged)
        q_s = explained.maps[b, split].flatten(1).long()
        assert clear.float().mean() > 0.95 and torch.equal(q_s[clear], expected[clear])
        windows = [len({(merged or {}).get(k, k) for k in left if k // 4 == c}) for c in (0, 1)]
        y = torch.stack([(q_s // 4 == c).sum(1) / windows[c] for c in (0, 1)], 1)
        right = (y.argmax(1) == explained.dataset.split(split).labels).double().mean()
        assert explained.table.loc[f"{explained.name(b)}, edited", column] == pytest.approx(100 * right.item())
    q_s, labels = explained.maps[b, "train"].flatten(1), explained.dataset.train.labels
    for k in range(8):
        assert explained.sharing(b, k)[0] == sum(k in row for row in q_s[labels == k // 4].tolist())


@pytest.mark.parametrize("b", [4, 2])
def test_cells_of_a_disabled_prototype_go_to_the_next_nearest(edited, b):
    before = edited.maps[b, "test"].clone()
    edited.edits.disable(b, 1, 6)
    left = [0, 2, 3, 4, 5, 7]
    check(edited, b, left)
    other = ~torch.isin(before, torch.tensor([1, 6]))
    assert torch.equal(edited.maps[b, "test"][other], before[other]) and (~other).any()
    edited.edits.disable(b, 5)
    check(edited, b, [k for k in left if k != 5])


def test_merged_prototypes_are_the_union_of_their_cells(edited):
    before = edited.maps[2, "train"].clone()
    edited.edits.merge(2, 2, 0, 3)
    check(edited, 2, list(range(8)), {0: 2, 3: 2})
    assert torch.equal(edited.maps[2, "train"] == 2, torch.isin(before, torch.tensor([0, 2, 3])))
    edited.edits.disable(2, 4)
    check(edited, 2, [0, 1, 2, 3, 5, 6, 7], {0: 2, 3: 2})
    edited.edits.disable(2, 2)  # all that were merged
    check(edited, 2, [1, 5, 6, 7])


def test_a_window_is_averaged_over_what_it_has_left(edited):
    """Known answer: 3 cells of a class with 4 segments, 1 of one with 1: 3/4 against 1."""
    q_s = torch.tensor([[[0, 1], [2, 4]]])
    assert edited.explainers[2].proj(q_s).tolist() == [[0.75, 0.25]]
    edited.edits.merge(2, 4, 5, 6, 7)
    assert edited.explainers[2].proj(q_s).tolist() == [[0.75, 1.0]]


def test_images_seen_and_panels_follow(edited, photos):
    edited.edits.merge(2, 0, 1).disable(2, 7).rename(2, 0, "$petal$ <b>")
    inside, outside = edited.picture(0), edited.picture(edited.picture(0).rgb)
    for picture in (inside, outside):
        part = edited.interpretations(picture, [2])[0]
        assert not np.isin(part.map, [1, 7]).any()
        assert np.array_equal(part.map, edited.maps[2, "test"][0].numpy())
        assert {p.label for p in part.patches if p.prototype == 0} <= {"$petal$ <b>"}
    assert [p.prototype for p in edited.patches(2, 0)][:4] == [0, 1, 0, 1] and len(edited.patches(2, 0)) == 10
    edited.panel(0)
    shown = view(edited, 0, 2)
    assert {p["prototype"] for p in shown["prototypes"]} == set(np.unique(edited.maps[2, "test"][0]).tolist())


def test_undo_is_as_it_was(edited):
    maps = {key: q_s.clone() for key, q_s in edited.maps.items()}
    sharing, table = [edited.sharing(2, k) for k in range(8)], edited.table.copy()
    edited.edits.disable(2, 0)
    after_one, row = edited.maps[2, "test"].clone(), edited.table.loc["B234, edited"].copy()
    edited.edits.merge(2, 1, 3).rename(4, 5, "arch")
    edited.edits.undo().undo()
    assert torch.equal(edited.maps[2, "test"], after_one) and edited.table.loc["B234, edited"].equals(row)
    edited.edits.undo()
    assert all(torch.equal(edited.maps[key], q_s) for key, q_s in maps.items())
    assert [edited.sharing(2, k) for k in range(8)] == sharing and edited.table.equals(table)
    assert repr(edited.edits) == "no edits"
    with pytest.raises(ValueError, match="no edit to undo"):
        edited.edits.undo()


@pytest.mark.parametrize("with_images", [True, False])
def test_edits_are_saved_and_loaded(edited, resnet, photos, tmp_path, with_images):
    """With what they led to; undone step by step, to the fit."""
    picture = photos / edited.names[1]
    fitted = edited.interpretations(picture, [2])[0]
    edited.edits.disable(2, 0)
    once = edited.interpretations(picture, [2])[0], edited.table.loc["B234, edited", HELD_OUT], edited.sharing(2, 1)
    edited.edits.merge(2, 4, 5).rename(2, 4, "sky")
    edited.save(tmp_path)
    again = kmex.load(tmp_path, copy.deepcopy(resnet.module), images=photos if with_images else None)
    assert repr(again.edits) == repr(edited.edits) and "B234: 4 named 'sky'" in repr(again.edits)
    assert [again.sharing(2, k) for k in range(8)] == [edited.sharing(2, k) for k in range(8)]
    np.testing.assert_allclose(again.table.loc["B234, edited"], edited.table.loc["B234, edited"], rtol=1e-5)
    ours, theirs = again.interpretations(picture, [2])[0], edited.interpretations(picture, [2])[0]
    assert np.array_equal(ours.map, theirs.map) and ours.predicted == theirs.predicted
    for one, other in zip(ours.patches, theirs.patches, strict=True):
        assert np.array_equal(one.pixels, other.pixels) and one.label == other.label
    if with_images:
        again.fill()
        assert torch.equal(again.maps[2, "test"], edited.maps[2, "test"])
    again.edits.undo().undo()
    assert np.array_equal(again.interpretations(picture, [2])[0].map, once[0].map)
    assert again.table.loc["B234, edited", HELD_OUT] == pytest.approx(once[1]) and again.sharing(2, 1) == once[2]
    again.edits.undo()
    assert np.array_equal(again.interpretations(picture, [2])[0].map, fitted.map)
    assert "B234, edited" not in again.table.index
    if with_images:
        again.edits.disable(2, 0)
        assert again.table.loc["B234, edited", HELD_OUT] == pytest.approx(once[1])


def test_what_cannot_be_done_is_one_line(edited):
    edits = edited.edits.merge(2, 0, 1).disable(2, 2)
    cases = [
        (lambda: edits.disable(1, 0), r"start_block must be one of \[4, 3, 2\], got 1"),
        (lambda: edits.disable(2, 8), "prototypes of B234 are 0 … 7, got 8"),
        (lambda: edits.disable(2, "3"), "prototypes of B234 are 0 … 7, got '3'"),
        (lambda: edits.disable(2), "name at least one prototype"),
        (lambda: edits.disable(2, 2), "prototype 2 of B234 is disabled"),
        (lambda: edits.rename(2, 1, "x"), "prototype 1 of B234 is merged with 0"),
        (lambda: edits.merge(2, 3), "merge takes two different prototypes or more"),
        (lambda: edits.merge(2, 3, 4), r"merge takes prototypes of one class, \[3, 4\] are of flower, temple"),
        (lambda: edits.disable(2, 0, 3), "the last prototype of flower in B234: fewer are a refit"),
        (lambda: edits.rename(2, 0, "two\nlines"), "a name is one line of 1 to 60 characters"),
        (lambda: edits.rename(2, 0, " "), "a name is one line"),
    ]
    for edit, message in cases:
        with pytest.raises(ValueError, match=message):
            edit()
    assert len(edits.done) == 2
    with pytest.raises(ValueError, match="B234 was edited, and another fit has other prototypes"):
        edited.add_encoder(edited.explainers[2], None, edited.maps[2, "train"])


def test_an_interrupted_edit_is_as_if_it_had_not_been(edited, monkeypatch):
    before = edited.maps[2, "test"].clone()
    monkeypatch.setattr(type(edited.edits), "_moved", lambda *key: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edited.edits.disable(2, 0)
    assert not edited.edits.done and torch.equal(edited.maps[2, "test"], before)
    assert type(edited.explainers[2]).__name__ == "EncoderKMeans"


@pytest.mark.parametrize(
    "change",
    [
        {"prototypes": [9]},
        {"prototypes": ["__import__('os')"]},
        {"edit": "delete"},
        {"shared": [1]},
        {"accuracy": None},
        {"start_block": 1},
    ],
)
def test_damaged_edits_are_one_line(edited, resnet, tmp_path, change):
    edited.edits.disable(2, 0)
    edited.save(tmp_path)
    content = json.loads((tmp_path / "explained.json").read_text())
    content["edits"][0] |= change
    (tmp_path / "explained.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="a saved edit does not fit the prototypes: ") as error:
        kmex.load(tmp_path, copy.deepcopy(resnet.module))
    assert "\n" not in str(error.value)


def test_an_export_of_other_edits_is_not_resumed(edited, tmp_path):
    edited.export(tmp_path / "export", log=str)
    edited.edits.disable(2, 0)
    with pytest.raises(ValueError, match="holds an export of other images or settings"):
        edited.export(tmp_path / "export", resume=True, log=str)


def test_edited_is_said_where_the_map_is_shown(edited, tmp_path):
    edited.edits.disable(2, 7)
    assert edited.interpretations(0, [2])[0].name == "B234, edited" and edited.interpretations(0, [4])[0].name == "B4"
    assert "Edited: B234: 7 disabled" in edited.report(tmp_path / "report.html").read_text()
    assert "edited: B234: 7 disabled" in edited.page(tmp_path / "page.html", 2).read_text()


def test_other_images_are_no_measure(explained, resnet, photos, tmp_path):
    """Part of the folder: maps and counts of what is here, but nothing that stands beside the fit's own numbers."""
    saved = explained.save(tmp_path / "saved")
    for name in ("flower", "temple"):
        (tmp_path / "few" / name).mkdir(parents=True)
        for file in sorted((photos / name).glob("*.png"))[:8]:
            shutil.copy(file, tmp_path / "few" / name)
    few = kmex.load(saved, resnet.module, images=tmp_path / "few")
    few.edits.disable(2, 5)
    assert few.edits.done[0]["accuracy"] == {} and "B234, edited" not in few.table.index
    line = r"not the images that the prototypes were made from, 18 of 2 classes, but 12 of them: give the whole folder"
    for asked in (lambda: few.certainty(refits=1), lambda: measured(few, refits=0)):
        with pytest.raises(ValueError, match=line):
            asked()
    (tmp_path / "few" / "flower").rename(tmp_path / "few" / "017.Flower")
    again = kmex.load(saved, resnet.module, images=tmp_path / "few")
    assert sorted(again.labels_of("train").unique().tolist()) == [0, 1], "the number is no part of the name"
    for old, new in (("017.Flower", "car"), ("temple", "ship")):
        (tmp_path / "few" / old).rename(tmp_path / "few" / new)
    with pytest.raises(ValueError, match=r"none of the classes of these images \(car, ship …\) is one of the"):
        kmex.load(saved, resnet.module, images=tmp_path / "few")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such modes")
def test_others_can_read_what_is_saved(explained, tmp_path):
    before = os.umask(0o022)
    try:
        folder = explained.save(tmp_path / "saved")
    finally:
        os.umask(before)
    assert {oct(file.stat().st_mode & 0o777) for file in folder.iterdir()} == {"0o644"}
