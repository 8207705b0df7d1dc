"""Run every notebook over data sets and seeds: ``kmex batch config/quick.yaml``.

Snakemake does the work (``Snakefile``); this adds what a long run needs around it: a configuration that is checked
before anything runs, only one run at a time in a folder of results, no clean-up after a kill, a last line that names
the notebook and the cell that failed, and in the end the tables beside those committed.
"""

import ast
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

import pandas as pd

from .. import parameters, paths, store
from .process import DONE, LOCK, interruptible, on_a_cluster, quiet

MEASURES = {"accuracy": "accuracy", "cos_class": "cosine to class", "cos_out": "cosine to others"}
ELSEWHERE = (  # seen with ONEDNN_MAX_CPU_ISA=AVX and ATEN_CPU_CAPABILITY=default beside AVX2, seed 0
    "Another chip rounds otherwise, and training from scratch amplifies it: with other instructions a seed moved by up "
    "to 1.5 points and 0.02 in cosines, about as much as the next seed does."
)
ENDING = 10.0  # seconds that processes of a killed run may take to end
CANCEL = 60.0  # and Snakemake, to cancel what it has submitted
NESTED = 10  # levels of a configuration
KEYS = {"datasets", "seeds", "threads", "report", "studies", "gpu"}  # of a configuration
TAKES = {  # parameters a data set's entry in the configuration may set, beside those the rules give
    "01_train": ["folder", "classes", "crop", "images_per_class", "validation", "held_out", "stream", "image_size",
                 "flip", "padding", "arch", "arch_args", "weights", "bias", "epochs", "batch_size", "learning_rate",
                 "momentum", "precision", "device", "data"],
    "02_cnn_as_sem": ["device"],
    "03_kmex": ["restarts"],
    "04_encoder": ["start_blocks", "prototypes_per_class", "norm", "scale", "align_corners", "grid", "restarts",
                   "store", "shards", "device"],
    "05_protopnet": ["features_from", "prototypes_per_class", "prototype_depth", "prototype_size", "warm_epochs",
                     "joint_epochs", "push_start", "push_every", "last_passes", "batch_size", "features_rate",
                     "add_on_rate", "prototypes_rate", "last_rate", "weight_decay", "rate_step", "rate_factor",
                     "cross_entropy", "cluster", "separation", "l1", "epsilon", "wrong_class", "frozen_features",
                     "affine", "embedding", "restarts", "precision", "device"],
    "06_alignment": [],
    "07_accuracy": [],
    "08_umap": ["group"],
    "09_interpretation": ["image", "target", "attribution_start", "closer", "device"],
    "10_subset": ["fractions", "draws", "restarts", "device"],
    "13_open_choices": ["fit_on", "others", "device"],
    "14_depth": ["fit_on", "device"],
    "16_fidelity": ["annotations", "fit_on", "device"],
    "17_faithfulness": ["annotations", "images", "steps", "rise_masks", "device"],
    "18_concepts": ["annotations", "device"],
    "19_certainty": ["device"],
}  # fmt: skip


