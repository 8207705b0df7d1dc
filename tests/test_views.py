"""Explorer, report and export: what they show and write is what the explanation says."""

import copy
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

pytest_plugins = ("tests.fixtures_explained",)


@pytest.fixture(scope="module")
def loaded(explained, resnet, tmp_path_factory):
    """The same from disk, without the photos."""
    return kmex.load(explained.save(tmp_path_factory.mktemp("saved")), resnet.module)


# --- explorer -----------------------------------------------------------------------------------------------------


def test_the_explorers_view_is_the_interpretation(explained):
    explorer = explained.explorer()
    for b in (4, 2):
        for target in ("", "flower", ("flower", "temple"), "temple"):
            view = explorer.view(3, b, target)
            (part,) = explained.interpretations(3, [b], target)
            prototypes = np.array([p["prototype"] for p in view["prototypes"]])
            assert np.array_equal(prototypes[np.array(view["map"])], part.map)
            np.testing.assert_allclose(view["attribution"], part.attribution, rtol=1e-3)
            shares = {p["prototype"]: p["share"] for p in view["prototypes"]}
            assert shares == {k: (part.map == k).mean() for k in np.unique(part.map)}
            assert sum(p["contribution"] for p in view["prototypes"]) == pytest.approx(view["total"], rel=1e-4)
            middle = (view["low"] + view["high"]) / 2
            assert middle == pytest.approx(part.attribution.mean(), rel=1e-4)
            assert view["low"] <= part.attribution.min() and part.attribution.max() <= view["high"]
            assert sum(shares.values()) == pytest.approx(1)
            for p in view["prototypes"]:
                assert (p["shared"], p["images"]) == explained.sharing(b, p["prototype"])
            json.dumps(view)
    assert view["target"] == "temple" and view["explainer"] == "B234"
    assert view["label"] == explained.classes[explained.dataset.test.labels[3]]


def test_widgets_follow_the_controls(explained):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    explorer = explained.explorer()
    assert explorer.widget is explorer.widget
    explorer.image.value = explained.names[4]
    explorer.start_block.value = 4
    explorer.target.value = "temple"
    assert explorer.panels.view == explorer.view(explained.names[4], 4, "temple")
    explorer.minus.value = "flower"
    assert explorer.panels.view == explorer.view(explained.names[4], 4, ("temple", "flower"))
    assert explorer.panels.view["target"] == "temple − flower"
    k = explorer.panels.view["prototypes"][0]["prototype"]
    explorer.panels.selected = k
    assert explorer.panels.nearest == explorer.patches(4, k) and len(explorer.panels.nearest) == 5
    explorer.image.value = explained.names[0]
    assert explorer.panels.selected == -1 and explorer.panels.nearest == []


def test_an_explanation_without_its_photos_is_explored_by_a_file(loaded, explained, photos):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    with pytest.raises(ValueError, match="the images are not here, only the prototypes"):
        loaded.explorer()
    explorer = loaded.explorer(photos / "temple" / "03.png")
    assert explorer.widget and explorer.image.options == (("03.png", ""),)
    shown = explorer.panels.view
    expected = explained.explorer().view("temple/03.png", 2)
    for word in ("map", "explainer", "predicted", "target"):
        assert shown[word] == expected[word]
    assert [p["patch"] for p in shown["prototypes"]] == [p["patch"] for p in expected["prototypes"]]
    explorer.start_block.value = 4
    assert explorer.panels.view == explorer.view("", 4) != shown


def test_a_file_stands_beside_the_images_of_the_data_set(explained, tmp_path):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    Image.new("RGB", (80, 80), "red").save(tmp_path / "new.png")
    explorer = explained.explorer(tmp_path / "new.png")
    assert explorer.widget and explorer.image.value == ""
    assert explorer.image.options[:2] == (("new.png", ""), (explained.names[0],) * 2)
    explorer.image.value = explained.names[0]
    assert explorer.panels.view["name"] == explained.names[0]
    explorer.image.value = ""
    assert explorer.panels.view["name"] == "new.png" and explorer.panels.view["label"] == ""


def test_where_there_are_no_widgets_a_still_view_says_what_to_install(explained, monkeypatch):
    display = pytest.importorskip("IPython.display", reason="shown in a notebook only")
    shown = []
    monkeypatch.setattr(display, "display", lambda *views: shown.extend(views))
    explained.explorer()._ipython_display_()
    assert "still view" in shown[0].data and len(shown) == 2
    shown.clear()
    monkeypatch.setitem(sys.modules, "anywidget", None)
    explained.explorer()._ipython_display_()
    (still,) = shown
    assert "data:image/png;base64," in still.data and "anywidget: pip install" in still.data


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
