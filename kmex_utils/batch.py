"""Run every notebook over data sets and seeds: ``python -m kmex_utils.batch config/quick.yaml``.

Snakemake does the work (``Snakefile``); this adds what a long run needs around it: only one run at a time in a folder
of results (the lock goes with the process, however it ends), no clean-up after a kill, and a last line that names
the notebook and the cell that failed.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from . import paths


def main(arguments: list[str] | None = None) -> int:
    """Command line; further options go to Snakemake (``--cores 4``, ``--dry-run`` …). Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kmex_utils.batch", description=main.__doc__)
    parser.add_argument("config", type=Path, help="config/quick.yaml, config/paper.yaml or your own")
    parser.add_argument("--runs", type=Path, default=paths.RUNS, help="folder of results (default: runs)")
    parser.add_argument("--figures", type=Path, default=paths.FIGURES, help="folder of figures (default: figures)")
    options, more = parser.parse_known_args(arguments)
    if not options.config.is_file():
        parser.error(f"{options.config} does not exist")
    if not any(option.startswith(("--cores", "-c", "-j", "--jobs")) for option in more):
        more += ["--cores", "all"]
    if shutil.which("nvidia-smi") and not any(option.startswith(("--resources", "--res")) for option in more):
        more += ["--resources", "gpu=1"]  # notebooks share one GPU in turn, not its memory
    return run(options.config.resolve(), options.runs.resolve(), options.figures.resolve(), more)


def run(config: Path, runs: Path, figures: Path, options: list[str]) -> int:
    """Run the Snakefile, alone in ``runs``; continues what a killed run left."""
    from filelock import FileLock, Timeout
    from snakemake.cli import main as snakemake

    runs.mkdir(parents=True, exist_ok=True)
    lock = FileLock(runs / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another run is at work in {runs}: wait for it to end, or stop it first", file=sys.stderr)
        return 2
    os.environ["TQDM_DISABLE"] = "1"  # one line per epoch in a log, not one per step
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    folders = [f"runs={_short(runs)}", f"figures={_short(figures)}"]
    always = ["--snakefile", str(paths.ROOT / "Snakefile"), "--configfile", str(config), "--config", *folders]
    always += ["--directory", str(paths.ROOT), "--nolock", "--rerun-incomplete", "--quiet", "host"]
    with lock:
        try:
            snakemake([*options, *always])
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        for line in failures(runs):
            if status:
                print(line, file=sys.stderr)
    return status


def _short(path: Path) -> str:
    """Relative to the repository's root where possible, so that results do not name this machine."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


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


if __name__ == "__main__":
    sys.exit(main())
