"""Run every notebook over data sets and seeds: ``kmex batch config/quick.yaml``.

Snakemake does the work (``Snakefile``); this adds what a long run needs around it: only one run at a time in a folder
of results (the lock goes with the process, however it ends), no clean-up after a kill, a last line that names the
notebook and the cell that failed, and in the end the tables beside those committed.
"""

import ast
import io
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from importlib.util import resolve_name
from pathlib import Path
from typing import Any

import pandas as pd

from .. import paths
from .published import with_spread

MEASURES = {"accuracy": "accuracy", "cos_class": "cosine to class", "cos_out": "cosine to others"}
ELSEWHERE = "Another chip moves ProtoPNet alone, by up to 0.3 points and cosines by 0.01, and the bytes of Figure 2."


def configuration(path: Path) -> dict[str, Any]:
    """A batch's data sets, each with the parameters of its notebooks, and seeds; read from YAML.

    Raises
    ------
    ValueError
        It is not that.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    config = config if isinstance(config, dict) else {}
    if not isinstance(config.get("datasets"), dict) or not isinstance(config.get("seeds"), list):
        raise ValueError("the configuration needs `datasets`, each a name with its parameters, and a list of `seeds`")
    return config


def run(config: Path, runs: Path, figures: Path, options: list[str]) -> int:
    """Run the Snakefile, alone in ``runs``; continues what a killed run left. ``options`` are Snakemake's."""
    from filelock import FileLock, Timeout
    from snakemake.cli import main as snakemake

    datasets = configuration(config)["datasets"]
    tables = {name: [figures / name / f"table{i}.csv" for i in (1, 2)] for name in datasets}
    before = {path: path.read_bytes() for pair in tables.values() for path in pair if path.is_file()}
    runs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(runs / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another run is at work in {runs}: wait for it to end, or stop it first", file=sys.stderr)
        return 2
    dry = any(option.startswith(("-n", "--dry")) for option in options)
    if not any(option.startswith(("--cores", "-c", "-j", "--jobs")) for option in options):
        options = [*options, "--cores", "all"]
    if shutil.which("nvidia-smi") and not any(option.startswith(("--resources", "--res")) for option in options):
        options = [*options, "--resources", "gpu=1"]  # notebooks share one GPU in turn, not its memory
    os.environ["TQDM_DISABLE"] = "1"  # one line per epoch in a log, not one per step
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    always = ["--snakefile", str(paths.ROOT / "Snakefile"), "--configfile", str(config)]
    always += ["--config", f"runs={_short(runs)}", f"figures={_short(figures)}", "--directory", str(paths.ROOT)]
    always += ["--nolock", "--rerun-incomplete", "--quiet", "host"]
    if not dry:  # the Snakefile's rules say when a notebook starts and ends
        always += ["rules", "progress"]
        logging.disable(logging.INFO)
    with lock:
        try:
            snakemake([*options, *always])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        finally:
            logging.disable(logging.NOTSET)
    for line in failures(runs) if status else () if dry else outcome(runs, tables, before):
        print(line, file=sys.stderr if status else sys.stdout)
    return status


def _short(path: Path) -> str:
    """Relative to the repository's root where possible, so that results do not name this machine."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def sources(file: Path, without: Collection[str] = ()) -> set[Path]:
    """A file's source and the modules of this package that run when it is imported.

    What a function imports when it is called is left out: a view that an explanation can draw is no part of a training.
    So are rooms of the package of the names ``without``, and what only they import.
    """
    seen, left = set[Path](), [file]
    while left:
        seen.add(file := left.pop())
        package = ".".join(file.parent.relative_to(paths.ROOT).parts)
        for node in ast.parse(file.read_text()).body:
            if not isinstance(node, ast.Import | ast.ImportFrom):
                continue
            base = ""
            if isinstance(node, ast.ImportFrom):
                base = resolve_name("." * node.level + (node.module or ""), package) + "."
            for parts in ((base + alias.name).split(".") for alias in node.names):
                if parts[0] != "kmex_utils" or set(without).intersection(parts[1:2]):
                    continue
                for n in range(2, len(parts) + 1):
                    module = paths.ROOT.joinpath(*parts[:n])
                    files = module.with_suffix(".py"), module / "__init__.py"
                    left += [file for file in files if file.is_file() and file not in seen]
    return seen


def failures(runs: Path) -> Iterator[str]:
    """One line for each executed notebook that ended in an error: the notebook, the cell and the message."""
    for notebook in sorted(runs.glob("**/notebooks/*.ipynb")):
        try:
            cells = json.loads(notebook.read_text())["cells"]
        except (OSError, json.JSONDecodeError, KeyError):
            yield f"FAILED {notebook}: it was not written whole"
            continue
        for cell in cells:
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    count = cell["execution_count"]
                    yield f"FAILED {notebook}, cell [{count}]: {output['ename']}: {output['evalue']}"


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
