"""The parameters cell of a notebook is its specification."""

import pytest
import torch

from kmex_utils.parameters import checked

CELL = (
    'dataset: str = "mnist"  # a name\nseed: int = 0\nrate: float = 0.1\nblocks: list[int] = [4, 2]\ncrop: bool = False'
)
VALUES = {"dataset": "mnist", "seed": 0, "rate": 0.1, "blocks": [4, 2], "crop": False}


def test_parameters_in_force_are_returned():
    assert checked([CELL, "import torch"], {**VALUES, "torch": torch}) == VALUES
    assert checked([CELL, "# Parameters\nseed = 3\nrate = 1\n"], {**VALUES, "seed": 3, "rate": 1})["rate"] == 1.0


def test_a_typo_is_caught_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown parameter 'sede': did you mean 'seed'"):
        checked([CELL, "# Parameters\nsede = 3\n"], {**VALUES, "sede": 3})


@pytest.mark.parametrize(
    ("name", "value"), [("seed", "three"), ("seed", 1.5), ("seed", True), ("crop", 1), ("blocks", 4), ("blocks", ["4"])]
)
def test_wrong_types_are_caught(name, value):
    with pytest.raises(ValueError, match=f"parameter {name} must be"):
        checked([CELL], {**VALUES, name: value})


def test_a_list_is_empty_only_where_that_is_said():
    given = {**VALUES, "blocks": []}
    assert checked([CELL, "# Parameters\nblocks = []\n"], given, ["blocks"]) == given
    assert checked(["names: list[str] = []"], {"names": []}) == {"names": []}
    with pytest.raises(ValueError, match="parameter blocks must not be empty, as in \\[4, 2\\]"):
        checked([CELL, "# Parameters\nblocks = []\n"], given)
