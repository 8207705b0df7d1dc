"""One rule per notebook, over data sets and seeds. Started by `kmex batch CONFIG`."""

import json
import os
import shlex
import sys
from pathlib import Path

from kmex_utils.paper.batch import TAKES, sources, to_html

if not config:
    raise WorkflowError("name a configuration: --configfile config/quick.yaml, or kmex batch CONFIG")

BASE = Path(workflow.basedir)
RUNS = os.environ.get("KMEX_RUNS", "runs")
FIGURES = os.environ.get("KMEX_FIGURES", "figures")
DATASETS = config["datasets"]
SEEDS = config["seeds"]
REPORT = config.get("report", "report")  # folder of notebook 15's page beside the figures
STUDIES = config.get("studies", [])  # folders beside the figures whose fidelity and section 5 the report carries too
CONFIG = str(workflow.configfiles[-1])
GPU = config.get("gpu", 1)  # that a notebook asks of a scheduler, where it can use one

RUN = f"{RUNS}/{{dataset}}/seed-{{seed}}"  # one training
DATA = f"{RUNS}/{{dataset}}"  # what is drawn from all of a data set's trainings
TABLES = f"{FIGURES}/{{dataset}}"
PER_SEED = ["01_train", "02_cnn_as_sem", "03_kmex", "04_encoder", "05_protopnet"]
TRAININGS = ["01_train", "05_protopnet"]
STAGES = ["train", "sem", "kmex", "encoder", "protopnet"]
PER_DATASET = ["06_alignment", "07_accuracy", "08_umap", "09_interpretation", "17_faithfulness", "19_certainty"]
WITH_PARTS = [name for name, chosen in DATASETS.items() if name == "cub200" or (chosen or {}).get("annotations")]


wildcard_constraints:
    dataset="[^/]+",
    seed="[0-9]+",
    shard="[0-9]+",
    shards="[0-9]+",


def code(notebook, *started):
    """A notebook, what it starts, and what both import; numbers without ``drawing``, trainings without ``paper/`` too.

    ``started`` are files that only a call runs: a script, a view that is imported when it is drawn.
    """
    without = {"drawing", "paper"} if notebook in TRAININGS else {"drawing"} if notebook in PER_SEED else ()
    return sorted(set().union(*(sources(BASE / file, without) for file in (f"notebooks/{notebook}.py", *started))))


def given(notebook, **values):
    """Parameters of a notebook as JSON: the rule's and the configuration's."""

    def of(wildcards):
        named = {name: value(wildcards) if callable(value) else value for name, value in values.items()}
        chosen = DATASETS[wildcards.dataset] or {}
        chosen = {name: chosen[name] for name in TAKES[notebook] if name in chosen}
        parameters = {"dataset": wildcards.dataset, **chosen, **named, "runs": RUNS}
        return json.dumps(parameters)

    return of


def seed(wildcards):
    return int(wildcards.seed)


def seeds_of(dataset):
    """A data set's own seeds, or the configuration's."""
    return (DATASETS[dataset] or {}).get("seeds", SEEDS)


def seeds(wildcards):
    return seeds_of(wildcards.dataset)


def first_seed(wildcards):
    return seeds(wildcards)[0]


def of_seeds(pattern, **more):
    """The pattern for every seed of the data set at hand."""
    return lambda wildcards: expand(pattern, dataset=wildcards.dataset, seed=seeds(wildcards), **more)


def of_first_seed(pattern):
    return lambda wildcards: pattern.format(dataset=wildcards.dataset, seed=first_seed(wildcards))


def pages(runs, notebooks):
    """The HTML of executed notebooks in a folder."""
    return [f"{runs}/notebooks/{notebook}.html" for notebook in notebooks]


def quoted(*words):
    """Words for a shell, in a string that Snakemake formats."""
    return shlex.join(map(str, words)).replace("{", "{{").replace("}", "}}")


def execute(notebook):
    """The command of a rule, whose parameter ``given`` and log it takes."""
    run = quoted(sys.executable, "-m", "kmex_utils.paper.process", "notebook", BASE / "notebooks" / f"{notebook}.ipynb")
    return f"exec {run} {{log:q}} {{params.given:q}} {quoted(RUNS)}"


def shards(wildcards, stage):
    """What the shards of notebook 4 leave, where a data set has more than one."""
    count = (DATASETS[wildcards.dataset] or {}).get("shards", 1)
    names = [f"{RUN}/shards/{stage}-{number}-of-{count}.safetensors" for number in range(1, count + 1)]
    return [name.format(**wildcards) for name in names] if count > 1 else []


