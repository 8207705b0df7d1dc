"""Every notebook on a few real digits; the numbers they leave are checked by name."""

import contextlib
import json
import re
import warnings

import jupytext
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from conftest import NOTEBOOKS
from IPython.core.interactiveshell import InteractiveShell
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from PIL import Image
from scipy.optimize import nnls
from scipy.spatial.distance import cdist
from sklearn.decomposition import NMF
from sklearn.metrics import adjusted_rand_score

import kmex_utils as kmex
from kmex_utils import data
from kmex_utils.explanation.passed import Passed
from kmex_utils.method.attribution import attribution, carried
from kmex_utils.method.composite import Normalisation
from kmex_utils.method.kmex import fit_kmex
from kmex_utils.method.measures import accuracy
from kmex_utils.paper import ledger as open_choices
from kmex_utils.paper.runs import Run

ALL = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
TINY = {
    "01_train": dict(image_size=32, images_per_class=20, arch="resnet18", epochs=2, batch_size=20, precision="float32"),
    "04_encoder": dict(start_blocks=[4, 3, 2], prototypes_per_class=2, restarts=2),
    "05_protopnet": dict(prototypes_per_class=2, warm_epochs=2, joint_epochs=1, last_passes=2, batch_size=20, image=3),
    "08_umap": dict(group="0,1,2", images_per_class=15),
    "09_interpretation": dict(image=3),
    "10_subset": dict(fractions=[0.5, 1.0], draws=1, start_blocks=[4], prototypes_per_class=2, restarts=2, seeds=[3]),
    "13_open_choices": dict(prototypes_per_class=2, restarts=2, fit_on=8, attribution_images=5, seeds=[3]),
    "14_depth": dict(start_blocks=[4, 2], prototypes_per_class=[1, 3], fit_on=8, restarts=2, seeds=[3]),
    "17_faithfulness": dict(prototypes_per_class=2, fit_on=8, images=2, steps=3, rise_masks=4, seeds=[3]),
    "18_concepts": dict(prototypes_per_class=2, restarts=1, fit_on=8, start_blocks=[4, 2], scales=["1"], seeds=[3])
    | dict(regions=6, crops=4, measured=6, shown=2),
    "19_certainty": dict(prototypes_per_class=2, restarts=1, fit_on=8, start_blocks=[4, 2], refits=2, seeds=[3]),
    "11_scaling": dict(repeats=1, images=[], prototypes_per_class=[], start_blocks=[], class_images=2, restarts=2)
    | dict(batch=1, prototypes=32, explanation_repeats=1, gradient_steps=2, stream_rows=[2000]),
}
ON_THEIR_OWN = ["11_scaling", "12_your_own_model", "16_fidelity"]


@pytest.mark.parametrize("name", ALL)
def test_pairs_are_in_sync_and_without_output(name):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    script = jupytext.read(NOTEBOOKS / f"{name}.py")
    cells = [[(c.cell_type, c.source, c.metadata.get("tags", [])) for c in pair.cells] for pair in (notebook, script)]
    assert cells[0] == cells[1], f"run: jupytext --sync notebooks/{name}.py"
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert "jupytext_version:" not in (NOTEBOOKS / f"{name}.py").read_text()


@pytest.mark.parametrize("name", ALL)
def test_parameters_read_like_a_manual(name):
    found = papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))
    for parameter in found.values():
        assert parameter["inferred_type_name"] not in ("None", None), parameter
        assert len(parameter["help"]) > 5, parameter


@pytest.mark.parametrize("name", ALL)
def test_no_code_line_is_cut_on_a_page(name):
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > 88]


def through_papermill(name, where, **parameters):
    out = where / f"{name}.ipynb"
    return papermill.execute_notebook(
        str(NOTEBOOKS / f"{name}.ipynb"), str(out), parameters, progress_bar=False, cwd=str(where)
    )


