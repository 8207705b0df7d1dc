"""Each data set from a tiny archive in its official on-disk format; bad input in one clear line."""

import gzip
import hashlib
import io
import json
import re
import resource
import shutil
import struct
import tarfile
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kmex_utils import paths, store
from kmex_utils.data import Input, count, held_out, load, own_input, reading, reopen, sources
from kmex_utils.explanation.activations import keep
from kmex_utils.store import load_json, save_json


def of_size(image_size, name="birds", **changes):
    return replace(own_input(name), image_size=image_size, **changes)


def idx(array):
    return struct.pack(">I", 0x800 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """MNIST/raw as torchvision leaves it, with 30 and 20 digits."""
    generator = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for stem, number in (("train", 30), ("t10k", 20)):
        arrays[stem] = generator.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(idx(arrays[stem]))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.arange(number, dtype=np.uint8) % 10))
    return tmp_path, arrays


def test_mnist(mnist):
    root, arrays = mnist
    dataset = load("mnist", of_size(28, "mnist"), data=root)
    assert dataset.classes == tuple("0123456789")
    assert np.array_equal(dataset.train.pixels[:, 0], arrays["train"])
    assert np.array_equal(dataset.test.pixels[:, 0], arrays["t10k"])
    assert dataset.test.labels.tolist() == [i % 10 for i in range(20)]
    resized = load("mnist", data=root)
    assert resized.train.pixels.shape == (30, 1, 32, 32)
    (x, labels), *_ = resized.batches("train", 8)
    assert x.shape == (8, 3, 32, 32) and labels.tolist() == list(range(8))
    expected = (resized.train.pixels[:8].astype(np.float32) / 255 - 0.13269) / 0.29185
    np.testing.assert_allclose(x.numpy(), np.repeat(expected, 3, 1), atol=1e-5)


def test_stl10(tmp_path, monkeypatch):
    """The binary files of the official archive; torchvision's checksums are set to the tiny files'."""
    from torchvision.datasets import STL10

    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    generator = np.random.default_rng(0)
    content = {"class_names.txt": b"airplane\nbird\ncar\ncat\ndeer\ndog\nhorse\nmonkey\nship\ntruck"}
    pixels = {}
    for part, number in (("train", 20), ("test", 10), ("unlabeled", 1)):
        pixels[part] = generator.integers(0, 256, (number, 3, 96, 96), dtype=np.uint8)
        content[f"{part}_X.bin"] = pixels[part].tobytes()
        content[f"{part}_y.bin"] = (np.arange(number, dtype=np.uint8) % 10 + 1).tobytes()
    for name, bytes_ in content.items():
        (folder / name).write_bytes(bytes_)
    md5 = lambda name: hashlib.md5(content[name]).hexdigest()  # noqa: E731
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, attribute, [[name, md5(name)] for name, _ in getattr(STL10, attribute)])
    dataset = load("stl10", data=tmp_path)
    assert dataset.classes[:2] == ("airplane", "bird") and dataset.train.labels[:3].tolist() == [0, 1, 2]
    # the official files store columns before rows
    assert np.array_equal(dataset.train.pixels, pixels["train"].transpose(0, 1, 3, 2))
    assert len(dataset.test) == 10


@pytest.fixture
def cub(tmp_path):
    """The official folder with three classes; also packed as the official archive."""
    root = tmp_path / "CUB_200_2011"
    names = ["001.Black_footed_Albatross", "113.Baird_Sparrow", "114.Black_throated_Sparrow"]
    lines = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes")}
    number = 0
    for label, name in zip((1, 113, 114), names, strict=True):
        (root / "images" / name).mkdir(parents=True)
        for i in range(4):
            number += 1
            file = f"{name}/{name[4:]}_{i:04d}.jpg"
            pixels = np.zeros((60, 80, 3), np.uint8)
            pixels[20:40, 30:50] = 255  # what the box cuts out
            Image.fromarray(pixels).save(root / "images" / file, quality=95)
            lines["images"].append(f"{number} {file}")
            lines["image_class_labels"].append(f"{number} {label}")
            lines["train_test_split"].append(f"{number} {int(i < 3)}")
            lines["bounding_boxes"].append(f"{number} 30.0 20.0 20.0 20.0")
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n")
    classes = [names[0], *(f"{i:03d}.Other_{i}" for i in range(2, 113)), *names[1:]]
    (root / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(classes, 1)))
    return tmp_path


