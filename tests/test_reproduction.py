"""The report: what counts as outside the spread, what holds, and that the page says what the tables say."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kmex_utils import reproduction, tables

EFFECTS = ["dataset", "question", "model", "metric", "mean", "std", "seeds"]


def rows(values, metric="accuracy", split="test"):
    """Records of {model: one value per seed}."""
    return [
        {"dataset": "stl10", "model": model, "metric": metric, "split": split, "seed": seed, "value": value}
        for model, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


@pytest.fixture
def table2():
    return tables.tidy(rows({"CNN": [86.0, 86.4, 85.9], "B4": [70.0, 70.2, 70.1], "B34": [60.0] * 3}), tables.TABLE2)


def test_margin_is_a_two_sample_interval(table2):
    found = reproduction.compare(table2).set_index("model")
    assert list(found.index) == ["CNN", "B4", "B34"]
    assert math.isnan(found.margin["B34"]) and found.outside["B34"] == "", "the paper prints no B34"
    values = np.array([86.0, 86.4, 85.9])
    expected = stats.t.ppf(0.975, 2) * values.std(ddof=1) * math.sqrt(1 / 3 + 1 / 5)
    assert found.margin["CNN"] == pytest.approx(expected + 0.05)
    assert found.outside.to_dict() == {"CNN": "no", "B4": "yes", "B34": ""}
    assert found.difference["B4"] == pytest.approx(70.1 - 85.5)


def test_margin_covers_as_often_as_it_says(generator):
    """Draws from one distribution for both sides lie outside in one of twenty cases."""
    draws = np.random.default_rng(0).normal(50, 3, (2000, 8))
    outside = 0
    for draw in draws:
        ours = pd.DataFrame(
            [{"metric": "accuracy", "n_seeds": 3, "mean": draw[:3].mean(), "std": draw[:3].std(ddof=1)}]
        )
        (answer,) = reproduction.compare(ours.assign(paper=draw[3:].mean())).outside
        outside += answer == "yes"
    assert 0.03 < outside / len(draws) < 0.07


def test_one_seed_has_no_spread():
    found = reproduction.compare(tables.tidy(rows({"CNN": [60.0]}), tables.TABLE2))
    assert found.outside.tolist() == [""] and found.margin.isna().all()


def all_records():
    accuracy = {"CNN": [80.0, 81.0], "KMEx (K/C=5)": [79.5, 79.0], "B4": [78.0, 75.0], "B234": [70.0, 71.0]}
    records = rows({**accuracy, "ProtoPNet": [81.0, 80.0]})
    records += rows({"CNN": [0.5, 0.4], "KMEx (K/C=1)": [0.9, 0.3], "ProtoPNet": [0.9, 0.9]}, "cos_class", "train")
    records += rows({"CNN": [-0.05, -0.2], "ProtoPNet": [0.85, 0.5]}, "cos_out", "train")
    return records + rows({"CNN": [-0.1, 0.2]}, "cos_columns", "train")


def test_relations_by_hand():
    found = reproduction.check_relations(pd.DataFrame(all_records()), "stl10", 5).set_index("claim")
    assert found.holds_in.to_dict() == {
        "KMEx keeps the CNN's accuracy": 1,
        "B4 stays close to it": 1,
        "B234 gives up more": 2,
        "ProtoPNet is not better than the CNN": 1,
        "centroids point into their class, columns less": 1,
        "columns are orthogonal to other classes": 1,
        "columns are nearly orthogonal to each other": 1,
        "ProtoPNet's cosines do not tell classes apart": 1,
    }
    assert (found.seeds == 2).all()
    assert found["mean"]["KMEx keeps the CNN's accuracy"] == pytest.approx(-1.25)
    assert found.paper["KMEx keeps the CNN's accuracy"] == pytest.approx(85.6 - 86.1)
    assert math.isnan(found.paper["columns are nearly orthogonal to each other"])


def test_a_model_that_was_not_run_is_left_out():
    records = pd.DataFrame([r for r in all_records() if r["model"] != "ProtoPNet"])
    found = reproduction.check_relations(records, "stl10", 5)
    assert len(found) == 6 and not found.claim.str.contains("ProtoPNet").any()


@pytest.mark.parametrize(("dataset", "own"), [("mnist", 5), ("stl10", 5), ("cub200", 10)])
def test_the_paper_meets_its_own_criteria(dataset, own):
    """Each criterion admits the paper's printed numbers, so that it can tell agreement from disagreement."""
    published = {**tables.TABLE1, **tables.TABLE2}
    seen = 0
    for relation in reproduction.relations(own):
        try:
            value = relation.of(lambda *key: published[(dataset, *key)])
        except KeyError:
            continue
        seen += 1
        assert relation.holds(value), (relation.claim, value)
    assert seen == 7


