"""Images of every kind and folders of every layout: read one way, or refused in one line."""

import json
import os

import numpy as np
import pytest
from PIL import Image, ImageOps

from kmex_utils.data import Input, load, reading
from kmex_utils.networks.class_names import class_names

SMALL = Input(8, (0,) * 3, (1,) * 3)


def lenient(folder, input=SMALL, held_out=0.2, log=str, **options):
    """A folder as ``explain`` reads it."""
    return load(folder, input, held_out=held_out, strict=False, needs_labels=False, data=None, log=log, **options)


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
    dataset = lenient(tmp_path, Input(40, (0,) * 3, (1,) * 3, "crop"), held_out=0, log=said.append)
    by_name = {name: dataset.train.rgb(i) for i, name in enumerate(dataset.train.names)}
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


def saved_on_its_side(file):
    """A photo whose left half is white, to be turned a quarter to the right."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, exif=exif)


def test_an_image_on_its_side_is_turned(tmp_path):
    saved_on_its_side(tmp_path / "a.png")
    pixels, *_ = reading.read(tmp_path / "a.png", Input(20, 0, 1))
    assert (pixels[:, :8] > 200).all() and (pixels[:, 12:] < 50).all()


def test_16_bits_have_one_scale(tmp_path):
    """A dark 16-bit image stays dark: the scale is the mode's, not the image's own."""
    for name, value in (("dark", 5140), ("white", 65535)):
        Image.fromarray(np.full((20, 20), value, np.uint16)).save(tmp_path / f"{name}.png")
    assert reading.read(tmp_path / "dark.png", Input(20, 0, 1, "crop"))[0].max() == 20
    assert reading.read(tmp_path / "white.png", Input(20, 0, 1, "crop"))[0].min() == 255
    Image.fromarray(np.ones((20, 20), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ValueError, match="no fixed white"):
        reading.read(tmp_path / "f.tiff", Input(20, 0, 1, "crop"))


def test_training_reads_as_explaining_does(tmp_path):
    """A 16-bit ramp 0 … 65535 and a photo on its side give the same pixels on both ways, and the right ones."""
    ramp = np.tile(np.linspace(0, 65535, 64).round().astype(np.uint16), (64, 1))
    for split in ("train", "test"):
        for name in ("ramp", "phone"):
            (tmp_path / split / name).mkdir(parents=True)
        Image.fromarray(ramp).save(tmp_path / split / "ramp" / "16.png")
        saved_on_its_side(tmp_path / split / "phone" / "turned.jpg")
    for fit in ("stretch", "crop"):
        input = Input(64, (0,) * 3, (1,) * 3, fit)
        trained, explained = load(tmp_path, input, data=tmp_path / "data"), lenient(tmp_path, input)
        assert trained.train.names == ("train/phone/turned.jpg", "train/ramp/16.png")
        for i, name in enumerate(trained.train.names):
            pixels, *_ = reading.read(tmp_path / name, input)
            assert np.array_equal(trained.train.pixels[i], pixels), name
            assert np.array_equal(explained.train.pixels[i], pixels), name
        assert np.abs(trained.train.pixels[1] - ramp / 257).max() <= 0.5
        assert trained.train.pixels[0, :, :16].min() > 200 > 50 > trained.train.pixels[0, :, 48:].max()


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("box", [None, (3.2, 4.7, 30.0, 21.5)])
def test_ordinary_images_are_only_cut_and_resized(ending, box, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    file = tmp_path / f"a.{ending}"
    Image.fromarray(pixels).save(file)
    with Image.open(file) as image:
        cut = image if box is None else image.crop((3, 5, 33, 26))
        expected = np.asarray(cut.resize((24, 24), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    result, kind, _ = reading.read(file, Input(24, 0, 1), box)
    assert np.array_equal(result, expected) and kind == ""


def made_folder(root, files):
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        if "empty" in file:
            (root / file).write_bytes(b"")
        else:
            Image.new("RGB", (8, 8)).save(root / file)
    return root


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("names", [("train", "val"), ("Train", "valid"), ("train", "validation"), ("TRAIN", "Test")])
def test_a_split_goes_by_many_names(names, strict, tmp_path):
    made_folder(tmp_path, [f"{split}/{c}/{i}.png" for split in names for c in ("cat", "dog") for i in range(2)])
    dataset = load(tmp_path, SMALL, strict=strict, data=tmp_path / "data")
    assert dataset.classes == ("cat", "dog") and dataset.test.labels.tolist() == [0, 0, 1, 1]
    for part, name in zip((dataset.train, dataset.test), names, strict=True):
        assert {file.split("/")[0] for file in part.names} == {name}


def test_images_go_to_scratch(tmp_path, monkeypatch):
    folder = made_folder(tmp_path / "in", [f"{c}/{i}.png" for c in ("cat", "dog") for i in range(5)])
    expected = lenient(folder, scratch=tmp_path)
    monkeypatch.setattr(reading, "IN_MEMORY", 0)
    dataset = lenient(folder, scratch=tmp_path)
    for split in ("train", "test"):
        assert isinstance(dataset.split(split).pixels, np.memmap), "never a copy in memory"
        assert np.array_equal(dataset.split(split).pixels, expected.split(split).pixels)
        assert dataset.split(split).names == expected.split(split).names
    full = type("Usage", (), {"free": 10})
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda path: full)
    with pytest.raises(ValueError, match="free: give scratch=, a folder with room"):
        lenient(folder, scratch=tmp_path)
    with pytest.raises(FileNotFoundError, match="scratch must be a folder that exists"):
        lenient(folder, scratch=tmp_path / "nowhere")


def test_hidden_files_and_folders_are_left_out_and_links_are_followed(tmp_path):
    root = tmp_path / "in"
    made_folder(root, [".git/a/1.png", "cat/1.png", "cat/._1.png", "cat/.thumbnails/1.png", "dog/more/1.png"])
    made_folder(tmp_path / "elsewhere", ["1.png"])
    (root / "emu").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    dataset = load(root, SMALL, held_out=0.5, data=None)
    assert dataset.train.names == ("cat/1.png", "dog/more/1.png", "emu/1.png")


@pytest.mark.parametrize("strict", [True, False])
def test_explanations_among_the_photos_are_left_out(strict, tmp_path):
    """As ``--out photos/explained`` leaves one, with its panels and below it whatever else was written there."""
    made_folder(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog") for i in range(5)])
    made_folder(tmp_path, ["explained/panel-cat-1.png", "explained/export/1.png", "dog/again/panel.png"])
    for folder in (tmp_path, tmp_path / "explained", tmp_path / "dog" / "again"):  # its own does not hide a folder
        (folder / "explained.json").write_text("{}")
    said = []
    dataset = load(tmp_path, SMALL, held_out=0.2, strict=strict, data=None, log=said.append)
    assert dataset.classes == ("cat", "dog") and len(dataset.train) + len(dataset.test) == 10
    assert said[0] == "left out, as they hold an explanation: dog/again, explained"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images"),
        (["train/1.png", "test/1.png"], "holds train/, test/ but not as a split with class folders: give <class>"),
        ([f"{s}/{c}/1.png" for s in ("train", "val", "test") for c in "ab"], "of three splits, put train/ and test/"),
        ([f"{s}/{c}/1.png" for s in ("train", "Test", "test") for c in "ab"], "of three splits, put train/ and test/"),
        (["train/a/1.png", "train/b/1.png", "other/a/1.png"], "holds train/ but not as a split"),
        (["Val/a/1.png", "Val/b/1.png"], "holds Val/ but not as a split"),
        (["train/a/1.png", "train/b/empty.png", "val/b/1.png"], "no image of class 'b' in .* can be read"),
        (["cat/1.png", "cat/2.png"], "holds one class only .cat.: give at least two, or the folder .*cat itself"),
        (["cat/1.png", "dog/1.png", "1.png"], "holds 1 images beside the class folders cat, dog"),
        (["train/cat/1.png", "train/dog/1.png", "test/cow/1.png"], "has classes that train/ lacks: cow"),
        (["cat/1.png", "dog/empty.png"], "no image of class 'dog' in .* can be read"),
        (["empty1.png", "empty2.png"], "none of the 2 images of .* that make prototypes can be read"),
    ],
)
def test_folders_that_do_not_do(files, message, tmp_path):
    made_folder(tmp_path, files)
    with pytest.raises(ValueError, match=message):
        lenient(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.png", "2.png"], r"holds images without class folders: give <class>/\*, or train/<class>"),
        (["cat/1.png", "cat/2.png"], "holds one class only .cat.: give at least two$"),
        (["cat/1.png", "dog/1.png"], "has no test split: give one, or a share as held_out or validation"),
        (["train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "train/owl/x.txt"], "classes without images: owl"),
        (["train/cat/1.png", "train/dog/empty.png", "test/cat/1.png"], r"1 of 2 images .* train/dog/empty.png \(zero"),
    ],
)
def test_folders_that_do_not_do_for_training(files, message, tmp_path):
    made_folder(tmp_path, [file for file in files if file.endswith("png")])
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, SMALL, data=tmp_path / "data")
    assert not list(tmp_path.glob("data/cache/*train*")), "nothing half-written may stay"


# --- pixel values -------------------------------------------------------------------------------------------------


def ramp(low, high, dtype):
    return np.tile(np.linspace(low, high, 40), (40, 1)).round().astype(dtype)


@pytest.mark.parametrize(
    ("ending", "values", "window"),
    [
        ("png", ramp(0, 4095, np.uint16), (0, 4095)),
        ("tiff", ramp(0, 4095, np.uint16), (0, 4095)),
        ("tiff", ramp(-1024, 3071, np.int32), (-1024, 3071)),
        ("tiff", ramp(-1024, 3071, np.int32), (-160, 240)),
        ("tiff", ramp(0, 1000, np.float32) / 1000, (0, 1)),
    ],
)
def test_a_window_is_black_to_white(ending, values, window, tmp_path):
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    low, high = window
    expected = ((np.clip(values.astype(float), low, high) - low) * 255 / (high - low)).round()
    input = Input(40, 0, 1, window=window)
    pixels, *_ = reading.read(tmp_path / f"a.{ending}", input)
    assert np.array_equal(pixels, np.broadcast_to(expected, (3, 40, 40)))
    assert np.array_equal(reading.taken(values, input).pixels, pixels), "an array as its file"
    said = []
    dataset = lenient(tmp_path, input, held_out=0, log=said.append)
    assert np.array_equal(dataset.train.pixels[0], pixels) and not any("window" in line for line in said)
    assert tuple(dataset.settings["input"]["window"]) == window and Input.of(dataset.settings["input"]) == input


def test_8_bits_need_no_window(tmp_path):
    grey = ramp(0, 255, np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(reading.read(tmp_path / "a.png", Input(40, 0, 1, window=(0, 4095))).pixels[0], grey)


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        (ramp(0, 4000, np.uint16), "hold values 0 … 4000, and 0 is black, 65535 white: give window=(0, 4095)"),
        (ramp(20, 600, np.uint16), "hold values 0 … 600, and 0 is black, 65535 white: give window=(0, 1023)"),
        (
            ramp(-1024, 3071, np.int32),
            "hold values -1024 … 3071, and 0 is black, 65535 white: give window=(-1024, 3071)",
        ),
        (ramp(0, 90000, np.int32), "hold values 0 … 90000, and 0 is black, 65535 white: give window=(0, 90000)"),
        (ramp(0, 5000, np.uint16), ""),
        (ramp(0, 0, np.uint16), ""),
    ],
)
def test_a_window_is_advised_once(values, advice, tmp_path):
    for name in "ab":
        Image.fromarray(values).save(tmp_path / f"{name}.tiff")
    said = []
    lenient(tmp_path, held_out=0, log=said.append)
    assert [line for line in said if "window" in line] == [f"images of more than 8 bits {advice}"] * bool(advice)


# --- broken files -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_malformed_exif_leaves_the_pixels(tmp_path):
    """A resolution that is text, with which Pillow's exif_transpose ends in TypeError; and EXIF that cannot be read."""
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, :20] = 255
    entry, text = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0", b"\x01\x1a\0\x02\0\0\0\x02x\0\0\0"
    turned = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + entry + text + bytes(4)
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=turned)
    Image.fromarray(pixels).save(tmp_path / "as stored.jpg", exif=turned[:12] + b"\xff" * 30)
    with Image.open(tmp_path / "turned.jpg") as image, pytest.raises(TypeError):
        ImageOps.exif_transpose(image)
    upright, as_stored = (reading.read(tmp_path / f"{name}.jpg", Input(40, 0, 1)).pixels for name in NAMES)
    assert upright[:, :16].min() > 200 > 50 > upright[:, 24:].max()
    assert as_stored[:, :, :16].min() > 200 > 50 > as_stored[:, :, 24:].max()
    assert len(lenient(tmp_path, held_out=0).train) == 2


