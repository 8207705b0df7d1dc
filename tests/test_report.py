"""The report: that it reads what lies there, and that the page says what the tables say."""

import pandas as pd
import pytest
from test_claims import all_records
from test_ledger import EFFECTS

from kmex_utils import paths
from kmex_utils.explanation.activations import embed
from kmex_utils.paper import claims, ledger, published, report
from kmex_utils.paper.runs import Run


def test_trainings_tell_every_stage(network, digits, tmp_path):
    """Epochs of the training before too, numbered on; sizes, pixels and augmentation as they were."""
    step = {"loss": 1.0, "accuracy": 50.0, "learning_rate": 0.1, "seconds": 2.0}
    first = {"arch": "resnet18", "weights": "scratch", "history": [step, step], "schedule": {"epochs": 2}}
    settings = {**first, "before": first, "weights": "a.safetensors", "classes": list(digits.classes)}
    settings |= {"data": digits.settings, "prototypes_per_class": 7, "flip": 0.5, "padding": 2, "machine": "a machine"}
    settings |= {"history": [step], "schedule": {"epochs": 1, "batch_size": 4, "learning_rate": 0.1, "momentum": 0.9}}
    run = Run.of(tmp_path, "my-digits", 4)
    run.save_training(network, digits, settings)
    run.save_embeddings(**{s: (embed(network, digits, s), digits.split(s).labels) for s in ("train", "test")})
    trained, curves = report.trainings(tmp_path, ["none", "my-digits"])
    (one,) = trained.to_dict("records")
    expected = {"dataset": "my-digits", "seed": 4, "classes": 3, "train": 36, "test": 36, "px": 32, "start": "scratch"}
    assert {**one, **expected, "epochs": "2 + 1", "seconds": 6.0, "flip": 0.5, "padding": 2, "batch": 4} == one
    assert curves.epoch.tolist() == [1, 2, 3] and (curves.seed == 4).all()
    assert report.own_prototypes_per_class(tmp_path, "my-digits") == 7
    assert report.own_prototypes_per_class(tmp_path, "cub200") == 10, "the recipe's, where no run is"


def test_costs_read_what_the_batch_noted(tmp_path):
    for seed, seconds in ((0, 60), (1, 180)):
        path = tmp_path / "stl10" / f"seed-{seed}" / "cost" / "01_train.tsv"
        path.parent.mkdir(parents=True)
        path.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:01:00\t2048\n")
    (one,) = report.costs(tmp_path, ["stl10", "mnist"]).to_dict("records")
    assert one == dict(dataset="stl10", notebook="01_train", runs=2, minutes=2.0, minutes_max=3.0, peak_gib=2.0)
    assert report.costs(tmp_path, ["mnist"]).empty
    (size,) = report.disk(tmp_path, ["stl10"]).mib
    assert size == pytest.approx(sum(p.stat().st_size for p in tmp_path.glob("**/*.tsv")) / 2**20)


def test_a_report_keeps_what_runs_no_longer_tell(tmp_path):
    """Rows of its own for the data sets at hand, an earlier report's for the others, in the order asked for."""
    earlier = pd.DataFrame({"dataset": ["mnist", "stl10", "stl10"], "seed": [1, 0, 1], "minutes": [9.0, 7.0, 8.0]})
    earlier.to_csv(tmp_path / "trained.csv", index=False)
    table = pd.DataFrame({"dataset": ["stl10"], "seed": [4], "minutes": [6.0]})
    kept = report.with_earlier(table, tmp_path / "trained.csv", ["stl10", "mnist"], "01_train")
    assert kept.to_dict("list") == {"dataset": ["stl10", "mnist"], "seed": [4, 1], "minutes": [6.0, 9.0]}
    with pytest.raises(FileNotFoundError, match="no runs of cub200, and none in .*: run notebook 01_train for it"):
        report.with_earlier(table, tmp_path / "trained.csv", ["cub200"], "01_train")
    assert report.with_earlier(report.costs(tmp_path, ["x"]), tmp_path / "cost.csv", ["x"]).empty
    trained, curves = report.trainings(tmp_path, ["x"])
    assert trained.empty and curves.empty and report.disk(tmp_path, ["x"]).empty


