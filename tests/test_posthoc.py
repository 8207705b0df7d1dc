"""From a folder to panels, table, report and export: against the notebooks' own path, and with bad input."""

import copy
import json
import re
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from kmex_utils import explained as explained_module
from kmex_utils import images, posthoc
from kmex_utils.activations import keep
from kmex_utils.composite import composite
from kmex_utils.interpretation import interpret
from kmex_utils.measures import cosine_alignment
from kmex_utils.networks import network

SIZE = 64


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Real photographs cut into pieces: two classes."""
    from sklearn.datasets import load_sample_images

    root = tmp_path_factory.mktemp("photos")
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (root / name).mkdir()
        for i, (row, column) in enumerate(np.ndindex(3, 4)):
            part = photo[140 * row : 140 * row + 140, 160 * column : 160 * column + 160]
            Image.fromarray(part).save(root / name / f"{i:02d}.png")
    return root


@pytest.fixture(scope="module")
def resnet():
    from torchvision.models import resnet18

    torch.manual_seed(0)
    return network(resnet18(num_classes=2), classes=["flower", "temple"], image_size=SIZE)


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def explained(resnet, photos, said):
    options = {"prototypes_per_class": 3, "held_out": 0.25, "restarts": 2, "device": "cpu", "report": said.append}
    return posthoc.explain(resnet, photos, **options)


def test_the_folder_is_read_and_split(explained, photos):
    dataset = explained.dataset
    assert dataset.classes == ("flower", "temple") and (len(dataset.train), len(dataset.test)) == (18, 6)
    assert not set(dataset.train.names) & set(dataset.test.names)
    with Image.open(photos / dataset.test.names[0]) as image:
        expected = image.crop((10, 0, 150, 140)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    assert np.abs(dataset.test.rgb(0).astype(int) - np.asarray(expected)).mean() < 1


def test_what_is_assumed_is_said(explained, said):
    assert explained.network.assumed == ("mean", "std")
    assert said[0] == f"images enter ResNet as {explained.network.preprocessing()}" and "assumed" in said[0]


def test_panels_are_figure_1s(explained):
    """The cached way gives what the notebooks' function computes from scratch."""
    for i in (0, 7):
        picture = explained.picture(i)
        ours = explained.interpretations(i, [4, 3, 2])
        theirs = interpret(explained.network, explained.dataset, explained.explainers, picture.pixels, [4, 3, 2])
        for a, b in zip(ours, theirs, strict=True):
            assert (a.name, a.predicted) == (b.name, b.predicted) and np.array_equal(a.map, b.map)
            np.testing.assert_allclose(a.attribution, b.attribution, rtol=1e-3, atol=1e-5)
            for p, q in zip(a.patches, b.patches, strict=True):
                assert (p.prototype, p.class_name, p.image, p.share) == (q.prototype, q.class_name, q.image, q.share)
                assert np.array_equal(p.pixels, q.pixels)
    assert len(explained.panel(0).axes) > 10


def test_an_image_from_anywhere_is_the_same(explained, photos):
    name = explained.names[2]
    inside = explained.picture(name)
    with Image.open(photos / name) as image:
        again = [explained.picture(photos / name), explained.picture(image), explained.picture(np.asarray(image))]
    assert again[0].split == inside.split == "test"
    for other in again:
        assert np.array_equal(other.pixels, inside.pixels)
    a, b = explained.seen(inside), explained.seen(again[1])
    assert again[1].split == "" and all(torch.equal(a.maps[s], b.maps[s]) for s in a.maps)
    torch.testing.assert_close(a.y, b.y, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="neither a file nor an image of"):
        explained.picture("nowhere.png")
    with pytest.raises(IndexError, match="index of the 24 images, got 24"):
        explained.picture(24)
    with pytest.raises(ValueError, match="target must be a class of ResNet, got 'dog': flower, temple"):
        explained.panel(0, target="dog")
    with pytest.raises(ValueError, match="start blocks run from 2 to 4, got 1"):
        explained.panel(0, [1])