def test_prices_are_what_the_cnn_keeps():
    ledger = [
        ("default", "", "B4", "accuracy", 0, 78.0),
        ("default", "", "B234", "accuracy", 0, 70.0),
        ("default", "", "B234", "accuracy_most_frequent", 0, 65.0),
        ("scale", "1", "B234", "accuracy", 0, 77.0),
        ("scale", "1", "B234", "accuracy", 1, 75.0),
        ("scale", "1", "B34", "accuracy", 1, 10.0),
        ("attribution start", "raw", "B234", "map_correlation", 0, 0.9),
    ]
    ledger = pd.DataFrame(ledger, columns=["question", "option", "model", "metric", "seed", "value"])
    found = reproduction.prices(ledger.assign(split="test"), pd.DataFrame(all_records()), "stl10")
    found = found.set_index(["question", "option", "model"])
    assert found["mean"].to_dict() == {
        ("all images", "", "B4"): 4.0,
        ("all images", "", "B234"): 10.0,
        ("default", "", "B4"): 2.0,
        ("default", "", "B234"): 10.0,
        ("scale", "1", "B234"): 4.5,
        ("prediction", "most frequent", "B234"): 15.0,
    }
    assert found.paper["scale", "1", "B234"] == pytest.approx(86.1 - 77.9)
    relations = reproduction.check_relations(pd.DataFrame(all_records()), "stl10", 5)
    lines = reproduction.summary(relations, found.reset_index())
    assert "- B234 gives up more: holds in every seed of stl10." in lines
    assert "- B4 stays close to it: does not hold in every seed of stl10 (1 of 2 seeds)." in lines
    assert lines[-1].startswith("- What B234 loses to the CNN in stl10: 10.0 points (paper 8.2);")
    assert lines[-1].endswith("10.0 with the printed 1/D_b, 4.5 with equal weights.")


def test_the_depth_study_tells_of_the_factor_too():
    depth = [
        ("B234", "1/D", "accuracy", 5, 0, 70.0),
        ("B234", "1/D", "accuracy_most_frequent", 5, 0, 65.0),
        ("B234", "1", "accuracy", 5, 0, 79.0),
        ("B234", "1", "accuracy", 20, 0, 80.0),
        ("KMEx", "", "accuracy", 5, 0, 79.0),
        ("CNN", "", "accuracy", 0, 0, 80.0),
    ]
    depth = pd.DataFrame(depth, columns=["model", "scale", "metric", "per_class", "seed", "value"]).assign(split="test")
    ledger = reproduction.ledger_of_depth(depth.replace({"scale": {"": np.nan}}), 5)
    found = reproduction.prices(ledger, pd.DataFrame(all_records()), "stl10").query("question != 'all images'")
    assert found.set_index(["question", "option"])["mean"].to_dict() == {
        ("default", ""): 10.0,
        ("scale", "1"): 1.0,
        ("prediction", "most frequent"): 15.0,
    }