NAMES = ("turned", "as stored")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_pillow_turns_it(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for ending in ("png", "tiff"):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)).save(
            tmp_path / f"a.{ending}", exif=exif
        )
        with Image.open(tmp_path / f"a.{ending}") as image:
            expected = np.asarray(ImageOps.exif_transpose(image)).transpose(2, 0, 1)
        assert np.array_equal(reading.read(tmp_path / f"a.{ending}", SMALL).pixels, expected), ending


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_files_are_read_or_refused_in_one_line(kind, tmp_path):
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    file = tmp_path / "a"
    Image.fromarray(generator.integers(0, 256, (24, 32, 3), np.uint8)).save(file, kind, exif=exif)
    whole, read = file.read_bytes(), 0
    for i in range(200):
        content = bytearray(whole[: generator.integers(1, len(whole))] if i % 4 == 0 else whole)
        for position in generator.integers(0, len(content) if i % 2 else min(len(content), 300), 4):
            content[position] = generator.integers(256)
        file.write_bytes(content)
        try:
            assert reading.read(file, SMALL).pixels.shape == (3, 8, 8)
            read += 1
        except ValueError as error:
            assert len(str(error).splitlines()) == 1
    assert read or kind == "PNG", "whose parts have checksums"
    assert read < 200


def test_a_bomb_is_one_unreadable_image(tmp_path):
    import zlib

    def chunk(name, content):
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    size = (60_000).to_bytes(4)
    header = chunk(b"IHDR", size + size + b"\x08\x02\0\0\0")
    made_folder(tmp_path, ["1.png"])
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(99))))
    said = []
    assert lenient(tmp_path, held_out=0, log=said.append).train.names == ("1.png",)
    assert said[0].startswith("cannot read bomb.png: Image size (3600000000 pixels) exceeds limit")