def execute(name, where, **parameters):
    """The cells that papermill would run, in this process: a kernel each takes longer to start than they to run."""
    notebook = parameterize_notebook(load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb")), parameters)
    shell, threads = InteractiveShell(), torch.get_num_threads()
    with contextlib.chdir(where), warnings.catch_warnings(), plt.rc_context():
        warnings.filterwarnings("ignore", "FigureCanvasAgg is non-interactive")
        try:
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    shell.run_cell(cell.source, store_history=True).raise_error()
        finally:
            plt.close("all")
            torch.set_num_threads(threads)  # UMAP's compiler sets them


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """All notebooks, in order, for one seed."""
    folder = tmp_path_factory.mktemp("story")
    for name in ALL:
        if name in ON_THEIR_OWN:
            continue
        given = {"dataset": "mnist-mini", "runs": str(folder / "runs"), **TINY.get(name, {})}
        if name == "15_report":
            given = {"datasets": [given.pop("dataset")], "config": "config/quick.yaml", **given}
        if name >= "06":
            given["figures_folder"] = str(folder / "figures")
        if "seed" in papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb")):
            given["seed"] = 3
        execute(name, folder, **given)
    return folder


def results(story, stage):
    content = json.loads((story / "runs" / "mnist-mini" / "seed-3" / f"results-{stage}.json").read_text())
    return {(r["model"], r["metric"], r["split"]): r["value"] for r in content["records"]}


@pytest.mark.notebook
def test_fidelity(tmp_path):
    """On squares whose corners are parts: a frozen network, every explainer by every measure, and the baselines."""
    generator, keypoints = np.random.default_rng(0), ["image,part,x,y"]
    for split, count in (("train", 6), ("test", 4)):
        for name, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
            (tmp_path / "squares" / split / name).mkdir(parents=True)
            for i in range(count):
                x, y = generator.integers(4, 28, 2)
                pixels = generator.integers(0, 60, (64, 64, 3)).astype(np.uint8)
                pixels[y : y + 30, x : x + 30] = colour
                file = f"{split}/{name}/{i}.png"
                Image.fromarray(pixels).save(tmp_path / "squares" / file)
                keypoints += [
                    f"{file},{part},{x + dx},{y + dy}" for part, dx, dy in (("top", 2, 2), ("bottom", 28, 28))
                ]
    (tmp_path / "keypoints.csv").write_text("\n".join(keypoints))
    shared = {"dataset": "squares", "runs": str(tmp_path / "runs")}
    frozen = {"folder": str(tmp_path / "squares"), "frozen": True, "arch": "resnet18", "weights": "scratch"}
    execute("01_train", tmp_path, **shared, **frozen, image_size=64)
    execute("03_kmex", tmp_path, **shared, prototypes_per_class=[1, 2], restarts=1)
    learned = {"prototypes_per_class": 2, "warm_epochs": 1, "joint_epochs": 1, "last_passes": 1, "push_start": 1}
    execute("05_protopnet", tmp_path, **shared, **learned, features_from="network", batch_size=4, restarts=1)
    small = {"prototypes_per_class": [1, 2], "named": 2, "weights": [1.0], "shared": [2], "refits": 2, "restarts": 1}
    execute("16_fidelity", tmp_path, **shared, **small, annotations=str(tmp_path / "keypoints.csv"),
            figures_folder=str(tmp_path / "figures"))  # fmt: skip
    records = pd.read_csv(tmp_path / "figures" / "squares" / "fidelity.csv", keep_default_na=False)
    assert {"CNN", "B4", "B34", "B234", "position", "ceiling of B2", "B4 on the grid of B2"} <= {*records.model}
    assert {*records["of"]} == {"all classes", "own class", "shared"}
    # the corners of a square are far apart: the place alone tells most of them, and on 8 x 8 cells all
    of = records.set_index(["model", "metric"])["value"].astype(float)
    assert of["ceiling of B2", "purity"] == 100
    assert of["position", "purity"] >= 80
    assert records[records.metric == "purity"].value.astype(float).between(0, 100).all()
    differences = pd.read_csv(tmp_path / "figures" / "squares" / "fidelity-differences.csv")
    assert (differences.low <= differences.high).all() and len(differences)
    baseline = json.loads((tmp_path / "runs" / "squares" / "seed-0" / "results-protopnet.json").read_text())["records"]
    (right,) = (
        r["value"] for r in baseline if (r["model"], r["metric"], r["split"]) == ("ProtoPNet", "accuracy", "test")
    )
    assert of["ProtoPNet", "accuracy_test"] == pytest.approx(right, abs=1e-3)
    assert set(records[records.model == "ProtoPNet"].grid) == {"2x2", "common", ""}
    assert "ProtoPNet" in set(differences.than)
    assert (tmp_path / "figures" / "squares" / "frontier.png").stat().st_size > 5000
    tiny = {"prototypes_per_class": 2, "restarts": 1, "start_blocks": [4, 2], "regions": 6, "crops": 4, "measured": 4}
    execute("18_concepts", tmp_path, **shared, **tiny, annotations=str(tmp_path / "keypoints.csv"),
            figures_folder=str(tmp_path / "figures"))  # fmt: skip
    concepts = pd.read_csv(tmp_path / "figures" / "squares" / "concepts.csv").set_index("method")
    same = records[(records["of"] == "all classes") & (records.prototypes_per_class.astype(str) == "2")]
    same = same[same.refit.astype(str) == "0"].set_index(["model", "scale", "grid", "metric"])["value"].astype(float)
    for method, (model, scale, grid) in {"B4": ("B4", "1/D", "2x2"), "B234, 1": ("B234", "1", "8x8")}.items():
        for metric in ("nmi", "ari", "purity"):
            assert concepts.loc[method, metric] == pytest.approx(same[model, scale, grid, metric], abs=1e-3)
        assert concepts.common_nmi[method] == pytest.approx(same[model, scale, "common", "nmi"], abs=1e-3)
        assert concepts.accuracy[method] == pytest.approx(same[model, scale, "", "accuracy_test"], abs=1e-3)


@pytest.mark.notebook
def test_named_results(story):
    train = results(story, "train")
    assert set(train) == {("CNN", "accuracy", "train"), ("CNN", "accuracy", "test")}
    assert results(story, "sem")["CNN", "theorem1_residual", "test"] < 1e-5
    kmex = results(story, "kmex")
    assert {model for model, *_ in kmex} == {"KMEx (K/C=1)", "KMEx (K/C=5)"}
    encoder = results(story, "encoder")
    assert {model for model, *_ in encoder} == {"B4", "B34", "B234"}
    assert all(0 <= value <= 100 for part in (train, kmex, encoder) for value in part.values())
    protopnet = results(story, "protopnet")
    assert {model for model, *_ in protopnet} == {"ProtoPNet", "ProtoPNet + KMEx"}
    cosines = [value for (_, metric, _), value in protopnet.items() if metric.startswith("cos")]
    assert len(cosines) == 8 and all(0 < value <= 1 for value in cosines), "sigmoid features are positive"


@pytest.mark.notebook
def test_tables(story):
    folder = story / "figures" / "mnist-mini"
    table1, table2 = (pd.read_csv(folder / f"table{i}.csv") for i in (1, 2))
    for table in (table1, table2):
        assert list(table) == ["dataset", "model", "metric", "split", "mean", "std", "n_seeds", "paper"]
        assert (table.n_seeds == 1).all() and table["std"].isna().all()
    assert {"CNN", "KMEx (K/C=1)", "KMEx (K/C=5)", "ProtoPNet"} == set(table1.model)
    cosines = table1.set_index(["model", "metric"])["mean"]
    assert cosines["KMEx (K/C=1)", "cos_class"] > cosines["CNN", "cos_class"]
    assert table1.set_index(["model", "metric"])["paper"]["CNN", "cos_class"] == 0.48
    assert table1.set_index(["model", "metric"])["paper"]["ProtoPNet", "cos_out"] == 1.0
    expected = {**results(story, "train"), **results(story, "kmex"), **results(story, "encoder")}
    expected |= {key: value for key, value in results(story, "protopnet").items() if key[1] == "accuracy"}
    means = table2.set_index(["model", "metric", "split"])["mean"].to_dict()
    assert means == pytest.approx(expected, rel=1e-5)
    assert "difference" in (folder / "table2.md").read_text()


@pytest.mark.notebook
def test_figures(story):
    folder = story / "figures" / "mnist-mini"
    for name in ("figure1.png", "figure1.pdf", "figure2.png", "figure2.pdf"):
        assert (folder / name).stat().st_size > 5000
    numbers = pd.read_csv(folder / "figure2.csv").set_index("prototypes")
    assert list(numbers.index) == ["c_j", "c_j rescaled", "KMEx (K/C=5)"]
    assert numbers.iloc[2, 0] > numbers.iloc[0, 0]


@pytest.mark.notebook
def test_figures_of_protopnet(story):
    """Asked for beside the paper's, which they leave as they are."""
    folder = story / "figures" / "mnist-mini"
    before = (folder / "figure2.png").read_bytes()
    given = {"runs": str(story / "runs"), "figures_folder": str(story / "figures"), "seed": 3}
    execute("08_umap", story, model="ProtoPNet", **TINY["08_umap"], **given)
    execute("09_interpretation", story, baseline=True, **TINY["09_interpretation"], **given)
    for name in ("figure1-protopnet.png", "figure2-protopnet.png"):
        assert (folder / name).stat().st_size > 5000
    assert (folder / "figure2.png").read_bytes() == before
    numbers = pd.read_csv(folder / "figure2-protopnet.csv")
    assert list(numbers.prototypes) == ["ProtoPNet", "KMEx (K/C=2)"]


@pytest.fixture(scope="module")
def passed(story):
    run = Run.of(story / "runs", "mnist-mini", 3)
    return Passed.of(run.network(), run.dataset(), 2)


@pytest.mark.notebook
def test_subset_study(story, passed):
    """Draws are the same share of every class; a row again with the draw and the distances written down."""
    records = pd.read_csv(story / "figures" / "mnist-mini" / "subset.csv")
    assert set(records.model) == {"KMEx", "B4"} and set(records.fraction) == {0.5, 1.0}
    assert (records.inertia[records.fraction == 0.5] > 1).all()
    assert records.accuracy.between(0, 100).all() and records.agreement.between(-1, 1).all()
    assert (records.images == 200 * records.fraction).all(), "of 20 images a class"
    labels, z = passed.labels["train"], passed.z("train")
    generator = torch.Generator().manual_seed(1000 * 3)
    members = [(labels == c).nonzero().flatten() for c in range(10)]
    index = torch.cat([of[torch.randperm(20, generator=generator)[:10]] for of in members]).sort().values
    assert torch.bincount(labels[index]).tolist() == [10] * 10
    whole = fit_kmex(z, labels, passed.classes, 2, seed=3, restarts=2)
    part = fit_kmex(z[index], labels[index], passed.classes, 2, seed=3 + 101, restarts=2)
    own = torch.arange(10).repeat_interleave(2)
    spread, partition = {}, {}
    for name, p in (("part", part.prototypes.vectors), ("whole", whole.prototypes.vectors)):
        distance = torch.cdist(z.double(), p.double())
        spread[name] = torch.where(own == labels[:, None], distance, torch.inf).amin(1).square().sum()
        partition[name] = distance.argmin(1)
    row = records.set_index(["model", "fraction"]).loc["KMEx", 0.5]
    assert row.inertia == pytest.approx(float(spread["part"] / spread["whole"]), rel=1e-3)
    assert row.agreement == pytest.approx(adjusted_rand_score(partition["whole"], partition["part"]), abs=1e-5)
    nearest = torch.cdist(passed.z("test").double(), part.prototypes.vectors.double()).argmin(1)
    assert row.accuracy == pytest.approx(accuracy(own[nearest], passed.labels["test"]), abs=1e-4)


@pytest.mark.notebook
def test_open_choices(story, passed):
    """Every reading for every start block, and the starts of the attribution compared."""
    ledger = pd.read_csv(story / "figures" / "mnist-mini" / "ledger.csv", keep_default_na=False)
    questions = {"default", "norm", "scale", "align_corners", "grid", "attribution start", "pairs"}
    assert set(ledger.question) == questions
    numbers = ledger.set_index(["question", "option", "model", "metric", "split"])["value"]
    assert not numbers.index.duplicated().any()
    index, explainers = passed.first_of_each_class(8), {}
    for question, option, normalisation in open_choices.READINGS:
        for b, model in ((4, "B4"), (3, "B34"), (2, "B234")):
            explainer = passed.fit_encoder(b, normalisation, 2, seed=3, restarts=2, index=index)
            explainers |= {b: explainer} if question == "default" else {}
            for metric, split, value in passed.accuracies(explainer):
                assert numbers[question, option, model, metric, split] == pytest.approx(value, abs=1e-3)
    network = Run.of(story / "runs", "mnist-mini", 3).network()
    x = passed.x["test"].read(torch.arange(5), 2)
    target = network.classifier(x[-1].mean((2, 3))).argmax(1)
    att, maps = attribution(x[-1], network.c[target]), {b: e.sim(e.h([x[0], *x])) for b, e in explainers.items()}
    ways = [carried(att, maps, start=start)[2] for start in ("segments", "raw")]
    pairs = [torch.stack([a.flatten(), b.flatten()]) for a, b in zip(*ways, strict=True)]
    expected = torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).nan_to_num(1.0).mean()
    assert numbers["attribution start", "raw", "B234", "map_correlation", "test"] == pytest.approx(
        float(expected), abs=1e-4
    )
    assert numbers["attribution start", "raw", "B4", "map_correlation", "test"] == 1, "one position at 32 pixels"
    assert (story / "figures" / "mnist-mini" / "ledger.png").stat().st_size > 5000


