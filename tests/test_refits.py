"""Which prototypes come out of other starts of k-means, too: against naive counts and known answers."""

import copy
import re
from itertools import permutations

import numpy as np
import pytest
import torch

import kmex_utils as kmex
from kmex_utils.explanation.refits import Refits
from kmex_utils.method.composite import Normalisation, composite

pytest_plugins = ("tests.fixtures_explained",)
EQUAL = Normalisation(scale="1")  # the default of explain()
OPTIONS = {"prototypes_per_class": 3, "held_out": 0.25, "restarts": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def sure(resnet, photos):
    """Three refits of B4, B34 and B234, and their table."""
    explained, said = kmex.explain(resnet, photos, log=str, **OPTIONS), []
    return explained, explained.certainty(3, device="cpu", log=said.append), said


def cells(explained, b, vectors, pixels):
    x = explained.network.activations(explained.network.input(pixels))
    value, index = torch.cdist(composite(x[b - 1 :], EQUAL).double(), vectors).topk(2, largest=False)
    return index[..., 0], value[..., 1] / value[..., 0] > 1.0001  # else rounding decides


@pytest.mark.parametrize("b", [4, 2])
def test_the_table_by_definition(sure, b):
    """From cells counted one by one."""
    explained, table, said = sure
    train = explained.dataset.train
    ours = explained.maps[b, "train"].flatten(1).long()
    rows = table[table.explainer == explained.name(b)].set_index("prototype")
    overlaps = []
    for vectors in explained.refits[b].vectors:
        theirs, clear = cells(explained, b, vectors.double(), train.pixels)
        assert clear.float().mean() > 0.95
        both = [set(zip(*np.nonzero((m == k).numpy()), strict=True)) for m in (ours, theirs) for k in range(6)]
        overlaps.append([len(both[k] & both[k + 6]) / max(1, len(both[k] | both[k + 6])) for k in range(6)])
        sizes = [len(part) for part in both]
    for k in range(6):
        of_k = [overlap[k] for overlap in overlaps]
        assert rows.overlap[k] == pytest.approx(np.mean(of_k), abs=0.01)
        assert rows.spread[k] == pytest.approx(np.std(of_k, ddof=1), abs=0.01)
        assert rows.exists[k] == sum(overlap > 0.5 for overlap in of_k)
        assert rows.loc[k, "class"] == ("flower", "temple")[k // 3]
    shared = sizes[0] * sizes[6] / ours.numel()
    assert explained.refits[b].chance[-1, 0] == pytest.approx(shared / (sizes[0] + sizes[6] - shared), abs=0.01)
    assert any(line.startswith(f"{explained.name(b)}: ") and "of 3 refits" in line for line in said)


def test_a_refit_is_the_fit_of_another_seed(sure, resnet):
    """The same rows clustered from the next seed, in the order of the least distance."""
    explained, _, _ = sure
    other = kmex.explain(resnet, explained.dataset, start_block=4, seed=2, log=str, **OPTIONS)
    ours, theirs = explained.explainers[4].prototypes.vectors, other.explainers[4].prototypes.vectors
    for c in (0, 1):
        part = slice(3 * c, 3 * c + 3)
        orders = [theirs[part][list(order)] for order in permutations(range(3))]
        best = min(orders, key=lambda vectors: (vectors - ours[part]).double().norm(dim=1).sum())
        torch.testing.assert_close(explained.refits[4].vectors[1, part], best)


def test_each_position_of_an_image_is_counted(sure, photos):
    explained, _, _ = sure
    picture = explained.picture(photos / "temple" / "05.png")
    for part, b in zip(explained.interpretations(picture, [4, 2]), (4, 2), strict=True):
        clear, same = torch.ones(part.map.size, dtype=torch.bool), torch.zeros(part.map.size)
        for vectors in explained.refits[b].vectors:
            theirs, sure_of = cells(explained, b, vectors.double(), picture.pixels[None])
            clear &= sure_of[0]
            same += theirs[0] == torch.from_numpy(part.map).flatten()
        assert clear.float().mean() > 0.9
        torch.testing.assert_close(torch.from_numpy(part.certainty).flatten()[clear], same[clear] / 3)
    titles = [axes.get_title() for axes in explained.panel(picture).axes]
    assert f"same in refits: {100 * part.certainty.mean():.0f} %" in titles


def test_known_clusterings():
    """The same cells: certain. One prototype in two of three refits. Cells drawn anew: chance."""
    generator = torch.Generator().manual_seed(0)
    q_s = torch.randint(4, (50, 8, 8), generator=generator)
    none = torch.zeros(3, 4, 1)
    same = Refits.of(q_s, q_s.expand(3, -1, -1, -1), none)
    assert same.exists.tolist() == [3] * 4 and (same.overlap == 1).all() and (same.kept == 1).all()
    assert same.line("B4") == "B4: 4 of 4 prototypes exist in most of 3 refits, 100 ± 0 % of positions keep theirs"
    moved = torch.where(q_s == 0, 1, q_s)  # 0 gone, 1 twice as large
    maps = Refits.of(q_s, torch.stack([q_s, q_s, moved]), none)
    assert maps.exists[[0, 2, 3]].tolist() == [2, 3, 3]
    assert maps.overlap[2, 0] == 0 and maps.overlap[2, 1] == pytest.approx(0.5, abs=0.02)
    anew = Refits.of(q_s, torch.randint(4, (3, 50, 8, 8), generator=generator), none)
    torch.testing.assert_close(anew.overlap, anew.chance, atol=0.02, rtol=0)
    assert anew.exists.tolist() == [0] * 4 and anew.chance.mean().item() == pytest.approx(1 / 7, abs=0.01)
    said = (
        r"B4: this clustering does not repeat: 0 of 4 prototypes exist in most of 3 refits, 2[456] ± \d % of positions"
    )
    assert re.match(said, anew.line("B4"))


def test_refits_are_saved_and_loaded(sure, resnet, photos, tmp_path):
    explained, _, _ = sure
    again = kmex.load(explained.save(tmp_path), copy.deepcopy(resnet.module))
    for b, refits in explained.refits.items():
        assert all(torch.equal(value, getattr(again.refits[b], name)) for name, value in vars(refits).items())
    picture = photos / "flower" / "02.png"
    parts = [e.interpretations(picture, [2])[0].certainty for e in (again, explained)]
    assert np.array_equal(*parts) and 0 < parts[0].mean() < 1
    small = kmex.load(explained.save(tmp_path, small=True), copy.deepcopy(resnet.module))
    assert torch.equal(small.refits[2].exists, explained.refits[2].exists)
    assert small.interpretations(picture, [2])[0].certainty is None
    with pytest.raises(ValueError, match="the images are not here"):
        again.certainty()


def test_edits_apply_to_refits(sure):
    """All prototypes of a class merged: a position is the same wherever it keeps its class."""
    explained, _, _ = sure
    picture = explained.picture(0)
    before = explained.interpretations(picture, [2])[0]
    try:
        explained.edits.merge(2, 0, 1, 2).merge(2, 3, 4, 5)
        part = explained.interpretations(picture, [2])[0]
        kept = torch.zeros(part.map.size)
        for vectors in explained.refits[2].vectors:
            theirs, _ = cells(explained, 2, vectors.double(), picture.pixels[None])
            kept += theirs[0] // 3 == torch.from_numpy(before.map).flatten() // 3
        assert (torch.from_numpy(part.certainty).flatten() == kept / 3).float().mean() > 0.97
        assert part.certainty.mean() >= before.certainty.mean()
    finally:
        explained.edits.undo().undo()


def test_the_same_seeds_give_the_same_table(sure):
    explained, table, _ = sure
    again = explained.certainty(3, device="cpu", log=str)
    assert again.equals(table)
    assert explained.certainty(1, device="cpu", log=str).spread.eq(0).all()
    explained.certainty(3, device="cpu", log=str)