# --- folders as they lie around -----------------------------------------------------------------------------------


def test_links_in_circles_are_followed_once(tmp_path):
    made_folder(tmp_path / "in", ["cat/1.png", "dog/1.png"])
    made_folder(tmp_path / "elsewhere", ["1.png", "2.png"])
    root = tmp_path / "in"
    (root / "ant").symlink_to(tmp_path / "elsewhere")
    (root / "bee").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "again").symlink_to(root)
    (tmp_path / "elsewhere" / "back").symlink_to(root / "cat")
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    said = []
    dataset = lenient(root, held_out=0, log=said.append)
    assert dataset.train.names == ("ant/1.png", "ant/2.png", "cat/1.png", "dog/1.png")
    assert said[0].startswith(
        "left out, as they lead nowhere or to a folder read before: ant/back, bee, cat/again, dog/"
    )


@pytest.mark.parametrize("strict", [True, False])
def test_what_systems_leave_is_left_out(strict, tmp_path):
    made_folder(tmp_path, [f"{name}/{i}.png" for name in ("cat", "dog", "@eaDir") for i in range(3)])
    made_folder(tmp_path, ["__MACOSX/cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png", "dog/@eaDir/1.png"])
    for name in (".DS_Store", "cat/Thumbs.db", "dog/desktop.ini", "labels.csv"):
        (tmp_path / name).write_text("x")
    said = []
    dataset = load(tmp_path, SMALL, held_out=0.4, strict=strict, data=None, log=said.append)
    assert dataset.classes == ("cat", "dog") and len(dataset.train) + len(dataset.test) == 6
    assert said == ["left out by their ending: 1 .csv"]


