"""From a folder to prototypes, panels and table: against definitions, and back from disk."""

import copy
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from bad_inputs import small_cnn
from PIL import Image
from torch import nn
from torchvision.transforms import v2

import kmex_utils as kmex
from kmex_utils import cli, data, drawing, networks
from kmex_utils.explanation import fit, passed
from kmex_utils.explanation.explained import Explained
from kmex_utils.explanation.explorer import about, view
from kmex_utils.explanation.interpretation import segment_patch
from kmex_utils.method.attribution import attribution, segment_mean
from kmex_utils.method.composite import Normalisation, composite
from kmex_utils.method.measures import cosine_alignment

pytest_plugins = ("tests.fixtures_explained",)
EQUAL = Normalisation(scale="1")  # the default of explain()
SIZE = 64
OPTIONS = {"prototypes_per_class": 3, "held_out": 0.25, "restarts": 2, "device": "cpu"}


def activations_of(explained, pixels):
    with torch.no_grad():
        return explained.network.outputs(explained.network.input(pixels))


def test_patch_is_the_connected_part_around_the_row():
    image = np.full((80, 80, 3), 100, np.uint8)
    segments = np.zeros((8, 8), int)
    segments[2:4, 5:7] = 1  # the part around the row
    segments[4, 4] = 1  # touches it at a corner only
    segments[7, 0] = 1  # the same prototype, elsewhere
    patch = segment_patch(image, segments, 2 * 8 + 5)
    expected = np.full((40, 40), 115)  # two cells and one of context on each side; a tenth of the way to white
    expected[8:32, 8:32], expected[9:31, 9:31], expected[10:30, 10:30] = 255, 0, 100
    assert np.array_equal(patch, np.broadcast_to(expected[..., None], (40, 40, 3)))


def test_patch_at_the_border_stays_inside_the_image():
    image = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    segments = np.arange(36).reshape(6, 6)
    assert segment_patch(image, segments, 0).shape == (30, 30, 3)
    assert np.array_equal(segment_patch(image, segments, 35)[20:, 20:], image[50:, 50:])
    assert np.array_equal(segment_patch(image, np.zeros((6, 6), int), 7), image)


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


@pytest.mark.parametrize("index", [0, 7])
def test_a_panel_by_definition(explained, index):
    """What is kept of the folder's images is what network and prototypes say of them, computed from scratch."""
    picture = explained.picture(index)
    x, y = activations_of(explained, picture.pixels[None])
    for part, b in zip(explained.interpretations(index, [4, 3, 2]), (4, 3, 2), strict=True):
        q = composite(x[b - 1 :], EQUAL)[0]
        expected = torch.cdist(q, explained.explainers[b].prototypes.vectors).argmin(1)
        assert (part.map.ravel() == expected.numpy()).mean() > 0.99  # but for near ties
        shares = [patch.share for patch in part.patches]
        assert shares == sorted(shares, reverse=True) and sum(shares) <= 1 + 1e-9
        labels = explained.explainers[b].prototypes.labels
        for patch in part.patches:
            assert patch.share == (part.map == patch.prototype).mean()
            assert patch.class_name == explained.classes[labels[patch.prototype]]
            source, position = (int(n[patch.prototype, 0]) for n in near(explained, b))
            segments = explained.maps[b, "train"][source].numpy()
            assert patch.index == source
            assert np.array_equal(patch.pixels, segment_patch(explained.dataset.train.rgb(source), segments, position))
    q_s = torch.from_numpy(explained.interpretations(index, [4])[0].map)[None]
    direct = segment_mean(attribution(x[-1], explained.network.c[y.argmax(1)]), q_s)
    np.testing.assert_allclose(explained.interpretations(index, [4])[0].attribution, direct[0], rtol=1e-3, atol=1e-5)
    raw = explained.interpretations(index, [4], attribution_start="raw")[0].attribution
    np.testing.assert_allclose(raw, attribution(x[-1], explained.network.c[y.argmax(1)])[0], rtol=1e-3, atol=1e-5)
    assert len(explained.panel(index).axes) > 10


def near(explained, start_block):
    return explained.nearest[start_block].index, explained.nearest[start_block].position


def test_a_target_by_name_or_index(explained):
    names = [explained.interpretations(0, [4], target=t)[0].attribution for t in ("temple", 1)]
    with pytest.raises(ValueError, match="target must be a class of ResNet, got 2"):
        explained.interpretations(0, target=2)
    for same_class in (np.int64(1), "1", ["temple"]):
        assert np.array_equal(explained.interpretations(0, [4], target=same_class)[0].attribution, names[0])
    assert np.array_equal(*names)
    assert not np.allclose(names[0], explained.interpretations(0, [4], target="flower")[0].attribution)


def test_a_contrast_is_a_difference(explained):
    """Maps, and what the segments add to the scores: to y_A - y_B less the biases."""
    y = explained.seen(explained.picture(0)).y[0] - explained.network.b
    one, other = (explained.interpretations(0, target=t) for t in ("temple", "flower"))
    for a, b, both in zip(one, other, explained.interpretations(0, target=("temple", "flower")), strict=True):
        assert (a.target, both.target) == (("temple",), ("temple", "flower"))
        np.testing.assert_allclose(both.attribution, a.attribution - b.attribution, rtol=1e-3, atol=1e-5)
        assert (a.total, both.total) == pytest.approx((float(y[1]), float(y[1] - y[0])), rel=1e-3, abs=1e-5)
        assert sum(p.contribution for p in both.patches) == pytest.approx(both.total, rel=1e-3, abs=1e-5)
    title = explained.panel(0, target=("temple", "flower")).get_suptitle()
    assert "attribution to temple − flower" in " ".join(title.split())