def test_an_open_image_is_treated_as_its_file(explained, tmp_path):
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (60, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(pixels).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 100).save(tmp_path / "16.png")
    for file in sorted(tmp_path.iterdir()):
        with Image.open(file) as image:
            assert np.array_equal(explained.picture(image).pixels, explained.picture(file).pixels), file.name
    for array in (pixels / 255, pixels.astype(np.int64), pixels.transpose(2, 0, 1)):
        with pytest.raises(ValueError, match=r"an array must be uint8 \[H, W, 3\] with values 0 … 255, got"):
            explained.picture(array)


@pytest.mark.parametrize("free", [10**12, 0])
def test_what_does_not_fit_in_memory(resnet, photos, explained, tmp_path, monkeypatch, free):
    """From temporary files, or computed anew, the result is the same; the files are gone afterwards."""
    monkeypatch.setattr(posthoc, "IN_MEMORY", 0)
    monkeypatch.setattr(posthoc.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    said, made = [], []
    monkeypatch.setattr(posthoc, "keep", lambda *a, **k: made.append(a[4]) or keep(*a, **k))
    options = {"prototypes_per_class": 3, "held_out": 0.25, "restarts": 2, "device": "cpu"}
    found = posthoc.explain(resnet, photos, start_block=4, scratch=tmp_path, report=said.append, **options)
    assert made == ["disk" if free else "nowhere"] and not list(tmp_path.iterdir())
    assert any("computed anew whenever they are read" in line for line in said) is (not free)
    torch.testing.assert_close(found.explainers[4].prototypes.vectors, explained.explainers[4].prototypes.vectors)
    for split in ("train", "test"):
        torch.testing.assert_close(found.y[split], explained.y[split])
    with pytest.raises(FileNotFoundError, match="scratch must be a folder that exists"):
        posthoc.explain(resnet, photos, scratch=tmp_path / "nowhere", **options)


def test_patches_are_kept_within_a_bound(explained, monkeypatch):
    monkeypatch.setattr(explained_module, "KEPT_PATCHES", 2)
    explained._patches.clear()
    drawn = [explained.patch(4, k).pixels for k in range(4)]
    assert len(explained._patches) == 2 and np.array_equal(explained.patch(4, 0).pixels, drawn[0])


def test_what_the_network_knows_of_the_folders_classes(explained):
    def of(named, network, folder):
        network = type("Network", (), {"named": named, "classes": network})
        dataset = type("Dataset", (), {"classes": folder})
        found = posthoc.network_classes(
            type("Found", (), {"network": network, "dataset": dataset, "predictions_as_labels": False})
        )
        return None if found is None else found.tolist()

    assert of(True, ("0", "1", "2"), ("2", "0")) == [2, 0]
    assert of(False, ("0", "1", "2"), ("2", "0")) is None, "numbers made up for unknown names name nothing"
    assert of(True, ("Maine Coon", "cat"), ("cat", "maine_coon")) == [1, 0]
    assert of(True, ("crane (0)", "cat", "crane (2)"), ("cat", "crane")) is None
    assert of(True, ("Crane", "cat", "crane"), ("cat", "crane")) is None


def test_an_interrupted_computation_leaves_the_network_on_the_cpu(resnet, photos, monkeypatch):
    moved = []
    monkeypatch.setattr(type(resnet), "to", lambda self, device: moved.append(str(device)) or self)
    monkeypatch.setattr(posthoc, "classwise", lambda *a, **k: moved.clear() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        posthoc.explain(resnet, photos, device="cpu", start_block=4, prototypes_per_class=2, report=str)
    assert moved == ["cpu"] and not resnet.classifier._forward_hooks


def test_the_table_by_definition(explained):
    dataset, table = explained.dataset, explained.table
    x = {s: dataset.normalise(dataset.split(s).pixels) for s in ("train", "test")}
    with torch.no_grad():
        outputs = {s: explained.network.outputs(x[s]) for s in x}
    z = {s: outputs[s][0][-1].mean((2, 3)) for s in x}
    names = ["images of the prototypes", "held out"]
    for s, name in zip(x, names, strict=True):
        right = outputs[s][1].argmax(1) == dataset.split(s).labels
        assert table.loc["CNN", f"accuracy, {name} (%)"] == pytest.approx(100 * right.double().mean().item())
        p = explained.kmex[3].prototypes
        nearest = p.labels[torch.cdist(z[s], p.vectors).argmin(1)] == dataset.split(s).labels
        assert table.loc["KMEx (K/C=3)", f"accuracy, {name} (%)"] == pytest.approx(100 * nearest.double().mean().item())
    cosines = cosine_alignment(z["train"], dataset.train.labels, explained.network.c, torch.arange(2))
    assert table.loc["CNN", ["cosine, class", "cosine, out"]].tolist() == pytest.approx(cosines, abs=1e-4)
    assert set(table.index) == {"CNN", "KMEx (K/C=1)", "KMEx (K/C=3)", "B4", "B34", "B234"}


def test_nearest_patches_and_sharing_by_definition(explained):
    train = explained.dataset.train
    with torch.no_grad():
        x = explained.network.activations(explained.dataset.normalise(train.pixels))
    q = composite(x[1:])
    prototypes = explained.explainers[2].prototypes
    for k in range(len(prototypes)):
        own = torch.nonzero(train.labels == prototypes.labels[k]).flatten()
        distance = (q[own] - prototypes.vectors[k]).norm(dim=2)
        order = distance.min(1).values.sort()
        images, positions = (found[k] for found in explained.nearest[2])
        found = (q[images, positions] - prototypes.vectors[k]).norm(dim=1)
        torch.testing.assert_close(found, order.values[:5], rtol=1e-3, atol=1e-6)
        assert len(images.unique()) == 5
        used = (explained.maps[2, "train"][own] == k).flatten(1).any(1).sum()
        assert explained.sharing(2, k) == (int(used), len(own))
    assert len(explained.patches(2, 0)) == 5


def test_without_labels_predictions_stand_in(resnet, photos, tmp_path):
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        (tmp_path / f"{i}.png").write_bytes(file.read_bytes())
    said = []
    resnet = copy.deepcopy(resnet)
    with torch.no_grad():  # a head that splits these images about in half
        z = [resnet.activations(images_of(resnet, tmp_path))[-1].mean((2, 3))][0]
        resnet.classifier.weight[0], resnet.classifier.bias[:] = 0, 0
        direction = torch.linalg.svd(z - z.mean(0), full_matrices=False).Vh[0]
        resnet.classifier.weight[1] = direction
        resnet.classifier.bias[1] = -(z @ direction).median()
    found = posthoc.explain(
        resnet, tmp_path, prototypes_per_class=2, restarts=1, device="cpu", report=said.append, start_block=4
    )
    assert any("the predictions of ResNet stand in for them" in line for line in said), said
    for split in ("train", "test"):
        names = [found.dataset.classes[c] for c in found.dataset.split(split).labels]
        assert names == [resnet.classes[j] for j in found.y[split].argmax(1)]
    assert "agreement, held out (%)" in found.table and found.settings["predictions_as_labels"]
    with torch.no_grad():
        resnet.classifier.bias[1] = 1e6
    with pytest.raises(ValueError, match="puts 20 of 20 images into one class .temple. and no second class"):
        posthoc.explain(resnet, tmp_path, prototypes_per_class=2, device="cpu")


def images_of(network, folder):
    found = images.load(folder, SIZE, mean=network.mean, std=network.std, held_out=0)
    return found.normalise(found.train.pixels)


def test_where_eq_11_does_not_hold(photos):
    said = []
    found = network("mobilenet_v3_small", "random", image_size=SIZE)
    explained = posthoc.explain(
        found, photos, prototypes_per_class=2, restarts=1, device="cpu", report=said.append, start_block=3
    )
    assert any("no attributions: Theorem 1 and eq. 11 do not hold for mobilenet_v3_small" in line for line in said)
    assert "CNN" not in explained.table.index and {"B4", "B34", "KMEx (K/C=2)"} <= set(explained.table.index)
    assert explained.interpretations(0)[0].attribution is None
    assert "eq. 11" in str([text.get_text() for axes in explained.panel(0).axes for text in axes.texts])
    view = explained.explorer().view(0, 3)
    assert view["attribution"] is None and "Hardswish" in view["why_no_attribution"]


# --- bad images and folders ---------------------------------------------------------------------------------------


def test_modes_are_converted_and_said_once(tmp_path):
    generator = np.random.default_rng(0)
    grey = generator.integers(0, 256, (40, 40), np.uint8)
    made = {
        "L.png": Image.fromarray(grey),
        "16.png": Image.fromarray(grey.astype(np.uint16) * 257),
        "RGBA.png": Image.fromarray(np.dstack([grey, grey, grey, np.full_like(grey, 0)])),
        "CMYK.jpg": Image.new("CMYK", (40, 40), (0, 255, 255, 0)),
        "P.png": Image.fromarray(grey).convert("P"),
        "bilevel.png": Image.fromarray(grey > 100),
        "RGB.png": Image.fromarray(np.dstack([grey] * 3)),
    }
    for name, image in made.items():
        image.save(tmp_path / name)
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "RGB.png").read_bytes()[:300])
    (tmp_path / "notes.txt").write_text("left alone")
    (tmp_path / "phone.HEIC").write_bytes(b"left alone")
    said = []
    found = images.load(tmp_path, 40, mean=(0,) * 3, std=(1,) * 3, held_out=0, report=said.append)
    by_name = {name: found.train.rgb(i) for i, name in enumerate(found.train.names)}
    assert set(by_name) == set(made)
    for name in ("L.png", "16.png", "RGB.png"):
        assert np.array_equal(by_name[name], np.dstack([grey] * 3)), name
    assert (by_name["RGBA.png"] == 255).all(), "what is transparent is white"
    assert by_name["CMYK.jpg"][20, 20, 0] > 200 > by_name["CMYK.jpg"][20, 20, 1]
    assert sorted(said.pop(0).removeprefix("left out by their ending: ").split(", ")) == ["1 .heic", "1 .txt"]
    assert said[:3] == ["cannot read cut.png: " + said[0].split(": ")[1], "cannot read empty.jpg: zero bytes", said[2]]
    assert said[2] == "cannot read text.png: not an image"
    assert said[3] == "3 of 10 images cannot be read and are left out"
    assert said[4].startswith("converted to 8-bit RGB: ") and len(said) == 5
    for kind in ("2 of one channel", "1 of 16 bit", "1 with transparency", "1 of CMYK", "1 with a palette"):
        assert kind in said[4]