ODD = [b"caf\xe9.png", b"caf\xc3\xa9.png", b"a$b$.png", b"two words.png", b"new\nline.png", b"back\\xe9.png"]
ODD += [b"quote'\".png", "😀.png".encode(), b"caf\\xe9.png"]


def test_every_name_is_readable_and_one_to_one(tmp_path):
    for name in ODD:
        Image.new("RGB", (8, 8)).save(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    names = lenient(tmp_path, held_out=0).train.names
    assert len(set(names)) == len(ODD) and all(len(name.encode().splitlines()) == 1 for name in names)
    assert {"café.png", "a$b$.png", "two words.png", "new\\nline.png", "😀.png", "caf\\udce9.png"} < set(names)


@pytest.mark.parametrize(
    ("ending", "content"),
    [
        ("txt", "tench\r\n\r\nÉmeu  \r\nowl\r\n".encode("utf-8-sig")),
        ("txt", "tench\n\nÉmeu\n\nowl".encode("latin-1")),
        ("txt", "tench\rÉmeu\rowl\r".encode("utf-16")),
        ("json", json.dumps(["tench", "Émeu", "owl"]).encode()),
        ("json", json.dumps({"2": ["n3", "owl"], "0": ["n1", "tench"], "1": ["n2", "Émeu"]}).encode("utf-8-sig")),
        ("json", json.dumps({"owl": 2, "tench": 0, "Émeu": 1}, ensure_ascii=False).encode()),
    ],
)
def test_class_names_in_files(ending, content, tmp_path):
    (tmp_path / f"names.{ending}").write_bytes(content)
    assert class_names(str(tmp_path / f"names.{ending}")) == ("tench", "Émeu", "owl")


def test_class_names_in_other_forms():
    names = ("tench", "7", "owl")
    for classes in ({0: "tench", 1: 7, 2: "owl"}, {"owl": 2, "7": 1, "tench": 0}, np.array(names), iter(names)):
        assert class_names(classes) == names
    assert class_names("") == class_names(()) == class_names({}) == ()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({0: "a", 2: "b"}, "the indices of `classes` must be 0, 1 … 1, each once: `classes` is a list"),
        ({"a": 0, "b": 0}, "the indices of `classes` must be"),
        ({"cat": "a"}, "the indices of `classes` must be"),
        (5, "got int: `classes` is a list of names"),
        (b"\0\1PK", "is not a text file"),
        (b"{", "is not readable JSON"),
        (b"3", "got int"),
    ],
)
def test_class_names_that_do_not_do(classes, message, tmp_path):
    if isinstance(classes, bytes):
        (tmp_path / "names.json").write_bytes(classes)
        classes = tmp_path / "names.json"
    with pytest.raises(ValueError, match=message) as raised:
        class_names(classes)
    assert len(str(raised.value).splitlines()) == 1