def test_the_page_says_what_the_tables_say(tmp_path):
    records = pd.DataFrame(all_records())
    trained = {"dataset": "stl10", "seed": 0, "classes": 10, "train": 5000, "test": 8000, "px": 96, "epochs": "16"}
    trained |= {"network": "resnet34", "start": "scratch", "batch": 64, "learning_rate": 0.01, "momentum": 0.9}
    trained = pd.DataFrame([trained | {"flip": 0.5, "padding": 12, "seconds": 600.0, "machine": "a machine"}])
    table = claims.compare(published.tidy(all_records(), {**published.TABLE1, **published.TABLE2}))
    (tmp_path / "stl10").mkdir()
    (tmp_path / "stl10" / "figure1.png").write_bytes(b"")
    parts = {
        "trained": trained,
        "relations": claims.check_relations(records, "stl10", 5),
        "table1": table[table.metric != "accuracy"],
        "table2": table[table.metric == "accuracy"],
        "prices": pd.DataFrame(),
        "effects": pd.DataFrame([("stl10", "bias", "CNN", "accuracy", -0.5, 0.25, 2)], columns=EFFECTS),
        "cost": report.costs(tmp_path, ["stl10"]),
        "disk": report.disk(tmp_path, ["stl10"]),
        "others": report.beside_others({"stl10": records}, trained),
    }
    text = report.page(parts, tmp_path, ["stl10"], "datasets: {}")
    assert text == (tmp_path / "report" / "report.md").read_text()
    assert "were not" in text and "datasets: {}" in text
    line = next(line for line in text.splitlines() if "| CNN" in line and "accuracy" in line)
    assert [cell.strip() for cell in line.split("|")[5:8]] == ["86.1", "80.5 ± 0.7", "-5.6"]
    assert "(../stl10/figure1.png)" in text and "figure2.png" not in text
    line = next(line for line in text.splitlines() if line.startswith("| bias"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["bias", "CNN", "accuracy", "-0.5 ± 0.2"]
    assert "| 1 of 2" in text and parts["others"]["test accuracy (%)"].tolist() == [80.5, 80.5]


def test_the_summary_says_where_a_finding_does_not_hold():
    relations = claims.check_relations(pd.DataFrame(all_records()), "stl10", 5)
    prices = [("all images", "", 10.0), ("default", "", 10.0), ("scale", "1", 4.5)]
    prices = pd.DataFrame(prices, columns=["question", "option", "mean"])
    lines = report.summary(relations, prices.assign(dataset="stl10", model="B234", paper=8.2))
    assert "B234 gives up more: holds in every seed of stl10." in lines
    assert "B4 stays close to it: does not hold in every seed of stl10 (1 of 2 seeds)." in lines
    assert lines[-1].startswith("What B234 loses to the CNN in stl10: 10.0 points (paper 8.2);")
    assert lines[-1].endswith("10.0 with the printed 1/D_b, 4.5 with equal weights.")
    two = relations.iloc[[0, 0]].assign(claim="depth buys", measure=["B34 - B4", "B234 - B4"], seeds=1, holds_in=[1, 0])
    expected = ["depth buys: holds in every seed in 1 of 2 comparisons in stl10."]
    assert report.summary(two, pd.DataFrame()) == expected
    assert len(report.summary(relations, pd.DataFrame())) == len(relations)


@pytest.mark.parametrize("folder", ["figures", "figures/efficientnet"])
def test_the_committed_pages_are_what_their_tables_say(folder, tmp_path):
    """Their runs are gone; from what these left in tables comes the same page."""
    figures = paths.ROOT / folder
    committed = (figures / "report" / "report.md").read_text()
    parts = {name: pd.read_csv(figures / "report" / f"{name}.csv") for name in ("trained", "cost", "disk")}
    parts |= {"relations": [], "table1": [], "table2": [], "prices": [], "effects": []}
    records = {}
    for dataset in parts["trained"].dataset.unique():
        tables = {path.stem: pd.read_csv(path) for path in (figures / dataset).glob("*.csv")}
        k = report.own_prototypes_per_class(tmp_path, dataset)
        records[dataset] = pd.concat([tables["table1-seeds"], tables["table2-seeds"]])
        parts["relations"].append(claims.check_relations(records[dataset], dataset, k))
        for table in ("table1", "table2"):
            parts[table].append(claims.compare(tables[table]))
        of_depth = ledger.ledger_of_depth(tables["depth"], k)
        parts["prices"].append(ledger.prices(tables.get("ledger", of_depth), records[dataset], dataset))
        if "ledger" in tables:
            parts["effects"].append(ledger.effects(tables["ledger"], dataset))
    parts = {
        name: pd.concat(part, ignore_index=True) if isinstance(part, list) else part for name, part in parts.items()
    }
    parts["others"] = report.beside_others(records, parts["trained"])
    for picture in figures.glob("*/*.png"):
        (tmp_path / picture.parent.name).mkdir(exist_ok=True)
        (tmp_path / picture.parent.name / picture.name).touch()
    page = report.page(parts, tmp_path, [*records])
    assert page.strip() == committed.partition("## How it was made")[0].strip()