def test_cub200(cub):
    dataset = load("cub200", of_size(32, "cub200"), data=cub)
    assert dataset.classes == ("Black_footed_Albatross", "Baird_Sparrow", "Black_throated_Sparrow")
    assert (len(dataset.train), len(dataset.test)) == (9, 3)
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert dataset.train.pixels.mean() < 100
    assert dataset.train.names[0] == "001.Black_footed_Albatross/Black_footed_Albatross_0000.jpg"


def test_cub200_crop_and_class_group(cub):
    dataset = load("cub200", of_size(32, "cub200"), data=cub, crop=True, classes="*Sparrow")
    assert dataset.classes == ("Baird_Sparrow", "Black_throated_Sparrow")
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.train.pixels.mean() > 240  # only what the box holds


def test_cub200_from_the_archive(cub, tmp_path_factory, monkeypatch):
    data = tmp_path_factory.mktemp("data")
    archive = data / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cub / "CUB_200_2011", "CUB_200_2011")
    with pytest.raises(ValueError, match="not the official CUB-200-2011 archive"):
        load("cub200", data=data)
    monkeypatch.setattr(sources, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load("cub200", of_size(16, "cub200"), data=data).train) == 9


def test_a_killed_extraction_is_done_again(cub, tmp_path_factory, monkeypatch):
    """By this package, which left what it had beside, or by another program, which left a part in place."""
    data = tmp_path_factory.mktemp("data")
    archive, root = data / "CUB_200_2011.tgz", data / "CUB_200_2011"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cub / "CUB_200_2011", "CUB_200_2011")
    monkeypatch.setattr(sources, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    for part in (data / ".CUB_200_2011" / "CUB_200_2011", root):
        part.mkdir(parents=True)
        shutil.copy(cub / "CUB_200_2011" / "images.txt", part)
    assert len(load("cub200", of_size(16, "cub200"), data=data).train) == 9
    assert not (data / ".CUB_200_2011").exists()
    extract = tarfile.TarFile.extractall

    def killed(tar, *where, **how):
        extract(tar, *where, **how)
        raise KeyboardInterrupt

    shutil.rmtree(root)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tarfile.TarFile, "extractall", killed)
        load("cub200", data=data)
    assert not root.exists(), "nothing stands under its name before it is whole"


def test_a_killed_extraction_of_mnist_is_named(mnist, no_network):
    """torchvision would take the part for the whole; without the archives it is fetched again."""
    root, _ = mnist
    file = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ConnectionError, match="put the four MNIST .gz files into"):
        load("mnist", data=root)


