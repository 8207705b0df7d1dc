"""What ``kmex measure`` and notebook 12 tell of one's own explanation: against naive readings of the same maps."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

import kmex_utils as kmex
from kmex_utils import cli
from kmex_utils.evaluation import faithfulness
from kmex_utils.evaluation.measured import measured
from kmex_utils.explanation.passed import Passed
from kmex_utils.explanation.refits import refitted

pytest_plugins = ("tests.fixtures_explained",)
QUICK = {"images": 2, "steps": 2, "refits": 2}


@pytest.fixture(scope="module")
def masks(photos, tmp_path_factory):
    """Sky above, and below it a left and a right half; the uppermost ten rows of pixels are nothing."""
    folder = tmp_path_factory.mktemp("masks")
    for file in photos.glob("*/*.png"):
        with Image.open(file) as image:
            width, height = image.size
        mask = np.full((height, width), 3, np.uint8)
        mask[: height // 2] = 7
        mask[height // 2 :, : width // 2] = 5
        mask[:10] = 0
        (folder / file.parent.name).mkdir(exist_ok=True)
        Image.fromarray(mask).save(folder / file.parent.name / file.name)
    return folder


@pytest.fixture(scope="module")
def tables(explained, masks):
    return measured(explained, masks, **QUICK)


def by_hand(explained, masks, b):
    """NMI_m, ARI_m and purity from every image's own mask, pixel by pixel of a lattice, with no tensor of ours."""
    asked = {}
    for split in ("train", "test"):
        prototype, part = [], []
        for i, name in enumerate(explained.dataset.split(split).names):
            mask, q_s = np.asarray(Image.open(masks / name)), explained.maps[b, split][i].numpy()
            height, width = mask.shape
            side, left, top = min(mask.shape), (width - min(mask.shape)) / 2, (height - min(mask.shape)) / 2
            for y in (np.arange(56) + 0.5) * height / 56:
                for x in (np.arange(56) + 0.5) * width / 56:
                    row, column = (y - top) / side, (x - left) / side
                    if mask[int(y), int(x)] and 0 <= row <= 1 and 0 <= column <= 1:
                        cell = [min(int(share * n), n - 1) for share, n in zip((row, column), q_s.shape, strict=True)]
                        prototype.append(q_s[tuple(cell)])
                        part.append(int(mask[int(y), int(x)]))
        asked[split] = np.array(prototype), np.array(part)
    prototype, part = asked["train"]
    means = {k: np.bincount(part[prototype == k]).argmax() for k in np.unique(prototype)}
    prototype, part = asked["test"]
    called = [means.get(k, -1) for k in prototype]
    right = np.mean([p == c for p, c in zip(part, called, strict=True)])
    return normalized_mutual_info_score(part, called), adjusted_rand_score(part, called), right


def test_fidelity_to_masks(tables, explained, masks):
    table = tables["fidelity"].set_index("explainer")
    assert list(table.index) == ["B4", "B34", "B234", "position"]
    for b, name in ((4, "B4"), (2, "B234")):
        expected = 100 * np.array(by_hand(explained, masks, b))
        np.testing.assert_allclose(table.loc[name, ["nmi", "ari", "purity"]].astype(float), expected, atol=0.01)
    assert (table.null_nmi[:3] < table.nmi[:3]).all() and (table.nmi[:3] <= table.ceiling_nmi[:3]).all()
    assert table.purity["position"] > 80, "the parts are where they are in every image"


def test_certainty_is_the_share_of_positions_that_stay(tables, explained):
    table = tables["certainty"].set_index(["explainer", "measure"])
    for b in (4, 2):
        passed, explainer = Passed.of(explained.network, explained.dataset, b), explained.explainers[b]
        kept = [
            passed.map(r, "test") == passed.map(explainer, "test") for r in refitted(passed, explainer, 2, restarts=2)
        ]
        expected = torch.stack(kept).double().mean().item()
        assert table.value[explained.name(b), "prototype"] == pytest.approx(expected, abs=1e-6)
    assert table.null["B234", "prototype"] < table.value["B234", "prototype"]


def test_faithfulness_of_held_out_images_within_the_masks(tables, explained):
    table = tables["faithfulness"].set_index(["method", "measure"])
    drawn = torch.randperm(6, generator=torch.Generator().manual_seed(0))[:2].sort().values.tolist()
    whole = faithfulness.table(explained, drawn, steps=2).set_index(["method", "measure"])
    pd.testing.assert_frame_equal(table.drop(["pointing game", "energy inside"], level=1), whole)
    # the object is all but ten of 140 rows, seen through a centre square as high as the picture
    assert table.null["B4", "energy inside"] == pytest.approx(130 / 140, abs=0.01)


def test_what_is_not_known_is_left_out(explained, masks, tmp_path):
    names = explained.dataset.test.names
    rows = "".join(f"{name},20,0,100,140\n" for name in names)
    (tmp_path / "boxes.csv").write_text("image,x,y,width,height\n" + rows)
    with_boxes = measured(explained, tmp_path / "boxes.csv", **QUICK)
    assert set(with_boxes) == {"certainty", "faithfulness"}
    shares = with_boxes["faithfulness"].set_index(["method", "measure"])["null"]
    assert shares["B4", "energy inside"] == pytest.approx(100 / 140, abs=0.02)
    assert set(measured(explained, **QUICK)["faithfulness"].measure) == {
        *(f"{way}, {fill}" for way in ("deletion", "insertion") for fill in ("mean colour", "blur")),
        "ROAD",
    }


def test_from_the_shell(explained, photos, masks, tables, tmp_path, capsys, resnet):
    with pytest.raises(ValueError, match="images are not here"):
        measured(kmex.Explained(resnet, None, explained.settings))
    kmex.explain(
        kmex.network("shufflenet_v2_x0_5", "random", image_size=64),
        photos,
        start_block=4,
        prototypes_per_class=2,
        restarts=1,
        device="cpu",
        log=lambda line: None,
    ).save(tmp_path / "saved")
    command = ["measure", str(tmp_path / "saved"), str(photos), "--device", "cpu", "--count", "2", "--steps", "2"]
    assert cli.main([*command, "--annotations", str(masks), "--refits", "2"]) == 0
    said = capsys.readouterr().out
    assert "pointing game" in said and "null_nmi" in said and "adjusted_rand" in said
    assert {file.name for file in (tmp_path / "saved").glob("*.csv")} == {
        "certainty.csv",
        "faithfulness.csv",
        "fidelity.csv",
        "table.csv",
    }
    assert cli.main([*command, "--annotations", str(tmp_path / "none.csv")]) == 2
    assert "none.csv does not exist: give a table of parts" in capsys.readouterr().err


def test_refits_there_are_used(tables, explained, monkeypatch):
    """As many as asked for are not fitted again, and give the same table."""
    explained.certainty(2, device="cpu", log=str)
    monkeypatch.setattr("kmex_utils.evaluation.measured.refitted", lambda *of, **how: pytest.fail("fitted again"))
    try:
        again = measured(explained, refits=2, images=2, steps=2, device="cpu")["certainty"]
    finally:
        explained.refits.clear()
    pd.testing.assert_frame_equal(again, tables["certainty"])
