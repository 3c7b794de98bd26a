"""A fit to a set of runs: which law each kind of run gets, its curves, and the curves of resampled runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.studies.scaling.fit import (
    LEAST_DIFFERENT,
    Curve,
    Sample,
    bootstrap,
    bootstrap_distillation,
    fit_distillation,
    fit_supervised,
    interval,
)
from gemma2_jax.studies.scaling.laws import SUPERVISED, Array, distillation_law
from gemma2_jax.studies.scaling.runs import ScalingRun, Teacher

LawName = Literal["chinchilla", "distillation"]
SCRATCH = "from scratch"


@dataclass(frozen=True)
class Source:
    """Runs that learn from the same: the text, or one teacher.

    Attributes:
        name: `SCRATCH`, or the teacher's path.
        teacher: None for the text.
        runs: its runs.
    """

    name: str
    teacher: Teacher | None
    runs: tuple[ScalingRun, ...]

    @property
    def sample(self) -> Sample:
        teachers = None
        if self.teacher is not None:
            teachers = np.full(len(self.runs), self.teacher.loss)
        return sample_of(self.runs, teachers)


@dataclass(frozen=True)
class Fit:
    """Curves by the name of their source.

    Attributes:
        sources: the sources by name.
        curves: fitted to all runs.
        resampled: each fitted to a resampled set of runs.
        law: the law of the runs with a teacher.
        seed: seed of the resampling.
        left_out: the reason for each source whose runs do not determine a law.
    """

    sources: dict[str, Source]
    curves: dict[str, Curve]
    resampled: list[dict[str, Curve]]
    law: LawName
    seed: int
    left_out: Mapping[str, str] = field(default_factory=dict)

    def loss(self, name: str, n: float, d: float) -> tuple[float, tuple[float, float] | None]:
        """Returns a source's loss in nats at `n` parameters and `d` tokens; its interval, None without resampling."""
        losses = [float(curves[name].loss(n, d)) for curves in self.resampled]
        return float(self.curves[name].loss(n, d)), interval(losses) if losses else None

    def parameter_interval(self, name: str, parameter: str) -> tuple[float, float] | None:
        found = [curves[name].parameters[parameter] for curves in self.resampled]
        return interval(found) if found else None

    def with_teacher(self, name: str, loss: float) -> "Fit":
        """Returns the fit with one more source, a teacher of a loss that no run had; needs the distillation law."""
        like = next(source.name for source in self.sources.values() if source.teacher is not None)

        def added(curves: dict[str, Curve]) -> dict[str, Curve]:
            known = curves[like]
            return {**curves, name: Curve(known.law, known.parameters, loss)}

        sources = {**self.sources, name: Source(name, Teacher(name, loss), ())}
        return replace(
            self,
            sources=sources,
            curves=added(self.curves),
            resampled=[added(each) for each in self.resampled],
        )


def sources_of(runs: Sequence[ScalingRun]) -> dict[str, Source]:
    """Groups runs by their teacher, those from scratch first."""
    grouped: dict[str, list[ScalingRun]] = {}
    for run in sorted(runs, key=lambda run: run.teacher is not None):
        grouped.setdefault(SCRATCH if run.teacher is None else run.teacher.path, []).append(run)
    return {name: Source(name, found[0].teacher, tuple(found)) for name, found in grouped.items()}


def sample_of(runs: Sequence[ScalingRun], teacher_losses: Array | None = None) -> Sample:
    return Sample(
        np.array([run.parameters for run in runs], float),
        np.array([run.tokens for run in runs], float),
        np.array([run.loss for run in runs], float),
        teacher_losses,
    )


