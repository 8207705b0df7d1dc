"""Explorer, report and export: what they show and write is what the explanation says."""

import base64
import copy
import io
import json
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import kmex_utils as kmex
from kmex_utils.explanation.explorer import about, patches, prototype, view
from kmex_utils.explanation.refits import Refits

pytest_plugins = ("tests.fixtures_explained",)


@pytest.fixture(scope="module")
def loaded(explained, resnet, tmp_path_factory):
    """The same from disk, without the photos."""
    return kmex.load(explained.save(tmp_path_factory.mktemp("saved")), resnet.module)


# --- explorer -----------------------------------------------------------------------------------------------------


def test_the_explorers_view_is_the_interpretation(explained):
    for b in (4, 2):
        for target in ("", "flower", ("flower", "temple"), "temple"):
            shown = view(explained, 3, b, target)
            (part,) = explained.interpretations(3, [b], target)
            prototypes = np.array([p["prototype"] for p in shown["prototypes"]])
            assert np.array_equal(prototypes[np.array(shown["map"])], part.map)
            np.testing.assert_allclose(shown["attribution"], part.attribution, rtol=1e-3)
            shares = {p["prototype"]: p["share"] for p in shown["prototypes"]}
            assert shares == {k: (part.map == k).mean() for k in np.unique(part.map)}
            assert sum(p["contribution"] for p in shown["prototypes"]) == pytest.approx(shown["total"], rel=1e-4)
            middle = (shown["low"] + shown["high"]) / 2
            assert middle == pytest.approx(part.attribution.mean(), rel=1e-4)
            assert shown["low"] <= part.attribution.min() and part.attribution.max() <= shown["high"]
            assert sum(shares.values()) == pytest.approx(1)
            for p in shown["prototypes"]:
                assert (p["shared"], p["images"]) == explained.sharing(b, p["prototype"])
            json.dumps(shown)
    assert shown["target"] == "temple" and shown["explainer"] == "B234"
    assert shown["label"] == explained.classes[explained.dataset.test.labels[3]]
    scores = explained.network.outputs(explained.network.input(explained.picture(3).pixels[None]))[1]
    assert shown["predicted"] == explained.network.classes[int(scores.argmax())]


def pixels(url):
    """Of a data URL."""
    with Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_the_image_is_shown_at_its_own_resolution_with_the_part_that_is_seen(explained, photos, tmp_path):
    shown = view(explained, 0, 2)
    with Image.open(photos / shown["name"]) as image:
        assert abs(pixels(shown["image"]) - np.asarray(image)).mean() < 6, "the file, not the network's 64 pixels"
    assert shown["box"] == [10 / 160, 0, 150 / 160, 1], "of 160 x 140 pixels the centre square"
    photo = np.zeros((100, 200, 3), np.uint8)
    photo[:, 50:150] = 200  # all that a centre crop sees
    Image.fromarray(photo).save(tmp_path / "wide.png")
    wide = view(explained, tmp_path / "wide.png", 2)
    assert wide["box"] == [0.25, 0, 0.75, 1] and pixels(wide["image"]).shape == (100, 200, 3)
    Image.new("RGB", (1000, 2000)).save(tmp_path / "tall.png")
    assert pixels(view(explained, tmp_path / "tall.png", 2)["image"]).shape == (1024, 512, 3)


def test_prototypes_with_their_patches(explained):
    for k in (0, 4):
        shown = patches(explained, 2, k)
        assert [p["word"] for p in shown] == ["nearest", "2", "3", "4", "5", "typical", "weakest"]
        for p, rank in zip(shown, [0, 1, 2, 3, 4, "typical", "weakest"], strict=True):
            assert abs(pixels(p["url"]) - explained.patch(2, k, rank).pixels).mean() < 8
    assert prototype(explained, 2, 4)["class"] == "temple" and prototype(explained, 2, 4)["exists"] == ""
    edited = copy.copy(explained)
    edited.refits = {
        2: Refits(torch.empty(2, 0, 0), torch.tensor([[0.6] * 6, [0.2] * 6]), torch.zeros(2, 6), torch.ones(2))
    }
    assert prototype(edited, 2, 4)["exists"] == "1 of 2"


