"""One notebook of a batch, as the Snakefile starts it: ``python -m kmex_utils.paper.notebook SOURCE EXECUTED JSON``."""

import json
import sys
import time

import papermill
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError


def run(source: str, executed: str, parameters: str) -> int:
    """Execute a notebook with ``parameters`` in JSON; returns the exit status.

    What it prints is shown as it comes, between a line at its start and one at its end. The error of a cell stays in
    ``executed``, from where :func:`kmex_utils.paper.batch.failures` names it.
    """
    start = time.monotonic()
    print(time.strftime("%T"), "start", executed, flush=True)
    for last in (False, True):
        try:
            papermill.execute_notebook(
                source, executed, json.loads(parameters), progress_bar=False, stdout_file=sys.stdout
            )
            break
        except PapermillExecutionError:
            return 1
        except DeadKernelError:
            raise
        except RuntimeError:  # two kernels that start at once may be given one port, and one of them does not answer
            if last:
                raise
    print(time.strftime("%T"), "done ", f"{executed}, {time.monotonic() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
