"""Configuration of a study: study.yaml as a dataclass."""

import dataclasses
import re
from dataclasses import dataclass

from gemma2_jax.config import UserError
from gemma2_jax.run import RunConfig


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        experiment: the experiment that configures the run, as in `gemma2 train experiment=NAME`.
        teacher: an earlier run of the study to distil from; distill.teacher is set to its folder.
        cache: whether to distil from a cache of the teacher, which the study writes first; distill.cache is set to it.
        overrides: `key=value` overrides on top of the experiment.
        series: the line in the plot of the summary that the run is a point of.
    """

    experiment: str
    teacher: str | None = None
    cache: bool = False
    overrides: tuple[str, ...] = ()
    series: str | None = None


@dataclass(frozen=True)
class StudyConfig:
    """A study: runs that are trained in order and reported together.

    Attributes:
        title: the question that the study answers.
        runs: the runs by name. Each is trained in a folder of that name inside the study's folder; with several seeds,
            the folder's name ends in -SEED.
        reference: the run that the predictions of the others are compared with (agreement, KL); null for no comparison.
        prompts: texts that every run completes in the report.
        sample_tokens: the maximum number of tokens in each completion.
        seeds: seeds (`seed` and `data.seed`) that every run is trained with, except teachers and the reference, which
            are trained once. The report then gives means and standard deviations. Empty: each run is trained once, with
            the seed of its configuration.
    """

    title: str
    runs: dict[str, StudyRun]
    reference: str | None = None
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 48
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs is empty; a study needs at least one run.")
        if self.sample_tokens < 1:
            raise UserError(f"sample_tokens is {self.sample_tokens}; it must be at least 1.")
        names = list(self.runs)
        if self.reference is not None and self.reference not in names:
            raise UserError(f"reference is {self.reference}; it must be one of the runs {', '.join(names)}.")
        keys = [field.name for field in dataclasses.fields(RunConfig)]
        for position, (name, run) in enumerate(self.runs.items()):
            if name in keys or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise UserError(
                    f"runs.{name} is not a valid name of a run; accepted: letters, digits, _ and -, but no key of the "
                    "run's configuration."
                )
            if run.teacher is not None and run.teacher not in names[:position]:
                earlier = ", ".join(names[:position]) or "none"
                raise UserError(
                    f"runs.{name}.teacher is {run.teacher}; it must be an earlier run ({earlier})."
                )
            if run.cache and run.teacher is None:
                raise UserError(
                    f"runs.{name}.cache is true, but runs.{name}.teacher is null; set it to the run whose outputs are "
                    "cached."
                )

    def trained_runs(self) -> dict[str, tuple[str, int | None]]:
        """Returns the run and the seed of each folder, in training order; the seed is None if the study sets none."""
        single = {run.teacher for run in self.runs.values()} | {self.reference}
        found: dict[str, tuple[str, int | None]] = {}
        for name in self.runs:
            if self.seeds and name not in single:
                found |= {f"{name}-{seed}": (name, seed) for seed in self.seeds}
            else:
                found[name] = (name, None)
        return found

    def folders(self, run: str) -> list[str]:
        """Returns the names of a run's folders, one for each seed."""
        return [folder for folder, (name, _) in self.trained_runs().items() if name == run]
