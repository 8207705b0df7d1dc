"""Mutated image files of every format that Pillow opens: each is read, or refused in the reader's one line.

``make fuzz COUNT=10000`` runs it at length; a failure names the case, which ``--only`` makes again. A file that takes
longer than a minute ends the process with the stack where it hangs.
"""

import argparse
import faulthandler
import io
import struct
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from kmex_utils.data import Input, reading
from kmex_utils.hardware import peak_memory

LONGEST = 60  # seconds of one file
MOST = 2.0  # GiB: one image of Pillow's largest, decoded and converted, takes 1.3
INPUT = Input(8, 0, 1, window=(0, 255))
PROGRAMS = {"EPS"}  # PostScript is not read
STUBS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # known by their beginning, without a reader here


def _gray(count):
    return bytes(np.arange(count, dtype=np.uint8))


def _sized(content, length):
    return content + bytes(length - len(content))


def _fli():
    frame = struct.pack("<IHH8x", 16 + 6 + 256, 0xF1FA, 1) + struct.pack("<IH", 6 + 256, 16) + _gray(256)
    head = struct.pack("<IHHHHHHI", 128 + len(frame), 0xAF11, 1, 16, 16, 8, 3, 5)
    return _sized(head, 128) + frame


def _psd():
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 8, 8, 3)
    return head + struct.pack(">III", 0, 0, 0) + struct.pack(">H", 0) + _gray(192)


def _fits():
    cards = ["SIMPLE  =                    T", "BITPIX  =                    8", "NAXIS   =                    2"]
    cards += ["NAXIS1  =                    8", "NAXIS2  =                    8", "END"]
    return _sized("".join(card.ljust(80) for card in cards).ljust(2880).encode() + _gray(64), 5760)


def _xpm():
    rows = ['"4 2 2 1",', '"a c #FF0000",', '"b c #00FF00",', '"abab",', '"baba"']
    return ("/* XPM */\nstatic char *x[] = {\n" + "\n".join(rows) + "\n};\n").encode()


def _cursor():
    image = Image.new("RGBA", (16, 16), "red")
    buffer = io.BytesIO()
    image.save(buffer, "ICO", sizes=[(16, 16)], bitmap_format="bmp")
    content = bytearray(buffer.getvalue())
    content[2] = 2
    return bytes(content)


def _pcx():
    buffer = io.BytesIO()
    Image.new("L", (8, 8), 90).save(buffer, "PCX")
    return buffer.getvalue()


def _iptc():
    def field(tag, content):
        return b"\x1c" + bytes(tag) + struct.pack(">H", len(content)) + content

    fields = [((3, 20), struct.pack(">H", 8)), ((3, 30), struct.pack(">H", 8)), ((3, 60), b"\x01\x00")]
    fields += [((3, 120), b"\x01"), ((8, 10), _gray(64))]
    return b"".join(field(*f) for f in fields)


