"""What a sweep costs: its runs, tokens and estimated time."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import UserError, load_config
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.journal import SweepProgress
from gemma2_jax.studies.rungs import planned_steps
from gemma2_jax.studies.trials import Sweep
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.progress import duration


@dataclass(frozen=True)
class SweepCost:
    """The cost of a sweep if no run fails.

    Attributes:
        runs: number of runs.
        tokens: tokens that they are trained on, padding included.
        work: sum of tokens times parameters.
    """

    runs: int
    tokens: int
    work: float


def sweep_cost(sweep: Sweep) -> SweepCost:
    """Returns the cost of the whole sweep.

    With rungs, it is not known which trials are trained further, so their mean is taken; for a method that draws from
    results, the mean over the corners of the space.
    """
    runs = [run.config for trial in sweep.trials for run in trial]
    seeds = len(sweep.trials[0])
    if not sweep.is_adaptive and not sweep.settings.rungs:
        return SweepCost(
            len(runs),
            sum(config.training.steps * _tokens(config) for config in runs),
            sum(config.training.steps * _tokens(config) * _parameters(config) for config in runs),
        )
    ends = [*sweep.settings.rungs, max(config.training.steps for config in runs)]
    steps = planned_steps(sweep.halving, ends) * seeds
    tokens = statistics.mean(map(_tokens, runs))
    work = statistics.mean(_tokens(config) * _parameters(config) for config in runs)
    return SweepCost(sweep.total * seeds, round(steps * tokens), steps * work)


def describe_cost(sweep: Sweep, workers: int) -> str:
    """Describes the cost in one sentence, with the time by the speed of an earlier run if there is one."""
    cost = sweep_cost(sweep)
    text = f"{cost.runs} {'run' if cost.runs == 1 else 'runs'}, {cost.tokens:,} tokens"
    if sweep.settings.rungs:
        most = max(run.config.training.steps for trial in sweep.trials for run in trial)
        whole = planned_steps(sweep.halving, [most] * sweep.halving.stages) * len(sweep.trials[0])
        tokens = statistics.mean(_tokens(run.config) for trial in sweep.trials for run in trial)
        text += f" ({cost.tokens / (whole * tokens):.0%} of those without rungs)"
    folders = [run.config.output for trial in sweep.trials for run in trial]
    for folder in [*folders, *([] if sweep.earlier is None else [sweep.earlier])]:
        rate = _rate(folder)
        if rate is not None:
            spent = duration(cost.work / rate / workers)
            return (
                f"{text}, about {spent} of training with {workers} {'worker' if workers == 1 else 'workers'}, at the "
                f"speed of {folder}."
            )
    return f"{text}; the time will be estimated from the first run that is done."


def remaining(sweep: Sweep, progress: SweepProgress, folder: str) -> str:
    """Estimates the time that is left, by the speed of the run in `folder`."""
    cost, rate = sweep_cost(sweep), _rate(folder)
    if rate is None or not cost.tokens:
        return "no time is estimated, since the run reported no speed"
    done = sum(
        max(steps) * _tokens(run.config)
        for trial in sweep.drawn(progress).values()
        for run in trial
        if (steps := progress.values.get(run.key))
    )
    left = cost.work / rate * max(0.0, 1 - done / cost.tokens)
    return f"about {duration(left)} of training left for one worker, at the speed of this run"


def _tokens(config: RunConfig) -> int:
    """The tokens of a step."""
    return config.data.batch_size * config.data.seq_len


def _parameters(config: RunConfig) -> int:
    return count_parameters(config.model).total


def _rate(folder: str) -> float | None:
    """A run's speed in tokens times parameters per second; None if it has reported none."""
    if not all(Path(folder, name).is_file() for name in (CONFIG_FILE, JSON_LINES)):
        return None
    try:
        rows = read_metrics(folder)
        config = load_config(RunConfig, Path(folder, CONFIG_FILE))
    except UserError:  # a run of an older version, or not a run
        return None
    found = [row.get("tokens_per_second", 0.0) for row in rows if row["split"] == "train"]
    speeds = [speed for speed in found if math.isfinite(speed) and speed > 0]
    return statistics.median(speeds) * _parameters(config) if speeds else None