@pytest.fixture
def full_disk():
    """Files end at 100 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line(folder, tmp_path, full_disk, monkeypatch, network, digits):
    """Not a bus error: decoded images kept, in a temporary file, and activations; no file is left."""
    said = "do not fit into .*: free some space"
    with pytest.raises(OSError, match=said):
        load(folder, of_size(224), data=tmp_path / "data")
    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    (tmp_path / "scratch").mkdir()
    with pytest.raises(OSError, match=said):
        load(folder, of_size(224), data=None, scratch=tmp_path / "scratch")
    with pytest.raises(OSError, match=said):
        keep(network, digits, "train", 1, "disk", folder=tmp_path / "kept")
    left = [path for name in ("data", "scratch", "kept") for path in (tmp_path / name).rglob("*") if path.is_file()]
    assert left == []


def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("../outside.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    monkeypatch.setattr(sources, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(tarfile.OutsideDestinationError):
        sources.extract_cub(archive, tmp_path / "data")
    assert not (tmp_path / "outside.txt").exists()


def test_mnist_mini_is_official_mnist():
    dataset = load("mnist-mini", of_size(28, "mnist-mini"))
    assert (len(dataset.train), len(dataset.test)) == (2500, 1500)
    assert torch.bincount(dataset.train.labels).tolist() == [250] * 10
    assert torch.bincount(dataset.test.labels).tolist() == [150] * 10
    assert len(set(dataset.train.names)) == 2500 and max(map(int, dataset.train.names)) < 60_000
    assert max(map(int, dataset.test.names)) < 10_000
    assert paths.MNIST_MINI.stat().st_size < 1.2e6
    assert hashlib.sha256(paths.MNIST_MINI.read_bytes()).hexdigest() in (paths.DATA / "README.md").read_text()


def test_a_damaged_mnist_mini_is_named(tmp_path, monkeypatch):
    damaged = tmp_path / "mnist-mini.npz"
    damaged.write_bytes(paths.MNIST_MINI.read_bytes()[:-1])
    monkeypatch.setattr(paths, "MNIST_MINI", damaged)
    with pytest.raises(ValueError, match="missing or damaged; restore it"):
        load("mnist-mini")


def test_streamed_pixels_are_those_decoded_once(folder, cub, tmp_path):
    """However they are indexed, boxes cut out; nothing is written."""
    for source, choice in ((folder, {}), ("cub200", {"crop": True})):
        how = {"input": of_size(24, "birds"), "data": cub, **choice}
        streamed = load(source, stream=True, **how)
        assert not (cub / "cache").exists()
        decoded = load(source, **how)
        shutil.rmtree(cub / "cache")
        for split in ("train", "test"):
            ours, expected = streamed.split(split), decoded.split(split)
            assert ours.pixels.shape == expected.pixels.shape and len(ours.pixels) == len(ours)
            for index in (0, -1, slice(1, None), slice(0, 0), [2, 0, 2][: len(ours)], np.arange(len(ours))):
                assert np.array_equal(ours.pixels[index], expected.pixels[index])
            assert np.array_equal(ours.rgb(1), expected.rgb(1))
            assert torch.equal(ours.labels, expected.labels) and ours.names == expected.names
        again = reopen(streamed.settings)
        assert isinstance(again.train.pixels, reading.Streamed) and again.settings == streamed.settings


def test_a_streamed_image_that_cannot_be_read_is_named(folder):
    streamed = load(folder, of_size(24), stream=True)
    streamed.train.pixels.files[1].write_bytes(b"no image")
    assert streamed.train.pixels[[0, 2]].shape[0] == 2
    with pytest.raises(ValueError, match=rf"1 of 2 images cannot be read.*{re.escape(streamed.train.names[1])}"):
        streamed.train.pixels[:2]


def test_own_folder(folder, tmp_path):
    dataset = load(folder, of_size(24), data=tmp_path)
    assert (dataset.name, dataset.classes) == ("birds", ("blue bird", "red"))
    assert dataset.train.pixels.shape == (12, 3, 24, 24)
    assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6
    assert dataset.train.pixels[:6, 2].mean() > 150 > 80 > dataset.train.pixels[:6, 0].mean()
    assert dataset.train.names[0] == "train/blue bird/0.png"
    assert dataset.input == Input(24, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "stretch")
    # decoded once: the second load reads the same file
    caches = list((tmp_path / "cache").iterdir())
    stamps = [file.stat().st_mtime_ns for file in caches]
    load(folder, of_size(24), data=tmp_path)
    assert [file.stat().st_mtime_ns for file in caches] == stamps and len(caches) == 2
    load(folder, of_size(24, fit="crop"), data=tmp_path)
    assert len(list((tmp_path / "cache").iterdir())) == 4, "another fit has other pixels"


def test_a_known_name_lends_a_folder_its_input(folder):
    assert load(folder, name="mnist", data=None).input == load("mnist-mini", of_size(32, "mnist-mini")).input


def test_a_changed_image_is_decoded_again(folder, tmp_path):
    before = load(folder, of_size(8), data=tmp_path).train.pixels[0].copy()
    Image.new("RGB", (10, 10), (0, 255, 0)).save(folder / "train" / "blue bird" / "0.png")
    after = load(folder, of_size(8), data=tmp_path).train.pixels[0]
    assert not np.array_equal(before, after) and after[1].min() == 255


def test_images_per_class(folder, tmp_path):
    dataset = load(folder, of_size(8), images_per_class=2, data=tmp_path)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1] and dataset.test.labels.tolist() == [0, 0, 1, 1]
    assert dataset.train.names[2:] == ("train/red/0.png", "train/red/1.png")


def test_held_out_images_are_a_random_share_of_each_class():
    labels = np.array([0] * 20 + [1] * 7 + [2] + [-1] * 5)
    mask = held_out(labels, 0.3, seed=0)
    assert [int(mask[labels == c].sum()) for c in (0, 1, 2, -1)] == [6, 2, 0, 1]
    assert np.array_equal(mask, held_out(labels, 0.3, seed=0))
    assert not np.array_equal(mask, held_out(labels, 0.3, seed=1))
    chosen = np.mean([held_out(labels, 0.3, seed)[:20] for seed in range(400)], 0)
    assert np.abs(chosen - 0.3).max() < 0.12, "every image has the same chance"
    assert not held_out(labels, 0.0, 0).any() and held_out(labels, 0.99, 0).sum() == 19 + 6 + 0 + 4


def test_validation_comes_from_the_training_images_alone(folder, tmp_path):
    """A third of each class stands in for the test images, of which a broken one goes unnoticed."""
    whole = load(folder, of_size(16), data=tmp_path).train
    (folder / "test" / "red" / "0.png").write_bytes(b"broken")
    dataset = load(folder, of_size(16), validation=1 / 3, seed=3, data=tmp_path)
    mask = held_out(whole.labels.numpy(), 1 / 3, 3)
    for split, index in ((dataset.train, np.flatnonzero(~mask)), (dataset.test, np.flatnonzero(mask))):
        assert torch.bincount(split.labels).tolist() == [len(index) // 2] * 2
        assert split.names == tuple(whole.names[i] for i in index)
        np.testing.assert_array_equal(split.pixels, whole.pixels[index])
        assert torch.equal(split.labels, whole.labels[index])
    with pytest.raises(ValueError, match="leaves a class without"):
        load(folder, of_size(16), validation=0.01, data=tmp_path)


def test_a_share_is_held_out_where_there_is_no_test_split(folder, tmp_path):
    dataset = load(folder / "train", of_size(8), held_out=0.5, seed=1, data=tmp_path)
    mask = held_out(np.repeat([0, 1], 6), 0.5, 1)
    names = [f"{c}/{i}.png" for c in ("blue bird", "red") for i in range(6)]
    assert dataset.test.names == tuple(name for name, is_test in zip(names, mask, strict=True) if is_test)
    assert not set(dataset.train.names) & set(dataset.test.names) and len(dataset.train) == len(dataset.test) == 6
    assert len(load(folder, of_size(8), held_out=0.5, data=tmp_path).test) == 6, "test/ itself"


@pytest.mark.parametrize("choice", [{}, {"images_per_class": 2}, {"validation": 0.5, "seed": 3}])
def test_images_are_counted_as_they_are_loaded(choice, folder, tmp_path):
    for source, more in ((folder, {}), (folder / "train", {"held_out": 0.4}), ("mnist-mini", {"classes": "3,7"})):
        dataset = load(source, of_size(8), **choice, **more, data=tmp_path)
        expected = (len(dataset.train), len(dataset.test), len(dataset.classes))
        assert count(source, **choice, **more) == expected
    assert count("mnist-mini") == (2500, 1500, 10)


def test_what_is_not_yet_downloaded_is_counted(no_network):
    assert count("mnist", classes="3,7", images_per_class=5) == (10, 10, 2)
    assert count("cub200", classes="*Sparrow") == (5994, 5794, 200)
    train, test, classes = count("stl10", validation=0.2)
    assert (train, test, classes) == (4000, 1000, 10)


@pytest.mark.parametrize(
    ("where", "choice"),
    [
        ("", {}),
        ("", {"validation": 0.4, "seed": 5, "classes": "*i*, red"}),
        ("train", {"held_out": 0.4, "seed": 2, "strict": False, "needs_labels": False, "data": None}),
        ("train/red", {"held_out": 0.4, "strict": False, "needs_labels": False, "data": None}),
        ("mnist-mini", {"classes": "1,[3-5]", "images_per_class": 4}),
    ],
)
def test_a_data_set_is_reopened_from_its_settings(where, choice, folder, tmp_path):
    source = where if where == "mnist-mini" else folder / where
    dataset = load(source, of_size(12, fit="crop"), **{"data": tmp_path / "data", **choice})
    save_json(tmp_path / "settings.json", dataset.settings)
    settings = load_json(tmp_path / "settings.json")
    assert settings == dataset.settings, "plain JSON"
    again = reopen(settings)
    assert (again.name, again.classes, again.input, again.settings) == (
        dataset.name,
        dataset.classes,
        dataset.input,
        dataset.settings,
    )
    for split in ("train", "test"):
        assert np.array_equal(again.split(split).pixels, dataset.split(split).pixels)
        assert torch.equal(again.split(split).labels, dataset.split(split).labels)
        assert again.split(split).names == dataset.split(split).names


def test_settings_are_resolved(folder, tmp_path, monkeypatch):
    """Values, not what stands for them; places in the repository without this machine's path to it."""
    settings = load("mnist-mini", images_per_class=2).settings
    assert settings["input"] == {"image_size": 56, "mean": [0.13269] * 3, "std": [0.29185] * 3, "fit": "stretch"}
    assert settings["classes"] == list("0123456789") and (settings["source"], settings["data"]) == (
        "mnist-mini",
        "data",
    )
    monkeypatch.setattr(paths, "ROOT", folder.parent)
    monkeypatch.chdir(folder / "train")
    for given, settled in (("birds", "birds"), (folder, "birds"), (".", "birds/train")):
        settings = load(given, of_size(8), held_out=0.5, data="kept").settings
        assert (settings["source"], settings["data"]) == (settled, "kept")
        assert reopen(settings).settings == settings
    assert (folder.parent / "kept" / "cache").is_dir()
    monkeypatch.setattr(paths, "ROOT", tmp_path / "installed")
    assert load(".", of_size(8), held_out=0.5, data=None).settings["source"] == str(folder / "train")