def test_where_refits_are_known_the_view_says_how_sure_each_position_is(explained, monkeypatch):
    """Of two refits one is the fit itself, in the other every prototype has another's place."""
    vectors = explained.explainers[2].prototypes.vectors
    swapped = vectors.roll(1, 0)
    refits = Refits(torch.stack([vectors, swapped]), torch.ones(2, 6), torch.zeros(2, 6), torch.tensor([1.0, 0.0]))
    assert view(explained, 0, 2)["certainty"] is None
    monkeypatch.setattr(explained, "refits", {2: refits})
    explained._kept.cache_clear()
    try:
        certainty = view(explained, 0, 2)["certainty"]
        assert certainty == [[0.5] * len(row) for row in certainty] and view(explained, 0, 4)["certainty"] is None
        monkeypatch.setattr(explained, "cautions", lambda: {2: "B234 is right on few"})
        assert about(explained)["notes"]["B234"][0] == "B234 is right on few"
        assert about(explained)["notes"]["B234"][-1].startswith("B234: 6 of 6 prototypes exist in most of 2 refits")
    finally:
        explained._kept.cache_clear()


def test_the_widget_follows_its_choice(explained):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    explorer = explained.explorer()
    widget = explorer.widget
    assert explorer.widget is widget and widget.view == view(explained, 0, 2)

    def choose(**changes):
        widget.choice = widget.choice | changes

    choose(image=4, start_block=4, target="temple")
    assert widget.view == view(explained, explained.names[4], 4, "temple")
    choose(minus="flower")
    assert widget.view == view(explained, explained.names[4], 4, ("temple", "flower"))
    assert widget.view["target"] == "temple − flower"
    k = widget.view["prototypes"][0]["prototype"]
    widget.selected = k
    assert widget.gallery == patches(explained, 4, k) and len(widget.gallery) == 7
    choose(image=0)
    assert widget.selected == -1 and widget.gallery == []
    widget.wanted = [2, 5]
    assert set(widget.thumbnails) == {"2", "5"}
    assert abs(pixels(widget.thumbnails["5"]) - explained.picture(5).rgb).mean() < 6


def test_what_images_are_filtered_by(explained, resnet, photos, tmp_path):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    rows = explained.explorer().widget.images
    assert [row["name"] for row in rows] == list(explained.names)
    for i, row in enumerate(rows):
        assert row["label"] == row["name"].split("/")[0]
        assert row["said"]["network"] == view(explained, i, 4)["predicted"]
        assert row["said"]["B4"] == view(explained, i, 4)["explainer_predicted"]
        assert row["said"]["B234"] == view(explained, i, 2)["explainer_predicted"]
    later = kmex.load(explained.save(tmp_path), resnet.module, photos).explorer()
    assert later.widget.images == [{"name": name} for name in explained.names], "a pass of all images is not for free"
    later.widget.predict = True
    assert later.widget.images == rows


def test_an_explanation_without_its_photos_is_explored_by_a_file(loaded, explained, photos):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    with pytest.raises(ValueError, match="the images are not here, only the prototypes"):
        loaded.explorer()
    explorer = loaded.explorer(photos / "temple" / "03.png")
    assert explorer.widget.images == [{"name": "03.png"}]
    shown, expected = explorer.widget.view, view(explained, "temple/03.png", 2)
    for word in ("map", "explainer", "predicted", "target", "image"):
        assert shown[word] == expected[word]
    assert [p["patch"] for p in shown["prototypes"]] == [p["patch"] for p in expected["prototypes"]]
    explorer.widget.choice = explorer.widget.choice | {"start_block": 4}
    assert explorer.widget.view == view(loaded, photos / "temple" / "03.png", 4) != shown


def test_a_file_stands_beside_the_images_of_the_data_set(explained, tmp_path):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    Image.new("RGB", (80, 80), "red").save(tmp_path / "new.png")
    widget = explained.explorer(tmp_path / "new.png").widget
    assert widget.choice["image"] == 0 and [row["name"] for row in widget.images] == ["new.png", *explained.names]
    assert widget.images[1]["label"] == explained.names[0].split("/")[0]
    widget.choice = widget.choice | {"image": 1}
    assert widget.view["name"] == explained.names[0]
    widget.choice = widget.choice | {"image": 0}
    assert widget.view["name"] == "new.png" and widget.view["label"] == ""


