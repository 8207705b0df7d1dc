"""A few of the mutated files of ``make fuzz``, and what these are made from."""

import warnings

import pytest
from fuzz_images import INPUT, PROGRAMS, STUBS, fuzz, originals
from PIL import Image

from kmex_utils.data import reading


def test_the_fuzzer_knows_every_format(tmp_path):
    """Before they are mutated all are of their format, and read."""
    files = originals()
    assert set(files) >= set(Image.ID)
    for name, contents in files.items():
        for content in contents:
            (tmp_path / "file").write_bytes(content)
            if name in PROGRAMS | STUBS:
                with pytest.raises(ValueError):
                    reading.read(tmp_path / "file", INPUT)
                continue
            with warnings.catch_warnings(action="ignore"), Image.open(tmp_path / "file") as image:
                assert image.format.upper() == name
            assert reading.read(tmp_path / "file", INPUT).pixels.shape == (3, 8, 8)


def test_mutated_files_are_read_or_refused_in_one_line():
    outcomes = fuzz(210, seed=1)
    read = sum(count for (_, outcome), count in outcomes.items() if outcome == "read")
    assert outcomes.total() == 210 and 20 < read < 190
