"""Sweeps: one run for each trial and seed, trained by any number of workers, and reported together."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console

from gemma2_jax.checkpoints.store import latest_step
from gemma2_jax.processes.hosts import is_first
from gemma2_jax.studies.journal import Journal, SweepProgress
from gemma2_jax.studies.space import identity
from gemma2_jax.studies.stages import check_unchanged, measure_run
from gemma2_jax.studies.sweep_report import Result, write_sweep_report
from gemma2_jax.studies.trials import Combination, Sweep
from gemma2_jax.studies.worker import work


def run_sweep(sweep: Sweep, console: Console | None = None) -> bool:
    """Trains the unfinished runs of a sweep as one of its workers, and reports all of them when none is left.

    The same call in another process is another worker. If a run fails, its traceback is written to error.txt in its
    folder and the sweep continues; the next sweep that begins when no worker is left tries it again. With several
    processes, a failure ends the sweep.

    Args:
        console: prints the progress and the tables; None prints neither.

    Returns:
        Whether no run failed.

    Raises:
        UserError: the sweep's folder holds another sweep or other runs, or another command is working there.
    """
    console = Console(quiet=True) if console is None else console
    journal = Journal(Path(sweep.output))
    with ExitStack() as stack:
        if is_first():
            check = partial(_void_runs, sweep)
            stack.enter_context(journal.joined(identity(sweep.settings), check, _changeable(sweep)))
        work(sweep, journal, console)
        progress = journal.read()
        results = []
        for trial in sweep.drawn(progress).values():
            for run in trial:
                values, key = progress.values.get(run.key, {}), run.key
                if run.config.training.steps in values:
                    results.append(_finished(run, progress.seconds[key]))
                else:
                    stopped = max(values.items(), default=None)
                    error = progress.failed.get(key)
                    results.append(Result(run.values, run.config.output, error=error, stopped=stopped))
        if is_first():
            write_sweep_report(results, sweep.settings, Path(sweep.output), console)
    return not progress.failed


def _changeable(sweep: Sweep) -> tuple[str, ...]:
    """The settings that another sweep in the same folder may have: those that change no run, but add or remove some."""
    if sweep.settings.rungs:
        return ()  # which trials go on depends on all of them
    return ("trials", "seeds") if sweep.is_drawn else ("space", "runs", "seeds")


def _void_runs(sweep: Sweep, progress: SweepProgress) -> Iterator[str]:
    """Checks the folders of runs that were begun earlier; yields the names of those that were deleted."""
    for trial in sweep.drawn(progress).values():
        for run in trial:
            check_unchanged(run.config)
            steps = progress.values.get(run.key)
            if steps and (latest_step(run.config.output) or 0) < max(steps):
                yield run.key


def _finished(run: Combination, seconds: float) -> Result:
    quiet = Console(quiet=True)
    found = measure_run(run.config, quiet, teacher=run.config.distill.teacher)  # stored by the worker
    return Result(run.values, run.config.output, found.evaluation, seconds=seconds)