def test_a_still_view_stands_where_the_widget_does_not_run(explained, monkeypatch):
    display = pytest.importorskip("IPython.display", reason="shown in a notebook only")
    shown = []
    monkeypatch.setattr(display, "display", lambda *views, **options: shown.extend(views))
    explained.explorer()._ipython_display_()
    still, widget = shown
    name = re.search(r'id="(kmex-still-\w+)"', still.data)[1]
    assert "still view" in still.data and f"has(#{name}) + " in still.data, "what follows is out of sight"
    assert "application/vnd.jupyter.widget-view+json" in widget and widget["text/plain"] == ""
    shown.clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    explained.explorer()._ipython_display_()
    (still,) = shown
    assert "data:image/png;base64," in still.data and "anywidget: pip install" in still.data


# --- the explorer as a page ---------------------------------------------------------------------------------------


def data_of(path):
    """What a page holds."""
    return json.loads(re.search('<script type="application/json" id="data">(.*?)</script>', path.read_text())[1])


def test_a_page_holds_the_views(explained, tmp_path):
    path = explained.page(tmp_path / "p.html", [0, 3, "temple/03.png"], ("flower", "temple"))
    data = data_of(path)
    assert not re.search(r"""(src|href)\s*=\s*["']""", path.read_text()), "nothing is loaded"
    for i, image in enumerate([0, 3, "temple/03.png"]):
        for b in (4, 3, 2):
            shown, expected = data["views"][i][str(b)], view(explained, image, b, ("flower", "temple"))
            known = data["prototypes"][str(b)]
            for word in ("name", "map", "attribution", "low", "high", "total", "target", "predicted", "label"):
                assert shown[word] == expected[word]
            for p, of in zip(shown["prototypes"], expected["prototypes"], strict=True):
                full = p | known[str(p["prototype"])]
                assert {key: full[key] for key in of if key != "patch"} == {k: v for k, v in of.items() if k != "patch"}
                gallery = [patch["word"] for patch in full["gallery"]]
                assert gallery == ["nearest", "2", "3", "4", "5", "typical", "weakest"]
        assert data["images"][i]["said"]["B234"] == data["views"][i]["2"]["explainer_predicted"]
        assert abs(pixels(data["thumbnails"][i]) - pixels(view(explained, image, 2)["image"])).mean() < 6
    with pytest.raises(FileExistsError, match="p.html exists"):
        explained.page(path)


def test_a_page_of_so_many_images_takes_them_from_the_held_out_ones(explained, loaded, tmp_path):
    names = [row["name"] for row in data_of(explained.page(tmp_path / "p.html", 3))["images"]]
    assert names == [explained.names[i] for i in (0, 2, 5)], "evenly over the six"
    assert len(data_of(explained.page(tmp_path / "all.html"))["images"]) == 6
    with pytest.raises(ValueError, match="there are no images to show: give images"):
        loaded.page(tmp_path / "none.html")


def test_a_page_within_its_bound(explained, tmp_path):
    whole = explained.page(tmp_path / "p.html", [0, 1, 2, 3]).stat().st_size
    shown, counts = [], []
    for bound in np.linspace(whole, 100_000, 12).astype(int):
        path = explained.page(tmp_path / "p.html", [0, 1, 2, 3], max_bytes=int(bound), overwrite=True)
        data, said = data_of(path), re.search(r"(\d) more images are left out", path.read_text())
        assert path.stat().st_size <= bound
        shown.append(len(data["images"]))
        assert shown[-1] == 4 - (int(said[1]) if said else 0)
        counts.append({len(p["gallery"]) for of in data["prototypes"].values() for p in of.values()})
        for b in ("2", "3", "4"):
            used = {str(p["prototype"]) for views in data["views"] for p in views[b]["prototypes"]}
            assert set(data["prototypes"][b]) == used, "prototypes of images left out are left out"
    assert shown == sorted(shown, reverse=True) and shown[0] == 4 and shown[-1] < 4
    assert [counts[0], counts[-1]] == [{7}, {4}], "nearest patches first, typical and weakest stay"
    assert all(of == {4} for of, n in zip(counts, shown, strict=True) if n < 4), "smaller patches before fewer images"
    with pytest.raises(ValueError, match=r"a page of one image takes [\d,]+ bytes, more than max_bytes = 9,000"):
        explained.page(tmp_path / "p.html", [0], max_bytes=9_000, overwrite=True)