def test_effects_of_what_else_is_open():
    ledger = [
        ("default", "", "KMEx (K/C=5)", "cos_class", "train", 0, 0.80),
        ("default", "", "KMEx (K/C=1)", "cos_class", "train", 0, 0.90),
        ("pairs", "nearest", "KMEx (K/C=5)", "cos_class", "train", 0, 0.85),
        ("pairs", "nearest", "KMEx (K/C=1)", "cos_class", "train", 0, 0.90),
        ("default", "", "B4", "accuracy", "test", 0, 70.0),
        ("norm", "image", "B4", "accuracy", "test", 0, 71.0),
        ("attribution start", "raw", "B4", "map_correlation", "test", 0, 0.7),
        ("attribution start", "raw", "B4", "map_correlation", "test", 1, 0.9),
        ("as trained", "", "CNN", "accuracy", "test", 0, 80.0),
        ("as trained", "", "CNN", "accuracy", "train", 0, 90.0),
        ("bias", "switched", "CNN", "accuracy", "test", 0, 79.5),
        ("bias", "switched", "CNN", "accuracy", "train", 0, 95.0),
        ("as trained", "", "KMEx (K/C=1)", "accuracy", "test", 0, 70.0),
        ("bias", "switched", "KMEx (K/C=1)", "accuracy", "test", 0, 72.0),
    ]
    columns = ["question", "option", "model", "metric", "split", "seed", "value"]
    found = reproduction.effects(pd.DataFrame(ledger, columns=columns).replace({"option": {"": np.nan}}), "stl10")
    assert found.columns.tolist() == EFFECTS
    assert found[["question", "model", "metric", "seeds"]].values.tolist() == [
        ["pairs", "KMEx (K/C=5)", "cos_class", 1],
        ["attribution start", "B4", "map_correlation", 2],
        ["bias", "CNN", "accuracy", 1],
        ["bias", "KMEx (K/C=1)", "accuracy", 1],
    ]
    assert found["mean"].tolist() == pytest.approx([0.05, 0.8, -0.5, 2.0])
    assert found["std"][1] == pytest.approx(0.02**0.5)


def test_share_of_the_deepest_block(generator):
    """As the rows of q(b:) have it: each block's part of a difference, its own length divided out."""
    from conftest import blocks_of

    from kmex_utils.composite import SCALES, Normalisation, composite

    assert reproduction.last_share("resnet34", "1/D") == pytest.approx(512**-2 / (128**-2 + 256**-2 + 512**-2))
    x = blocks_of(channels=(128, 256, 512))
    for scale in SCALES:
        q = composite(x, Normalisation(scale=scale))
        squared = [part.square().sum(-1).amax() for part in q.split((128, 256, 512), -1)]
        assert reproduction.last_share("resnet34", scale) == pytest.approx(float(squared[-1] / sum(squared)), rel=1e-4)


def test_weightings_are_the_prices_of_the_factors():
    prices = [
        ("stl10", "default", "", "B234", 8.2, 14.0, 1.0, 2),
        ("stl10", "scale", "1", "B234", 8.2, 1.0, 0.5, 2),
        ("stl10", "scale", "1", "B4", 0.6, 0.5, 0.5, 2),
        ("stl10", "norm", "image", "B234", 8.2, 13.0, 0.5, 2),
    ]
    prices = pd.DataFrame(prices, columns=["dataset", "question", "option", "model", "paper", "mean", "std", "seeds"])
    found = reproduction.weightings(prices, {"stl10": "resnet34"})
    assert found.scale.tolist() == ["1/D", "1"] and found["mean"].tolist() == [14.0, 1.0]
    assert found.last_share.tolist() == pytest.approx([0.0476, 1 / 3], abs=1e-4)