# --- one's own torch data set -------------------------------------------------------------------------------------


def test_a_torch_data_set_is_read_as_its_folder(folder):
    """torchvision's ImageFolder opens the files itself; the pixels are the folder's."""
    expected = load(folder, of_size(16), data=None)
    pair = ImageFolder(folder / "train"), ImageFolder(folder / "test")
    dataset = load(pair, of_size(16))
    assert (dataset.name, dataset.classes) == ("ImageFolder", ("blue bird", "red"))
    for split in ("train", "test"):
        assert np.array_equal(dataset.split(split).pixels, expected.split(split).pixels)
        assert torch.equal(dataset.split(split).labels, expected.split(split).labels)
    assert dataset.settings["source"] == ""
    with pytest.raises(ValueError, match="a torch data set is not found by its settings: give it again"):
        reopen(dataset.settings)
    alone = load(pair[0], of_size(16), held_out=0.5, seed=1, classes="red,blue*", name="own")
    mask = held_out(expected.train.labels.numpy(), 0.5, 1)
    assert np.array_equal(alone.test.pixels, expected.train.pixels[mask]) and alone.name == "own"
    part = load(Subset(pair[0], [0, 1, 6, 7]), of_size(16), held_out=0.5)
    assert part.classes == ("blue bird", "red") and part.train.labels.tolist() == [0, 1]