def shard(stage):
    """The command of a shard, whose parameter ``given`` and log it takes."""
    run = quoted(sys.executable, "-m", "kmex_utils.paper.process", "shard", stage)
    return f"exec {run} {{wildcards.shard}} {{log:q}} {{params.given:q}} {quoted(RUNS)}"


rule all:
    input:
        expand(pages(DATA, PER_DATASET), dataset=DATASETS),
        [expand(pages(RUN, PER_SEED), dataset=d, seed=seeds_of(d)) for d in DATASETS],


rule train:
    """01: the network, its embeddings and accuracy."""
    input:
        code=code("01_train"),
    output:
        f"{RUN}/network.json",
        f"{RUN}/weights.safetensors",
        f"{RUN}/training.json",
        f"{RUN}/embeddings.safetensors",
        f"{RUN}/results-train.json",
    params:
        given=given("01_train", seed=seed, threads=config["threads"]),
    log:
        f"{RUN}/notebooks/01_train.ipynb",
    benchmark:
        f"{RUN}/cost/01_train.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("01_train")


rule cnn_as_sem:
    """02: Theorem 1."""
    input:
        f"{RUN}/training.json",
        code=code("02_cnn_as_sem"),
    output:
        f"{RUN}/results-sem.json",
    params:
        given=given("02_cnn_as_sem", seed=seed),
    log:
        f"{RUN}/notebooks/02_cnn_as_sem.ipynb",
    benchmark:
        f"{RUN}/cost/02_cnn_as_sem.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("02_cnn_as_sem")


rule kmex:
    """03: class-wise k-means on z."""
    input:
        f"{RUN}/embeddings.safetensors",
        f"{RUN}/results-train.json",
        code=code("03_kmex"),
    output:
        f"{RUN}/results-kmex.json",
    params:
        given=given("03_kmex", seed=seed),
    log:
        f"{RUN}/notebooks/03_kmex.ipynb",
    benchmark:
        f"{RUN}/cost/03_kmex.tsv"
    threads: config["threads"]
    shell:
        execute("03_kmex")


rule shard_fit:
    """04 in shards: class-wise k-means of some of the classes."""
    input:
        f"{RUN}/training.json",
        code=code("04_encoder"),
    output:
        f"{RUN}/shards/fit-{{shard}}-of-{{shards}}.safetensors",
    params:
        given=given("04_encoder", seed=seed, threads=config["threads"]),
    log:
        f"{RUN}/shards/fit-{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/cost/shards/fit-{{shard}}-of-{{shards}}.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        shard("fit")


rule shard_maps:
    """04 in shards: maps of some of the images, by the prototypes of all classes."""
    input:
        lambda wildcards: shards(wildcards, "fit"),
        code=code("04_encoder"),
    output:
        f"{RUN}/shards/maps-{{shard}}-of-{{shards}}.safetensors",
    params:
        given=given("04_encoder", seed=seed, threads=config["threads"]),
    log:
        f"{RUN}/shards/maps-{{shard}}-of-{{shards}}.log",
    benchmark:
        f"{RUN}/cost/shards/maps-{{shard}}-of-{{shards}}.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        shard("maps")


rule encoder:
    """04: class-wise k-means on the composite, from each start block; with shards, what they have made."""
    input:
        f"{RUN}/training.json",
        f"{RUN}/results-train.json",
        lambda wildcards: shards(wildcards, "fit") + shards(wildcards, "maps"),
        code=code("04_encoder"),
    output:
        f"{RUN}/results-encoder.json",
    params:
        given=given("04_encoder", seed=seed, threads=config["threads"]),
    log:
        f"{RUN}/notebooks/04_encoder.ipynb",
    benchmark:
        f"{RUN}/cost/04_encoder.tsv"
    resources:
        gpu=lambda wildcards: 0 if shards(wildcards, "fit") else GPU,
    threads: config["threads"]
    shell:
        execute("04_encoder")


rule protopnet:
    """05: the baseline, trained."""
    input:
        f"{RUN}/training.json",
        f"{RUN}/results-train.json",
        code=code("05_protopnet"),
    output:
        f"{RUN}/results-protopnet.json",
    params:
        given=given("05_protopnet", seed=seed, threads=config["threads"]),
    log:
        f"{RUN}/notebooks/05_protopnet.ipynb",
    benchmark:
        f"{RUN}/cost/05_protopnet.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("05_protopnet")


