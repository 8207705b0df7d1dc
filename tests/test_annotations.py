"""Annotations lie where the network sees them: dots are drawn into images, which are read, and the dots found again."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from kmex_utils.data import Input, load
from kmex_utils.data.annotations import Parts, boxes, parts

HALF = 4  # of a dot's side, pixels
SIZES = [(100, 60), (70, 90), (64, 48), (120, 80)]  # width, height
POINTS = [  # of parts 0, 1, 2, which are drawn in red, green and blue; None: not visible
    ((4, 30), (50, 20), (70, 50)),  # the first is cut off where the image is cropped to 4:3
    ((20, 45), None, (50, 31)),
    ((10, 10), (50, 40), None),
    ((60, 40), (30, 22), (88, 61)),
]
SEEN = {"stretch": 10, "crop": 9}  # of these points, in four images
NAMES = ("beak", "left eye", "right eye")


def picture(size, points):
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for channel, point in enumerate(points):
        if point:
            x, y = point
            pixels[y - HALF : y + HALF, x - HALF : x + HALF, channel] = 255
    return Image.fromarray(pixels)


def dot(channel):
    """Centre (y, x) of a channel's dot in pixels, from the corner; None: there is none."""
    weights = np.where(channel > 60, channel, 0).astype(float)  # below it: what JPEG and resizing leave
    if not weights.any():
        return None
    y, x = (
        (np.arange(n) + 0.5) @ weights.sum(axis) / weights.sum() for axis, n in zip((1, 0), weights.shape, strict=True)
    )
    return y, x


def check(dataset, found, tolerance=0.3):
    """Each part lies at the dot of its colour and each dot is a part; returns how many parts there are."""
    height, width = dataset.input.size
    for split, visible in found.items():
        images = dataset.split(split)
        assert visible.images == len(images)
        columns = (visible.image, visible.part, visible.y, visible.x)
        where = {(i, p): (y, x) for i, p, y, x in zip(*(column.tolist() for column in columns), strict=True)}
        assert len(where) == len(visible)
        for i in range(len(images)):
            for part, channel in enumerate(images.pixels[i]):
                if (centre := dot(channel)) is None:
                    assert (i, part) not in where
                else:
                    y, x = where[i, part]
                    assert (y * height, x * width) == pytest.approx(centre, abs=tolerance)
    return sum(map(len, found.values()))


def of(fit="stretch", size=(48, 64)):
    return Input(size, 0, 1, fit)


@pytest.fixture
def birds(tmp_path):
    """Two classes in either split; sizes and points repeat. One photo lies on its side."""
    rows, number = [], 0
    for split in ("train", "test"):
        for name in ("owl", "tit, blue"):
            (tmp_path / "birds" / split / name).mkdir(parents=True)
            for i in range(2):
                image = picture(SIZES[number % 4], POINTS[number % 4])
                file, exif = f"{split}/{name}/{i}.png", Image.Exif()
                if number == 3:
                    exif[0x0112] = 6  # to be turned by 270 degrees
                    image = image.transpose(Image.Transpose.ROTATE_90)
                image.save(tmp_path / "birds" / file, exif=exif)
                visible = [(NAMES[part], *point) for part, point in enumerate(POINTS[number % 4]) if point]
                rows += [(file, *row) for row in visible]
                number += 1
    table(tmp_path / "points.csv", ("image", "part", "x", "y"), rows)
    return tmp_path / "birds"


def table(path, columns, rows):
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def read(folder, input=None, **options):
    return load(folder, input or of(), data=None, **options)


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_a_table_of_points(birds, fit):
    dataset = read(birds, of(fit))
    found = parts(dataset, birds.parent / "points.csv")
    assert found["test"].names == NAMES
    assert check(dataset, found) == 2 * SEEN[fit]
    tall = read(birds, of(fit, (80, 40)), validation=0.5)  # the validation images lie in train/
    assert check(tall, parts(tall, birds.parent / "points.csv")) > 0


def test_the_turned_photo_is_turned(birds):
    """What the test above rests on: stored and upright sides of it differ, and so does where its parts lie."""
    with Image.open(birds / "train" / "tit, blue" / "1.png") as image:
        assert image.size == SIZES[3][::-1]
    dataset = read(birds)
    i = dataset.train.names.index("train/tit, blue/1.png")
    y, x = dot(dataset.train.pixels[i][0])
    assert (y / 48, x / 64) == pytest.approx((40 / 80, 60 / 120), abs=0.01)