class Items(torch.utils.data.Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


def test_arrays_and_tensors_of_either_order():
    pixels = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    turned = pixels.transpose(2, 0, 1)
    images = [Image.fromarray(pixels), pixels, turned, torch.from_numpy(pixels), torch.from_numpy(turned.copy())]
    items = [(image, label) for label in (3, 7) for image in images] + [
        (pixels, np.int64(3)),
        (pixels, torch.tensor(7)),
    ]
    dataset = load(Items(items), of_size(9), strict=False, log=str)
    assert dataset.classes == ("3", "7") and dataset.train.labels.tolist() == [0] * 5 + [1] * 5 + [0, 1]
    assert all(np.array_equal(other, dataset.train.pixels[0]) for other in dataset.train.pixels)
    unlabelled = load(Items([(pixels, -1)] * 3), of_size(9), strict=False, needs_labels=False)
    assert unlabelled.classes == () and unlabelled.train.labels.tolist() == [-1] * 3


def as_tensors(*steps):
    """The pixels of two classes as a transform gives them, and how it gives them to a network."""
    pixels = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)
    pixels[0], pixels[1] = 0, 255
    images, transform = [Image.fromarray(part) for part in pixels], v2.Compose([v2.ToImage(), *steps])
    return pixels, images, transform


TO_FLOAT = v2.ToDtype(torch.float32, scale=True)
NORMALISED = (0.2, 0.5, 0.7), (0.3, 0.25, 0.4)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("known", ["transform", "values", "loader", "collate"])
def test_float_tensors_are_undone_to_their_bytes(normalised, known):
    """Exactly: a float of 0 … 1 is a byte, and a normalised one is again the tensor, to rounding."""
    pixels, images, transform = as_tensors(TO_FLOAT, *[v2.Normalize(*NORMALISED)] * normalised)
    dataset = Items([(transform(image), i % 2) for i, image in enumerate(images)])
    input, source = Input(16, *NORMALISED), dataset
    if known == "transform":  # the data set's own: it need not be the network's
        dataset.transform, input = transform, Input(16, 0.4, 0.3)
    if known == "loader":
        source = DataLoader(dataset, batch_size=3, shuffle=True)
    if known == "collate":
        source = DataLoader(
            dataset, collate_fn=lambda batch: (torch.stack([x for x, _ in batch]), [y for _, y in batch])
        )
    loaded = load(source, input, strict=False)
    assert loaded.name == "Items" and loaded.train.labels.tolist() == [0, 1] * 4
    assert np.array_equal(loaded.train.pixels, pixels.transpose(0, 3, 1, 2))
    (x, _), *_ = loaded.batches("train")
    if normalised and known != "transform":
        torch.testing.assert_close(x, torch.stack([image for image, _ in dataset.items]), rtol=0, atol=1e-5)