def test_costs_read_what_the_batch_noted(tmp_path):
    for seed, seconds in ((0, 60), (1, 180)):
        path = tmp_path / "stl10" / f"seed-{seed}" / "cost" / "01_train.tsv"
        path.parent.mkdir(parents=True)
        path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:01:00\t2048\n")
    (one,) = reproduction.costs(tmp_path, ["stl10", "mnist"]).to_dict("records")
    assert one == dict(dataset="stl10", notebook="01_train", runs=2, minutes=2.0, minutes_max=3.0, peak_gib=2.0)
    assert reproduction.costs(tmp_path, ["mnist"]).empty
    (size,) = reproduction.disk(tmp_path, ["stl10"]).mib
    assert size == pytest.approx(sum(p.stat().st_size for p in tmp_path.glob("**/*.tsv")) / 2**20)


def test_a_report_keeps_what_runs_no_longer_tell(tmp_path):
    """Rows of its own for the data sets at hand, an earlier report's for the others, in the order asked for."""
    earlier = pd.DataFrame({"dataset": ["mnist", "stl10", "stl10"], "seed": [1, 0, 1], "minutes": [9.0, 7.0, 8.0]})
    earlier.to_csv(tmp_path / "trained.csv", index=False)
    found = pd.DataFrame({"dataset": ["stl10"], "seed": [4], "minutes": [6.0]})
    kept = reproduction.with_earlier(found, tmp_path / "trained.csv", ["stl10", "mnist"], "01_train")
    assert kept.to_dict("list") == {"dataset": ["stl10", "mnist"], "seed": [4, 1], "minutes": [6.0, 9.0]}
    with pytest.raises(FileNotFoundError, match="no runs of cub200, and none in .*: run notebook 01_train for it"):
        reproduction.with_earlier(found, tmp_path / "trained.csv", ["cub200"], "01_train")
    assert reproduction.with_earlier(reproduction.costs(tmp_path, ["x"]), tmp_path / "cost.csv", ["x"]).empty
    trained, curves = reproduction.trainings(tmp_path, ["x"])
    assert trained.empty and curves.empty and reproduction.disk(tmp_path, ["x"]).empty


def test_the_page_says_what_the_tables_say(tmp_path):
    records = pd.DataFrame(all_records())
    trained = {"dataset": "stl10", "seed": 0, "classes": 10, "train": 5000, "test": 8000, "px": 96, "epochs": "16"}
    trained |= {"network": "resnet34", "start": "scratch", "batch": 64, "learning_rate": 0.01, "momentum": 0.9}
    trained = pd.DataFrame([trained | {"flip": 0.5, "padding": 12, "seconds": 600.0, "machine": "a machine"}])
    table = reproduction.compare(tables.tidy(all_records(), {**tables.TABLE1, **tables.TABLE2}))
    (tmp_path / "stl10").mkdir()
    (tmp_path / "stl10" / "figure1.png").write_bytes(b"")
    parts = {
        "trained": trained,
        "relations": reproduction.check_relations(records, "stl10", 5),
        "table1": table[table.metric != "accuracy"],
        "table2": table[table.metric == "accuracy"],
        "prices": pd.DataFrame(),
        "effects": pd.DataFrame([("stl10", "bias", "CNN", "accuracy", -0.5, 0.25, 2)], columns=EFFECTS),
        "cost": reproduction.costs(tmp_path, ["stl10"]),
        "disk": reproduction.disk(tmp_path, ["stl10"]),
        "others": reproduction.beside_others({"stl10": records}, trained),
    }
    text = reproduction.page(parts, tmp_path, ["stl10"], "datasets: {}")
    assert text == (tmp_path / "report" / "report.md").read_text()
    assert "were not" in text and "datasets: {}" in text
    line = next(line for line in text.splitlines() if "| CNN" in line and "accuracy" in line)
    assert [cell.strip() for cell in line.split("|")[5:8]] == ["86.1", "80.5 ± 0.7", "-5.6"]
    assert "(../stl10/figure1.png)" in text and "figure2.png" not in text
    line = next(line for line in text.splitlines() if line.startswith("| bias"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["bias", "CNN", "accuracy", "-0.5 ± 0.2"]
    assert "| 1 of 2" in text and parts["others"]["test accuracy (%)"].tolist() == [80.5, 80.5]