def cub_folder(root, box):
    """CUB-200 in the official form: two classes, two training and two test images each."""
    names = ["001.Owl", "002.Tit"]
    lines = {name: [] for name in ("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts")}
    number = 0
    for label, name in enumerate(names, 1):
        (root / "images" / name).mkdir(parents=True)
        for i in range(4):
            number += 1
            picture(SIZES[i], POINTS[i]).save(root / "images" / name / f"{i}.jpg", quality=95, subsampling=0)
            lines["images"].append(f"{number} {name}/{i}.jpg")
            lines["image_class_labels"].append(f"{number} {label}")
            lines["train_test_split"].append(f"{number} {i % 2}")
            lines["bounding_boxes"].append(f"{number} {box}")
            for part, point in enumerate(POINTS[i], 1):
                x, y = point or (0, 0)
                lines["parts"].append(f"{number} {part} {x:.1f} {y:.1f} {int(point is not None)}")
    (root / "parts").mkdir()
    (root / "parts" / "part_locs.txt").write_text("\n".join(lines.pop("parts")) + "\n")
    (root / "parts" / "parts.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(NAMES, 1)))
    for name, content in lines.items():
        (root / f"{name}.txt").write_text("\n".join(content) + "\n")
    (root / "classes.txt").write_text("".join(f"{i} {name}\n" for i, name in enumerate(names, 1)))
    return root.parent


@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_the_parts_of_cub(tmp_path, fit):
    dataset = load("cub200", of(fit), data=cub_folder(tmp_path / "CUB_200_2011", "0 0 1 1"))
    found = parts(dataset)
    assert found["train"].names == NAMES
    assert check(dataset, found) == 2 * SEEN[fit]


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize(("box", "count"), [("14.5 14.5 50.0 40.0", 12), ("15.6 14.4 84.0 66.0", 16)])
def test_the_parts_of_cropped_cub(tmp_path, box, count, fit):
    """Boxes are rounded to even, and the second is larger than most images. No dot is cut: it is in or out."""
    data = cub_folder(tmp_path / "CUB_200_2011", box)
    dataset = load("cub200", of(fit, (96, 128)), data=data, crop=True)
    assert check(dataset, parts(dataset), 0.5) == count
    if fit == "stretch":
        np.testing.assert_allclose(boxes(dataset)["train"], [[0, 0, 1, 1]] * 4, atol=0.5 / 40)


def masks(birds, mode="L", numbers=(3, 7, 200)):
    """Beside images of 168 x 112 pixels; a part is a square of 24, drawn into image and mask."""
    for file in birds.rglob("*.png"):
        image, mask = np.zeros((112, 168, 3), np.uint8), np.zeros((112, 168), np.uint16)
        for part, number in enumerate(numbers):
            rows, columns = slice(12 + 30 * part, 36 + 30 * part), slice(36 + 30 * part, 60 + 30 * part)
            image[rows, columns, part], mask[rows, columns] = 255, number
        Image.fromarray(image).save(file)
        target = birds.parent / "masks" / file.relative_to(birds)
        target.parent.mkdir(parents=True, exist_ok=True)
        wide = Image.fromarray(mask)
        if mode == "P":
            wide = Image.fromarray(mask.astype(np.uint8))
            wide.putpalette([*range(255, -1, -1)] * 3)
        elif mode != "I;16":
            wide = Image.fromarray(mask.astype(bool) if mode == "1" else mask.astype(np.uint8))
        assert wide.mode == mode
        wide.save(target)
    return birds.parent / "masks"


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "1"])
@pytest.mark.parametrize("fit", ["stretch", "crop"])
def test_masks(birds, mode, fit):
    """At 56 x 56 points a pixel row in two and a column in three is read: 12 x 8 points of a square of 24 pixels."""
    numbers = {"1": (1,), "I;16": (3, 7, 1000)}.get(mode, (3, 7, 200))
    folder = masks(birds, mode, numbers)
    dataset = read(birds, of(fit))
    for split, visible in parts(dataset, folder).items():
        assert visible.names == tuple(map(str, numbers))
        assert torch.equal(visible.image.bincount(), torch.full((4,), 96 * len(numbers)))
        pixels = dataset.split(split).pixels
        rows, columns = (visible.y * 48).long(), (visible.x * 64).long()
        assert (pixels[visible.image, visible.part, rows, columns] > 50).all()  # at the edge of a square about 90
        for part in range(len(numbers)):
            here = (visible.image == 0) & (visible.part == part)
            centre = float(visible.y[here].mean()) * 48, float(visible.x[here].mean()) * 64
            assert centre == pytest.approx(dot(pixels[0][part]), abs=0.1)