def test_resized_floats_are_undone_to_half_a_byte():
    _, images, transform = as_tensors(TO_FLOAT, v2.Resize((9, 9)), v2.Normalize(*NORMALISED))
    tensors = [transform(image) for image in images]
    loaded = load(Items(list(zip(tensors, [0, 1] * 4, strict=True))), Input(9, *NORMALISED), strict=False)
    (x, _), *_ = loaded.batches("train")
    limit = torch.tensor([0.5 / 255 / std for std in NORMALISED[1]]).view(3, 1, 1)
    assert ((x - torch.stack(tensors)).abs() <= limit + 1e-5).all()


def test_a_collate_that_is_no_pair_is_refused():
    loader = DataLoader(Items([(torch.zeros(3, 8, 8), 0)]), collate_fn=lambda batch: {"x": batch})
    with pytest.raises(TypeError, match="items must be"):
        load(loader, of_size(8), strict=False)
    stream = type("Stream", (torch.utils.data.IterableDataset,), {"__iter__": lambda self: iter(())})()
    with pytest.raises(TypeError, match="a torch data set with a length or its DataLoader"):
        load(DataLoader(stream), of_size(8))


def test_grey_tensors_are_grey_images():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), np.uint8)
    x = (torch.from_numpy(pixels).float() / 255 - 0.1307) / 0.3081
    loaded = load(Items([(x[i], i % 2) for i in range(4)]), Input(8, 0.1307, 0.3081, channels=1), strict=False)
    assert np.array_equal(loaded.train.pixels, np.repeat(pixels, 3, 1))
    torch.testing.assert_close(loaded.input(loaded.train.pixels), x, rtol=0, atol=1e-6)


# --- how an image enters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [(0.5, 0.25, 0.125), [0.5], 0.5, 0, "array", "tensor", "[3, 1, 1]"])
def test_means_in_every_form(values):
    forms = {"array": np.float32([0.485, 0.456, 0.406]), "tensor": torch.tensor([0.485, 0.456, 0.406])}
    forms["[3, 1, 1]"] = forms["tensor"].view(3, 1, 1)
    mean = Input(8, forms.get(values, values) if isinstance(values, str) else values, 1).mean
    expected = (0.485, 0.456, 0.406) if isinstance(values, str) else tuple(np.broadcast_to(values, 3).tolist())
    assert mean == expected, "of float32 the decimals that were meant"