def configuration(path: Path) -> dict[str, Any]:
    """A batch's data sets, each with the parameters of its notebooks, seeds and threads; read from YAML.

    Raises
    ------
    ValueError
        One line: it is not that, a name is no name, or a parameter is unknown or of another type.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        depth = 0
        for event in yaml.parse(text):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > NESTED:
                raise ValueError(f"{path} has aliases (*name) or more than {NESTED} levels: write the values out")
        config = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    config = config if isinstance(config, dict) else {}
    if not isinstance(config.get("datasets"), dict) or not config["datasets"]:
        raise ValueError("the configuration needs `datasets`, each a name with its parameters, at least one")
    if unknown := set(config) - KEYS:
        raise ValueError(f"unknown in the configuration: {_unknown(unknown, KEYS)}")
    _seeds(config.get("seeds"), "the configuration needs")
    if type(config.get("threads")) is not int or config["threads"] < 1:
        raise ValueError("the configuration needs `threads`, the CPU threads of one notebook, as `threads: 1`")
    parameters.whole(gpu=config.get("gpu", 1))
    paths.folder_name(config.get("report", "report"), "report")
    parameters.typed("studies", "list[str]", config.get("studies", []))
    takes = {name: parameters.declared((paths.ROOT / "notebooks" / f"{name}.py").read_text("utf-8")) for name in TAKES}
    for name, chosen in config["datasets"].items():
        paths.folder_name(name)
        if not isinstance(chosen or {}, dict):
            raise ValueError(f"what is given for {name} must be parameters and their values, got {chosen!r}")
        known = {parameter for names in TAKES.values() for parameter in names}
        parameters.whole(1, shards=(chosen or {}).get("shards", 1))
        for parameter, value in (chosen or {}).items():
            if parameter == "seeds":
                _seeds(value, f"{name} needs")
            elif parameter not in known:
                raise ValueError(f"no notebook takes {_unknown([parameter], known)} (given for {name})")
            for notebook in (notebook for notebook in TAKES if parameter in TAKES[notebook]):
                try:
                    parameters.typed(parameter, takes[notebook][parameter], value)
                except ValueError as error:
                    raise ValueError(f"{str(error).partition(';')[0]} (given for {name})") from None
    return config


def _seeds(seeds: Any, who: str) -> None:
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise ValueError(f"{who} `seeds`, a list of at least one whole number, as `seeds: [0, 1]`")


def _unknown(names: Collection[Any], known: Collection[str]) -> str:
    """Names, and what they may have meant."""
    close = [match for name in names for match in get_close_matches(str(name), known, n=1)]
    return ", ".join(map(str, names)) + (f"; did you mean {', '.join(close)}?" if close else "")


def run(config: Path, runs: Path, figures: Path, options: list[str]) -> int:
    """Run the Snakefile, alone in ``runs``; continues what a killed run left. ``options`` are Snakemake's."""
    datasets = configuration(config)["datasets"]
    for folder, option in ((runs, "--runs"), (figures, "--figures")):
        _writable(folder, option)
    tables = {name: [figures / name / f"table{i}.csv" for i in (1, 2)] for name in datasets}
    before = {path: path.read_bytes() for pair in tables.values() for path in pair if path.is_file()}
    try:
        lock = store.lock(runs / LOCK, seconds=ENDING)
        for folder in (runs, figures):
            store.clean(folder)
        store.relock(lock, shared=True)  # by all that write, until the last of them has ended
    except BlockingIOError:
        print(f"another run is at work in {runs}: wait for it to end, or stop it first", file=sys.stderr)
        return 2
    start = time.time()
    dry = any(option.startswith(("-n", "--dry")) for option in options)
    # names as they are, which Snakemake's --config takes for numbers; a line per epoch in a log, not one per step
    environment = {"KMEX_RUNS": _short(runs), "KMEX_FIGURES": _short(figures), "TQDM_DISABLE": "1", "PYTHONUTF8": "1"}
    with lock:
        process = subprocess.Popen(
            command(config, options),
            stdin=subprocess.PIPE,  # see process
            process_group=0,
            pass_fds=[lock.fileno()],
            cwd=paths.ROOT,
            env={**os.environ, **environment},
        )
        try:
            status = interruptible(process.wait)
        except SystemExit as end:
            signal_name = signal.Signals(int(end.code or 0) - 128).name
            print(f"stopped ({signal_name}): what is finished is kept, the same command goes on", file=sys.stderr)
            return int(end.code or 0)
        finally:
            if on_a_cluster(options) and process.poll() is None:
                process.send_signal(signal.SIGINT)  # which makes Snakemake take its jobs from the scheduler
                with suppress(subprocess.TimeoutExpired):
                    process.wait(CANCEL)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if not status and not dry:
        _forget(runs, figures, datasets)
    for line in failures(runs, start) if status else () if dry else outcome(runs, tables, before):
        print(line, file=sys.stderr if status else sys.stdout)
    return status


def _writable(folder: Path, option: str) -> None:
    """Refuse a folder that cannot be written to, before anything is computed."""
    if re.search(r"[{}\x00-\x1f\x7f]", str(folder)):
        raise ValueError(f"{str(folder)!r} has braces or control characters: choose another folder as {option}")
    try:
        store.writable(folder)
    except ValueError as error:
        raise ValueError(f"{error} as {option}") from None
    folder.mkdir(parents=True, exist_ok=True)


