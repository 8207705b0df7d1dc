"""Each data set from a tiny archive in its official on-disk format; bad input in one clear line."""

import gzip
import hashlib
import io
import re
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from kmex_utils import datasets, paths
from kmex_utils.datasets import RECIPES, augment, load


def idx(array):
    return struct.pack(">I", 0x800 + array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """MNIST/raw as torchvision leaves it, with 30 and 20 digits."""
    generator = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    arrays = {}
    for stem, count in (("train", 30), ("t10k", 20)):
        arrays[stem] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{stem}-images-idx3-ubyte").write_bytes(idx(arrays[stem]))
        (raw / f"{stem}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path, arrays


def test_mnist(mnist):
    root, arrays = mnist
    found = load("mnist", data=root, image_size=28)
    assert found.classes == tuple("0123456789")
    assert np.array_equal(found.train.pixels[:, 0], arrays["train"])
    assert np.array_equal(found.test.pixels[:, 0], arrays["t10k"])
    assert found.test.labels.tolist() == [i % 10 for i in range(20)]
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
    for part, count in (("train", 20), ("test", 10), ("unlabeled", 1)):
        pixels[part] = generator.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        content[f"{part}_X.bin"] = pixels[part].tobytes()
        content[f"{part}_y.bin"] = (np.arange(count, dtype=np.uint8) % 10 + 1).tobytes()
    for name, bytes_ in content.items():
        (folder / name).write_bytes(bytes_)
    md5 = lambda name: hashlib.md5(content[name]).hexdigest()  # noqa: E731
    for attribute in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, attribute, [[name, md5(name)] for name, _ in getattr(STL10, attribute)])
    found = load("stl10", data=tmp_path)
    assert found.classes[:2] == ("airplane", "bird") and found.train.labels[:3].tolist() == [0, 1, 2]
    # the official files store columns before rows
    assert np.array_equal(found.train.pixels, pixels["train"].transpose(0, 1, 3, 2))
    assert len(found.test) == 10


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
    found = load("cub200", data=cub, image_size=32)
    assert found.classes == ("Black_footed_Albatross", "Baird_Sparrow", "Black_throated_Sparrow")
    assert (len(found.train), len(found.test)) == (9, 3)
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.train.pixels.mean() < 100
    assert found.train.names[0] == "001.Black_footed_Albatross/Black_footed_Albatross_0000.jpg"


def test_cub200_crop_and_class_group(cub):
    found = load("cub200", data=cub, image_size=32, crop=True, classes="*Sparrow")
    assert found.classes == ("Baird_Sparrow", "Black_throated_Sparrow")
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.train.pixels.mean() > 240  # only what the box holds


def test_cub200_from_the_archive(cub, tmp_path_factory, monkeypatch):
    data = tmp_path_factory.mktemp("data")
    archive = data / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(cub / "CUB_200_2011", "CUB_200_2011")
    with pytest.raises(ValueError, match="not the official CUB-200-2011 archive"):
        load("cub200", data=data)
    monkeypatch.setattr(datasets, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert len(load("cub200", data=data, image_size=16).train) == 9


def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, monkeypatch):
    archive = tmp_path / "CUB_200_2011.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        info = tarfile.TarInfo("../outside.txt")
        info.size = 4
        tar.addfile(info, io.BytesIO(b"evil"))
    monkeypatch.setattr(datasets, "CUB_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    with pytest.raises(tarfile.OutsideDestinationError):
        datasets.extract_cub(archive, tmp_path / "data")
    assert not (tmp_path / "outside.txt").exists()


def test_mnist_mini_is_official_mnist():
    found = load("mnist-mini", image_size=28)
    assert (len(found.train), len(found.test)) == (2500, 1500)
    assert torch.bincount(found.train.labels).tolist() == [250] * 10
    assert torch.bincount(found.test.labels).tolist() == [150] * 10
    assert len(set(found.train.names)) == 2500 and max(map(int, found.train.names)) < 60_000
    assert max(map(int, found.test.names)) < 10_000
    assert paths.MNIST_MINI.stat().st_size < 1.2e6
    assert hashlib.sha256(paths.MNIST_MINI.read_bytes()).hexdigest() in (paths.DATA / "README.md").read_text()


def test_a_damaged_mnist_mini_is_named(tmp_path, monkeypatch):
    damaged = tmp_path / "mnist-mini.npz"
    damaged.write_bytes(paths.MNIST_MINI.read_bytes()[:-1])
    monkeypatch.setattr(paths, "MNIST_MINI", damaged)
    with pytest.raises(ValueError, match="missing or damaged; restore it"):
        load("mnist-mini")


def test_own_folder(folder, tmp_path):
    found = load("birds", folder, image_size=24, data=tmp_path)
    assert found.classes == ("blue bird", "red")
    assert found.train.pixels.shape == (12, 3, 24, 24)
    assert found.train.labels.tolist() == [0] * 6 + [1] * 6
    assert found.train.pixels[:6, 2].mean() > 150 > 80 > found.train.pixels[:6, 0].mean()
    assert found.train.names[0] == "train/blue bird/0.png"
    assert found.recipe.image_size == 24
    # decoded once: the second load reads the same file
    caches = list((tmp_path / "cache").iterdir())
    stamps = [file.stat().st_mtime_ns for file in caches]
    load("birds", folder, image_size=24, data=tmp_path)
    assert [file.stat().st_mtime_ns for file in caches] == stamps and len(caches) == 2


def test_a_changed_image_is_decoded_again(folder, tmp_path):
    before = load("birds", folder, image_size=8, data=tmp_path).train.pixels[0].copy()
    Image.new("RGB", (10, 10), (0, 255, 0)).save(folder / "train" / "blue bird" / "0.png")
    after = load("birds", folder, image_size=8, data=tmp_path).train.pixels[0]
    assert not np.array_equal(before, after) and after[1].min() == 255


def test_images_per_class(folder, tmp_path):
    found = load("birds", folder, image_size=8, images_per_class=2, data=tmp_path)
    assert found.train.labels.tolist() == [0, 0, 1, 1] and found.test.labels.tolist() == [0, 0, 1, 1]


def test_validation_comes_from_the_training_images_alone(folder, tmp_path):
    """The last third of each class stands in for the test images, of which a broken one goes unnoticed."""
    whole = load("birds", folder, image_size=16, data=tmp_path).train
    (folder / "test" / "red" / "0.png").write_bytes(b"broken")
    found = load("birds", folder, image_size=16, validation=1 / 3, data=tmp_path)
    kept = [f"train/{name}/{i}.png" for name in ("blue bird", "red") for i in range(4)]
    held = [f"train/{name}/{i}.png" for name in ("blue bird", "red") for i in (4, 5)]
    assert found.train.names == tuple(kept) and found.test.names == tuple(held)
    for split in (found.train, found.test):
        index = [whole.names.index(name) for name in split.names]
        np.testing.assert_array_equal(split.pixels, whole.pixels[index])
        assert torch.equal(split.labels, whole.labels[index])
    with pytest.raises(ValueError, match="leaves a class without"):
        load("birds", folder, image_size=16, validation=0.01, data=tmp_path)


def test_augmentation_can_be_chosen(folder, tmp_path):
    own = load("birds", folder, data=tmp_path).recipe
    chosen = load("birds", folder, flip=0.0, padding=3, data=tmp_path).recipe
    assert (own.flip, own.padding) == (RECIPES["folder"].flip, RECIPES["folder"].padding)
    assert (chosen.flip, chosen.padding) == (0.0, 3)


def test_unreadable_images_are_named(folder, tmp_path):
    (folder / "train" / "red" / "0.png").write_bytes(b"")
    (folder / "train" / "red" / "1.png").write_bytes((folder / "train" / "red" / "2.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"2 of 12 images cannot be read; .*0\.png.*1\.png"):
        load("birds", folder, image_size=8, data=tmp_path)
    assert not list((tmp_path / "cache").glob("*train*")), "nothing half-written may stay"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="minst"), "unknown dataset 'minst': use one of mnist-mini, mnist"),
        (dict(name="folder"), "needs `folder`"),
        (dict(name="birds", folder="nowhere"), "nowhere/train does not exist"),
        (dict(name="mnist-mini", crop=True), "`crop` cuts to CUB-200's"),
        (dict(name="mnist-mini", image_size=-1), "must be 0"),
        (dict(name="mnist-mini", validation=1.0), "validation must be a share"),
        (dict(name="mnist-mini", flip=2.0), "flip must be a probability"),
        (dict(name="mnist-mini", padding=-2), "padding pixels"),
        (dict(name="mnist-mini", classes="eleven"), "no class matches 'eleven'"),
        (dict(name="mnist-mini", classes="3"), "keep at least two classes"),
    ],
)
def test_bad_choices(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load(**arguments)


def test_a_folder_without_enough_classes(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds 1 class folders; at least two"):
        load("mine", tmp_path, data=tmp_path)


def test_without_a_network_the_file_to_place_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "CUB_URL", "http://127.0.0.1:9/CUB_200_2011.tgz")
    with pytest.raises(ConnectionError, match=re.escape(f"put CUB_200_2011.tgz into {tmp_path}")):
        load("cub200", data=tmp_path)


def test_training_batches_depend_on_seed_and_epoch_only():
    found = load("mnist-mini", image_size=28)
    first = [labels.tolist() for _, labels in found.training_batches(256, seed=1, epoch=2)]
    again = [labels.tolist() for _, labels in found.training_batches(256, seed=1, epoch=2)]
    other = [labels.tolist() for _, labels in found.training_batches(256, seed=1, epoch=3)]
    assert first == again != other
    assert len(first) == 2500 // 256 and all(len(labels) == 256 for labels in first)


def test_augmentation_flips_and_shifts():
    x = torch.arange(2 * 3 * 5 * 6, dtype=torch.uint8).view(2, 3, 5, 6)
    flipped = augment(x, 1.0, 0, torch.Generator().manual_seed(0))
    assert torch.equal(flipped, x.flip(3))
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    crops = {(i, j): padded[:, :, i : i + 5, j : j + 6] for i in range(5) for j in range(5)}
    seen = set()
    for seed in range(40):
        moved = augment(x, 0.0, 2, torch.Generator().manual_seed(seed))
        for n in range(2):
            matches = [shift for shift, crop in crops.items() if torch.equal(crop[n], moved[n])]
            assert len(matches) == 1
            seen.add(matches[0])
    assert len(seen) > 15


def test_recipes_are_the_papers():
    assert (RECIPES["mnist"].image_size, RECIPES["mnist"].epochs, RECIPES["mnist"].prototypes_per_class) == (32, 10, 5)
    assert (RECIPES["stl10"].image_size, RECIPES["stl10"].epochs, RECIPES["stl10"].padding) == (96, 30, 2)
    assert (RECIPES["cub200"].image_size, RECIPES["cub200"].prototypes_per_class) == (224, 10)
    for name in ("mnist", "stl10", "cub200"):
        recipe = RECIPES[name]
        assert (recipe.weights, recipe.batch_size, recipe.learning_rate, recipe.momentum) == (
            "imagenet",
            128,
            0.01,
            0.5,
        )


def test_gz_files_that_are_not_the_official_ones_are_refused(mnist, no_network):
    """Placed by hand, they are verified; a wrong one would be downloaded again, which needs the network."""
    root, _ = mnist
    raw = root / "MNIST" / "raw"
    for file in list(raw.iterdir()):
        (raw / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    with pytest.raises(ConnectionError, match=re.escape(f"put the four MNIST .gz files into {raw}")):
        load("mnist", data=root)
