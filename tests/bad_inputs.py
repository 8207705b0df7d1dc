"""Makes bad inputs from their names: folders of images, files of weights. Of a few kB each, quickly."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn


def small_cnn(channels=3, classes=3):
    """Three blocks of a few channels, seeded."""
    torch.manual_seed(0)
    layers, width = [], channels
    for out in (4, 6, 8):
        layers += [nn.Conv2d(width, out, 3, 2, 1), nn.ReLU()]
        width = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


# --- folders ------------------------------------------------------------------------------------------------------


def image(file: Path, seed=0, **options):
    """A small picture, of what format the name says."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
    Image.fromarray(pixels).save(file, **options)
    return file


def good(root: Path, classes=("cat", "dog", "ship"), count=4):
    """A folder in which nothing is wrong."""
    for c, name in enumerate(classes):
        for i in range(count):
            image(root / name / f"{i}.png", 10 * c + i)
    return root


def png(width, height, content=b"", *chunks):
    """A PNG that says it has so many pixels, with more chunks (name, content)."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(content or bytes(99)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(*c) for c in chunks) + data + chunk(b"IEND", b"")


def cut(file: Path, share=0.5):
    """What is left of a file that was copied in part."""
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])


def damaged(root: Path, ending: str, **options):
    """Every part of a format's file but its beginning is noise."""
    file = image(root / "cat" / f"bad.{ending}", **options)
    content = bytearray(file.read_bytes())
    content[len(content) // 3 :] = np.random.default_rng(0).bytes(len(content) - len(content) // 3)
    file.write_bytes(content)


def _bytes(name: str, content: bytes):
    def make(root):
        (root / "cat" / name).write_bytes(content)

    return make


def _bombs(side, count=1):
    def make(root):
        for i in range(count):
            (root / "cat" / f"bomb{i}.png").write_bytes(png(side, side))

    return make


def _raw(name: bytes):
    """A path below the folder by bytes that need not be UTF-8."""
    return lambda root: Path(os.fsdecode(os.fsencode(root) + b"/" + name))


def _all_bad(root):
    for file in (root / "cat").iterdir():
        file.write_bytes(b"")


def _moved(*pairs):
    def make(root):
        for source, target in pairs:
            (root / target).parent.mkdir(parents=True, exist_ok=True)
            (root / source).rename(root / target)

    return make


def _only(*classes):
    """The folder without its other classes."""

    def make(root):
        for folder in root.iterdir():
            if folder.name not in classes:
                for file in folder.iterdir():
                    file.unlink()
                folder.rmdir()

    return make


def _one_each(root):
    for folder in root.iterdir():
        for file in sorted(folder.iterdir())[1:]:
            file.unlink()


def _flat(root):
    for folder in list(root.iterdir()):
        for file in list(folder.iterdir()):
            file.rename(root / f"{folder.name}{file.name}")
        folder.rmdir()


def _single(root):
    _flat(root)
    for file in sorted(root.iterdir())[1:]:
        file.unlink()


def _empty(root):
    _flat(root)
    for file in root.iterdir():
        file.unlink()


def _texts(root):
    _empty(root)
    (root / "notes.txt").write_text("x")


def _a_file(root):
    _empty(root)
    root.rmdir()
    root.write_text("x")


def _splits(*names, extra=""):
    def make(root):
        classes = [folder.name for folder in root.iterdir()]
        for name in names:
            good(root / name, classes, 2)
        _only(*names)(root)
        if extra:
            image(root / extra / "0.png")

    return make


def _links(*pairs):
    def make(root):
        for link, target in pairs:
            (root / link).symlink_to(root / target)

    return make


def _explained_inside(root):
    (root / "explained").mkdir()
    (root / "explained" / "explained.json").write_text("{}")
    image(root / "explained" / "panel-0.png")


def _odd(*names: bytes, folder=b"cat"):
    def make(root):
        for i, name in enumerate(names):
            image(_raw(folder + b"/" + name)(root), i)

    return make


def _exif(root):
    content = (root / "cat" / "0.png").read_bytes()
    exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\xff\xff\xff\xff\xff\xff\xff\xff"
    chunk = struct.pack(">I", len(exif)) + b"eXIf" + exif + struct.pack(">I", zlib.crc32(b"eXIf" + exif))
    (root / "cat" / "bad.png").write_bytes(content[:33] + chunk + content[33:])


def _floats(root):
    Image.fromarray(np.ones((9, 9), np.float32)).save(root / "cat" / "f.tiff")


def _ints(root):
    Image.fromarray(np.full((9, 9), 70_000, np.int32)).save(root / "cat" / "i.tiff")


def _nothing(root):
    pass


LEFT_OUT = "1 of 13 images cannot be read and are left out"
# By name: what is done to a good folder of cat, dog and ship with four images each; what must be said of it (in a
# regular expression; without "error: " reading goes on); how many images are read; which classes there are
FOLDERS = {
    "good": (_nothing, "", 12, "cat dog ship"),
    "truncated": (lambda root: cut(image(root / "cat" / "x.png")), LEFT_OUT, 12, "cat dog ship"),
    "zero": (_bytes("x.png", b""), "cannot read cat/x.png: zero bytes", 12, "cat dog ship"),
    "text": (_bytes("x.png", b"not an image"), "cannot read cat/x.png: not an image", 12, "cat dog ship"),
    "allbad": (_all_bad, "error: no image of class 'cat' in .* can be read$", 0, ""),
    "bomb60k": (_bombs(60_000), "cannot read cat/bomb0.png: Image size .* exceeds limit", 12, "cat dog ship"),
    "bombs13k": (
        _bombs(13_000, 12),
        "cannot read cat/bomb0.png: 13000 x 13000 pixels, more than the .* make it smaller, or raise PIL.Image.MAX",
        12,
        "cat dog ship",
    ),
    "floattiff": (_floats, r"cannot read cat/f.tiff: .* no fixed white: give window=", 12, "cat dog ship"),
    "int32tiff": (_ints, r"hold values 0 … 70000.*: give window=\(0, 70000\)", 13, "cat dog ship"),
    "dirpng": (lambda root: (root / "cat" / "x.png").mkdir(), "", 12, "cat dog ship"),
    "looplink": (
        _links(("cat/x.png", "cat/x.png")),
        "left out, as they lead nowhere .*: cat/x.png",
        12,
        "cat dog ship",
    ),
    "broken": (_links(("cat/x.png", "gone.png")), "left out, as they lead nowhere .*: cat/x.png", 12, "cat dog ship"),
    "brokenclass": (_links(("owl", "gone")), "left out, as they lead nowhere .*: owl", 12, "cat dog ship"),
    "loopdir": (_links(("cat/again", ".")), "folder read before: cat/again", 12, "cat dog ship"),
    "unicode": (_odd("猫😀é.png".encode(), folder="кот".encode()), "", 13, "cat dog ship кот"),
    "newline": (_odd(b"a\nb.png", folder=b"new\nline"), "", 13, "cat dog new\\nline ship"),
    "longclass": (_odd(b"0.png", folder=b"n" * 255), "", 13, f"cat dog {'n' * 255} ship"),
    "longfile": (_odd(b"n" * 248 + b".png"), "", 13, "cat dog ship"),
    "badutf8class": (_odd(b"\xff.png", folder=b"\xff\xfe"), "", 13, "\\udcff\\udcfe cat dog ship"),
    "oneclass": (_only("cat"), "error: .* one class only .cat.: give at least two, or the folder .*cat itself", 0, ""),
    "oneeach": (_one_each, "", 3, "cat dog ship"),
    "single": (_single, "", 1, ""),
    "flat": (_flat, "", 12, ""),
    "empty": (_empty, "error: .* holds no images$", 0, ""),
    "texts": (_texts, "error: .* holds no images of a known ending, but 1 .txt$", 0, ""),
    "afile": (_a_file, "error: .* does not exist or is not a folder: give a folder of images$", 0, ""),
    "loose": (lambda root: image(root / "x.png"), "error: .* holds 1 images beside the class folders cat", 0, ""),
    "extra": (
        _splits("train", "test", extra="test/zebra"),
        "error: .*test has classes that train/ lacks: zebra",
        0,
        "",
    ),
    "missingtest": (_splits("train", "test", extra="train/zebra"), "", 13, "cat dog ship zebra"),
    "threesplits": (_splits("train", "test", "val"), "error: .* of three splits, put train/ and test/ alone", 0, ""),
    "hidden": (
        _moved(("cat/0.png", ".owl/0.png")),
        "left out, as their names begin with a dot: .owl$",
        11,
        "cat dog ship",
    ),
    "emptyclass": (
        lambda root: (root / "owl").mkdir(),
        "left out, as they hold no images: owl$",
        12,
        "cat dog ship",
    ),
    "explained": (_explained_inside, "left out, as they hold an explanation: explained$", 12, "cat dog ship"),
    "eps": (_bytes("x.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "1 .eps", 12, "cat dog ship"),
    "eps as png": (
        _bytes("x.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n"),
        "cannot read cat/x.png: not an image",
        12,
        "cat dog ship",
    ),
    "hdf": (_bytes("x.h5", b"\x89HDF\r\n\x1a\n" + bytes(99)), LEFT_OUT, 12, "cat dog ship"),
    "badexif": (_exif, "", 13, "cat dog ship"),
    "avif": (lambda root: damaged(root, "avif"), LEFT_OUT, 12, "cat dog ship"),
    "dds": (_bytes("x.dds", b"DDS " + struct.pack("<I", 124) + bytes(range(1, 121))), LEFT_OUT, 12, "cat dog ship"),
    "blp": (_bytes("x.blp", b"BLP2" + bytes(range(1, 200))), LEFT_OUT, 12, "cat dog ship"),
    "webp": (lambda root: cut(image(root / "cat" / "x.webp")), LEFT_OUT, 12, "cat dog ship"),
    "jp2": (lambda root: damaged(root, "jp2"), LEFT_OUT, 12, "cat dog ship"),
}


# --- weights ------------------------------------------------------------------------------------------------------


class Runs:
    """What a pickle would do when it is read."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def weights(name: str, file: Path, module: nn.Module) -> Path:
    """A file with the state dict of a module, and the fault its name says."""
    state = {key: value.clone() for key, value in module.state_dict().items()}
    first = next(iter(state))
    stem, kind = name.split(".")
    change = {
        "allzero": lambda x: torch.zeros_like(x),
        "complex": lambda x: x.to(torch.complex64),
        "half": lambda x: x.half(),
        "huge": lambda x: torch.full_like(x, 1e38),
        "nan": lambda x: x * torch.nan,
        "int8": lambda x: (100 * x).to(torch.int8),
        "shape": lambda x: x[..., :1],
        "meta": lambda x: x.to("meta"),
        "sparse": lambda x: x.to_sparse(),
    }
    if stem in change:
        state = {key: change[stem](value) for key, value in state.items()}
    headers = {
        "liar": b'{"a":{"dtype":"F32","shape":[9,9],"data_offsets":[0,4]}}',
        "badjson": b'{"a":',
        "nested": b"{" * 9999,
    }
    if stem in headers and kind == "safetensors":
        file.write_bytes(struct.pack("<Q", len(headers[stem])) + headers[stem] + bytes(4))
    elif stem == "hugehdr":
        file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    elif kind == "safetensors":
        save_file(state, file)
    else:
        contents = {
            "empty": {},
            "ints": {"a": 1},
            "list": [state],
            "tensor": state[first],
            "nested": {"epoch": 3, "model": {"state_dict": state}},
            "module": {f"module.{key}": value for key, value in state.items()},
            "intkeys": {i: value for i, value in enumerate(state.values())},
            "mixedkeys": {**state, 5: torch.ones(1)},
            "evil": {"state_dict": state, "x": Runs()},
            "whole": module,
            "zeroclasses": {key: value[:0] if key.startswith("fc.") else value for key, value in state.items()},
        }
        torch.save(contents.get(stem, state), file, _use_new_zipfile_serialization=stem != "legacy")
    if stem == "trunc":
        cut(file, 0.9)
    elif stem == "zero":
        file.write_bytes(b"")
    return file


NO_STATE = "is not a state dict: names with tensors"
READ = ""  # the weights are taken
WEIGHTS = {
    "ok.pt": READ,
    "ok.safetensors": READ,
    "allzero.pt": READ,
    "half.pt": READ,
    "nested.pt": READ,
    "module.pt": READ,
    "mixedkeys.pt": READ,
    "legacy.pt": READ,
    "complex.pt": "is torch.complex64, not torch.float32",
    "int8.pt": "is torch.int8, not torch.float32",
    "shape.pt": r"0.weight is \[4, 3, 3, 1\], not \[4, 3, 3, 3\]",
    "nan.pt": r"holds NaN or infinite weights \(0.weight …\)",
    "huge.pt": "infinite",
    "meta.pt": "is a meta tensor, without values",
    "sparse.pt": "is of layout torch.sparse_coo",
    "empty.pt": NO_STATE,
    "ints.pt": NO_STATE,
    "intkeys.pt": NO_STATE,
    "list.pt": NO_STATE,
    "tensor.pt": NO_STATE,
    "evil.pt": "holds pickled objects, which may run code",
    "whole.pt": "holds pickled objects, which may run code",
    "zero.pt": "is empty: download or save it again",
    "zero.safetensors": "is empty: download or save it again",
    "trunc.pt": "is cut short or damaged: download or save it again",
    "trunc.safetensors": "is not a readable state dict .*: download or save it again",
    "badjson.safetensors": "is not a readable state dict",
    "liar.safetensors": "is not a readable state dict",
    "nested.safetensors": "is not a readable state dict",
    "hugehdr.safetensors": "is not a readable state dict",
}