def command(config: Path, options: list[str]) -> list[str]:
    """The command that starts Snakemake; ``options`` of its own go first."""
    here = not on_a_cluster(options)
    if here and not any(option.startswith(("--cores", "-c", "-j", "--jobs")) for option in options):
        options = [*options, "--cores", "all"]
    lent = any(option.startswith(("--resources", "--res")) for option in options)
    if here and shutil.which("nvidia-smi") and not lent:
        options = [*options, "--resources", "gpu=1"]  # notebooks share one GPU in turn, not its memory
    always = ["--snakefile", str(paths.ROOT / "Snakefile"), "--configfile", str(config)]
    always += ["--directory", str(paths.ROOT), "--nolock", "--rerun-incomplete", "--quiet", "host"]
    if quiet(options):
        always += ["rules", "progress"]  # each notebook says when it starts and ends
    return [sys.executable, "-m", "kmex_utils.paper.process", "workflow", *options, *always]


def _forget(runs: Path, figures: Path, datasets: Collection[str]) -> None:
    """Remove the states of trainings whose results Snakemake knows to be finished."""
    for name in datasets:
        for state in (runs / name).glob("seed-*/training*.safetensors"):
            stage = state.stem.removeprefix("training").removeprefix("-") or "train"
            result = state.with_name(f"results-{stage}.json")
            if stage == "closer":
                result = figures / name / "figure1-closer.png"
            if result.is_file() and result.stat().st_mtime_ns >= state.stat().st_mtime_ns:
                state.unlink()


def _short(path: Path) -> str:
    """Relative to the repository's root where possible, so that results do not name this machine."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def to_html() -> list[str]:
    """The command that makes a page of each executed notebook given to it, with MathJax in it: it needs no network."""
    carried = find_spec("sphinx-mathjax-offline")  # a package of MathJax's files
    if carried is None or carried.origin is None:
        raise ModuleNotFoundError("pages of notebooks need pip install sphinx-mathjax-offline")
    template = Path(__file__).with_name("notebook.html.j2")
    mathjax = Path(carried.origin).parent / "static" / "mathjax"
    command = [sys.executable, "-m", "nbconvert", "--to", "html", "--log-level", "ERROR"]
    return [*command, "--template-file", str(template), f"--HTMLExporter.extra_template_paths={mathjax}"]


def sources(file: Path, without: Collection[str] = ()) -> set[Path]:
    """A file's source and the modules of this package that run when it is imported.

    What a function imports when it is called is left out: a view that an explanation can draw is no part of a training.
    So are rooms of the package of the names ``without``, and what only they import.
    """
    seen, left = set[Path](), {file}
    while left:
        seen.add(file := left.pop())
        left |= {of for room, files in _imported(file) if room not in without for of in files} - seen
    return seen


@cache
def _imported(file: Path) -> list[tuple[str, list[Path]]]:
    """The package's files that a file imports as it is read, by room: a module's own and its packages'."""
    found = []
    package = ".".join(file.parent.relative_to(paths.ROOT).parts)
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        base = ""
        if isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) + "."
        for parts in ((base + alias.name).split(".") for alias in node.names):
            if parts[0] == "kmex_utils":
                modules = [paths.ROOT.joinpath(*parts[:n]) for n in range(2, len(parts) + 1)]
                files = [of for module in modules for of in (module.with_suffix(".py"), module / "__init__.py")]
                found.append(("".join(parts[1:2]), [of for of in files if of.is_file()]))
    return found


