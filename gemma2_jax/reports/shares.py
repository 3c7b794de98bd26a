"""The gain of students: the share of the gap to the teacher that they close, and the share that other targets keep.

    closed = (scratch - student) / (scratch - teacher)       kept = (scratch - student) / (scratch - online student)

All are cross-entropies on the validation split in nats. A student is paired with the runs of the same seed.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from gemma2_jax.reports.groups import (
    RunGroup,
    by_seed,
    grouped_runs,
    has_teacher,
    result_settings,
    seed_of,
    teacher_of,
)
from gemma2_jax.reports.intervals import SeedInterval, seed_interval
from gemma2_jax.reports.reported_runs import Run, setting

# Settings in which a student may differ from the run from scratch that it is compared with.
_TRAINED_BY = ("objective.", "distill.", "optimizer.")


@dataclass(frozen=True)
class Share:
    """A student's share.

    Attributes:
        student: name of the student's group.
        closed: share of the gap between scratch and teacher that it closes; None without a teacher in the report, or
            if the teacher is not better than scratch.
        kept: share of the gain of online distillation that it keeps; None for online students, and if there is none.
        scratch: name of the group from scratch that it is compared with.
        teacher: name of the teacher's run; None if it is not in the report.
        full: name of the online student's group that `kept` refers to.
    """

    student: str
    closed: SeedInterval | None
    kept: SeedInterval | None
    scratch: str
    teacher: str | None
    full: str | None


def gap_shares(runs: Sequence[Run]) -> list[Share]:
    """Returns the shares of all students that have a run from scratch of the same sizes, data and tokens."""
    groups = [found for found in grouped_runs(runs) if found.losses]
    teachers = {id(teacher) for run in runs if (teacher := teacher_of(run, runs)) is not None}
    students = [found for found in groups if has_teacher(found.runs[0])]
    plain = [
        found
        for found in groups
        if not has_teacher(found.runs[0]) and not any(id(run) in teachers for run in found.runs)
    ]
    found = []
    for student in students:
        scratch = _best(other for other in plain if _comparable(student.runs[0], other.runs[0]))
        if scratch is None:
            continue
        teacher = teacher_of(student.runs[0], runs)
        full = None if _is_online(student.runs[0]) else _online_student(student, students, runs)
        closed = _paired(student, scratch, lambda run: teacher_of(run, runs))
        kept = None if full is None else _paired(student, scratch, _partner(full))
        if closed is not None or kept is not None:
            name = None if teacher is None else _name_of(teacher, groups)
            found.append(
                Share(student.name, closed, kept, scratch.name, name, None if full is None else full.name)
            )
    return found


def _paired(student: RunGroup, scratch: RunGroup, goal: Callable[[Run], Run | None]) -> SeedInterval | None:
    """Returns (scratch - student) / (scratch - goal) over the seeds; None if a seed has no positive denominator."""
    partner = _partner(scratch)
    values = []
    for run in student.runs:
        best, base = goal(run), partner(run)
        if run.cross_entropy is None or best is None or best.cross_entropy is None or base is None:
            continue
        if base.cross_entropy is None or base.cross_entropy <= best.cross_entropy:
            return None
        values.append((base.cross_entropy - run.cross_entropy) / (base.cross_entropy - best.cross_entropy))
    return seed_interval(values) if values else None


def _partner(other: RunGroup) -> Callable[[Run], Run | None]:
    """Returns a function from a run to the run of `other` with its seed, or to its only run."""
    seeds = by_seed(other.runs)
    return lambda run: seeds.get(seed_of(run), other.runs[0] if len(other.runs) == 1 else None)


def _comparable(student: Run, scratch: Run) -> bool:
    """Whether two runs have the same sizes, data and tokens, whatever they are trained by."""
    settings = [
        {key: value for key, value in result_settings(run).items() if not key.startswith(_TRAINED_BY)}
        for run in (student, scratch)
    ]
    return settings[0] == settings[1] and student.data == scratch.data


def _online_student(student: RunGroup, students: Sequence[RunGroup], runs: Sequence[Run]) -> RunGroup | None:
    teacher = teacher_of(student.runs[0], runs)
    return _best(
        other
        for other in students
        if _is_online(other.runs[0])
        and _comparable(student.runs[0], other.runs[0])
        and _same_teacher(teacher, teacher_of(other.runs[0], runs))
    )


def _same_teacher(one: Run | None, other: Run | None) -> bool:
    return one is not None and other is not None and result_settings(one) == result_settings(other)


def _is_online(run: Run) -> bool:
    """Whether a run learns from the teacher's complete distributions on the data, in every step, and from no more."""
    settings = [setting(run.config, f"distill.{key}") for key in ("cache", "on_policy", "match")]
    return has_teacher(run) and settings == [None, None, None]


def _best(groups: Iterable[RunGroup]) -> RunGroup | None:
    """Returns the group with the lowest mean cross-entropy; None without groups."""
    return min(groups, key=lambda found: statistics.fmean(found.losses), default=None)


def _name_of(run: Run, groups: Sequence[RunGroup]) -> str:
    return next((found.name for found in groups if any(member is run for member in found.runs)), run.name)