@pytest.mark.notebook
def test_depth(story, passed):
    """KMEx, each start block and scale with each K/C; one of them again."""
    depth = pd.read_csv(story / "figures" / "mnist-mini" / "depth.csv", keep_default_na=False)
    assert set(depth.prototypes_per_class) == {0, 1, 3} and depth.value.between(0, 100).all()
    numbers = depth.set_index(["model", "scale", "prototypes_per_class", "metric", "split"])["value"]
    assert not numbers.index.duplicated().any()
    models = {("KMEx", ""), ("CNN", ""), ("B4", "1/D"), ("B234", "1/D"), ("B234", "1")}
    assert {(model, scale) for model, scale, *_ in numbers.index} == models
    index = passed.first_of_each_class(8)
    alone = passed.fit_encoder(2, Normalisation(scale="1"), 3, seed=3, restarts=2, index=index)
    for metric, split, value in passed.accuracies(alone, ["test"]):
        assert numbers["B234", "1", 3, metric, split] == pytest.approx(value, abs=1e-3)
    assert (story / "figures" / "mnist-mini" / "depth.png").stat().st_size > 5000


def naive_deletion(network, x, att, steps):
    """Area under the probability of the predicted class of one image [1, 3, S, S], loop by loop."""
    with torch.no_grad():
        j = int(network(x).argmax())
        curve, share, image = [], [], x.clone()
        for k in range(steps + 1):
            for value in att.unique():
                if (att >= value).float().mean() * steps <= k + 1e-6:
                    image[0, :, att >= value] = x.mean((2, 3))[0, :, None]
            gone = (image != x).any(1)
            curve.append(float(network(image).softmax(1)[0, j]))
            share.append(float(gone.float().mean()))
    return np.trapezoid(curve, share)


