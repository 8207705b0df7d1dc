"""What counts as outside the spread, and what holds."""

import io
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from kmex_utils.paper import claims, published


def rows(values, metric="accuracy", split="test"):
    """Records of {model: one value per seed}."""
    return [
        {"dataset": "stl10", "model": model, "metric": metric, "split": split, "seed": seed, "value": value}
        for model, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


@pytest.fixture
def table2():
    return published.tidy(
        rows({"CNN": [86.0, 86.4, 85.9], "B4": [70.0, 70.2, 70.1], "B34": [60.0] * 3}), published.TABLE2
    )


def test_margin_is_a_two_sample_interval(table2):
    found = claims.compare(table2).set_index("model")
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
    ours, papers = draws[:, :3], draws[:, 3:].mean(1)
    table = pd.DataFrame({"n_seeds": 3, "mean": ours.mean(1), "std": ours.std(1, ddof=1), "paper": papers})
    outside = claims.compare(table.assign(metric="accuracy")).outside == "yes"
    assert len(outside) == 2000 and 0.03 < outside.mean() < 0.07


def test_one_seed_has_no_spread():
    found = claims.compare(published.tidy(rows({"CNN": [60.0]}), published.TABLE2))
    assert found.outside.tolist() == [""] and found.margin.isna().all()


def all_records():
    accuracy = {"CNN": [80.0, 81.0], "KMEx (K/C=5)": [79.5, 79.0], "B4": [78.0, 75.0], "B234": [70.0, 71.0]}
    records = rows({**accuracy, "ProtoPNet": [81.0, 80.0]})
    records += rows({"CNN": [0.5, 0.4], "KMEx (K/C=1)": [0.9, 0.3], "ProtoPNet": [0.9, 0.9]}, "cos_class", "train")
    records += rows({"CNN": [-0.05, -0.2], "ProtoPNet": [0.85, 0.5]}, "cos_out", "train")
    return records + rows({"CNN": [-0.1, 0.2]}, "cos_columns", "train")


def test_relations_by_hand():
    found = claims.check_relations(pd.DataFrame(all_records()), "stl10", 5).set_index("claim")
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
    found = claims.check_relations(records, "stl10", 5)
    assert len(found) == 6 and not found.claim.str.contains("ProtoPNet").any()


@pytest.mark.parametrize(("dataset", "own"), [("mnist", 5), ("stl10", 5), ("cub200", 10)])
def test_the_paper_meets_its_own_criteria(dataset, own):
    """Each criterion admits the paper's printed numbers, so that it can tell agreement from disagreement."""
    tables = {**published.TABLE1, **published.TABLE2}
    numbers = {key[1:]: value for key, value in tables.items() if key[0] == dataset}
    printed = [relation for relation in claims.relations(own) if {*relation.terms} <= {*numbers}]
    assert len(printed) == 7
    for relation in printed:
        assert relation.holds(relation.value(numbers)), relation.claim


def test_fidelity_holds_where_the_interval_excludes_zero():
    columns = ["seed", "more", "than", "metric", "difference", "low", "high"]
    differences = pd.DataFrame(
        [
            (0, "B34, 1", "B4, 1/D", "nmi", 6.0, 5.0, 7.0),
            (1, "B34, 1", "B4, 1/D", "nmi", 4.0, -0.5, 8.0),
            (0, "B34, 1", "B4, 1/D", "purity", 9.0, 8.0, 10.0),
            (0, "B4, 1/D", "ProtoPNet", "nmi", 3.0, 2.0, 4.0),
        ],
        columns=columns,
    )
    (row,) = claims.check_fidelity(differences, "cub200").to_dict("records")
    assert row["measure"] == "NMI_m, B34, 1 - B4, 1/D, points" and row["seeds"] == 2 and row["holds_in"] == 1
    assert row["mean"] == 5 and row["std"] == pytest.approx(math.sqrt(2)) and math.isnan(row["paper"])


def test_section_5_is_carried_as_saved():
    text = "claim,measure,value,spread,chance,holds if,holds\nneurons are often redundant,share,3.5,,0,above 25,False\n"
    (row,) = claims.check_section5(pd.read_csv(io.StringIO(text)), "cub200").to_dict("records")
    assert (row["claim"], row["criterion"]) == ("section 5: neurons are often redundant", "above 25")
    assert (row["mean"], row["holds_in"], row["seeds"]) == (3.5, 0, 1)