def fit_runs(
    runs: Sequence[ScalingRun], law: LawName = "distillation", resamples: int = 200, seed: int = 0
) -> Fit:
    """Fits the laws and resamples the runs.

    With `law` chinchilla, each source has a law `SUPERVISED` of its own, and a source of too few runs is left out. With
    distillation, all runs with a teacher share a `distillation_law`, which needs runs from scratch beside them. Without
    teachers, both are the same.

    Args:
        resamples: number of resampled sets of runs.

    Raises:
        UserError: the runs are too few, or too much alike, for a law.
    """
    sources = sources_of(runs)
    if law == "distillation" and set(sources) != {SCRATCH}:
        return _fit_distillation(sources, resamples, seed)
    refused = {}
    for source in sources.values():
        try:
            _check_enough(source.runs, len(SUPERVISED.names), source.name)
        except UserError as error:
            refused[source.name] = str(error)
    if refused.keys() == sources.keys():
        raise UserError("\n".join(refused.values()))
    sources = {name: source for name, source in sources.items() if name not in refused}
    samples = {name: sample_of(source.runs) for name, source in sources.items()}
    fitted = {name: fit_supervised(sample) for name, sample in samples.items()}
    resampled = [
        {name: Curve(SUPERVISED, parameters) for name, parameters in each.items()}
        for each in bootstrap(samples, fitted, resamples, seed)
    ]
    curves = {name: Curve(SUPERVISED, parameters) for name, parameters in fitted.items()}
    return Fit(sources, curves, resampled, "chinchilla", seed, refused)


def _fit_distillation(sources: dict[str, Source], resamples: int, seed: int) -> Fit:
    taught = {name: source for name, source in sources.items() if source.teacher is not None}
    students = [run for source in taught.values() for run in source.runs]
    hint = "; --law chinchilla fits the runs of each teacher on their own"
    scratch = sources[SCRATCH].runs if SCRATCH in sources else ()
    _check_enough(scratch, len(SUPERVISED.names), SCRATCH, hint)
    losses = np.array([run.teacher.loss for run in students if run.teacher is not None])
    if len(set(losses)) < 2:
        raise UserError(
            f"all runs with a teacher have one teacher's loss ({losses[0]:.4f}), but the distillation law needs at "
            f"least 2 different ones{hint}."
        )
    count = len(distillation_law(dict.fromkeys(SUPERVISED.names, 1.0)).names)
    _check_enough(students, count, "with a teacher", hint)

    text, pooled = sample_of(scratch), sample_of(students, losses)
    baseline = fit_supervised(text)
    law = distillation_law(baseline)
    fitted = fit_distillation(law, pooled)
    baselines = [each[SCRATCH] for each in bootstrap({SCRATCH: text}, {SCRATCH: baseline}, resamples, seed)]
    redrawn = bootstrap_distillation(pooled, fitted, baselines, seed)
    teachers = {name: source.teacher.loss for name, source in taught.items() if source.teacher is not None}

    curves = {SCRATCH: Curve(SUPERVISED, baseline)}
    curves |= {name: Curve(law, fitted, loss) for name, loss in teachers.items()}
    resampled = []
    for supervised, (drawn_law, parameters) in zip(baselines, redrawn, strict=True):
        drawn = {SCRATCH: Curve(SUPERVISED, supervised)}
        drawn |= {name: Curve(drawn_law, parameters, loss) for name, loss in teachers.items()}
        resampled.append(drawn)
    return Fit(sources, curves, resampled, "distillation", seed)


def _check_enough(runs: Sequence[ScalingRun], parameters: int, name: str, hint: str = "") -> None:
    """Raises UserError if the runs do not determine a law with that many parameters."""
    which = name if name in (SCRATCH, "with a teacher") else f"of the teacher {name}"
    if len(runs) <= parameters:
        raise UserError(
            f"a law of {parameters} parameters needs at least {parameters + 1} runs {which}, and there "
            f"{'is' if len(runs) == 1 else 'are'} {len(runs)}{hint}."
        )
    values = {
        "numbers of parameters": {run.parameters for run in runs},
        "numbers of tokens": {run.tokens for run in runs},
    }
    for what, found in values.items():
        if len(found) < LEAST_DIFFERENT:
            listed = " and ".join(f"{value:,}" for value in sorted(found))
            raise UserError(
                f"the {len(runs)} runs {which} have only {len(found)} different {what} ({listed}), but the law needs "
                f"at least {LEAST_DIFFERENT}{hint}."
            )