def test_cells():
    """By a loop over the grid; the lower and the right edge belong to the last cells."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.rand(2, 50, generator=generator, dtype=torch.float64)
    y, x = torch.cat([y, torch.tensor([0.0, 1, 1])]), torch.cat([x, torch.tensor([0.0, 0, 1])])
    visible = Parts(("a",), 1, torch.zeros(53, dtype=torch.long), torch.zeros(53, dtype=torch.long), y, x)
    cells = visible.cells((3, 5)).tolist()
    for i in range(50):
        (inside,) = [5 * r + c for r in range(3) for c in range(5) if r <= 3 * y[i] < r + 1 and c <= 5 * x[i] < c + 1]
        assert cells[i] == inside
    assert cells[50:] == [0, 10, 14]


def test_left_and_right_become_one():
    visible = Parts(
        ("beak", "left eye", "right eye", "leftover"), 1, *torch.tensor([[0] * 4, [3, 2, 1, 0]]), *[None] * 2
    )
    merged = visible.without_sides()
    assert merged.names == ("beak", "eye", "leftover") and merged.part.tolist() == [2, 1, 1, 0]


# --- boxes --------------------------------------------------------------------------------------------------------


def seen(pixels):
    """Box of what is bright, in shares."""
    rows, columns = (np.flatnonzero((pixels[0] > 127).any(axis)) for axis in (1, 0))
    height, width = pixels.shape[1:]
    return rows[0] / height, columns[0] / width, (rows[-1] + 1) / height, (columns[-1] + 1) / width


@pytest.mark.parametrize("fit", ["stretch", "crop"])
@pytest.mark.parametrize("form", ["table", "masks"])
def test_boxes_hold_what_is_drawn(birds, form, fit):
    """Images of 200 x 60 pixels, of which the crop shows the middle 80: it cuts some boxes, and hides two."""
    rows, unknown = [], []
    for i, file in enumerate(sorted(birds.rglob("*.png"))):
        pixels = np.zeros((60, 200), np.uint8)
        pixels[10 + i : 40, 10 * i : 10 * i + 45] = 255
        Image.fromarray(pixels).save(file)
        if i != 5:  # of it nothing is known
            name = file.relative_to(birds).as_posix()
            target = birds.parent / "masks" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(target)
            rows.append((name, 10 * i, 10 + i, 45, 30 - i))
    source = birds.parent / "masks"
    if form == "table":
        source = table(birds.parent / "boxes.csv", ("image", "x", "y", "width", "height"), rows)
    dataset = read(birds, of(fit))
    for split, found in boxes(dataset, source).items():
        assert found.shape == (4, 4)
        for i, box in enumerate(found):
            if box.isnan().all():
                unknown.append(dataset.split(split).names[i])
            else:
                assert box.tolist() == pytest.approx(seen(dataset.split(split).pixels[i]), abs=1 / 48 + 1e-9)
    hidden = ["test/owl/0.png", "test/owl/1.png"] if fit == "crop" else []
    assert sorted(unknown) == [*hidden, "train/owl/1.png"]


def test_the_boxes_of_cub(tmp_path):
    dataset = load("cub200", of(), data=cub_folder(tmp_path / "CUB_200_2011", "10.0 12.0 40.0 30.0"))
    width, height = np.array([SIZES[i % 4] for i in (1, 3, 1, 3)]).T
    expected = np.stack([12 / height, 10 / width, 42 / height, 50 / width], 1)
    np.testing.assert_allclose(boxes(dataset)["train"], expected)


# --- what does not do -----------------------------------------------------------------------------------------------


def test_data_without_files_have_no_annotations(birds):
    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, i):
            return np.zeros((8, 8, 3), np.uint8), i % 2

    for dataset in (load(Items(), of(), held_out=0.5), load("mnist-mini", images_per_class=1)):
        for source in ("", birds.parent / "points.csv"):
            for what in (parts, boxes):
                with pytest.raises(ValueError, match="are no files: annotations belong to a folder of images"):
                    what(dataset, source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,part,x\n", "has no column y: it needs image, part, x, y"),
        ("", "has no column image, part, x, y: it needs"),
        ("image,part,x,y\na.png,beak,3,4\na.png,beak,3,\n", "points.csv, row 2: x, y must be numbers"),
        ("x,y,image,part\n3,,a.png\n", "points.csv, row 1: x, y must be numbers"),
        ("image,part,x,y\na.png,beak,3\n", "points.csv, row 1: x, y must be numbers"),
        (b"\x89PNG\r\n\0", "points.csv is no CSV table: "),
        ("image,part,x,y\nowl.png,beak,3,4\n", "no train image of birds has a part in .*points.csv"),
        ("image,part,x,y\ntrain/owl/0.png,beak,3,4\n", "no test image of birds has a part in .*points.csv"),
        ("image,part,x,y\ntrain/owl/0.png,beak,300,nan\n", "no train image of birds has a part in .*points.csv"),
    ],
)
def test_tables_that_do_not_do(birds, content, message):
    file = birds.parent / "points.csv"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as raised:
        parts(read(birds), file)
    assert len(str(raised.value).splitlines()) == 1


def test_tables_of_boxes_that_do_not_do(birds):
    with pytest.raises(ValueError, match="has no column width, height: it needs image, x, y, width, height"):
        boxes(read(birds), birds.parent / "points.csv")
    file = table(birds.parent / "boxes.csv", ("image", "x", "y", "width", "height"), [("owl.png", 0, 0, 9, 9)])
    with pytest.raises(ValueError, match="no image of birds has a box in .*boxes.csv"):
        boxes(read(birds), file)


@pytest.mark.parametrize("what", [parts, boxes])
def test_annotations_must_be_there(birds, what):
    dataset = read(birds)
    with pytest.raises(ValueError, match=f"birds has no {what.__name__} of its own: give a table or a folder of masks"):
        what(dataset)
    with pytest.raises(
        FileNotFoundError, match=f"nowhere does not exist: give a table of {what.__name__}, or a folder"
    ):
        what(dataset, birds.parent / "nowhere")
    (birds.parent / "none").mkdir()
    with pytest.raises(ValueError, match="no (train )?image of birds has a (part|box) in .*none"):
        what(dataset, birds.parent / "none")
    with pytest.raises(ValueError, match=r"0.png lie after your own transform is not known: give none"):
        own = replace(dataset, input=replace(dataset.input, transform=torch.nn.Identity()))
        what(own, masks(birds))


@pytest.mark.parametrize("kind", ["smaller", "of three channels", "broken"])
def test_masks_that_do_not_do(birds, kind):
    folder = masks(birds)
    file = folder / "train" / "owl" / "1.png"
    if kind == "broken":
        file.write_bytes(file.read_bytes()[:60])
    else:
        Image.new(*{"smaller": ("L", (84, 56)), "of three channels": ("RGB", (168, 112))}[kind]).save(file)
    fix = "cannot read .*" if kind == "broken" else ""
    why = "" if kind == "broken" else " is no mask of its image: it needs one channel and 168 x 112 pixels"
    for what in (parts, boxes):
        with pytest.raises(ValueError, match=f"{fix}owl/1.png{why}"):
            what(read(birds), folder)


@pytest.mark.parametrize("file", ["parts/part_locs.txt", "parts/parts.txt", "bounding_boxes.txt"])
def test_a_folder_of_cub_that_is_not_complete(tmp_path, file):
    dataset = load("cub200", of(), data=cub_folder(tmp_path / "CUB_200_2011", "0 0 9 9"))
    (tmp_path / "CUB_200_2011" / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} does not exist: unpack the whole of CUB_200_2011.tgz"):
        (parts if "parts" in file else boxes)(dataset)
