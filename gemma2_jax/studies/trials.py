"""The trials of a sweep, their runs, and which of them can be trained now."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemma2_jax.config import UserError, refuse
from gemma2_jax.messages import written
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.journal import SweepProgress
from gemma2_jax.studies.rungs import Halving
from gemma2_jax.studies.space import ADAPTIVE, SAMPLED, SweepConfig


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        values: values by key, as the tables show them.
        config: the run's configuration with these values.
    """

    values: Mapping[str, str]
    config: RunConfig

    @property
    def key(self) -> str:
        """The run's name in the journal: that of its folder."""
        return Path(self.config.output).name


Trial = Sequence[Combination]  # one run for each seed


@dataclass(frozen=True)
class Sweep:
    """A sweep whose configurations are composed.

    Attributes:
        settings: what it tries.
        output: its folder.
        trials: all trials; for a method that draws from results, trials at the corners of the space.
        build: composes the trial of a number at a point.
        earlier: folder of an earlier run of the same experiment, whose speed the estimate of the time may use.
        groups: keys of the runs that are trained in one program; runs in no group are trained alone.
    """

    settings: SweepConfig
    output: str
    trials: Sequence[Trial]
    build: Callable[[int, Mapping[str, str]], Trial]
    earlier: str | None = None
    groups: Sequence[Sequence[str]] = ()

    def group_of(self, run: Combination) -> Sequence[str]:
        """Returns the keys of the runs that are trained together with a run, its own among them."""
        return next((group for group in self.groups if run.key in group), (run.key,))

    @property
    def is_adaptive(self) -> bool:
        return self.settings.method in ADAPTIVE

    @property
    def is_drawn(self) -> bool:
        return self.settings.method in SAMPLED

    @property
    def total(self) -> int:
        return self.settings.trials or len(self.trials)

    @property
    def halving(self) -> Halving:
        settings = self.settings
        return Halving(self.total, len(settings.rungs) + 1, settings.reduction, settings.brackets)

    def drawn(self, progress: SweepProgress) -> dict[int, Trial]:
        """Returns the trials that exist so far, by number."""
        if not self.is_adaptive:
            return dict(enumerate(self.trials))
        return {number: self.build(number, point) for number, point in sorted(progress.points.items())}

    def ends(self, run: Combination) -> list[int]:
        """Returns the last step of each stage of a run."""
        return [*self.settings.rungs, run.config.training.steps]


@dataclass(frozen=True)
class Task:
    """A run to be trained to the end of a stage."""

    trial: int
    run: int
    stage: int


def check_trials(sweep: Sweep) -> None:
    """Raises UserError if the rungs or the metric of a sweep do not fit its trials."""
    settings = sweep.settings
    runs = [run for trial in sweep.trials for run in trial]
    lengths = sorted({run.config.training.steps for run in runs})
    if settings.rungs and len(lengths) > 1:
        raise UserError(
            f"training.steps is {lengths[0]} in one trial and {lengths[-1]} in another; trials that are compared at "
            "rungs need the same steps."
        )
    refuse(
        f"rungs has step {step}, but training.steps is {lengths[0]}; each rung must be below it."
        for step in settings.rungs
        if step >= lengths[0]
    )
    for run in runs:
        every = run.config.training.eval_every
        for step in settings.rungs:
            if step % every:
                raise UserError(
                    f"rungs has step {step}, but {run.config.name} is evaluated only every {every} steps; set "
                    f"training.eval_every to a divisor of {written(settings.rungs)}."
                )
        if settings.metric in ("kl", "agreement") and run.config.distill.teacher is None:
            raise UserError(
                f"metric is {settings.metric}, but {run.config.name} has no distill.teacher to be compared with; set "
                "one, or metric to cross_entropy."
            )


def losses(
    sweep: Sweep, trials: Mapping[int, Trial], progress: SweepProgress
) -> dict[int, dict[int, float | None]]:
    """Returns the loss of each trial at each stage that all of its runs have finished: the mean over its seeds.

    The loss is the metric, with its sign changed if larger is better; None if a run failed.
    """
    sign = -1.0 if sweep.settings.larger_is_better else 1.0
    found: dict[int, dict[int, float | None]] = {}
    for stage in range(sweep.halving.stages):
        at_stage: dict[int, float | None] = {}
        for number, trial in trials.items():
            values = [progress.values.get(run.key, {}).get(sweep.ends(run)[stage]) for run in trial]
            reached = [value for value in values if value is not None]
            if len(reached) == len(trial):
                at_stage[number] = sign * statistics.mean(reached)
            elif any(
                value is None and run.key in progress.failed for value, run in zip(values, trial, strict=True)
            ):
                at_stage[number] = None
        found[stage] = at_stage
    return found


def open_tasks(sweep: Sweep, trials: Mapping[int, Trial], progress: SweepProgress) -> list[Task]:
    """Returns what is to be trained as far as is known, the runs that are furthest first."""
    halving = sweep.halving
    allowed = halving.stages_of(losses(sweep, trials, progress))
    first = first_stages(halving)
    tasks = []
    for number, trial in trials.items():
        for index, run in enumerate(trial):
            done = progress.values.get(run.key, {})
            left = [
                stage
                for stage in range(first[number], allowed[number] + 1)
                if sweep.ends(run)[stage] not in done
            ]
            if left and run.key not in progress.failed:
                tasks.append(Task(number, index, left[0]))
    return sorted(tasks, key=lambda task: (-task.stage, task.trial, task.run))


def first_stages(halving: Halving) -> dict[int, int]:
    """Returns the stage at which each trial begins: the number of its bracket."""
    return {number: bracket for bracket, members in enumerate(halving.members()) for number in members}
