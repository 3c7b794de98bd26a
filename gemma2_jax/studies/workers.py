"""Further workers of a sweep, as processes on this machine."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console

from gemma2_jax import stops
from gemma2_jax.studies.tables import print_line

_GRACE = 30.0  # seconds that a worker has to save its run after a signal


@contextmanager
def started_workers(arguments: Sequence[str], count: int, folder: str, console: Console) -> Iterator[None]:
    """Runs `gemma2 ARGUMENTS` in `count` more processes; waits for their end, or stops them if this process is stopped.

    Args:
        folder: the sweep's folder, where workers/N.log receives their output.
    """
    if not count:
        yield
        return
    logs = Path(folder) / "workers"
    logs.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []
    with stops.cleanup(partial(_end, processes)):
        for number in range(2, count + 2):
            with (logs / f"{number}.log").open("ab") as log:
                command = [sys.executable, "-m", "gemma2_jax.cli.main", *arguments]
                processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        print_line(console, f"{count + 1} workers, the others' output in {logs}")
        yield
        for process in processes:
            process.wait()


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Stops the processes that are still running; each saves the run that it is training."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    for process in running:
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
