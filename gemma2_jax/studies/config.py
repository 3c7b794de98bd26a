"""What a study is made of: study.yaml as a dataclass."""

import dataclasses
import re
from dataclasses import dataclass

from gemma2_jax.config import UserError
from gemma2_jax.run import RunConfig


@dataclass(frozen=True)
class StudyRun:
    """One run of a study.

    Attributes:
        experiment: the experiment that configures it, as in `gemma2 train experiment=NAME`.
        teacher: an earlier run of the study to distil from: distill.teacher is set to its folder.
        cache: distil from a cache of the teacher, which the study writes before: distill.cache is set to it.
        overrides: `key=value` on top of the experiment.
        series: the line of the summary's plot that the run is a point of.
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
        title: the question that the study asks.
        runs: the runs by name; each gets a folder of that name inside the study's, with -SEED behind it where
            there are several seeds.
        reference: a run with which the others' predictions are compared (agreement, KL); None: no comparison.
        prompts: texts that every run continues in the report.
        sample_tokens: how many tokens each continuation has at most.
        seeds: every run is trained with each of them (`seed` and `data.seed`), but for teachers and the reference, of
            which there is one; and the report gives means and deviations. None: all with the configuration's.
    """

    title: str
    runs: dict[str, StudyRun]
    reference: str | None = None
    prompts: tuple[str, ...] = ()
    sample_tokens: int = 48
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.runs:
            raise UserError("runs is empty; a study has at least one run.")
        if self.sample_tokens < 1:
            raise UserError(f"sample_tokens is {self.sample_tokens}; it must be at least 1.")
        names = list(self.runs)
        if self.reference is not None and self.reference not in names:
            raise UserError(f"reference is {self.reference}; it must be one of the runs {', '.join(names)}.")
        keys = [field.name for field in dataclasses.fields(RunConfig)]
        for position, (name, run) in enumerate(self.runs.items()):
            if name in keys or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise UserError(
                    f"runs.{name} cannot name a run; accepted: letters, digits, _ and -, but no key of a run."
                )
            if run.teacher is not None and run.teacher not in names[:position]:
                earlier = ", ".join(names[:position]) or "none"
                raise UserError(
                    f"runs.{name}.teacher is {run.teacher}; it must be an earlier run ({earlier})."
                )
            if run.cache and run.teacher is None:
                raise UserError(
                    f"runs.{name}.cache is true and its teacher is null; name the teacher whose outputs are cached."
                )

    def trained(self) -> dict[str, tuple[str, int | None]]:
        """What is trained, in order, by the name of its folder: the run, and its seed if the study sets one."""
        single = {run.teacher for run in self.runs.values()} | {self.reference}
        found: dict[str, tuple[str, int | None]] = {}
        for name in self.runs:
            if self.seeds and name not in single:
                found |= {f"{name}-{seed}": (name, seed) for seed in self.seeds}
            else:
                found[name] = (name, None)
        return found

    def folders(self, run: str) -> list[str]:
        """The names of the folders of a run, one for each of its seeds."""
        return [folder for folder, (of, _) in self.trained().items() if of == run]
