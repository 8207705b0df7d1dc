"""The published tables, and ours beside them."""

import pandas as pd
import pytest

from kmex_utils.paper import published


def records():
    return [
        dict(dataset="mnist", model="B4", metric="accuracy", split="test", seed=s, value=v)
        for s, v in enumerate((98.0, 99.0, 97.0))
    ] + [dict(dataset="mnist", model="B34", metric="accuracy", split="test", seed=0, value=95.0)]


def test_tidy_table():
    table = published.tidy(records(), published.TABLE2)
    assert list(table.columns) == ["dataset", "model", "metric", "split", "mean", "std", "n_seeds", "paper"]
    first, second = table.to_dict("records")
    assert (first["mean"], first["std"], first["n_seeds"], first["paper"]) == (98.0, 1.0, 3, 99.4)
    assert second["n_seeds"] == 1 and pd.isna(second["std"]) and pd.isna(second["paper"])


def test_markdown_has_paper_ours_and_difference():
    text = published.markdown(published.tidy(records(), published.TABLE2), 1)
    assert "| 99.4" in text and "98.0 ± 1.0" in text and "-1.4" in text


def test_a_seed_counted_twice_is_refused():
    with pytest.raises(ValueError, match="two records"):
        published.tidy(records() + records()[:1], published.TABLE2)


def test_the_note_tells_how_a_training_began():
    first = {"arch": "resnet34", "dataset": "cub200", "weights": "scratch", "schedule": {"epochs": 14}}
    first["data"] = {"input": {"image_size": 112}}
    then = {**first, "weights": "a.safetensors", "before": first, "schedule": {"epochs": 2}}
    then["data"] = {"input": {"image_size": 224}}
    assert published.note(then).startswith("Ours: resnet34, weights scratch, 14 epochs at 112 px, then 2 epochs.")
    assert "trained from scratch" in published.note(then)
    assert "scratch" not in published.note({**first, "weights": "imagenet"})


def test_numbers_are_never_minus_zero():
    assert published.numbers([-0.001, float("nan"), 1.25], 1) == ["0.0", "–", "1.2"]
    assert published.numbers([-0.001, 2.0], 1, sign="+") == ["+0.0", "+2.0"]


def test_published_numbers_are_the_papers():
    """Spot checks of each row's first and last number against the printed published."""
    printed = {
        ("mnist", "CNN", "cos_class", "train"): 0.48,
        ("cub200", "CNN", "cos_out", "train"): 0.00,
        ("stl10", "KMEx (K/C=1)", "cos_out", "train"): 0.42,
        ("cub200", "ProtoPNet", "cos_out", "train"): 0.97,
        ("mnist", "CNN", "accuracy", "test"): 99.4,
        ("cub200", "KMEx (K/C=10)", "accuracy", "test"): 78.6,
        ("stl10", "ProtoPNet", "accuracy", "train"): 74.2,
        ("cub200", "B234", "accuracy", "test"): 52.8,
    }
    both = {**published.TABLE1, **published.TABLE2}
    assert {key: both[key] for key in printed} == printed
    assert (len(published.TABLE1), len(published.TABLE2)) == (24, 30)
