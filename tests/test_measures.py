import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from kmex_utils import tables
from kmex_utils.measures import accuracy, cosine_alignment


def data():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(60, 5, generator=generator) + 0.5
    labels = torch.randint(3, (60,), generator=generator)
    p = torch.randn(6, 5, generator=generator)
    return z, labels, p, torch.tensor([0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize("pairs", ["all", "nearest"])
def test_cosines_by_their_n_times_k_definition(pairs):
    z, labels, p, p_labels = data()
    cosine = F.cosine_similarity(z[:, None], p[None], dim=2)
    distance = torch.cdist(z, p)
    inside, outside = [], []
    for j in range(3):
        columns = (p_labels == j).nonzero().flatten()
        for own, into in ((True, inside), (False, outside)):
            values = []
            for n in ((labels == j) == own).nonzero().flatten().tolist():
                nearest = columns[distance[n, columns].argmin()]
                values += cosine[n, columns].tolist() if pairs == "all" else [cosine[n, nearest].item()]
            into.append(sum(values) / len(values))
    expected = sum(inside) / 3, sum(outside) / 3
    assert cosine_alignment(z, labels, p, p_labels, pairs) == pytest.approx(expected, abs=1e-6)


def test_cosines_ignore_lengths():
    z, labels, p, p_labels = data()
    longer = cosine_alignment(7 * z, labels, 0.01 * p, p_labels)
    assert longer == pytest.approx(cosine_alignment(z, labels, p, p_labels), abs=1e-7)


def test_unknown_pairs_and_a_missing_class_are_refused():
    z, labels, p, p_labels = data()
    with pytest.raises(ValueError, match="pairs must be"):
        cosine_alignment(z, labels, p, p_labels, "some")
    with pytest.raises(ValueError, match="class 2 needs embeddings"):
        cosine_alignment(z[labels < 2], labels[labels < 2], p, p_labels)


def test_accuracy_is_in_percent():
    assert accuracy(torch.tensor([1, 2, 3, 0]), torch.tensor([1, 2, 0, 0])) == 75.0


def records():
    return [
        dict(dataset="mnist", model="B4", metric="accuracy", split="test", seed=s, value=v)
        for s, v in enumerate((98.0, 99.0, 97.0))
    ] + [dict(dataset="mnist", model="B34", metric="accuracy", split="test", seed=0, value=95.0)]


def test_tidy_table():
    table = tables.tidy(records(), tables.TABLE2)
    assert list(table.columns) == ["dataset", "model", "metric", "split", "mean", "std", "n_seeds", "paper"]
    first, second = table.to_dict("records")
    assert (first["mean"], first["std"], first["n_seeds"], first["paper"]) == (98.0, 1.0, 3, 99.4)
    assert second["n_seeds"] == 1 and pd.isna(second["std"]) and pd.isna(second["paper"])


def test_markdown_has_paper_ours_and_difference():
    text = tables.markdown(tables.tidy(records(), tables.TABLE2), 1)
    assert "| 99.4" in text and "98.0 ± 1.0" in text and "-1.4" in text


def test_a_seed_counted_twice_is_refused():
    with pytest.raises(ValueError, match="two records"):
        tables.tidy(records() + records()[:1], tables.TABLE2)


def test_the_note_tells_how_a_training_began():
    first = {"arch": "resnet34", "dataset": "cub200", "weights": "scratch", "schedule": {"epochs": 14}}
    first["data"] = {"image_size": 112}
    then = {**first, "weights": "a.safetensors", "before": first, "schedule": {"epochs": 2}, "data": {"image_size": 0}}
    assert tables.note(then).startswith("Ours: resnet34, weights scratch, 14 epochs at 112 px, then 2 epochs.")
    assert "trained from scratch" in tables.note(then)
    assert "scratch" not in tables.note({**first, "weights": "imagenet"})


def test_published_numbers_are_the_papers():
    """Spot checks of each row's first and last number against the printed tables."""
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
    both = {**tables.TABLE1, **tables.TABLE2}
    assert {key: both[key] for key in printed} == printed
    assert (len(tables.TABLE1), len(tables.TABLE2)) == (24, 30)
