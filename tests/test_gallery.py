"""Tables of all images and examples of prototypes: against loops over maps, and known answers."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

import kmex_utils as kmex
from kmex_utils.explanation.gallery import near_copies
from kmex_utils.method.composite import Normalisation, composite

pytest_plugins = ("tests.fixtures_explained",)
EQUAL = Normalisation(scale="1")  # the default of explain()


@pytest.fixture(scope="module")
def loaded(explained, resnet, photos, tmp_path_factory):
    """From disk with the photos, which pass once more."""
    return kmex.load(explained.save(tmp_path_factory.mktemp("saved")), resnet.module, images=photos)


def rows(explained, b, split):
    """q of every image [N, R', D], and its nearest prototype [N, R']."""
    x = explained.network.activations(explained.network.input(explained.dataset.split(split).pixels))
    q = composite(x[b - 1 :], EQUAL).double()
    return q, torch.cdist(q, explained.explainers[b].prototypes.vectors.double()).argmin(2)


@pytest.mark.parametrize("split", ["train", "test"])
def test_predictions_by_a_loop(explained, loaded, split):
    table, images = explained.predictions(split), explained.dataset.split(split)
    assert list(table.index) == list(images.names)
    assert table.label.tolist() == [explained.classes[c] for c in images.labels]
    y = explained.network(explained.network.input(images.pixels))
    assert table.network.tolist() == [explained.network.classes[j] for j in y.argmax(1)]
    for b in (4, 2):
        q_s = explained.maps[b, split].flatten(1).tolist()
        classes = [explained.classes[Counter(sorted(k // 3 for k in row)).most_common(1)[0][0]] for row in q_s]
        assert table[explained.name(b)].tolist() == classes
        accuracy = 100 * (table.label == table[explained.name(b)]).mean()
        column = {"train": "images of the prototypes", "test": "held out"}[split]
        assert explained.table.loc[explained.name(b), f"accuracy, {column} (%)"] == pytest.approx(accuracy)
    assert loaded.predictions(split).equals(table)


def test_empty_is_held_out_and_others_are_refused(explained, resnet, tmp_path):
    assert explained.predictions().equals(explained.predictions("test"))
    with pytest.raises(ValueError, match="split must be one of train, test, got 'val'"):
        explained.predictions("val")
    alone = kmex.load(explained.save(tmp_path), resnet.module)
    for table in (alone.predictions, alone.by_class, alone.gallery):
        with pytest.raises(ValueError, match="the images are not here"):
            table()


def test_classes_by_a_loop(explained):
    table, said = explained.by_class(4, "train"), explained.predictions("train")
    for name, row in table.iterrows():
        of_class = said[said.label == name]
        assert row["images"] == len(of_class) == 9
        for model in ("network", "B4", "B34", "B234"):
            assert row[model] == pytest.approx(100 * (of_class[model] == name).mean())
        other = "temple" if name == "flower" else "flower"
        wrong = int(of_class.B4.eq(other).sum())
        assert row["taken for"] == (f"{other} ({wrong})" if wrong else "")
        assert table.loc[other, "taken from"] == row["taken for"].replace(other, name)


def test_confusions_known(explained, monkeypatch):
    """Of three classes, the most frequent confusion first."""
    said = pd.DataFrame({"label": list("aaaabbc"), "network": list("aaaabbc"), "B4": list("abbcbab")})
    monkeypatch.setattr("kmex_utils.explanation.gallery.predictions", lambda *of: said)
    monkeypatch.setattr(explained, "classes", ("a", "b", "c", "d"))
    table = explained.by_class(4)
    assert table["taken for"].to_dict() == {"a": "b (2), c (1)", "b": "a (1)", "c": "b (1)", "d": ""}
    assert table["taken from"].to_dict() == {"a": "b (1)", "b": "a (2), c (1)", "c": "a (1)", "d": ""}
    assert table.B4[["a", "b", "c"]].tolist() == [25, 50, 0] and np.isnan(table.B4["d"])
    assert table.images.tolist() == [4, 2, 1, 0]


@pytest.mark.parametrize("b", [4, 2])
def test_use_of_a_prototype_by_a_loop(explained, b):
    table, said = explained.gallery(b, "train"), explained.predictions("train")
    maps, name = explained.maps[b, "train"].flatten(1).tolist(), explained.name(b)
    for k, row in table.iterrows():
        own = explained.classes[k // 3]
        assert row["class"] == own
        there = [i for i, cells in enumerate(maps) if k in cells]
        assert row.images == len(there)
        taken = [i for i in there if said[name].iloc[i] == own]
        assert row.right == sum(said.label.iloc[i] == own for i in taken)
        assert row.wrong == sum(said.label.iloc[i] != own for i in taken)
        count = Counter(said.label.iloc[i] for i, cells in enumerate(maps) for cell in cells if cell == k)
        assert row.cells == pytest.approx(100 * sum(count.values()) / (len(maps) * len(maps[0])))
        other = sum(n for c, n in count.items() if c != own)
        assert row.elsewhere == pytest.approx(100 * other / sum(count.values()))
        assert row.most == pytest.approx(row.elsewhere), "of two classes"
        assert row.most_with == ((set(explained.classes) - {own}).pop() if other else "")
    assert table.cells.sum() == pytest.approx(100)


def test_copies_are_measured_by_the_median_distance(explained):
    p, table = explained.explainers[2].prototypes.vectors.double(), explained.gallery(2)
    pairs = sorted((p[i] - p[j]).norm().item() for i in range(6) for j in range(i))
    for k, row in table.iterrows():
        others = {j: (p[j] - p[k]).norm().item() for j in range(6) if j != k}
        assert row.copy_of == min(others, key=others.get)
        assert row.copy_distance == pytest.approx(min(others.values()) / pairs[7])  # the median of 15


def test_a_known_copy():
    """Two of five on top of each other; the others at the corners of a square of side 1: median 1."""
    corners = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1], [0, 0.1]], dtype=torch.float64)
    copy, ratio = near_copies(corners)
    assert copy[[0, 4]].tolist() == [4, 0] and ratio[[0, 4]].tolist() == pytest.approx([0.1, 0.1])
    assert ratio[[1, 2]].tolist() == pytest.approx([1, 1])


def test_edits_show_in_the_gallery(explained):
    explained.edits.merge(2, 0, 1).rename(2, 0, "petal").disable(2, 5)
    try:
        table = explained.gallery(2)
        assert list(table.index) == [0, 2, 3, 4] and table.name[0] == "petal" and (table.name[1:] == "").all()
        assert set(table.copy_of) <= {0, 2, 3, 4} and table.cells.sum() == pytest.approx(100)
    finally:
        explained.edits.undo().undo().undo()


@pytest.mark.parametrize("b", [4, 2])
def test_typical_and_weakest_by_definition(explained, b):
    """Images of the class with a cell, in the order of their nearest such cell: the median, and the last."""
    q, q_s = rows(explained, b, "train")
    p, labels = explained.explainers[b].prototypes.vectors.double(), explained.dataset.train.labels
    for k in range(6):
        nearest = []
        for i in (labels == k // 3).nonzero().flatten().tolist():
            cells = (q_s[i] == k).nonzero().flatten()
            if len(cells):
                distance = (q[i, cells] - p[k]).norm(dim=1)
                nearest.append((distance.min().item(), i, int(cells[distance.argmin()])))
        nearest.sort()
        assert len(nearest) == explained.sharing(b, k)[0]
        for rank, which in (("typical", (len(nearest) - 1) // 2), ("weakest", -1)):
            image, position = explained.nearest[b].place(k, rank)
            distance = (q[image, position] - p[k]).norm().item()
            assert distance == pytest.approx(nearest[which][0], rel=1e-3) and q_s[image, position] == k
            assert explained.patch(b, k, rank).index == image


def test_examples_are_saved(explained, loaded, resnet, tmp_path):
    for b, k in ((4, 0), (2, 5)):
        for rank in (0, "typical", "weakest"):
            assert np.array_equal(loaded.patch(b, k, rank).pixels, explained.patch(b, k, rank).pixels)
    from kmex_utils import store

    explained.save(tmp_path)  # a folder from before there were examples
    for path in tmp_path.glob("B*.safetensors"):
        tensors, made = store.load_tensors(path)
        nearest = int((tensors["nearest_index"] >= 0).sum())
        tensors["patch_sizes"] = tensors["patch_sizes"][:nearest]
        tensors["patches"] = tensors["patches"][: int(tensors["patch_sizes"].sum())]
        del tensors["nearest_examples"]
        store.save_tensors(path, tensors, made)
    older = kmex.load(tmp_path, resnet.module)
    assert np.array_equal(older.patch(2, 1, 3).pixels, explained.patch(2, 1, 3).pixels)
    assert [patch.index for patch in older.patches(4, 2)] == [patch.index for patch in explained.patches(4, 2)]
    with pytest.raises(ValueError, match="has no typical example"):
        older.patch(2, 1, "typical")