@pytest.mark.notebook
def test_faithfulness(story, passed):
    """Every method by every measure, the null beside it; B234's deletion again, pixel by pixel."""
    folder = story / "figures" / "mnist-mini"
    table = pd.read_csv(folder / "faithfulness.csv").fillna({"scale": ""})
    columns = "method scale draw measure value spread null margin_spread seed grid images"
    assert list(table) == columns.split() and (table.images == 2).all()
    ours = {("B4", "1/D"), ("B34", "1/D"), ("B34", "1"), ("B234", "1/D"), ("B234", "1")}
    named = {"CAM", "Grad-CAM", "LayerCAM", "LayerCAM, block 2", "Integrated Gradients", "occlusion", "RISE"}
    named |= {"centre", "edges", "random pixels", "random cells"}
    first = table[(table.draw == 0) & ~table.measure.str.contains("Rand|Spearman|ties")]
    assert set(zip(first.method, first.scale, strict=True)) == ours | {(name, "") for name in named}
    measures = {"deletion, mean colour", "deletion, blur", "insertion, mean colour", "insertion, blur", "ROAD"}
    assert set(first.measure) == measures | {"exact deletion"} and len(first) == 16 * 6
    assert first[first.measure.isin(measures)].value.between(0, 1).all()
    assert set(table[table.draw == 1].method) == {"B4", "B34", "B234"}
    values = table[table.draw == 0].set_index(["method", "scale", "measure"])["value"]
    assert values["CAM", "", "ROAD"] == pytest.approx(values["Grad-CAM", "", "ROAD"], abs=0.05)
    assert values["B34", "1/D", "adjusted Rand, head"] == 1, "maps do not see the head"
    assert (folder / "faithfulness.png").stat().st_size > 5000

    run = Run.of(story / "runs", "mnist-mini", 3)
    drawn = torch.randperm(len(passed.labels["test"]), generator=torch.Generator().manual_seed(3))[:2].sort().values
    network, data = run.network(), run.dataset()
    x, h = data.input(data.test.pixels[drawn.numpy()]), passed.x["test"].read(drawn, 4)[0]
    options = {"seed": 3, "restarts": 1, "index": passed.first_of_each_class(8)}
    maps = {b: passed.map(passed.fit_encoder(b, Normalisation(), 2, **options), "test")[drawn] for b in (4, 3, 2)}
    att = carried(attribution(h, network.c[passed.y["test"][drawn].argmax(1)]), maps)[2]
    sized = att.repeat_interleave(8, 1).repeat_interleave(8, 2)
    expected = [naive_deletion(network, x[i : i + 1], sized[i], 3) for i in range(2)]
    assert values["B234", "1/D", "deletion, mean colour"] == pytest.approx(np.mean(expected), abs=1e-4)


