"""A worker of a sweep: takes a run that no other worker has, trains it to its next rung, and records the result."""

import math
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from gemma2_jax import stops
from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.processes.hosts import from_first, is_first
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.journal import Journal, SweepProgress
from gemma2_jax.studies.samplers import tpe_point
from gemma2_jax.studies.space import axes
from gemma2_jax.studies.stages import measure_run, prepare_all, train_run
from gemma2_jax.studies.sweep_cost import remaining
from gemma2_jax.studies.tables import print_line
from gemma2_jax.studies.trials import Combination, Sweep, Task, Trial, first_stages, losses, open_tasks
from gemma2_jax.training.metrics import read_metrics
from gemma2_jax.training.together import train_together

ERROR_FILE = "error.txt"
_POLL = 0.5  # seconds between looks at the journal while the other workers have all that can be trained now


def work(sweep: Sweep, journal: Journal, console: Console) -> None:
    """Trains runs of the sweep until none is left, neither here nor in another worker.

    With several processes, they are one worker together, and process 0 chooses the runs.
    """
    done = 0
    while True:
        with ExitStack() as claim:
            choice = from_first(_choose(sweep, journal, claim) if is_first() else None)
            if choice is None:
                return
            if choice:
                tasks, point = [Task(**values) for values in choice["tasks"]], choice["point"]
                runs = [_run_of(sweep, task, point) for task in tasks]
                spent = _train_group(journal, runs, console) if len(runs) > 1 else 0.0
                for task, run in zip(tasks, runs, strict=True):
                    _announce(sweep, task, run, console)
                    succeeded = _carry_out(sweep, journal, task, run, console, spent / len(runs))
                    if succeeded and (done := done + 1) == 1 and is_first():
                        print_line(console, remaining(sweep, journal.read(), run.config.output))
                continue
        time.sleep(_POLL)
        stops.check()


def _run_of(sweep: Sweep, task: Task, point: Mapping[str, str] | None) -> Combination:
    """The run of a task; `point` is that of a trial that is drawn from results."""
    trial = sweep.trials[task.trial] if point is None else sweep.build(task.trial, point)
    return trial[task.run]


def _choose(sweep: Sweep, journal: Journal, claim: ExitStack) -> dict[str, Any] | None:
    """Claims a task, and those of the runs that it is to be trained together with.

    Returns:
        The tasks, and the point of a trial that is drawn from results, as plain values; an empty dict if other workers
        have all open tasks, None if there are none.
    """
    while True:
        progress = journal.read()
        trials = sweep.drawn(progress)
        tasks = open_tasks(sweep, trials, progress)
        for task in tasks:
            if _is_claimed(sweep, journal, trials, task, claim):
                together = sweep.group_of(trials[task.trial][task.run])
                others = [
                    other
                    for other in tasks
                    if other != task
                    and trials[other.trial][other.run].key in together
                    and _is_claimed(sweep, journal, trials, other, claim)
                ]
                chosen = [asdict(each) for each in (task, *others)]
                return {"tasks": chosen, "point": progress.points.get(task.trial)}
        number = len(trials)
        if not sweep.is_adaptive or number == sweep.total:
            return {} if tasks else None
        if not _can_draw(sweep, trials, progress, number):
            return {}
        journal.add_point(number, _drawn_point(sweep, trials, progress, number))


def _is_claimed(
    sweep: Sweep, journal: Journal, trials: Mapping[int, Trial], task: Task, claim: ExitStack
) -> bool:
    """Tries to claim a task until `claim` is closed."""
    with ExitStack() as trying:
        own = trying.enter_context(journal.claim(trials[task.trial][task.run].key))
        # Another worker may have finished it since the journal was read.
        if own and task in open_tasks(sweep, trials, journal.read()):
            claim.enter_context(trying.pop_all())
            return True
    return False


def _can_draw(sweep: Sweep, trials: Mapping[int, Trial], progress: SweepProgress, number: int) -> bool:
    """Whether all trials that a point is drawn from have results."""
    return len(_results(sweep, trials, progress, number)) == max(0, number - sweep.settings.parallel + 1)