def test_a_flat_map_stays_flat(explained):
    """h of one value at every position, but for noise of a thousandth: the scale does not stretch that to full colour.

    Its half-width is then what columns of random directions would reach; where a map goes further, that.
    """
    seen = explained.seen(explained.picture(0))
    c = explained.network.c[int(seen.y.argmax())]
    noise = torch.randn(seen.h.shape, generator=torch.Generator().manual_seed(0))
    flat = explained.attributed(seen._replace(h=seen.h.mean((2, 3), keepdim=True) * (1 + noise / 1000)))
    length = seen.h.mean((2, 3)).norm()
    for b, att in flat.maps.items():
        assert float(flat.half[b]) == pytest.approx(float(length / c.norm() / len(c) ** 0.5), rel=1e-3)
        assert float(att.max() - att.min()) < flat.half[b] / 20
    assert float(flat.centre[4]) == pytest.approx(float(seen.h.mean((0, 2, 3)) @ c / c.square().sum()), rel=1e-2)
    far = seen.h.clone()
    far[:, :, 0, 0] += 10 * c
    spread = explained.attributed(seen._replace(h=far), int(seen.y.argmax()))
    reach = float((spread.maps[4] - spread.maps[4].mean()).abs().max())
    assert float(spread.half[4]) == pytest.approx(reach, rel=1e-5) and reach > 3


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
    with pytest.raises(
        TypeError, match=r"uint8 \[H, W, 3\] or \[3, H, W\], or floats \[3, H, W\], got int64 \[60, 90, 3\]"
    ):
        explained.picture(pixels.astype(np.int64))