@pytest.fixture(scope="module")
def passed_part(story):
    """The first eight images of each class, of either split."""
    run = Run.of(story / "runs", "mnist-mini", 3)
    images = data.reopen({**run.settings()["data"], "images_per_class": 8})
    assert len(images.train) == len(images.test) == 80
    return Passed.of(run.network(), images, 2)


@pytest.mark.notebook
def test_certainty(story, passed_part):
    """Refits by their seeds: partitions need no matching, classes none either."""
    table = pd.read_csv(story / "figures" / "mnist-mini" / "certainty.csv", keep_default_na=False)
    numbers = table.set_index(["model", "scale", "measure"])
    assert not numbers.index.duplicated().any() and len(numbers) == 3 * 8
    assert set(table.refits) == {2} and set(table.seed) == {3} and set(table.grid) == {"1x1", "4x4"}
    explainers = [passed_part.fit_encoder(2, Normalisation(), 2, seed=seed, restarts=1) for seed in (3, 4, 5)]
    maps = [passed_part.map(explainer, "test") for explainer in explainers]
    expected = {
        "adjusted_rand": [adjusted_rand_score(maps[0].flatten(), q_s.flatten()) for q_s in maps[1:]],
        "class": [float((q_s // 2 == maps[0] // 2).double().mean()) for q_s in maps[1:]],
    }
    for measure, values in expected.items():
        row = numbers.loc["B234", "1/D", measure]
        assert float(row.value) == pytest.approx(sum(values) / 2, abs=1e-5)
        assert float(row.spread) == pytest.approx(abs(values[0] - values[1]) / 2**0.5, abs=1e-5)
    prototype = numbers.xs("prototype", level="measure")[["value", "null", "random_rows"]].astype(float)
    assert (prototype.value > prototype.random_rows).all() and prototype.loc["B234"].eval("value > null").all()
    assert (numbers.xs("prototype_always", level="measure").value.astype(float) <= prototype.value).all()
    for name in ("certainty.png", "certainty-maps.png"):
        assert (story / "figures" / "mnist-mini" / name).stat().st_size > 5000


@pytest.mark.notebook
def test_concepts(story, passed_part):
    """Accuracy and coverage of each method from rows as they are, by scikit-learn, SciPy and NumPy."""
    table = pd.read_csv(story / "figures" / "mnist-mini" / "concepts.csv").set_index("method")
    assert list(table.index) == ["B4", "B234, 1", "random rows", "NMF", "PCA", "SLIC", "neurons"]
    assert "purity" not in table and table.loc["neurons"][["accuracy", "predicted_class"]].isna().all()
    for name, explainer in (("B4", (4, "1/D")), ("B234, 1", (2, "1"))):
        fitted = passed_part.fit_encoder(explainer[0], Normalisation(scale=explainer[1]), 2, seed=3, restarts=1)
        expected = {metric: value for metric, _, value in passed_part.accuracies(fitted, ["test"])}
        assert table.accuracy[name] == pytest.approx(expected["accuracy"], abs=1e-3)
    labels, everything = passed_part.labels, torch.arange(80)
    x = {split: passed_part.x[split].read(everything, 4)[0].flatten(1).double().numpy() for split in labels}
    of_class = [x["train"][(labels["train"] == c).numpy()] for c in range(10)]
    error = {name: np.empty((10, 80)) for name in ("random rows", "PCA", "NMF")}
    for c, rows in enumerate(of_class):
        drawn = torch.randperm(8, generator=torch.Generator().manual_seed(3 + 7919 * c))[:2].numpy()
        unit = [part / np.linalg.norm(part, axis=1, keepdims=True) for part in (x["test"], rows[drawn])]
        error["random rows"][c] = cdist(*unit).min(1)
        mean, (_, _, axes) = rows.mean(0), np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        apart = x["test"] - mean
        error["PCA"][c] = np.square(apart - apart @ axes[:2].T @ axes[:2]).sum(1)
        factors = NMF(2, max_iter=500, random_state=3).fit(rows.astype(np.float32)).components_
        error["NMF"][c] = [nnls(factors.T.astype(float), row)[1] for row in x["test"]]
    network = Run.of(story / "runs", "mnist-mini", 3).network()
    predicted = network.classifier(torch.from_numpy(x["test"]).float()).argmax(1).numpy()
    for name, of_rows in error.items():
        best = of_rows.argmin(0)
        assert table.accuracy[name] == pytest.approx(100 * (best == labels["test"].numpy()).mean(), abs=1.3)
        assert table.predicted_class[name] == pytest.approx(100 * (best == predicted).mean(), abs=1.3)
    assert table.loc[["NMF", "PCA", "neurons"], "agreement"].tolist() == pytest.approx([1, 1, 1])
    section5 = pd.read_csv(story / "figures" / "mnist-mini" / "section5.csv").set_index("claim")
    alive = x["test"][:, x["test"].std(0) > 0]
    r = np.corrcoef(alive, rowvar=False) - np.eye(alive.shape[1])
    assert section5.value["neurons are often redundant"] == pytest.approx(100 * (r.max(1) > 0.9).mean(), abs=0.5)
    assert section5.value["a single class leaves portions unexplained"] == pytest.approx(
        100 - table.predicted_class["NMF"], abs=1e-3
    )
    assert (story / "figures" / "mnist-mini" / "concepts.png").stat().st_size > 5000


@pytest.mark.notebook
def test_report(story):
    folder = story / "figures" / "report"
    page = (folder / "report.md").read_text()
    table = pd.read_csv(folder / "table2.csv").set_index(["model", "split"])
    train = results(story, "train")
    assert table["mean"]["CNN", "test"] == pytest.approx(train["CNN", "accuracy", "test"], abs=1e-3)
    assert table.outside.isna().all(), "one seed"
    assert f"{train['CNN', 'accuracy', 'test']:.1f}" in page and "seeds: [0, 1]" in page
    assert set(pd.read_csv(folder / "relations.csv").seeds) == {1}
    assert len(pd.read_csv(folder / "curves.csv")) == 2


@pytest.mark.notebook
def test_scaling(tmp_path):
    execute("11_scaling", tmp_path, figures_folder=str(tmp_path), **TINY["11_scaling"])
    fit = pd.read_csv(tmp_path / "scaling" / "fit.csv")
    columns = "case n_rows n_channels k restarts ours_s sklearn_s faiss_s sklearn_over_ours ours_mib sklearn_mib"
    assert list(fit)[:13] == [*columns.split(), "ours_inertia", "sklearn_inertia"]
    assert fit.case.tolist() == ["cub-class"] and fit.n_rows.tolist() == [2 * 784]
    assert fit.ours_inertia[0] == pytest.approx(fit.sklearn_inertia[0], rel=0.05)
    explain = pd.read_csv(tmp_path / "scaling" / "explain.csv").set_index("method")
    assert {"ours", "naive", "grad-cam", "integrated-gradients"} < set(explain.index)
    assert explain.over_forward["forward"] == 1
    stream = pd.read_csv(tmp_path / "scaling" / "stream.csv")
    assert stream.n_rows.tolist() == [3 * 784]


@pytest.mark.notebook
def test_own_images_through_the_same_notebooks(folder, tmp_path):
    given = {"dataset": "my-birds", "runs": str(tmp_path / "runs")}
    small = {"image_size": 32, "arch": "mobilenet_v2", "weights": "scratch", "epochs": 1, "batch_size": 6}
    execute("01_train", tmp_path, folder=str(folder), data=str(tmp_path), **small, **given)
    execute("02_cnn_as_sem", tmp_path, **given)
    execute("03_kmex", tmp_path, prototypes_per_class=[1, 2], **given)
    assert (tmp_path / "runs" / "my-birds" / "seed-0" / "KMEx-2.safetensors").exists()


@pytest.mark.notebook
def test_your_own_model_on_notebook_1s_data(story):
    run = story / "runs" / "mnist-mini" / "seed-3"
    execute("12_your_own_model", story, model=str(run), out=str(story / "own"), restarts=1, prototypes_per_class=2)
    table = pd.read_csv(story / "own" / "table.csv").set_index("model")
    train, encoder = results(story, "train"), results(story, "encoder")
    columns = {"train": "accuracy, images of the prototypes (%)", "test": "accuracy, held out (%)"}
    for split, column in columns.items():
        assert table.loc["CNN", column] == pytest.approx(train["CNN", "accuracy", split])
        assert abs(table.loc["B4", column] - encoder["B4", "accuracy", split]) < 15  # another restart of k-means
    assert 20_000 < (story / "own" / "report.html").stat().st_size < 5_000_000
    assert 20_000 < (story / "own" / "page.html").stat().st_size < 20_000_000


@pytest.mark.notebook
def test_a_run_is_a_saved_explanation(story, tmp_path):
    """What notebooks 1, 3 and 4 left explains an image in a process that knows nothing of them."""
    folder = story / "runs" / "mnist-mini" / "seed-3"
    images = Run.at(folder).dataset()
    explained = kmex.load(folder)
    assert set(explained.kmex) == {1, 5} and explained.start_blocks == [4, 3, 2]
    explainer = explained.explainers[2]
    y = explainer.proj(Passed.of(explained.network, images, 2).map(explainer, "test")[:10])
    predicted = [explained.interpretations(images.test.rgb(i), [2])[0].predicted for i in range(10)]
    assert predicted == [images.classes[c] for c in y.argmax(1)]


@pytest.mark.notebook
def test_your_own_model_by_name_on_a_folder(folder, tmp_path):
    given = {"model": "resnet18", "weights": "random", "image_size": 32, "prototypes_per_class": 2, "restarts": 1}
    given |= {"mean": [0.5, 0.5, 0.5], "std": [1, 1, 1]}
    executed = through_papermill("12_your_own_model", tmp_path, folder=str(folder), out=str(tmp_path / "own"), **given)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in outputs)
    still = [output for output in outputs if "kmex-still" in output.get("data", {}).get("text/html", "")]
    assert len(still) == 1, "a still view stands in where widgets cannot run"
    assert "mean (0.5, 0.5, 0.5), std (1.0, 1.0, 1.0)" in str(outputs)
    with pytest.raises(papermill.PapermillExecutionError, match="give folder, the images to explain resnet18 on"):
        through_papermill("12_your_own_model", tmp_path, model="resnet18")
    assert (tmp_path / "own" / "B234.safetensors").exists() and (tmp_path / "own" / "report.html").exists()


@pytest.mark.notebook
@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("01_train", {"epoch": 2}, "unknown parameter 'epoch': did you mean 'epochs'"),
        ("01_train", {"dataset": "cifar"}, "unknown dataset 'cifar'"),
        ("03_kmex", {"seed": 77}, "run notebook 01_train with dataset=mnist-mini and seed=77"),
        ("03_kmex", {"seed": 3, "prototypes_per_class": [21]}, "fewer than K/C = 21"),
        ("05_protopnet", {"seed": 3, "prototype_size": 2}, "does not fit the 1 x 1 grid of 32-pixel images"),
        ("05_protopnet", {"seed": 3, "prototypes_per_class": 21}, "fewer than K/C = 21"),
        ("05_protopnet", {"seed": 3, "box": "cell"}, "box must be one of patch, activation"),
        ("05_protopnet", {"seed": 78}, "run notebook 01_train with dataset=mnist-mini and seed=78"),
        ("08_umap", {"seed": 3, "group": "0,1", "images_per_class": 2}, "at least 6 training embeddings, got 4"),
        ("09_interpretation", {"seed": 3, "image": 10**6}, "image must be an index of the"),
        ("09_interpretation", {"seed": 3, "target": "ten"}, "target must be a class of resnet18, got 'ten'"),
        ("10_subset", {"seeds": [3], "fractions": [0.0, 1.0]}, "fractions must lie in"),
        ("10_subset", {"seeds": [3], "fractions": []}, "parameter fractions must not be empty"),
        ("10_subset", {"seeds": [3], "draws": 0}, "draws must be at least 1"),
        ("10_subset", {"seeds": [3], "start_blocks": [5]}, "there is no block 5"),
        ("18_concepts", {"seeds": [3], "fit_on": 8, "annotations": "parts.csv"}, "annotations belong to a folder"),
        ("19_certainty", {"seeds": [3], "refits": 1}, "refits must be at least 2"),
        (
            "19_certainty",
            {"seeds": [3], "start_blocks": [3, 2]},
            "start_blocks must hold 4, to compare the others with",
        ),
        ("16_fidelity", {"seeds": [3], "start_blocks": [5], "dataset": "mnist-mini"}, "there is no block 5"),
        (
            "16_fidelity",
            {"seeds": [3], "start_blocks": [], "dataset": "mnist-mini"},
            "start_blocks must not be empty, as in [4, 3, 2]",
        ),
        ("14_depth", {"seeds": [3], "fit_on": 8, "prototypes_per_class": [9]}, "8 images), fewer than K/C = 9"),
    ],
)
def test_bad_input_is_one_clear_line(name, parameters, message, story, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        execute(name, tmp_path, runs=str(story / "runs"), **parameters)
    assert "\n" not in str(error.value)