def _results(
    sweep: Sweep, trials: Mapping[int, Trial], progress: SweepProgress, number: int
) -> dict[int, float | None]:
    """The losses that the point of a number is drawn from, each at its trial's first rung, by number."""
    known, first = losses(sweep, trials, progress), first_stages(sweep.halving)
    earlier = range(max(0, number - sweep.settings.parallel + 1))
    return {each: known[first[each]][each] for each in earlier if each in known[first[each]]}


def _drawn_point(
    sweep: Sweep, trials: Mapping[int, Trial], progress: SweepProgress, number: int
) -> dict[str, str]:
    results = _results(sweep, trials, progress, number)
    history = [(progress.points[each], loss) for each, loss in results.items()]
    pending = [progress.points[each] for each in range(len(results), number)]
    settings = sweep.settings
    return tpe_point(axes(settings), history, pending, settings.sampler_seed, number)


def _announce(sweep: Sweep, task: Task, run: Combination, console: Console) -> None:
    number = sum(len(trial) for trial in sweep.trials[: task.trial]) + task.run + 1
    total = sum(map(len, sweep.trials))
    if sweep.is_adaptive:
        number, total = task.trial + 1, sweep.total
    shown = " ".join(f"{key}={value}" for key, value in run.values.items())
    print_line(console, f"{number} of {total}: {shown}", "bold")


def _train_group(journal: Journal, runs: Sequence[Combination], console: Console) -> float:
    """Trains runs in one program, and returns the seconds that it took.

    If one of them fails, the others are saved; each is then trained further on its own, which names the failed one.
    """
    start, configs = time.monotonic(), [run.config for run in runs]
    print_line(console, f"{len(runs)} runs together", "bold")
    try:
        _prepare(journal, configs, console)
        train_together(configs)
    except Exception as error:
        stops.check()
        if jax.process_count() > 1:
            raise
        print_line(console, f"ended early; each run goes on alone: {error}", "red")
    return time.monotonic() - start


def _prepare(journal: Journal, configs: Sequence[RunConfig], console: Console) -> None:
    """Prepares the data of runs, in one worker at a time."""
    with ExitStack() as preparing:
        if is_first():
            preparing.enter_context(journal.claim("data", wait=True))
        prepare_all(configs, console)


def _carry_out(
    sweep: Sweep, journal: Journal, task: Task, run: Combination, console: Console, spent: float
) -> bool:
    """Trains a run to the end of a stage, and records its metric or why it failed; returns whether it succeeded.

    Args:
        spent: seconds that were spent on it before.
    """
    config, step = run.config, sweep.ends(run)[task.stage]
    start, entry = time.monotonic(), {"run": run.key}
    try:
        _prepare(journal, [config], console)
        train_run(config, console, until=step)
        value = _metric(sweep, run, step, console)
    except Exception as error:  # an error of any type fails this run only
        stops.check()  # unless it was caused by a signal, which stops the worker
        if jax.process_count() > 1:
            raise  # the error may be in this process only, and the others cannot continue without it
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_text(Path(config.output) / ERROR_FILE, traceback.format_exc())
        print_line(console, f"failed     {reason}", "red")
        journal.append(entry | {"failed": reason})
        return False
    if is_first():
        (Path(config.output) / ERROR_FILE).unlink(missing_ok=True)  # from an earlier try
        journal.append(entry | {"step": step, "value": value, "seconds": spent + time.monotonic() - start})
    return True


def _metric(sweep: Sweep, run: Combination, step: int, console: Console) -> float:
    """The metric at a step: at the last one on the whole validation split, before on what training evaluates."""
    config, metric = run.config, sweep.settings.metric
    found: Any
    if step == config.training.steps:
        evaluation = measure_run(config, console, teacher=config.distill.teacher).evaluation
        found = getattr(evaluation, metric)
    else:
        rows = read_metrics(config.output)
        found = next(row for row in rows if (row["step"], row["split"]) == (step, "validation"))[metric]
    if not math.isfinite(found):
        raise UserError(f"{config.output} has {metric} {found} at step {step}, so it cannot be compared.")
    return float(found)