def test_names_cannot_be_markup_of_a_page(explained, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    of = copy.copy(explained)
    of.classes = (evil, "temple")
    path = of.page(tmp_path / "p.html", 2, title=evil)
    assert evil not in path.read_text() and path.read_text().count("</script>") == 2
    assert evil in {row["label"] for row in data_of(path)["images"]} | {data_of(path)["about"]["classes"][0]}


# --- report -------------------------------------------------------------------------------------------------------


def test_report_is_one_file_within_its_bound(explained, tmp_path):
    path = explained.report(tmp_path / "r.html", [0, explained.names[1]])
    page = path.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:|#)""", page) and "url(" not in page and "@import" not in page
    assert page.count("<img") == 4 + 3 * 3 * 6, "two panels from two blocks, three patches of each prototype"
    assert 'name="viewport"' in page and "max-width" in page
    for cell in ("CNN", "KMEx (K/C=3)", "B234", "flower", "temple", explained.names[1], "held_out"):
        assert cell in page
    assert "18 images of\n2 classes, with 6 images held out" in page
    with pytest.raises(FileExistsError, match=r"r.html exists"):
        explained.report(path)
    small = path.stat().st_size - 15_000
    explained.report(path, [0, 1], max_bytes=small, overwrite=True)
    assert path.stat().st_size <= small
    with pytest.raises(ValueError, match="more than max_bytes = 5,000: choose fewer panels"):
        explained.report(path, [0], max_bytes=5_000, overwrite=True)


def test_the_report_shows_the_table_and_the_settings(explained, tmp_path):
    page = explained.report(tmp_path / "r.html").read_text()
    cells = {row[0]: row[1:] for row in (re.findall("<td>(.*?)</td>", line) for line in page.splitlines()) if row}
    for model, row in explained.table.iterrows():
        expected = ["–" if np.isnan(v) else f"{v:.{1 if '%' in name else 2}f}" for name, v in row.items()]
        assert cells[model] == expected
    assert "<th>restarts</th><td>2</td>" in page and "<th>mean</th><td>0.485, 0.456, 0.406</td>" in page
    assert str(explained.settings["folder"]) not in page, "paths of the machine it was made on are not sent"


def test_what_does_not_fit_is_left_out_and_said(explained, tmp_path):
    whole = explained.report(tmp_path / "r.html").stat().st_size
    shown = []
    for bound in range(6_000, whole, whole // 12):
        path = explained.report(tmp_path / "r.html", max_bytes=bound, overwrite=True)
        page = path.read_text()
        shown.append(page.count(" images)</summary>"))
        said = re.search(r"(\d) more classes are left out to keep this file small", page)
        assert path.stat().st_size <= bound and shown[-1] == 2 - (int(said[1]) if said else 0)
    assert shown == sorted(shown) and set(shown) == {0, 1, 2}


def test_the_report_needs_no_photos(loaded, explained, tmp_path):
    """Without them the same patches; what is counted in images is left out."""
    pages = [e.report(tmp_path / f"{i}.html").read_text() for i, e in enumerate((loaded, explained))]
    patches = [re.findall(r'src="(.*?)"', page) for page in pages]
    assert patches[0] == patches[1] and len(patches[0]) == 3 * 3 * 6
    assert "images held out" in pages[1] and "images held out" not in pages[0]
    assert "taken for" in pages[1] and "taken for" not in pages[0]


def test_the_reports_index_leads_to_classes_and_their_mistakes(explained, tmp_path):
    page = explained.report(tmp_path / "r.html").read_text()
    said, table = explained.predictions(), explained.by_class()
    for i, (name, row) in enumerate(table.iterrows(), 1):
        (line,) = re.findall(rf'<tr><td><a href="#c{i}">{name}</a></td>\n(.*)<td class="words">(.*?)</td>', page)
        numbers = [f"{value:.0f}" for value in row[["images", "network", "B4", "B34", "B234"]]]
        assert re.findall("<td>(.*?)</td>", line[0]) == numbers and line[1] == row["taken for"]
        part = page.split(f'<div id="c{i}">')[1].split("<h3>B4</h3>")[0]
        lists = []
        for model in ("network", "B4", "B34", "B234"):
            wrong = said[(said.label == name) & (said[model] != name)]
            assert not len(wrong) or f"{model} {len(wrong)}" in part
            named = [f"{image.split('/')[-1]} ({other})" for image, other in wrong[model].items()]
            lists += [f"{model}: {', '.join(named)}"] if named else []
        assert re.findall("<p>(.*?)</p>", part) == lists


def test_the_reports_prototypes_say_how_they_are_used(explained, tmp_path):
    explained.edits.rename(2, 4, "<dome>").disable(2, 3)
    try:
        page = explained.report(tmp_path / "r.html").read_text()
        table = explained.gallery(2)
    finally:
        explained.edits.undo().undo()
    (block,) = re.findall(r"<h3>B234</h3>(.*?)</details>", page.split('<div id="c2">')[1], re.DOTALL)
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", block)
    assert sorted(caption[0] for caption in captions) == ["4", "5"]
    for caption in captions:
        k = int(caption[0])
        use = table.loc[k]
        assert caption.startswith(f"{k}{' “&lt;dome&gt;”' if k == 4 else ''}: in ")
        assert f"; right {use.right}, wrong {use.wrong}" in caption
        assert ("near-copy of" in caption) == (use.copy_distance < 0.25)
        shared = f"; shared: {use.most:.0f} % in flower, {100 - use.elsewhere:.0f} % here"
        assert (shared in caption) == (use.most >= 50) == ("shared" in caption)


def test_a_report_of_refits_says_whether_prototypes_exist(explained, tmp_path):
    explained.certainty(2, device="cpu", log=str)
    try:
        page = explained.report(tmp_path / "r.html").read_text()
        for b, refits in explained.refits.items():
            assert f"<li>{refits.line(explained.name(b))}</li>" in page
            for k in range(6):
                assert f"exists in {refits.exists[k]} of 2 refits" in page
        assert page.count(" of 2 refits</figcaption>") == 18
    finally:
        explained.refits.clear()


def test_a_name_from_the_folder_cannot_be_markup(explained, tmp_path):
    path = explained.report(tmp_path / "r.html", title="<script>alert(1)</script>")
    assert "<script>" not in path.read_text()


# --- export -------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(photos, tmp_path):
    """Images to export: of both classes, one that cannot be read."""
    folder = tmp_path / "in"
    for file in sorted(photos.rglob("*.png"))[::3]:
        (folder / file.parent.name).mkdir(parents=True, exist_ok=True)
        (folder / file.parent.name / file.name).write_bytes(file.read_bytes())
    (folder / "bad.jpg").write_bytes(b"")
    return folder


def test_export(explained, mixed, tmp_path):
    said = []
    out = explained.export(tmp_path / "out", mixed, batch_size=3, device="cpu", log=said.append)
    table = pd.read_parquet(out / "images.parquet").set_index("file")
    segments = pd.read_parquet(out / "segments.parquet")
    assert len(table) == 9 and table.error.notna().sum() == 1 and table.loc["bad.jpg", "error"] == "zero bytes"
    assert said == ["cannot read bad.jpg: zero bytes", "1 of 9 images cannot be read and are left out"]
    for name in table.index[table.error.isna()]:
        parts = explained.interpretations(mixed / name, [4, 2])
        with np.load(out / "maps" / f"{name}.npz") as maps:
            for part in parts:
                assert np.array_equal(maps[part.name], part.map)
                np.testing.assert_allclose(maps[f"attribution_{part.name}"], part.attribution, rtol=1e-3, atol=1e-5)
                assert table.loc[name, part.name] == part.predicted
                rows = segments[(segments.file == name) & (segments.explainer == part.name)]
                assert rows.share.sum() == pytest.approx(1)
                for row in rows.itertuples():
                    segment = part.map == row.prototype
                    assert row.share == pytest.approx(segment.mean())
                    assert row.attribution == pytest.approx(part.attribution[segment].mean(), rel=1e-3, abs=1e-5)
                j = int(table.loc[name, "predicted_index"])
                score = table.loc[name, "score"] - float(explained.network.b[j])
                assert rows.contribution.sum() == pytest.approx(score, rel=1e-4, abs=1e-5), "the score less its bias"
    assert pq.read_schema(out / "images.parquet").field("predicted_index").type == "int64"
    with pytest.raises(FileExistsError, match="out exists: choose another folder, or give resume=True"):
        explained.export(out, mixed)
    with pytest.raises(ValueError, match="of other images or settings"):
        explained.export(out, mixed, batch_size=4, resume=True)


def test_an_export_of_a_contrast(explained, mixed, tmp_path):
    """The first class minus the second, and their scores less the biases."""
    out = explained.export(tmp_path / "out", mixed, target=("temple", 0), device="cpu", log=str)
    table = pd.read_parquet(out / "images.parquet").set_index("file")
    sums = pd.read_parquet(out / "segments.parquet").groupby(["file", "explainer"]).contribution.sum()
    for name in table.index[table.error.isna()]:
        flower, temple = explained.seen(explained.picture(mixed / name)).y[0] - explained.network.b
        assert sums[name].tolist() == pytest.approx([float(temple - flower)] * 3, rel=1e-3, abs=1e-4)
        a, b = (explained.interpretations(mixed / name, [2], target=t)[0].attribution for t in (1, 0))
        with np.load(out / "maps" / f"{name}.npz") as maps:
            np.testing.assert_allclose(maps["attribution_B234"], a - b, rtol=1e-3, atol=1e-5)
        assert table.target[name] == "temple − flower"
    with pytest.raises(ValueError, match="target must be a class, or two of which the second is subtracted, got 3"):
        explained.export(tmp_path / "three", mixed, target=(0, 1, 0))
    assert not (tmp_path / "three").exists()


def test_a_killed_export_continues(explained, mixed, tmp_path, monkeypatch):
    whole = explained.export(tmp_path / "whole", mixed, batch_size=2, device="cpu", log=str)
    calls = []
    outputs = explained.network.outputs

    def killed(x):
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return outputs(x)

    monkeypatch.setattr(explained.network, "outputs", killed)
    moved = []
    monkeypatch.setattr(explained.network, "to", lambda device: moved.append(str(device)))
    with pytest.raises(KeyboardInterrupt):
        explained.export(tmp_path / "parts", mixed, batch_size=2, device="cpu", log=str)
    assert not (tmp_path / "parts" / "images.parquet").exists()
    assert moved == ["cpu", "cpu"], "to the device, and back in spite of the kill"
    explained.export(tmp_path / "parts", mixed, batch_size=2, device="cpu", log=str, resume=True)
    assert len(calls) == 6, "two batches before the kill, one killed, three after"
    for table in ("images", "segments"):
        pd.testing.assert_frame_equal(*(pd.read_parquet(f / f"{table}.parquet") for f in (whole, tmp_path / "parts")))
    assert not (tmp_path / "parts" / "parts").exists()


def test_an_export_of_other_weights_is_not_continued(explained, mixed, tmp_path):
    explained.export(tmp_path / "out", mixed, maps="none", device="cpu", log=str)
    other = copy.copy(explained)
    other.settings = json.loads(json.dumps(explained.settings))
    explained.export(tmp_path / "out", mixed, maps="none", device="cpu", log=str, resume=True)
    module = copy.deepcopy(explained.network.module)
    with torch.no_grad():
        module.fc.bias += 1
    other.network = kmex.network(module, classes=["flower", "temple"], image_size=64)
    with pytest.raises(ValueError, match="of other images or settings"):
        other.export(tmp_path / "out", mixed, maps="none", device="cpu", log=str, resume=True)


def test_maps_as_png(explained, mixed, tmp_path):
    out = explained.export(tmp_path / "out", mixed, maps="png", device="cpu", log=str)
    table = pd.read_parquet(out / "images.parquet").set_index("file")
    name = table.index[1]
    (part,) = explained.interpretations(mixed / name, [2])
    with Image.open(out / "maps" / f"{name}.B234.png") as image:
        assert np.array_equal(np.asarray(image), part.map)
    with Image.open(out / "maps" / f"{name}.B234.attribution.png") as image:
        limit = table.loc[name, "attribution_limit"]
        values = (np.asarray(image) / 65535 - 0.5) * 2 * limit
    np.testing.assert_allclose(values, part.attribution, atol=limit * 1e-4)


def test_a_loaded_explanation_exports_the_same(explained, loaded, mixed, tmp_path):
    folders = [e.export(tmp_path / n, mixed, device="cpu", log=str) for n, e in (("a", explained), ("b", loaded))]
    for table in ("images", "segments"):
        pd.testing.assert_frame_equal(*(pd.read_parquet(folder / f"{table}.parquet") for folder in folders))


def test_export_names_what_is_missing():
    code = "import sys; sys.modules['pyarrow'] = None; import kmex_utils.explanation.export"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith("ImportError: Parquet tables need pyarrow, which is not installed")
