"""The processes of a batch: the command, Snakemake, for each notebook what runs it, and its kernel.

All hold the lock of the folder they write to, and none outlives the command. Its children read, as their standard
input, a pipe that the command alone can write to: its end is the command's, however that came.
"""

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import FrameType
from typing import Any

from ..store import lock

LOCK = ".lock"  # in the folder of results
START = 300  # seconds for a kernel to answer: beside many others one once took more than papermill's 60
QUIET = ["--IPKernelApp.log_level=CRITICAL"]  # nothing of its transport, nor that it is told to end
WIDGET = "application/vnd.jupyter.widget-view+json"
DONE = "done"  # the last line of a shard's log
KERNELS: list[int] = []  # that this process has started, each the leader of a group
CAUSES = {  # of a kernel's end by a signal, and what to do
    "SIGKILL": "most likely because memory ran out: run fewer notebooks at a time (--cores), or smaller ones",
    "SIGBUS": "most likely because a disk filled up under a memory map: free some space",
    "SIGSEGV": "a library crashed: run again",
}


def end_with_the_command() -> None:
    """End this process, or the group it leads, when the command that runs the batch ends."""
    if stat.S_ISFIFO(os.fstat(0).st_mode):
        Thread(target=_end_at, args=(0,), daemon=True).start()


def _end_at(pipe: int) -> None:
    while os.read(pipe, 1):
        pass
    _end_kernels()
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_kernels() -> None:
    """Kernels, and what their notebooks started and left."""
    for kernel in KERNELS:
        with suppress(ProcessLookupError):
            os.killpg(kernel, signal.SIGKILL)


def interruptible(work: Callable[[], int]) -> int:
    """What ``work`` returns; SIGINT, SIGTERM and SIGHUP raise SystemExit in it, with status 128 + the signal."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return work()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def on_a_cluster(options: list[str]) -> bool:
    """Whether Snakemake's options send the rules elsewhere."""
    named = ("--profile", "--workflow-profile", "--executor")
    return "SNAKEMAKE_PROFILE" in os.environ or any(o.startswith(named) or o == "-e" for o in options)


def quiet(options: list[str]) -> bool:
    """Whether the rules themselves say what starts and ends: not on a dry run, nor from another machine."""
    return not on_a_cluster(options) and not any(option.startswith(("-n", "--dry")) for option in options)


def workflow(options: list[str]) -> None:
    """Snakemake, of whose lines only those of errors are shown where it is :func:`quiet`."""
    from snakemake.cli import main

    if quiet(options):
        logging.disable(logging.INFO)
    main(options)


def notebook(source: str, out: str, parameters: str, runs: str) -> int:
    """Execute a notebook with ``parameters`` (JSON) into ``out``, what it prints as it comes; returns the exit status.

    A kernel that dies leaves an error in the cell it died in, as an exception does.
    """
    # jsonschema's check of IRIs, which nothing here needs: its grammar takes one to three seconds to build
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    import papermill
    from nbclient.exceptions import CellExecutionError, DeadKernelError
    from nbformat.v4 import new_output
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.exceptions import PapermillExecutionError

    for folder in (Path(runs), Path(out).parent):
        folder.mkdir(parents=True, exist_ok=True)
    file = lock(Path(runs) / LOCK, shared=True)

    class Client(PapermillNotebookClient):
        def start_new_kernel(self, **how: Any) -> None:
            super().start_new_kernel(**how)
            self.process = self.km.provisioner.process
            KERNELS.append(self.process.pid)
            # reads what this process alone can write to: its end, however it came, is the group's
            watch = ["sh", "-c", 'read _; kill -s KILL -- "-$1" 2> /dev/null', "sh", str(self.process.pid)]
            self.watch = subprocess.Popen(watch, stdin=subprocess.PIPE, start_new_session=True)

        def execute_cell(self, cell: Any, *index: Any, **how: Any) -> Any:
            try:
                return super().execute_cell(cell, *index, **how)
            except DeadKernelError:
                why = _died(self.process.wait())
                self.note(cell, why)
                raise CellExecutionError(why, "KernelDied", why) from None

        def note(self, cell: Any, why: str) -> None:
            cell.execution_count = max(1, self.code_cells_executed)
            cell.outputs.append(new_output("error", ename="KernelDied", evalue=why, traceback=[why]))

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, **how: Any) -> Any:
            how = {"stdout_file": how["stdout_file"], "startup_timeout": how["start_timeout"]}
            client = Client(nb_man, kernel_name=kernel_name, extra_arguments=QUIET, **how)
            try:
                return client.execute(pass_fds=[file.fileno()], preexec_fn=_end_with_parent)
            except RuntimeError as error:  # it died before the first cell or after the last, or did not answer
                why = _died(client.process.wait()) if "died" in str(error) else str(error)
                cells = [cell for cell in nb_man.nb.cells if cell.cell_type == "code"]
                client.note(cells[-1 if client.code_cells_executed else 0], why)
                return nb_man.nb
            finally:
                _end_kernels()
                without_bars(nb_man.nb)

    papermill_engines.register("kmex", Engine)
    print(f"{time.strftime('%T')} start {out}", flush=True)
    start = time.monotonic()
    how: dict[str, Any] = {"stdout_file": sys.stdout, "start_timeout": START, "progress_bar": False}
    try:
        papermill.execute_notebook(source, out, json.loads(parameters), engine_name="kmex", **how)
    except PapermillExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # the disk is full
        print(f"FAILED {out}: it cannot be written ({error.strerror})", file=sys.stderr)
        return 1
    print(f"{time.strftime('%T')} done  {out}, {time.monotonic() - start:.0f} s", flush=True)
    return 0


def without_bars(executed: Any) -> None:
    """Take out what progress bars leave in a notebook: their first state, and state that only a live page shows."""
    executed.metadata.pop("widgets", None)
    for cell in executed.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]


def shard(stage: str, number: str, log: str, given: str, runs: str) -> int:
    """Do a shard of notebook 4, see :mod:`~kmex_utils.paper.shards`; what goes wrong goes to ``log``, its last line."""
    start, name = time.monotonic(), Path(log).with_suffix("")
    name.parent.mkdir(parents=True, exist_ok=True)
    print(f"{time.strftime('%T')} start {name}", flush=True)
    with Path(log).open("w", encoding="utf-8") as file:
        try:
            from .shards import work

            with lock(Path(runs) / LOCK, shared=True):
                work(stage, int(number), json.loads(given))
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            traceback.print_exc(file=file)
            print(why, file=file)
            print(f"FAILED {name}: {why}", file=sys.stderr)
            return 1
        print(DONE, file=file)
    print(f"{time.strftime('%T')} done  {name}, {time.monotonic() - start:.0f} s", flush=True)
    return 0


def _died(status: int) -> str:
    """Why a kernel ended that should not have."""
    if status >= 0:
        return f"the kernel ended with status {status}"
    name = signal.Signals(-status).name
    return f"the kernel was killed ({name}), {CAUSES.get(name, 'from outside: run again')}"


def _end_with_parent() -> None:
    """End this process when its parent does, on Linux; ipykernel, which looks itself, may hang."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    end_with_the_command()
    kind, *given = sys.argv[1:]
    if kind == "workflow":
        workflow(given)
    run = notebook if kind == "notebook" else shard
    sys.exit(run(*given))