BY_HAND = {  # formats that Pillow reads and does not write
    "CUR": _cursor,
    "DCX": lambda: struct.pack("<III", 0x3ADE68B1, 12, 0) + _pcx(),
    "FITS": _fits,
    "FLI": _fli,
    "FTEX": lambda: b"FTEX" + struct.pack("<IIIIIIII", 1, 8, 8, 1, 1, 1, 32, 192) + _gray(192),
    "GBR": lambda: struct.pack(">IIIII4sI", 32, 2, 8, 8, 1, b"GIMP", 10) + b"abc\0" + _gray(64),
    "IMT": lambda: b"width 8\nheight 8\npixel n8\n\x0c" + _gray(64),
    "IPTC": _iptc,
    "MCIDAS": lambda: _sized(b"\0\0\0\0\0\0\0\x04" + struct.pack(">62I", *_mcidas()), 256) + _gray(64),
    "PCD": lambda: _sized(_sized(b"", 2048) + b"PCD_", 96 * 2048 + 768 * 512 * 3 // 2),
    "PIXAR": lambda: (
        _sized(_sized(b"\x80\xe8\0\0", 416) + struct.pack("<HH", 8, 8) + bytes(4) + b"\x0e\0\x02\0", 1024) + _gray(192)
    ),
    "PSD": _psd,
    "SUN": lambda: struct.pack(">IIIIIIII", 0x59A66A95, 8, 8, 8, 64, 1, 0, 0) + _gray(64),
    "XPM": _xpm,
    "XVTHUMB": lambda: b"P7 332\n#XVVERSION:Version 2.28\n#END_OF_COMMENTS\n8 8 255\n" + _gray(64),
    "WMF": lambda: _sized(
        b"\xd7\xcd\xc6\x9a\0\0" + struct.pack("<hhhhH", 0, 0, 9, 9, 72) + bytes(6) + b"\x01\0\t\0", 99
    ),
    "HDF5": lambda: b"\x89HDF\r\n\x1a\n" + bytes(99),
    "GRIB": lambda: b"GRIB\0\0\0\x01" + bytes(99),
    "BUFR": lambda: b"BUFR" + bytes(99),
    "MPEG": lambda: b"\0\0\x01\xb3\x01\0\x10\x13" + bytes(99),
}


def _mcidas():
    words = [0] * 64
    words[8], words[9], words[10], words[13], words[14], words[33] = 8, 8, 1, 1, 0, 256
    return words[2:]


def originals() -> dict[str, list[bytes]]:
    """Whole files by format: in every mode that Pillow writes, and by hand."""
    Image.init()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8))
    files: dict[str, list[bytes]] = {name: [make()] for name, make in BY_HAND.items()}
    for name in sorted(set(Image.SAVE) & set(Image.ID) - set(files)):
        for mode in ("RGB", "RGBA", "L", "P", "1", "I;16", "F", "CMYK"):
            buffer = io.BytesIO()
            try:
                mode_of = picture.convert("L").convert(mode) if mode in ("I;16", "F") else picture.convert(mode)
                mode_of.save(buffer, name)
            except Exception:  # a mode that this format does not have
                continue
            files.setdefault(name, []).append(buffer.getvalue())
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        buffer = io.BytesIO()
        picture.convert("1" if compression == "group4" else "RGB").save(buffer, "TIFF", compression=compression)
        files["TIFF"].append(buffer.getvalue())
    return files


def mutated(content: bytes, generator: np.random.Generator) -> bytes:
    """A file after one to four flips, cuts, insertions, repetitions or large numbers, most near its beginning."""
    changed = bytearray(content)
    for _ in range(generator.integers(1, 5)):
        if not changed:
            break
        near = len(changed) if generator.random() < 0.4 else min(len(changed), 128)
        at, kind = int(generator.integers(near)), generator.integers(6)
        if kind == 0:
            changed[at] ^= 1 << int(generator.integers(8))
        elif kind == 1:
            changed[at] = int(generator.integers(256))
        elif kind == 2:
            del changed[int(generator.integers(len(changed))) :]
        elif kind == 3:
            changed[at:at] = generator.bytes(int(generator.integers(1, 64)))
        elif kind == 4:
            part = changed[at : at + int(generator.integers(1, 64))]
            changed[at:at] = part * int(generator.integers(1, 8))
        else:
            word = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\x40\0", b"\0\x40\0\0"][at % 5]
            changed[at : at + 4] = word
    return bytes(changed)


def fuzz(count: int, seed: int = 0, only: int = -1) -> Counter:
    """Reads so many mutated files; returns how many of each format were read and refused; a failure names the case."""
    files, outcomes = originals(), Counter()
    names = sorted(files)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore"):
        for i in range(count) if only < 0 else (only,):
            generator = np.random.default_rng([seed, i])
            name = names[i % len(names)]
            file = Path(folder) / f"{i}.{name.lower()}"
            file.write_bytes(mutated(files[name][generator.integers(len(files[name]))], generator))
            case, before = f"case {i} of seed {seed} ({name})", peak_memory()
            faulthandler.dump_traceback_later(LONGEST, exit=True)
            try:
                pixels = reading.read(file, INPUT).pixels
                assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8, case
                outcomes[name, "read"] += 1
            except ValueError as error:
                lines = str(error).splitlines()
                assert len(lines) == 1 and lines[0].strip(), f"{case}: {error!r}"
                outcomes[name, "refused"] += 1
            except Exception as error:
                raise AssertionError(f"{case}: {error!r}") from error
            finally:
                faulthandler.cancel_dump_traceback_later()
            assert peak_memory() - before < MOST, f"{case}: {peak_memory():.1f} GiB"
            file.unlink()
    return outcomes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=-1, metavar="CASE")
    options = parser.parse_args()
    outcomes = fuzz(options.count, options.seed, options.only)
    for name in sorted({name for name, _ in outcomes}):
        print(f"{name:9} {outcomes[name, 'read']:6} read {outcomes[name, 'refused']:6} refused")
    print(f"{outcomes.total()} files, peak {peak_memory():.2f} GiB")
    sys.exit(0)