@pytest.mark.parametrize("free", [10**12, 0])
def test_what_does_not_fit_in_memory(resnet, photos, explained, tmp_path, monkeypatch, free):
    """From temporary files, or computed anew, the result is the same; the files are gone afterwards."""
    monkeypatch.setattr(passed, "IN_MEMORY", 0)
    monkeypatch.setattr(passed.shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    said = []
    again = kmex.explain(resnet, photos, start_block=4, scratch=tmp_path, log=said.append, **OPTIONS)
    assert not list(tmp_path.iterdir())
    assert any("computed anew whenever they are read" in line for line in said) is (not free)
    torch.testing.assert_close(again.explainers[4].prototypes.vectors, explained.explainers[4].prototypes.vectors)
    for split in ("train", "test"):
        torch.testing.assert_close(again.y[split], explained.y[split])
    with pytest.raises(FileNotFoundError, match="scratch must be a folder that exists"):
        kmex.explain(resnet, photos, scratch=tmp_path / "nowhere", **OPTIONS)


def test_what_the_network_knows_of_the_folders_classes():
    def of(named, network, folder):
        network = type("Network", (), {"named": named, "classes": network})
        explained = type("Explained", (), {"network": network, "classes": folder, "predictions_as_labels": False})
        outputs = fit.network_classes(explained)
        return None if outputs is None else outputs.tolist()

    assert of(True, ("0", "1", "2"), ("2", "0")) == [2, 0]
    assert of(False, ("0", "1", "2"), ("2", "0")) is None, "numbers made up for unknown names name nothing"
    assert of(True, ("Maine Coon", "cat"), ("cat", "maine_coon")) == [1, 0]
    assert of(True, ("Maine_Coon", "cat"), ("002.cat", "n02123045-maine_coon")) == [1, 0]
    assert of(True, ("cat", "3"), ("3", "cat")) == [1, 0]
    assert of(True, ("Maine_Coon", "cat"), ("001.cat", "002.cat")) is None
    assert of(True, ("crane (0)", "cat", "crane (2)"), ("cat", "crane")) is None
    assert of(True, ("Crane", "cat", "crane"), ("cat", "crane")) is None


def test_an_interrupted_computation_leaves_the_network_on_the_cpu(resnet, photos, monkeypatch):
    moved = []
    monkeypatch.setattr(type(resnet), "to", lambda self, device: moved.append(str(device)) or self)
    monkeypatch.setattr(fit, "_fit", lambda *a: moved.clear() or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kmex.explain(resnet, photos, device="cpu", start_block=4, prototypes_per_class=2, log=str)
    assert moved == ["cpu"] and not resnet.classifier._forward_hooks


def test_the_table_by_definition(explained):
    dataset, table = explained.dataset, explained.table
    outputs = {s: activations_of(explained, dataset.split(s).pixels) for s in ("train", "test")}
    z = {s: outputs[s][0][-1].mean((2, 3)) for s in outputs}
    names = ["images of the prototypes", "held out"]
    for s, name in zip(outputs, names, strict=True):
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
    q = composite(activations_of(explained, train.pixels)[0][1:], EQUAL)
    prototypes = explained.explainers[2].prototypes
    for k in range(len(prototypes)):
        members = torch.nonzero(train.labels == prototypes.labels[k]).flatten()
        distance = (q[members] - prototypes.vectors[k]).norm(dim=2)
        order = distance.min(1).values.sort()
        index, position = (of_all[k] for of_all in near(explained, 2))
        ours = (q[index, position] - prototypes.vectors[k]).norm(dim=1)
        torch.testing.assert_close(ours, order.values[:5], rtol=1e-3, atol=1e-6)
        assert len(index.unique()) == 5
        assert (index[0], position[0]) == (prototypes.image[k], prototypes.position[k])
        used = (explained.maps[2, "train"][members] == k).flatten(1).any(1).sum()
        assert explained.sharing(2, k) == (int(used), len(members))
    assert len(explained.patches(2, 0)) == 5


def test_without_labels_predictions_stand_in(resnet, photos, tmp_path):
    for i, file in enumerate(sorted(photos.rglob("*.png"))):
        (tmp_path / f"{i}.png").write_bytes(file.read_bytes())
    said = []
    resnet = copy.deepcopy(resnet)
    options = {"strict": False, "needs_labels": False, "data": None, "log": str}
    images = data.load(tmp_path, resnet.input, **options)
    with torch.no_grad():  # a head that splits these images about in half
        z = resnet.activations(images.input(images.train.pixels))[-1].mean((2, 3))
        resnet.classifier.weight[0], resnet.classifier.bias[:] = 0, 0
        direction = torch.linalg.svd(z - z.mean(0), full_matrices=False).Vh[0]
        resnet.classifier.weight[1] = direction
        resnet.classifier.bias[1] = -(z @ direction).median()
    options = {"prototypes_per_class": 2, "device": "cpu"}
    explained = kmex.explain(resnet, tmp_path, restarts=1, log=said.append, start_block=4, **options)
    assert any("the predictions of ResNet stand in for them" in line for line in said), said
    for split in ("train", "test"):
        names = [explained.classes[c] for c in explained.dataset.split(split).labels]
        assert names == [resnet.classes[j] for j in explained.y[split].argmax(1)]
    assert "agreement, held out (%)" in explained.table and explained.predictions_as_labels
    with torch.no_grad():
        resnet.classifier.bias[1] = 1e6
    with pytest.raises(ValueError, match="puts 20 of 20 images into one class .temple. and no second class"):
        kmex.explain(resnet, tmp_path, **options)


def test_where_eq_11_does_not_hold(photos):
    said = []
    network = kmex.network("vgg11", "random", image_size=SIZE)
    options = {"prototypes_per_class": 2, "restarts": 1, "device": "cpu", "start_block": 3}
    explained = kmex.explain(network, photos, log=said.append, **options)
    assert any("no attributions: Theorem 1 and eq. 11 do not hold for vgg11" in line for line in said)
    assert "CNN" not in explained.table.index and {"B4", "B34", "KMEx (K/C=2)"} <= set(explained.table.index)
    assert explained.interpretations(0)[0].attribution is None
    assert "eq. 11" in str([text.get_text() for axes in explained.panel(0).axes for text in axes.texts])
    assert view(explained, 0, 3)["attribution"] is None and "Linear" in about(explained)["why_no_attribution"]


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "convnext_tiny"])
def test_attributions_beyond_the_paper(arch, photos, tmp_path):
    """Eq. 11 with the columns of each image's own, or with fixed ones; the report does not say that there are none."""
    network = kmex.network(arch, "random", image_size=SIZE)
    options = {"prototypes_per_class": 1, "restarts": 1, "device": "cpu", "start_block": 4}
    explained = kmex.explain(network, photos, log=str, **options)
    seen = explained.seen(explained.picture(0))
    att = explained.attributions(seen, 7, "raw")[4]
    module, z = network.module, seen.h.mean((2, 3))
    if arch == "convnext_tiny":
        weighted = module.classifier[0].weight * module.classifier[2].weight[7]
        c = (weighted - weighted.mean())[None]
    else:
        a = module.classifier[0](z)
        c = (torch.nn.functional.hardswish(a) / a * module.classifier[3].weight[7]) @ module.classifier[0].weight
    expected = torch.einsum("ndhw,nd->nhw", seen.h, c) / c.square().sum()
    torch.testing.assert_close(att, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    points = explained.attributed(seen, 7).contributions[4].sum()
    torch.testing.assert_close(points, (z * c).sum(), rtol=1e-3, atol=1e-5)
    inputs = seen.inputs.numpy()
    of_quantus = explained.explain_func(network, inputs, np.array([7]), attribution_start="raw")
    assert of_quantus.shape == (1, 1, SIZE, SIZE) and np.isclose(of_quantus.max(), att.max(), rtol=1e-4)
    assert "There are no attributions" not in explained.report(tmp_path / "r.html").read_text()


def test_a_class_with_fewer_images_than_prototypes(resnet, photos):
    with pytest.raises(ValueError, match=r"class 'flower' has 10 images .*, fewer than K/C = 11: lower"):
        kmex.explain(resnet, photos, prototypes_per_class=11, device="cpu")
    with pytest.raises(FileNotFoundError, match="nowhere does not exist or is not a folder"):
        kmex.explain(resnet, photos / "nowhere")


def test_a_data_set_of_this_project():
    """Grey digits, whose names are numbers in either split."""
    digits = data.load("mnist-mini", data.Input(32, *MEAN_AND_STD), images_per_class=3)
    given = {"image_size": 32, "mean": digits.input.mean, "std": digits.input.std}
    network = kmex.network("resnet18", "random", **given, classes=[str(c) for c in range(1000)])
    options = {"prototypes_per_class": 1, "restarts": 1, "device": "cpu", "start_block": 4, "log": str}
    explained = kmex.explain(network, digits, **options)
    assert len(set(explained.names)) == 60
    for i in (0, 29, 30, 59):
        picture = explained.picture(explained.names[i])
        assert np.array_equal(picture.pixels, digits.split(picture.split).pixels[picture.index])
        assert view(explained, i, 4)["name"] == explained.names[i]
    assert picture.rgb.shape == (32, 32, 3)
    with pytest.raises(ValueError, match="give the folder of images to export"):
        explained.export("nowhere")
    with pytest.raises(ValueError, match="image size and normalisation are not the network's"):
        kmex.explain(kmex.network("resnet18", "random", image_size=32), digits)


MEAN_AND_STD = (0.13,) * 3, (0.29,) * 3


def test_the_same_settings_give_the_same_prototypes(resnet, photos, explained):
    again = kmex.explain(resnet, photos, log=str, **OPTIONS)
    assert again.dataset.test.names == explained.dataset.test.names
    for b in (2, 3, 4):
        assert torch.equal(again.explainers[b].prototypes.vectors, explained.explainers[b].prototypes.vectors)


# --- saved and loaded ---------------------------------------------------------------------------------------------


def same(a, b):
    """Whether two lists of interpretations are equal, patches and all."""
    for one, other in zip(a, b, strict=True):
        assert (one.name, one.predicted) == (other.name, other.predicted) and np.array_equal(one.map, other.map)
        assert np.array_equal(one.attribution, other.attribution)
        for p, q in zip(one.patches, other.patches, strict=True):
            assert (p.prototype, p.class_name, p.share, p.index) == (q.prototype, q.class_name, q.share, q.index)
            assert np.array_equal(p.pixels, q.pixels)
    return True


@pytest.fixture
def new_image(tmp_path, photos):
    """A picture that is not of the folder."""
    path = tmp_path / "new.png"
    with Image.open(next(iter(sorted(photos.rglob("*.png"))))) as image:
        image.rotate(90).save(path)
    return path


def test_what_is_saved_explains_as_before(explained, resnet, new_image, tmp_path):
    """Maps, attributions and patches of a new image are equal to the last bit; the photos are not needed."""
    explained.save(tmp_path / "kept")
    again = kmex.load(tmp_path / "kept", module=copy.deepcopy(resnet.module))
    assert again.dataset is None and again.names == ()
    assert same(again.interpretations(new_image, [4, 3, 2]), explained.interpretations(new_image, [4, 3, 2]))
    assert again.start_blocks == explained.start_blocks and set(again.kmex) == {1, 3}
    assert again.sharing(2, 0) == explained.sharing(2, 0)
    np.testing.assert_allclose(again.table, explained.table, rtol=1e-5)
    assert json.loads(json.dumps(again.settings["start_block"])) == explained.settings["start_block"]
    with pytest.raises(ValueError, match="the images are not here, only the prototypes"):
        again.picture(0)


def test_fitted_again_it_shows_the_patches_of_its_new_prototypes(explained, resnet, photos, tmp_path):
    """As notebook 4 does to a run that has prototypes: none of the patches saved before stay."""
    explained.save(tmp_path)
    again = kmex.load(tmp_path, module=resnet.module, images=photos)
    one = passed.Passed.of(resnet, again.dataset, 4)
    explainer = one.fit_encoder(4, again.explainers[4].normalisation, 3, seed=7, restarts=1)
    maps = one.map(explainer, "train")
    again.add_encoder(explainer, one.nearest(explainer, maps), maps, seed=7, restarts=1)
    for k in range(6):
        index, position = (int(n[k, 0]) for n in near(again, 4))
        segments = again.maps[4, "train"][index].numpy()
        expected = segment_patch(again.dataset.train.rgb(index), segments, position)
        assert np.array_equal(again.patch(4, k).pixels, expected)


def test_with_its_images_it_is_as_it_was(explained, resnet, photos, tmp_path):
    explained.save(tmp_path)
    again = kmex.load(tmp_path, module=resnet.module, images=photos)
    assert again.names == explained.names
    for a, b in zip(again.interpretations(5), explained.interpretations(5), strict=True):
        assert np.array_equal(a.map, b.map) and [p.index for p in a.patches] == [p.index for p in b.patches]
        np.testing.assert_allclose(a.attribution, b.attribution, rtol=1e-4, atol=1e-5)  # one image, not in a batch


def test_another_process_explains_without_fitting(photos, new_image, tmp_path):
    """A network by name is built again by its name; only torch and what panels need is imported."""
    network = kmex.network("resnet18", "random", image_size=SIZE, seed=3)
    options = {"prototypes_per_class": 2, "restarts": 1, "device": "cpu", "log": str}
    explained = kmex.explain(network, photos, **options)
    explained.save(tmp_path / "kept")
    code = f"""
import kmex_utils as kmex, numpy as np
explained = kmex.load({str(tmp_path / "kept")!r})
np.save({str(tmp_path / "map.npy")!r}, explained.interpretations({str(new_image)!r})[1].map)
explained.panel({str(new_image)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert np.array_equal(np.load(tmp_path / "map.npy"), explained.interpretations(new_image)[1].map)


def test_what_was_saved_of_another_network_is_refused(explained, resnet, tmp_path):
    explained.save(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="module"):
        Explained.load(tmp_path)
    other = copy.deepcopy(resnet.module)
    with torch.no_grad():
        other.fc.weight.mul_(2)
    with pytest.raises(ValueError, match="weights"):
        Explained.load(tmp_path, other)
    with pytest.raises(FileNotFoundError, match="holds no saved explanation"):
        Explained.load(tmp_path / "elsewhere")


def test_prototypes_of_another_network_are_refused(explained, photos, tmp_path):
    explained.save(tmp_path / "one")
    network = kmex.network("resnet18", "random", image_size=SIZE, seed=4)
    options = {"prototypes_per_class": 3, "restarts": 1, "device": "cpu", "log": str}
    kmex.explain(network, photos, start_block=4, **options).save(tmp_path / "other")
    (tmp_path / "other" / "B4.safetensors").write_bytes((tmp_path / "one" / "B4.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"B4.safetensors was made from another network: fit it again"):
        kmex.load(tmp_path / "other")


def test_saving_again_leaves_nothing_stale(explained, tmp_path):
    explained.save(tmp_path)
    (tmp_path / "B1234.safetensors").write_text("of a deeper explanation before")
    (tmp_path / "KMEx-9.safetensors").write_text("of another K/C")
    explained.save(tmp_path)
    files = {file.name for file in tmp_path.glob("*.safetensors")}
    names = ("B4", "B34", "B234", "KMEx-1", "KMEx-3")
    assert files == {f"{name}.safetensors" for name in names}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "B1234.safetensors").write_text("of something else")
    explained.save(tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere" / "B1234.safetensors").exists(), "not what this made"


@pytest.mark.parametrize("before", ["nothing", "another"])
def test_a_killed_save_is_refused_and_saved_again(explained, photos, tmp_path, monkeypatch, before):
    """After every file but the last: no mix of two explanations is loaded."""
    from kmex_utils.explanation import explained as module

    if before == "another":
        network = kmex.network("resnet18", "random", image_size=SIZE, seed=4)
        options = {"prototypes_per_class": 3, "restarts": 1, "device": "cpu", "log": str}
        kmex.explain(network, photos, start_block=1, **options).save(tmp_path)
    save_tensors, left = module.save_tensors, []

    def killed(*content):
        left.pop() if left else signal.raise_signal(signal.SIGINT)
        save_tensors(*content)

    for files in range(5):
        left[:] = range(files)
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(module, "save_tensors", killed)
            explained.save(tmp_path)
        with pytest.raises(ValueError, match=r"explained.json is not of a whole saved explanation: save it again"):
            kmex.load(tmp_path, copy.deepcopy(explained.network.module))
    again = kmex.load(explained.save(tmp_path), copy.deepcopy(explained.network.module))
    assert set(again.explainers) == {2, 3, 4} and set(again.kmex) == {1, 3}


def test_damaged_parts_are_one_line(explained, resnet, tmp_path):
    from kmex_utils import store

    explained.save(tmp_path)
    path = tmp_path / "B4.safetensors"
    whole, made = store.load_tensors(path)
    other = torch.zeros(1, dtype=torch.int64)
    tensors = [
        ({"vectors": whole["vectors"][:, :5]}, "channels, not 512"),
        ({"labels": whole["labels"] + 7}, "not 3 prototypes for each of 2 classes"),
        ({"patches": whole["patches"][:100]}, "does not hold prototypes of this network"),
        ({"patch_sizes": other}, "does not hold prototypes of this network"),
    ]
    settings = [
        ({"start_block": 9}, "does not hold prototypes of this network"),
        ({"start_block": "2"}, "does not hold prototypes of this network"),
        ({"start_block": 3}, "its name is of another explainer"),
        ({"norm": "row"}, "norm must be one of"),
        ({"classes": ["a", "b"]}, "is of other classes"),
    ]
    cases = [(whole | change, made, message) for change, message in tensors]
    cases += [(whole, made | change, message) for change, message in settings]
    cases += [(whole, {key: value for key, value in made.items() if key != "classes"}, "is of other classes")]
    for changed, said, message in cases:
        store.save_tensors(path, changed, said)
        with pytest.raises(ValueError, match=message) as error:
            kmex.load(tmp_path, module=resnet.module)
        assert "B4.safetensors" in str(error.value)


@pytest.fixture(scope="module")
def by_name(photos, tmp_path_factory):
    """A network from a file with a head of its own, explained, and the file."""
    file = tmp_path_factory.mktemp("weights") / "resnet18.pt"
    torch.save(kmex.network("resnet18", "random", image_size=SIZE, seed=3).module.state_dict(), file)
    network = kmex.network("resnet18", file, image_size=SIZE)
    network.module.fc = nn.Linear(512, 2)  # a probe, which the file does not have
    network = networks.Network(
        network.module, input=network.input, classes=["flower", "temple"], name="resnet18", reference=network.reference
    )
    return kmex.explain(network, photos, log=str, **OPTIONS), file


def test_saved_small_it_needs_the_encoders_file(by_name, new_image, tmp_path):
    """The head is kept to the last bit, patches and prototypes nearly; another encoder is refused."""
    explained, file = by_name
    explained.save(tmp_path)
    explained.save(tmp_path, small=True)
    assert not (tmp_path / "weights.safetensors").exists()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 400_000
    with pytest.raises(ValueError, match="holds no weights but the head's: give weights=, the file resnet18 was made"):
        kmex.load(tmp_path)
    again = kmex.load(tmp_path, weights=file)
    assert again.network.fingerprint == explained.network.fingerprint
    assert torch.equal(again.network.c, explained.network.c)
    assert kmex.network(tmp_path, torch.load(file)).fingerprint == explained.network.fingerprint
    for b in (4, 3, 2):
        ours, theirs = (e.explainers[b].prototypes.vectors for e in (again, explained))
        torch.testing.assert_close(ours, theirs, rtol=2**-11, atol=2**-24 * float(theirs.abs().max()))
        maps = [e.interpretations(new_image, [b])[0].map for e in (again, explained)]
        assert (maps[0] == maps[1]).mean() > 0.99
        patch, whole = (e.patch(b, 1) for e in (again, explained))
        assert max(patch.pixels.shape) <= 96 and patch.index == whole.index
        assert np.abs(patch.pixels.mean((0, 1)) - whole.pixels.mean((0, 1))).max() < 4
        assert len(again.patches(b, 0)) == 1
    other = kmex.network("resnet18", "random", image_size=SIZE, seed=4).module.state_dict()
    with pytest.raises(ValueError, match="weights of resnet18 are not those that"):
        kmex.load(tmp_path, weights=other)
    explained.save(tmp_path)
    assert not (tmp_path / "head.safetensors").exists() and len(kmex.load(tmp_path).patches(4, 0)) == 5
    with pytest.raises(ValueError, match="weights= goes with what was saved without them"):
        kmex.load(tmp_path, weights=file)


def test_images_for_another_network_are_refused(explained, resnet, photos, tmp_path):
    explained.save(tmp_path)
    other = data.load(photos, data.Input(32, *MEAN_AND_STD), held_out=0.2, data=None)
    with pytest.raises(ValueError, match="image size and normalisation are not the network's"):
        kmex.load(tmp_path, module=resnet.module, images=other)


def test_a_torch_data_set_is_taken_when_loading_as_when_explaining(resnet, photos, tmp_path):
    names = ("flower", "temple")
    files = [(file, label) for label, name in enumerate(names) for file in sorted((photos / name).iterdir())]

    class Photos(torch.utils.data.Dataset):
        classes = names

        def __len__(self):
            return len(files)

        def __getitem__(self, i):
            return Image.open(files[i][0]), files[i][1]

    options = {"prototypes_per_class": 1, "restarts": 1, "device": "cpu", "log": str, "start_block": 4}
    explained = kmex.explain(resnet, Photos(), **options)
    explained.save(tmp_path)
    again = kmex.load(tmp_path, resnet.module, images=Photos())
    assert again.names == explained.names and len(again.dataset.test) == len(explained.dataset.test) == 4
    assert np.array_equal(again.picture(3).pixels, explained.picture(3).pixels)


def test_a_users_own_weights_are_never_overwritten(photos, tmp_path):
    """A file of the name that save writes, which save did not write, is refused before anything is."""
    from torchvision.models import resnet18

    torch.manual_seed(1)
    module = resnet18(num_classes=2)
    torch.save(module.state_dict(), tmp_path / "weights.safetensors")
    before = (tmp_path / "weights.safetensors").read_bytes()
    network = kmex.network(module, classes=["flower", "temple"], image_size=SIZE)
    options = {"prototypes_per_class": 1, "restarts": 1, "device": "cpu", "log": str, "start_block": 4}
    with pytest.raises(FileExistsError, match="is not of a network saved here: choose another folder"):
        kmex.explain(network, photos, **options).save(tmp_path)
    assert (tmp_path / "weights.safetensors").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["weights.safetensors"]


def test_a_network_that_trains_on_is_neither_drawn_nor_saved_as_it_was(resnet, photos, new_image, tmp_path):
    """Panels use running statistics, whatever mode the user's module is in; changed weights are refused by save."""
    mine = kmex.network(copy.deepcopy(resnet.module), classes=["flower", "temple"], image_size=SIZE)
    options = {"prototypes_per_class": 1, "restarts": 1, "device": "cpu", "log": str, "start_block": 4}
    explained = kmex.explain(mine, photos, **options)
    y, weights = explained.seen(explained.picture(new_image)).y, mine.fingerprint
    mine.module.train()
    with Image.open(new_image) as image:
        again = explained.seen(explained.picture(image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
        mine.module.train()
        turned = explained.see(explained.picture(image).pixels[None])
    torch.testing.assert_close(turned.y, y)
    assert mine.fingerprint == weights and again.y.shape == y.shape
    with torch.no_grad():
        mine.module.fc.weight.mul_(2)
    with pytest.raises(ValueError, match="weights of ResNet are no longer those explained"):
        explained.save(tmp_path)


@pytest.mark.parametrize("held_out", [0.0, 0.2])
def test_nothing_held_out(resnet, photos, tmp_path, held_out):
    """Asked for, or because no class has images to spare."""
    for name in ("flower", "temple"):
        (tmp_path / name).mkdir()
        for file in sorted((photos / name).iterdir())[:4]:
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
    options = {"prototypes_per_class": 2, "restarts": 1, "device": "cpu", "log": str}
    explained = kmex.explain(resnet, tmp_path, held_out=held_out, **options)
    assert len(explained.dataset.test) == 0 and len(explained.dataset.train) == 8
    assert "accuracy, held out (%)" not in explained.table
    assert explained.table.loc["B234", "accuracy, images of the prototypes (%)"] >= 50
    assert len(explained.interpretations(0)) == 2


def test_what_was_held_out_is_what_is_recorded(resnet, photos, tmp_path):
    """The folder's own test split is used, whatever share was asked for."""
    for split in ("train", "test"):
        for name in ("flower", "temple"):
            (tmp_path / split / name).mkdir(parents=True)
            files = sorted((photos / name).iterdir())
            for file in files[:8] if split == "train" else files[8:]:
                (tmp_path / split / name / file.name).write_bytes(file.read_bytes())
    options = {"prototypes_per_class": 1, "restarts": 1, "device": "cpu", "log": str, "start_block": 4}
    explained = kmex.explain(resnet, tmp_path, held_out=0.5, **options)
    assert len(explained.dataset.test) == 8 and explained.settings["held_out"] == 0


def test_embeddings_alone_have_no_views(explained, tmp_path):
    alone = Explained(explained.network, explained.dataset, explained.settings)
    alone.add_kmex(explained.kmex[1], seed=0, restarts=1)
    for shown in (
        lambda: alone.panel(0),
        lambda: alone.explorer(),
        lambda: alone.report(tmp_path / "report.html"),
        lambda: alone.page(tmp_path / "page.html"),
        lambda: alone.export(tmp_path / "maps", maps="png"),
    ):
        with pytest.raises(ValueError, match="no prototypes of the encoder"):
            shown()
    assert not list(tmp_path.iterdir())


def test_a_folder_is_found_from_anywhere(explained, resnet, tmp_path, monkeypatch):
    """Relative to where one is or, if nothing is there, to the repository's root, as networks and weights are."""
    explained.save(tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    assert kmex.load("kept", resnet.module).start_blocks == [4, 3, 2]
    monkeypatch.setattr("kmex_utils.paths.ROOT", tmp_path)
    monkeypatch.chdir(tmp_path / "kept")
    assert kmex.load("kept", resnet.module).start_blocks == [4, 3, 2]
    assert kmex.load(".", resnet.module).start_blocks == [4, 3, 2]


# --- images of other shapes and kinds -----------------------------------------------------------------------------


FEW = {"prototypes_per_class": 1, "held_out": 0.25, "restarts": 1, "device": "cpu", "log": str}


@pytest.fixture
def odd_photos(photos, tmp_path):
    """Six photos of either class, whose folder and files bear names that are no UTF-8 or hold what formats quote."""
    root = tmp_path / "photos"
    names = [b"caf\xe9.png", b"a$b$_{.png", b"new\nline.png", "'\"😀.png".encode(), b"two words.png", b"back\\.png"]
    for name, odd in (("temple", b"t$emp\xe9l$e"), ("flower", b"<b>flow&er")):
        (folder := root / os.fsdecode(odd)).mkdir(parents=True)
        for source, target in zip(sorted((photos / name).iterdir()), names, strict=False):
            shutil.copy(source, folder / os.fsdecode(target))
    return root


@pytest.mark.filterwarnings("ignore:Glyph")
def test_odd_names_go_everywhere(odd_photos, tmp_path):
    import pandas as pd

    module = small_cnn(classes=2)
    explained = kmex.explain(module, odd_photos, image_size=32, mean=0.5, std=0.25, **FEW)
    assert explained.classes == ("<b>flow&er", "t$emp\\udce9l$e") and len(set(explained.names)) == 12
    for index, name in enumerate(explained.names):
        assert explained.picture(name).index == explained.picture(index).index
        assert len(view(explained, name, 1)["prototypes"]) > 0
    files = [
        odd_photos / os.fsdecode(b"t$emp\xe9l$e") / os.fsdecode(name) for name in (b"caf\xe9.png", b"new\nline.png")
    ]
    assert all(explained.picture(file).split for file in files), "known as images of the folder"
    drawing.save(explained.panel(files[0]), tmp_path / "panel")
    page = explained.report(tmp_path / "report.html", panels=files[:1]).read_text(encoding="utf-8")
    assert "caf\\udce9.png" in page and "<b>flow" not in page
    table = pd.read_parquet(explained.export(tmp_path / "export", log=str) / "images.parquet")
    assert set(table.file) == set(explained.names) and table.error.isna().all()
    assert all((tmp_path / "export" / "maps" / f"{name}.npz").is_file() for name in table.file)
    loaded = kmex.load(explained.save(tmp_path / "saved"), module, odd_photos)
    assert loaded.names == explained.names and loaded.classes == explained.classes
    assert loaded.picture(files[0]).name == "t$emp\\udce9l$e/caf\\udce9.png"


@pytest.mark.parametrize("size", [(32, 64), (48, 32), (45, 70)])
def test_images_of_two_sides(size, photos, tmp_path):
    """Maps, attributions and patches have the image's proportions, in every view and after loading."""
    module = small_cnn(classes=2)
    explained = kmex.explain(module, photos, image_size=size, **FEW)
    assert explained.network.input.size == size and explained.network.blocks == ("1", "3", "5")
    grid = tuple(-(-side // 2) for side in size)
    picture = explained.picture(0)
    assert picture.rgb.shape == (*size, 3)
    (part,) = explained.interpretations(picture, [1])
    assert part.map.shape == part.attribution.shape == grid
    x, y = activations_of(explained, picture.pixels[None])
    torch.testing.assert_close(y, module(x_of(explained, picture)), rtol=1e-5, atol=1e-6)
    expected = torch.cdist(composite(x, EQUAL)[0], explained.explainers[1].prototypes.vectors).argmin(1)
    assert (part.map.ravel() == expected.numpy()).mean() > 0.99
    assert all(max(patch.pixels.shape) <= max(size) for patch in part.patches)
    explained.panel(0), explained.report(tmp_path / "report.html", panels=[0])
    assert view(explained, 0, 1)["map"] == view(explained, explained.names[0], 1)["map"]
    maps = explained.export(tmp_path / "export", log=str) / "maps"
    assert np.load(maps / f"{picture.name}.npz")["B123"].tolist() == part.map.tolist()
    loaded = kmex.load(explained.save(tmp_path / "saved"), copy.deepcopy(module))
    again = loaded.interpretations(photos / picture.name, [1])[0]
    assert loaded.network.input == explained.network.input and np.array_equal(again.map, part.map)
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(again.patches, part.patches, strict=True))


def x_of(explained, picture):
    """The network's input by torchvision's own transforms."""
    input = explained.network.input
    return v2.functional.normalize(torch.from_numpy(picture.pixels.copy()).float() / 255, input.mean, input.std)[None]


def test_patch_of_a_wide_image():
    """All of a segment that spans the width, which is more than the height."""
    image = np.random.default_rng(0).integers(0, 256, (40, 80, 3), np.uint8)
    segments = np.zeros((4, 8), int)
    assert np.array_equal(segment_patch(image, segments, 9), image)
    segments[1, 6] = 1
    assert segment_patch(image, segments, 14).shape == (30, 30, 3)


def test_images_of_12_bits_in_a_network_of_one_channel(tmp_path):
    """From files to the network's input: grey, by the window; saved and loaded with it."""
    generator, module = np.random.default_rng(0), small_cnn(channels=1, classes=2)
    values = {}
    for name in ("ant", "bee"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(4):
            values[f"{name}/{i}.png"] = generator.integers(0, 4096, (32, 32)).astype(np.uint16)
            Image.fromarray(values[f"{name}/{i}.png"]).save(tmp_path / "in" / name / f"{i}.png")
    explained = kmex.explain(module, tmp_path / "in", image_size=32, window=(0, 4095), **FEW)
    assert (explained.network.input.channels, explained.network.input.mean) == (1, (0.449,))
    assert explained.settings["network"]["window"] == (0, 4095)
    loaded = kmex.load(explained.save(tmp_path / "saved"), copy.deepcopy(module))
    for name, array in values.items():
        x = torch.from_numpy((array / 4095 * 255).round() / 255 - 0.449).float()[None, None] / 0.226
        for of in (explained.picture(name), loaded.picture(tmp_path / "in" / name), loaded.picture(array)):
            torch.testing.assert_close(loaded.seen(of).y, module(x), rtol=1e-4, atol=1e-5)
    assert loaded.network.input.window == (0, 4095)


def test_tensors_are_images(explained, photos):
    """Bytes in either order, floats, and what the network takes: the same picture."""
    inside = explained.picture(1)
    pixels = torch.from_numpy(inside.pixels.copy())
    forms = [
        pixels,
        pixels.permute(1, 2, 0),
        pixels / 255,
        (pixels / 255).numpy(),
        explained.network.input(pixels[None])[0],
    ]
    for form in forms:
        assert np.array_equal(explained.picture(form).pixels, inside.pixels)
    with pytest.raises(ValueError, match="are not in .0, 1., nor normalised by mean"):
        explained.picture(pixels.float())
    with pytest.raises(ValueError, match="values nan"):
        explained.picture(torch.full((3, 8, 8), torch.nan))
    with pytest.raises(TypeError, match=r"got float32 \[1, 3, 8, 8\]"):
        explained.picture(torch.zeros(1, 3, 8, 8))


OWN = [v2.Resize((40, 40)), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]


@pytest.mark.parametrize("steps", [[], [v2.Normalize((0.3, 0.4, 0.5), (0.2, 0.25, 0.3))]])
def test_a_transform_of_ones_own(steps, photos, tmp_path):
    """What the network is given is what the transform gives, to half a byte; mean and std are read off it."""
    module, transform = small_cnn(classes=2), v2.Compose([*OWN, *steps])
    explained = kmex.explain(module, photos, transform=transform, **FEW)
    input = explained.network.input
    assert (input.size, input.mean, input.std) == (
        ((32, 32), (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)) if steps else ((32, 32), (0.0,) * 3, (1.0,) * 3)
    )
    assert explained.network.assumed == ()
    for index in (0, 9):
        picture = explained.picture(index)
        with Image.open(photos / picture.name) as image:
            x = transform(image)
        limit = 0.5 / 255 / torch.tensor(input.std).view(3, 1, 1) + 1e-5
        assert ((input(picture.pixels[None])[0] - x).abs() <= limit).all()
        assert np.array_equal(explained.picture(x).pixels, picture.pixels), "a tensor is already transformed"
    saved = explained.save(tmp_path)
    with pytest.raises(ValueError, match="by a transform of your own, Compose: give it again, as transform="):
        kmex.load(saved, module)
    loaded = kmex.load(saved, module, photos, transform=transform)
    assert np.array_equal(loaded.picture(photos / explained.names[0]).pixels, explained.picture(0).pixels)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image: 1 / 0, "does not make a tensor of a Pillow image: division by zero"),
        (lambda image: image, "does not make a tensor of a Pillow image"),
        (lambda image: torch.zeros(3, 8), "give a tensor .C, H, W., got 2 dimensions"),
        (v2.Compose([*OWN, lambda x: (x - x.mean()) / (x.std() + 1)]), "cannot be read off it: give mean= and std="),
    ],
)
def test_transforms_that_do_not_do(transform, message):
    with pytest.raises(ValueError, match=message):
        kmex.network(small_cnn(classes=2), transform=transform)


def test_options_of_the_network_go_with_a_module(resnet, photos):
    with pytest.raises(ValueError, match=r"window: options of kmex_utils.network\(\), give them there"):
        kmex.explain(resnet, photos, window=(0, 1))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_values_in_other_forms_from_the_shell(tmp_path, capsys):
    """12 bits in 16, two sides, one value for all channels; and a panel of a file with malformed EXIF."""
    generator = np.random.default_rng(0)
    for name in ("ant", "bee"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(3):
            pixels = generator.integers(0, 4096, (40, 60)).astype(np.uint16)
            Image.fromarray(pixels).save(tmp_path / "in" / name / f"{i}.png")
    Image.new("RGB", (60, 40)).save(tmp_path / "bad.jpg", exif=b"Exif\0\0MM\0*" + b"\xff" * 30)
    (tmp_path / "names.json").write_text(json.dumps({str(j): [f"n{j}", f"name {j}"] for j in range(1000)}))
    command = [
        "explain",
        str(tmp_path / "in"),
        "--model",
        "shufflenet_v2_x0_5",
        "--weights",
        "random",
        "--device",
        "cpu",
    ]
    command += [
        "--image-size",
        "32",
        "64",
        "--mean",
        "0.5",
        "--std",
        "0.25",
        "--window",
        "0",
        "4095",
        "--restarts",
        "1",
    ]
    command += ["--classes", str(tmp_path / "names.json"), "--prototypes-per-class", "1", "--start-block", "4"]
    assert cli.main([*command, "--panel", str(tmp_path / "bad.jpg"), "--out", str(tmp_path / "out")]) == 0
    assert "give window" not in capsys.readouterr().out
    loaded = kmex.load(tmp_path / "out")
    assert loaded.network.input == data.Input((32, 64), 0.5, 0.25, "crop", window=(0, 4095))
    assert loaded.network.classes[999] == "name 999"