def test_an_image_on_its_side_is_turned(tmp_path):
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    found, _ = images.read(tmp_path / "a.png", 20, "stretch")
    assert (found[:, :8] > 200).all() and (found[:, 12:] < 50).all()


def test_16_bits_have_one_scale(tmp_path):
    """A dark 16-bit image stays dark: the scale is the mode's, not the image's own."""
    for name, value in (("dark", 5140), ("white", 65535)):
        Image.fromarray(np.full((20, 20), value, np.uint16)).save(tmp_path / f"{name}.png")
    assert images.read(tmp_path / "dark.png", 20)[0].max() == 20
    assert images.read(tmp_path / "white.png", 20)[0].min() == 255
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="no fixed white"):
        images.read(tmp_path / "f.tiff", 20)


def made_folder(root, files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if "empty" in file:
            (root / file).write_bytes(b"")
        else:
            Image.new("RGB", (8, 8)).save(root / file)
    return root


@pytest.mark.parametrize("names", [("train", "val"), ("Train", "valid"), ("train", "validation"), ("TRAIN", "Test")])
def test_a_split_goes_by_many_names(names, tmp_path):
    made_folder(tmp_path, [f"{split}/{c}/{i}.png" for split in names for c in ("cat", "dog") for i in range(2)])
    found = images.load(tmp_path, 8, mean=(0,) * 3, std=(1,) * 3)
    assert found.classes == ("cat", "dog") and found.test.labels.tolist() == [0, 0, 1, 1]
    for part, name in zip((found.train, found.test), names, strict=True):
        assert {file.split("/")[0] for file in part.names} == {name}


def test_images_go_to_scratch(tmp_path, monkeypatch):
    folder = made_folder(tmp_path / "in", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5)])
    options = {"mean": (0,) * 3, "std": (1,) * 3, "scratch": tmp_path}
    expected = images.load(folder, 8, **options)
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    found = images.load(folder, 8, **options)
    for split in ("train", "test"):
        assert isinstance(found.split(split).pixels, np.memmap), "never a copy in memory"
        assert np.array_equal(found.split(split).pixels, expected.split(split).pixels)
        assert found.split(split).names == expected.split(split).names
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(images.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match="free: give scratch=, a folder with room"):
        images.load(folder, 8, **options)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images"),
        (["train/1.png", "test/1.png"], "holds train/, test/ but not as a split with class folders: give <class>"),
        ([f"{s}/{c}/1.png" for s in ("train", "val", "test") for c in "ab"], "of three splits, put train/ and test/"),
        (["train/a/1.png", "train/b/1.png", "other/a/1.png"], "holds train/ but not as a split"),
        (["Val/a/1.png", "Val/b/1.png"], "holds Val/ but not as a split"),
        (["train/a/1.png", "train/b/empty.png", "val/b/1.png"], "no image of class 'b' in .* can be read"),
        (["cat/1.png", "cat/2.png"], "holds one class only .cat.: give at least two"),
        (["cat/1.png", "dog/1.png", "1.png"], "holds 1 images beside the class folders cat, dog"),
        (["train/cat/1.png", "train/dog/1.png", "test/cow/1.png"], "has classes that train/ lacks: cow"),
        (["cat/1.png", "dog/empty.png"], "no image of class 'dog' in .* can be read"),
    ],
)
def test_folders_that_do_not_do(files, message, tmp_path):
    made_folder(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        images.load(tmp_path, 8, mean=(0,) * 3, std=(1,) * 3, report=str)


def test_a_class_with_fewer_images_than_prototypes(resnet, photos):
    with pytest.raises(ValueError, match=r"class 'flower' has 10 images .*, fewer than K/C = 11: lower"):
        posthoc.explain(resnet, photos, prototypes_per_class=11, device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist or is not a folder"):
        posthoc.explain(resnet, photos / "nowhere")


# --- explorer, report, export -------------------------------------------------------------------------------------


def test_the_explorers_view_is_the_interpretation(explained):
    explorer = explained.explorer()
    for b in (4, 2):
        for target in ("", "flower", "temple"):
            view = explorer.view(3, b, target)
            (found,) = explained.interpretations(3, [b], target)
            prototypes = np.array([p["prototype"] for p in view["prototypes"]])
            assert np.array_equal(prototypes[np.array(view["map"])], found.map)
            np.testing.assert_allclose(view["attribution"], found.attribution, rtol=1e-3)
            shares = {p["prototype"]: p["share"] for p in view["prototypes"]}
            assert shares == {k: (found.map == k).mean() for k in np.unique(found.map)}
            assert sum(shares.values()) == pytest.approx(1)
            for p in view["prototypes"]:
                assert (p["shared"], p["images"]) == explained.sharing(b, p["prototype"])
            json.dumps(view)
    assert view["target"] == "temple" and view["explainer"] == "B234"


def test_widgets_follow_the_controls(explained):
    pytest.importorskip("anywidget", reason="the interactive explorer needs it")
    explorer = explained.explorer()
    assert explorer.widget is explorer.widget
    explorer.image.value = explained.names[4]
    explorer.start_block.value = 4
    explorer.target.value = "temple"
    assert explorer.panels.view == explorer.view(explained.names[4], 4, "temple")
    k = explorer.panels.view["prototypes"][0]["prototype"]
    explorer.panels.selected = k
    assert explorer.panels.nearest == explorer.patches(4, k) and len(explorer.panels.nearest) == 5
    explorer.image.value = explained.names[0]
    assert explorer.panels.selected == -1 and explorer.panels.nearest == []


def test_report_is_one_file_within_its_bound(explained, tmp_path):
    path = explained.report(tmp_path / "r.html", [0, explained.names[1]])
    page = path.read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", page) and "url(" not in page and "@import" not in page
    assert page.count("<img") == 4 + 3 * 6, "two panels from two blocks, a patch of each prototype"
    assert 'name="viewport"' in page and "max-width" in page
    for cell in ("CNN", "KMEx (K/C=3)", "B234", "flower", "temple", explained.names[1], "held_out"):
        assert cell in page
    with pytest.raises(FileExistsError, match=r"r.html exists"):
        explained.report(path)
    small = path.stat().st_size - 15_000
    explained.report(path, [0, 1], max_bytes=small, overwrite=True)
    assert path.stat().st_size <= small
    with pytest.raises(ValueError, match="more than max_bytes = 5,000: choose fewer panels"):
        explained.report(path, [0], max_bytes=5_000, overwrite=True)


def test_a_name_from_the_folder_cannot_be_markup(explained, tmp_path):
    path = explained.report(tmp_path / "r.html", title="<script>alert(1)</script>")
    assert "<script>" not in path.read_text()


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
    pq = pytest.importorskip("pyarrow.parquet", reason="Parquet needs it")
    said = []
    out = explained.export(tmp_path / "out", mixed, batch_size=3, device="cpu", report=said.append)
    table = pd.read_parquet(out / "images.parquet").set_index("file")
    segments = pd.read_parquet(out / "segments.parquet")
    assert len(table) == 9 and table.error.notna().sum() == 1 and table.loc["bad.jpg", "error"] == "zero bytes"
    assert said == ["cannot read bad.jpg: zero bytes", "1 of 9 images cannot be read and are left out"]
    for name in table.index[table.error.isna()]:
        found = explained.interpretations(mixed / name, [4, 2])
        with np.load(out / "maps" / f"{name}.npz") as maps:
            for part in found:
                assert np.array_equal(maps[part.name], part.map)
                np.testing.assert_allclose(maps[f"attribution_{part.name}"], part.attribution, rtol=1e-3, atol=1e-5)
                assert table.loc[name, part.name] == part.predicted
                rows = segments[(segments.file == name) & (segments.explainer == part.name)]
                assert rows.share.sum() == pytest.approx(1)
                for row in rows.itertuples():
                    own = part.map == row.prototype
                    assert row.share == pytest.approx(own.mean())
                    assert row.attribution == pytest.approx(part.attribution[own].mean(), rel=1e-3, abs=1e-5)
    assert pq.read_schema(out / "images.parquet").field("predicted_index").type == "int64"
    with pytest.raises(FileExistsError, match="out exists: choose another folder, or give resume=True"):
        explained.export(out, mixed)
    with pytest.raises(ValueError, match="of other images or settings"):
        explained.export(out, mixed, batch_size=4, resume=True)


def test_a_killed_export_continues(explained, mixed, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="Parquet needs it")
    whole = explained.export(tmp_path / "whole", mixed, batch_size=2, device="cpu", report=str)
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
        explained.export(tmp_path / "parts", mixed, batch_size=2, device="cpu", report=str)
    assert not (tmp_path / "parts" / "images.parquet").exists()
    assert moved == ["cpu", "cpu"], "to the device, and back in spite of the kill"
    explained.export(tmp_path / "parts", mixed, batch_size=2, device="cpu", report=str, resume=True)
    assert len(calls) == 6, "two batches before the kill, one killed, three after"
    for table in ("images", "segments"):
        pd.testing.assert_frame_equal(*(pd.read_parquet(f / f"{table}.parquet") for f in (whole, tmp_path / "parts")))
    assert not (tmp_path / "parts" / "parts").exists()


def test_an_export_of_other_weights_is_not_continued(explained, mixed, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs it")
    explained.export(tmp_path / "out", mixed, maps="none", device="cpu", report=str)
    other = copy.copy(explained)
    other.settings = json.loads(json.dumps(explained.settings))
    explained.export(tmp_path / "out", mixed, maps="none", device="cpu", report=str, resume=True)
    trained_on = copy.deepcopy(explained.network)
    trained_on.classifier.bias.data += 1
    other.settings |= trained_on.settings()
    with pytest.raises(ValueError, match="of other images or settings"):
        other.export(tmp_path / "out", mixed, maps="none", device="cpu", report=str, resume=True)


def test_maps_as_png(explained, mixed, tmp_path):
    pytest.importorskip("pyarrow", reason="Parquet needs it")
    out = explained.export(tmp_path / "out", mixed, maps="png", device="cpu", report=str)
    table = pd.read_parquet(out / "images.parquet").set_index("file")
    name = table.index[1]
    (found,) = explained.interpretations(mixed / name, [2])
    with Image.open(out / "maps" / f"{name}.B234.png") as image:
        assert np.array_equal(np.asarray(image), found.map)
    with Image.open(out / "maps" / f"{name}.B234.attribution.png") as image:
        limit = table.loc[name, "attribution_limit"]
        values = (np.asarray(image) / 65535 - 0.5) * 2 * limit
    np.testing.assert_allclose(values, found.attribution, atol=limit * 1e-4)


def test_the_shell(photos, tmp_path, capsys, monkeypatch):
    pytest.importorskip("pyarrow", reason="Parquet needs it")
    out = tmp_path / "explained"
    arguments = [str(photos), "--model", "resnet18", "--weights", "random", "--image-size", "64", "--per-class", "2"]
    arguments += ["--restarts", "1", "--start-block", "4", "--device", "cpu", "--out", str(out)]
    picture = str(photos / "flower" / "00.png")
    normalisation = ["--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2"]
    others = ["--panel", picture, "temple/00.png", "--report", "--export"]
    assert posthoc.main([*arguments, *normalisation, *others]) == 0
    network = json.loads((out / "settings.json").read_text())["network"]
    assert (network["mean"], network["std"]) == ([0.5] * 3, [0.2] * 3)
    for product in (
        "B4.safetensors",
        "KMEx-2.safetensors",
        "table.csv",
        "settings.json",
        "panel-flower-00.png",
        "panel-temple-00.png",
        "report.html",
    ):
        assert (out / product).stat().st_size > 100, product
    assert len(pd.read_parquet(out / "export" / "images.parquet")) == 24
    assert "| B4" in capsys.readouterr().out
    assert posthoc.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {out} exists: choose another --out, or give --resume to go on in it\n"
    assert posthoc.main([*arguments[:3], "--model", "resnet19"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(posthoc, "explain", lambda *a, **k: pytest.fail("checked only after the computation"))
    (tmp_path / "bad.png").write_text("not an image")
    arguments[-1] = str(tmp_path / "new")
    for wrong, message in (
        (["--panel", "nowhere.png"], "--panel nowhere.png is neither a file nor in"),
        (["--panel", str(tmp_path / "bad.png")], "bad.png cannot be read: not an image"),
        (["--target", "doggo"], "target must be a class of resnet18, got 'doggo'"),
    ):
        assert posthoc.main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert posthoc.main([*arguments, "--export"]) == 2 and "pip install pyarrow" in capsys.readouterr().err


def test_saving_again_leaves_nothing_stale(explained, tmp_path):
    explained.save(tmp_path)
    (tmp_path / "B1234.safetensors").write_text("of a deeper explanation before")
    (tmp_path / "KMEx-9.safetensors").write_text("of another K/C")
    explained.save(tmp_path)
    found = {file.name for file in tmp_path.glob("*.safetensors")}
    assert found == {
        "B4.safetensors",
        "B34.safetensors",
        "B234.safetensors",
        "KMEx-1.safetensors",
        "KMEx-3.safetensors",
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "B1234.safetensors").write_text("of notebook 4")
    explained.save(tmp_path / "run")
    assert (tmp_path / "run" / "B1234.safetensors").exists(), "not what this made"


def test_a_data_set_of_this_project():
    """Grey digits, whose names are numbers in either split."""
    from kmex_utils.datasets import load

    digits = load("mnist-mini", image_size=32, images_per_class=3)
    recipe = digits.recipe
    found = network(
        "resnet18", "random", image_size=32, mean=recipe.mean, std=recipe.std, classes=[str(c) for c in range(1000)]
    )
    explained = posthoc.explain(
        found, digits, prototypes_per_class=1, restarts=1, device="cpu", start_block=4, report=str
    )
    assert len(set(explained.names)) == 60
    for i in (0, 29, 30, 59):
        picture = explained.picture(explained.names[i])
        assert np.array_equal(picture.pixels, digits.split(picture.split).pixels[picture.index])
        assert explained.explorer().view(i, 4)["name"] == explained.names[i]
    assert picture.rgb.shape == (32, 32, 3)
    with pytest.raises(ValueError, match="give the folder of images to export"):
        explained.export("nowhere")
    with pytest.raises(ValueError, match="image size and normalisation are not the network's"):
        posthoc.explain(network("resnet18", "random", image_size=32), digits)


def test_the_same_settings_give_the_same_prototypes(resnet, photos, explained):
    again = posthoc.explain(resnet, photos, prototypes_per_class=3, held_out=0.25, restarts=2, device="cpu", report=str)
    assert again.dataset.test.names == explained.dataset.test.names
    for b in (2, 3, 4):
        assert torch.equal(again.explainers[b].prototypes.vectors, explained.explainers[b].prototypes.vectors)