rule alignment:
    """06: Table 1."""
    input:
        of_seeds(f"{RUN}/results-{{stage}}.json", stage=["kmex", "protopnet"]),
        code=code("06_alignment"),
    output:
        f"{TABLES}/table1.csv",
        f"{TABLES}/table1.md",
    params:
        given=given("06_alignment", seeds=seeds, figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/06_alignment.ipynb",
    benchmark:
        f"{DATA}/cost/06_alignment.tsv"
    threads: config["threads"]
    shell:
        execute("06_alignment")


rule accuracy:
    """07: Table 2."""
    input:
        of_seeds(f"{RUN}/results-{{stage}}.json", stage=STAGES),
        code=code("07_accuracy"),
    output:
        f"{TABLES}/table2.csv",
        f"{TABLES}/table2.md",
    params:
        given=given("07_accuracy", seeds=seeds, figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/07_accuracy.ipynb",
    benchmark:
        f"{DATA}/cost/07_accuracy.tsv"
    threads: config["threads"]
    shell:
        execute("07_accuracy")


rule umap:
    """08: Figure 2, of the first seed."""
    input:
        of_first_seed(f"{RUN}/results-kmex.json"),
        code=code("08_umap"),
    output:
        f"{TABLES}/figure2.png",
        f"{TABLES}/figure2.pdf",
        f"{TABLES}/figure2.csv",
    params:
        given=given("08_umap", seed=first_seed, figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/08_umap.ipynb",
    benchmark:
        f"{DATA}/cost/08_umap.tsv"
    threads: config["threads"]
    shell:
        execute("08_umap")


rule interpretation:
    """09: Figure 1, of the first seed."""
    input:
        of_first_seed(f"{RUN}/results-encoder.json"),
        code=code("09_interpretation", "kmex_utils/explanation/figure1.py"),
    output:
        f"{TABLES}/figure1.png",
        f"{TABLES}/figure1.pdf",
    params:
        given=given("09_interpretation", seed=first_seed, threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/09_interpretation.ipynb",
    benchmark:
        f"{DATA}/cost/09_interpretation.tsv"
    threads: config["threads"]
    shell:
        execute("09_interpretation")


rule faithfulness:
    """17: whether the attribution points at what the network uses, of the first seed."""
    input:
        of_first_seed(f"{RUN}/training.json"),
        code=code("17_faithfulness"),
    output:
        f"{TABLES}/faithfulness.csv",
        f"{TABLES}/faithfulness.png",
        f"{TABLES}/faithfulness.pdf",
    params:
        given=given("17_faithfulness", seeds=lambda wildcards: [first_seed(wildcards)], threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/17_faithfulness.ipynb",
    benchmark:
        f"{DATA}/cost/17_faithfulness.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("17_faithfulness")


rule certainty:
    """19: how sure a map is, over refits."""
    input:
        of_seeds(f"{RUN}/training.json"),
        code=code("19_certainty"),
    output:
        f"{TABLES}/certainty.csv",
        f"{TABLES}/certainty.png",
        f"{TABLES}/certainty.pdf",
    params:
        given=given("19_certainty", seeds=seeds, threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/19_certainty.ipynb",
    benchmark:
        f"{DATA}/cost/19_certainty.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("19_certainty")


rule fidelity:
    """16: fidelity to parts against accuracy, where a data set has parts; asked for by `extras`."""
    input:
        of_seeds(f"{RUN}/results-protopnet.json"),
        code=code("16_fidelity"),
    output:
        f"{TABLES}/fidelity.csv",
        f"{TABLES}/frontier.png",
        f"{TABLES}/frontier.pdf",
    params:
        given=given("16_fidelity", seeds=seeds, threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/16_fidelity.ipynb",
    benchmark:
        f"{DATA}/cost/16_fidelity.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("16_fidelity")


rule concepts:
    """18: beside other ways to get concepts; asked for by `extras`."""
    input:
        of_seeds(f"{RUN}/training.json"),
        code=code("18_concepts"),
    output:
        f"{TABLES}/concepts.csv",
        f"{TABLES}/concepts.png",
        f"{TABLES}/concepts.pdf",
    params:
        given=given("18_concepts", seeds=seeds, threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/18_concepts.ipynb",
    benchmark:
        f"{DATA}/cost/18_concepts.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("18_concepts")


rule subset:
    """10: how many images the prototypes need; asked for by `extras`."""
    input:
        of_seeds(f"{RUN}/training.json"),
        code=code("10_subset"),
    output:
        f"{TABLES}/subset.csv",
        f"{TABLES}/subset.png",
        f"{TABLES}/subset.pdf",
    params:
        given=given("10_subset", seeds=seeds, threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/10_subset.ipynb",
    benchmark:
        f"{DATA}/cost/10_subset.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("10_subset")


rule open_choices:
    """13: each reading the paper leaves open, alone; asked for by `extras`."""
    input:
        of_seeds(f"{RUN}/results-kmex.json"),
        code=code("13_open_choices"),
    output:
        f"{TABLES}/ledger.csv",
        f"{TABLES}/ledger.png",
        f"{TABLES}/ledger.pdf",
    params:
        given=given("13_open_choices", seeds=seeds, threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/13_open_choices.ipynb",
    benchmark:
        f"{DATA}/cost/13_open_choices.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("13_open_choices")


rule depth:
    """14: accuracy against start block and K/C; asked for by `extras`."""
    input:
        of_seeds(f"{RUN}/training.json"),
        code=code("14_depth"),
    output:
        f"{TABLES}/depth.csv",
        f"{TABLES}/depth.png",
        f"{TABLES}/depth.pdf",
    params:
        given=given("14_depth", seeds=seeds, threads=config["threads"], figures_folder=FIGURES),
    log:
        f"{DATA}/notebooks/14_depth.ipynb",
    benchmark:
        f"{DATA}/cost/14_depth.tsv"
    resources:
        gpu=GPU,
    threads: config["threads"]
    shell:
        execute("14_depth")


rule report:
    """15: paper and ours over all data sets; asked for by `extras`."""
    input:
        expand(f"{TABLES}/{{product}}", dataset=DATASETS, product=["table1.csv", "table2.csv", "figure1.png", "figure2.png", "ledger.csv", "depth.csv", "concepts.csv"]),
        expand(f"{TABLES}/fidelity.csv", dataset=WITH_PARTS),
        code=code("15_report"),
    output:
        f"{FIGURES}/{REPORT}/report.md",
    params:
        given=lambda wildcards: json.dumps({"datasets": list(DATASETS), "config": CONFIG, "name": REPORT, "studies": STUDIES, "runs": RUNS, "figures_folder": FIGURES}),
    log:
        f"{RUNS}/{REPORT}/notebooks/15_report.ipynb",
    shell:
        execute("15_report")


rule scaling:
    """11: what it costs on this machine, which it wants for itself; asked for by its name."""
    input:
        code=code("11_scaling", "benchmarks/scaling.py"),
    output:
        f"{FIGURES}/scaling/fit.csv",
        f"{FIGURES}/scaling/explain.csv",
        f"{FIGURES}/scaling/stream.csv",
    params:
        given=lambda wildcards: json.dumps({"figures_folder": FIGURES}),
    log:
        f"{RUNS}/scaling/notebooks/11_scaling.ipynb",
    resources:
        gpu=GPU,
    threads: os.cpu_count()
    shell:
        execute("11_scaling")


rule extras:
    """What goes beyond the paper: subsets, open choices, depth, fidelity, concepts and the report."""
    input:
        f"{FIGURES}/{REPORT}/report.md",
        expand(f"{TABLES}/{{study}}.csv", dataset=DATASETS, study=["subset", "ledger", "depth", "concepts"]),
        expand(f"{TABLES}/fidelity.csv", dataset=WITH_PARTS),


rule html_of_run:
    """Every executed notebook of a training as a page."""
    input:
        expand(f"{RUN}/results-{{stage}}.json", stage=STAGES, allow_missing=True),
    output:
        pages(RUN, PER_SEED),
    params:
        executed=lambda wildcards, output: [str(Path(page).with_suffix(".ipynb")) for page in output],
    shell:
        f"{quoted(*to_html())} {{params.executed:q}}"


rule html_of_data:
    """Every executed notebook over a data set's trainings as a page."""
    input:
        expand(f"{TABLES}/{{product}}", product=["table1.csv", "table2.csv", "figure1.png", "figure2.png", "faithfulness.csv", "certainty.csv"], allow_missing=True),
    output:
        pages(DATA, PER_DATASET),
    params:
        executed=lambda wildcards, output: [str(Path(page).with_suffix(".ipynb")) for page in output],
    shell:
        f"{quoted(*to_html())} {{params.executed:q}}"