def test_grey_is_pillows():
    """Three channels are weighted as convert("L") does, to the byte; one is itself."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 16, 16), np.uint8)
    expected = [np.asarray(Image.fromarray(part.transpose(1, 2, 0)).convert("L")) for part in pixels]
    input = Input(16, 0.1307, 0.3081, channels=1)
    x = input(pixels)
    np.testing.assert_allclose(x[:, 0], (np.stack(expected) / 255 - 0.1307) / 0.3081, atol=1e-6)
    assert torch.equal(x, input(np.stack(expected)[:, None])) and x.shape == (2, 1, 16, 16)


@pytest.mark.parametrize("fit", ["crop", "stretch"])
def test_images_of_two_sides(fit, folder):
    assert Input((8, 8), 0, 1) == Input(8, 0, 1) and Input([8], 0, 1).size == (8, 8)
    input = Input((12, 20), 0, 1, fit)
    dataset = load(folder, input, data=folder.parent)
    assert dataset.train.pixels.shape[1:] == (3, 12, 20) and dataset.train.rgb(0).shape == (12, 20, 3)
    with Image.open(folder / dataset.train.names[0]) as image:
        image = image.convert("RGB")
        if fit == "crop":
            expected = ImageOps.fit(image, (20, 12), Image.Resampling.BILINEAR)
        else:
            expected = image.resize((20, 12), Image.Resampling.BILINEAR)
    assert np.array_equal(dataset.train.rgb(0), np.asarray(expected))
    assert reopen(json.loads(json.dumps(dataset.settings))).input == input
    assert load("mnist-mini", replace(input, fit="stretch"), images_per_class=1).train.pixels.shape == (10, 1, 12, 20)


def test_unreadable_items_stop_or_are_left_out():
    good = np.zeros((8, 8, 3), np.uint8)
    items = Items([(good, 0), OSError("image file is truncated"), (good, 1), (good, 1), (good, 0)])
    with pytest.raises(ValueError, match=r"1 of 5 images cannot be read; .*image 1 \(image file is truncated\)"):
        load(items, of_size(8), held_out=0.5)
    said = []
    dataset = load(items, of_size(8), held_out=0.5, strict=False, log=said.append)
    assert sorted(dataset.train.names + dataset.test.names) == ["0", "2", "3", "4"]
    assert said == ["cannot read image 1: image file is truncated", "1 of 5 images cannot be read and are left out"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Items([(torch.full((3, 8, 8), 9.0), 0)]), "values 9 … 9 are not in [0, 1], nor normalised by mean (0.485, "),
        (Items([(np.zeros((8, 8, 5), np.uint8), 0)]), "or floats [3, H, W], got uint8 [8, 8, 5]"),
        (Items([{"image": 0}]), "items must be (image, integer label), got <class 'dict'>"),
        (Items([(np.zeros((8, 8, 3), np.uint8), 0.5)]), "items must be (image, integer label)"),
        (Items([(np.zeros((8, 8, 3), np.uint8), 0)] * 3), "labels must be 0, 1 … of at least two classes, got [0]"),
        (Items([(np.zeros((8, 8, 3), np.uint8), c) for c in (-1, 0)]), "labels must be 0, 1 … of at least two"),
        (
            tuple(Items([(np.zeros((8, 8, 3), np.uint8), c) for c in labels]) for labels in ((0, 1), (1, 2))),
            "the test images have labels that the training images lack: [2]",
        ),
        (5, "a torch data set with a length or its DataLoader, or a pair (train, test), got int"),
    ],
)
def test_items_that_do_not_do(source, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        load(source, of_size(8), held_out=0.5)


def test_many_images_of_a_torch_data_set_stay_out_of_memory(tmp_path, monkeypatch):
    items = Items([(np.full((8, 8, 3), i, np.uint8), i % 2) for i in range(10)])
    expected = load(items, of_size(8), held_out=0.4)
    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    dataset = load(items, of_size(8), held_out=0.4, scratch=tmp_path)
    for split in ("train", "test"):
        assert isinstance(dataset.split(split).pixels, np.memmap)
        assert np.array_equal(dataset.split(split).pixels, expected.split(split).pixels)


def test_unreadable_images_are_named(folder, tmp_path):
    (folder / "train" / "red" / "0.png").write_bytes(b"")
    (folder / "train" / "red" / "1.png").write_bytes((folder / "train" / "red" / "2.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be read; .*0\.png.*1\.png"):
        load(folder, of_size(8), data=tmp_path)
    assert not list((tmp_path / "cache").glob("*train*")), "nothing half-written may stay"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(source="minst"), "unknown dataset 'minst': use one of mnist-mini, mnist"),
        (dict(source="no/where"), "no/where does not exist or is not a folder: give a folder of images"),
        (dict(source="mnist-mini", crop=True), "`crop` cuts to CUB-200's"),
        (
            dict(source="mnist-mini", images_per_class=-1),
            "images_per_class must be a whole number of at least 0, got -1",
        ),
        (dict(source="mnist-mini", validation=1.0), "validation must be a share"),
        (dict(source="mnist-mini", held_out=-0.1), "held_out must be a share"),
        (dict(source="mnist-mini", classes="eleven"), "no class matches 'eleven'"),
        (dict(source="mnist-mini", classes="3"), "keep at least two classes"),
        (dict(source="mnist-mini", classes=["3"]), "keep at least two classes"),
    ],
)
def test_bad_choices(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "image_size must be at least 1"),
        ({"mean": (0.5, 0.5)}, "mean and std must be of R, G and B, or one value, std positive; got (0.5, 0.5)"),
        ({"std": (0.0,) * 3}, "std positive"),
        ({"fit": "pad"}, "fit must be crop or stretch"),
        ({"image_size": (8, 8, 8)}, "a number or (H, W), got (8, 8, 8)"),
        ({"image_size": 8.5}, "a number or (H, W), got 8.5"),
        ({"mean": "red"}, "mean must be numbers, got 'red'"),
        ({"mean": (np.nan,) * 3}, "mean must be numbers"),
        ({"channels": 1}, "mean and std must be of one value, for one channel"),
        ({"channels": 4}, "channels must be 3 (RGB) or 1 (grey), got 4"),
        ({"window": (5, 5)}, "window must be (low, high)"),
        ({"window": (5,)}, "window must be (low, high)"),
    ],
)
def test_bad_inputs(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(own_input("mnist"), **changes)


def test_own_inputs_are_the_papers():
    assert [own_input(name).image_size for name in ("mnist", "stl10", "cub200", "birds")] == [32, 96, 224, 224]
    assert own_input("mnist").mean == own_input("mnist-mini").mean == (0.13269,) * 3


def test_without_a_network_the_file_to_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CUB_URL", "http://127.0.0.1:9/CUB_200_2011.tgz")
    with pytest.raises(ConnectionError, match=re.escape(f"put CUB_200_2011.tgz into {tmp_path}")):
        load("cub200", data=tmp_path)


def test_of_two_that_fetch_one_waits(mnist):
    """Else the second finds a file that the first is unpacking, and takes it for damaged."""
    root, _ = mnist
    loaded = []
    second = threading.Thread(target=lambda: loaded.append(load("mnist", data=root)), daemon=True)
    with store.lock(root / "MNIST" / "raw" / ".fetching.lock"):
        second.start()
        second.join(1)
        assert second.is_alive() and not loaded
    second.join(60)
    assert len(loaded[0].train) == len(load("mnist", data=root).train)


def test_gz_files_that_are_not_the_official_ones_are_refused(mnist, no_network):
    """Placed by hand, they are verified; a wrong one would be downloaded again, which needs the network."""
    root, _ = mnist
    raw = root / "MNIST" / "raw"
    for file in list(raw.iterdir()):
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    with pytest.raises(ConnectionError, match=re.escape(f"put the four MNIST .gz files into {raw}")):
        load("mnist", data=root)