def failures(runs: Path, since: float = 0.0) -> Iterator[str]:
    """One line for each notebook executed ``since`` (seconds of the epoch) that did not end well: the cell and why."""
    for notebook in sorted(runs.glob("**/notebooks/*.ipynb")):
        if notebook.stat().st_mtime < since:
            continue
        try:
            content = json.loads(notebook.read_text(encoding="utf-8"))
            cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
        except (OSError, ValueError, KeyError):
            yield f"FAILED {notebook}: it was not written whole; is the disk full?"
            continue
        errors = [(cell, output) for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
        for cell, output in errors:
            yield f"FAILED {notebook}, cell [{cell['execution_count']}]: {output['ename']}: {output['evalue']}"
        states = [cell["metadata"].get("papermill", {}).get("status") for cell in cells]
        if not errors and {"pending", "running"} & set(states):
            ran = len(states) - states.count("pending")
            yield f"FAILED {notebook}, cell [{ran}]: it was ended from outside: run again"
    for log in sorted(runs.glob("**/shards/*.log")):
        lines = log.read_text(encoding="utf-8").splitlines() if log.stat().st_mtime >= since else [DONE]
        if lines[-1:] != [DONE]:
            why = (
                lines[-1]
                if lines
                else "it was ended from outside: out of memory or of time? more shards take less each"
            )
            yield f"FAILED {log.with_suffix('')}: {why}"


def outcome(runs: Path, tables: Mapping[str, list[Path]], before: Mapping[Path, bytes]) -> Iterator[str]:
    """What came out for each data set: its tables, where to look, and how they compare with those there were."""
    for name, files in tables.items():
        if all(file.is_file() for file in files):
            yield f"\n{name}: accuracy in % and cosine of prototypes with embeddings, (the paper's)\n"
            yield pd.concat([_compact(file) for file in reversed(files)], axis=1).fillna("").to_string()
            folder = _short(runs / name)
            yield f"\nTables and figures: {_short(files[0].parent)}/. Notebooks as run: {folder}/**/notebooks/*.html"
            yield from comparison(files, before)


def _compact(file: Path) -> pd.DataFrame:
    """The main rows of a table: model by measure, mean ± standard deviation over seeds (the paper's)."""
    from .published import with_spread  # brings torch, which takes seconds

    table = pd.read_csv(file)
    table = table[table.metric.isin(MEASURES)]
    digits = 1 if "accuracy" in set(table.metric) else 2
    papers = ["" if pd.isna(value) else f" ({value:.{digits}f})" for value in table.paper]
    table["shown"] = [ours + paper for ours, paper in zip(with_spread(table, digits), papers, strict=True)]
    table["measure"] = table.metric.map(MEASURES) + ", " + table.split
    shown = table.pivot(index="model", columns="measure", values="shown")
    return shown.loc[table.model.unique(), table.measure.unique()].rename_axis(index=None, columns=None)


def comparison(files: list[Path], before: Mapping[Path, bytes]) -> Iterator[str]:
    """By how much tables differ from those committed, or, where none are, from those there before the run."""
    what, those = "committed", [_committed(file) for file in files]
    if not all(those):
        what, those = "there before", [before.get(file, b"") for file in files]
    these = [file.read_bytes() for file in files]
    if not all(those) or these == those:
        if all(those):
            yield f"The tables are those {what}, to the last digit."
        return
    ours, theirs = (
        pd.concat([pd.read_csv(io.BytesIO(table)) for table in tables]).set_index(["model", "metric", "split"])
        for tables in (these, those)
    )
    if not ours["n_seeds"].equals(theirs["n_seeds"]):
        yield f"The tables are of other models, measures or seeds than those {what}."
    apart = (ours[["mean", "std"]] - theirs[["mean", "std"]]).abs().max(axis=1).rename("apart").reset_index()
    apart["unit"] = ["points" if metric.startswith("accuracy") else "in cosines" for metric in apart.metric]
    largest = apart[apart.apart > 0].groupby(["model", "unit"], sort=False)["apart"].max()
    for model in largest.index.unique("model"):
        amounts = " and ".join(f"{value:.2g} {unit}" for unit, value in largest[model].items())
        yield f"{model} differs from the tables {what} by at most {amounts}."
    same = "" if set(apart.model) <= set(largest.index.unique("model")) else "The others are the same. "
    yield same + ELSEWHERE


def _committed(file: Path) -> bytes:
    """A file of this repository as last committed; empty where there is none."""
    if not file.is_relative_to(paths.ROOT) or not shutil.which("git"):
        return b""
    show = ["git", "-C", str(paths.ROOT), "show", f"HEAD:./{file.relative_to(paths.ROOT).as_posix()}"]
    return subprocess.run(show, capture_output=True).stdout
