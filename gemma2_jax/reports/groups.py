"""Groups of runs that differ only in their seeds."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from gemma2_jax.reports.reported_runs import Run, flat, setting, short_name
from gemma2_jax.training.resume import MAY_CHANGE

SEEDS = ("seed", "data.seed")
_PLACES = ("distill.teacher", "distill.cache")  # compared by what they hold


@dataclass(frozen=True)
class RunGroup:
    """Runs that differ only in their seeds.

    Attributes:
        name: what their names have in common.
        runs: the runs; at least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """A short name: of several values of a sweep, the values without their keys."""
        values = [value for key, value in self.runs[0].values.items() if key not in SEEDS]
        return ", ".join(values) if len(values) > 1 else self.name

    @property
    def losses(self) -> list[float]:
        """The cross-entropies of the runs that have one, in nats."""
        return [run.cross_entropy for run in self.runs if run.cross_entropy is not None]


def grouped_runs(runs: Sequence[Run]) -> list[RunGroup]:
    """Returns the groups in the order of their first runs, with distinct names."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(_key(run, runs), []).append(run)
    names = [_common_name(members) for members in found.values()]
    return [
        RunGroup(name if names.count(name) == 1 else members[0].name, tuple(members))
        for name, members in zip(names, found.values(), strict=True)
    ]


def seed_of(run: Run) -> str:
    """Returns the seeds of a run as text, by which the runs of two groups are paired."""
    return json.dumps([setting(run.config, key) for key in SEEDS])


def teacher_of(run: Run, runs: Sequence[Run]) -> Run | None:
    """Returns the run among `runs` that is the teacher of `run`.

    It is the one in the folder of distill.teacher. If the runs were moved together, it is the one beside `run` whose
    folder has the same name.
    """
    place = setting(run.config, "distill.teacher")
    if not isinstance(place, str):
        return None
    try:
        given = Path(os.path.realpath(place))
    except ValueError:  # no name of a file
        return None
    for folder in (given, run.folder.resolve().parent / given.name):
        for other in runs:
            if other is not run and other.folder.resolve() == folder:
                return other
    return None


def has_teacher(run: Run) -> bool:
    """Whether a run is distilled, from a teacher or from a cache of its outputs."""
    return any(setting(run.config, f"distill.{key}") is not None for key in ("teacher", "cache"))


def result_settings(run: Run) -> dict[str, Any]:
    """Returns the settings by dotted key that a run's result depends on, without its seeds and without places."""
    left_out = {*MAY_CHANGE, *SEEDS, *_PLACES}
    return {
        key: value
        for key, value in flat(run.config).items()
        if not any(key == name or key.startswith(f"{name}.") for name in left_out)
    }


def _key(run: Run, runs: Sequence[Run]) -> str:
    """Text that is equal for two runs exactly if they differ only in their seeds."""
    if not run.config:
        return run.name
    teacher = teacher_of(run, runs)
    return json.dumps(
        [
            sorted(result_settings(run).items()),
            run.data or setting(run.config, "data.folder"),
            setting(run.config, "distill.cache") is not None,
            _teacher_key(teacher) if teacher is not None else setting(run.config, "distill.teacher"),
            {key: value for key, value in run.values.items() if key not in SEEDS},
        ],
        default=str,
    )


def _teacher_key(teacher: Run) -> list[Any]:
    return [sorted(result_settings(teacher).items()), teacher.data]


def _common_name(runs: Sequence[Run]) -> str:
    """What the names of the runs have in common: without a seed at the end, and without the folders above."""
    if len(runs) == 1:
        return runs[0].name
    if runs[0].values:
        rest = {key: value for key, value in runs[0].values.items() if key not in SEEDS}
        if rest:
            return short_name(rest)
    own = {run.config.get("name", run.name) for run in runs}
    if len(own) == 1:
        return str(own.pop())
    columns = zip(*map(str, own), strict=False)
    shared = "".join(letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, columns))
    return re.sub(r"[-_.,=]*(seed)?[-_.,=]*$", "", shared) or runs[0].name


def by_seed(runs: Sequence[Run]) -> Mapping[str, Run]:
    """Returns the runs by their seeds, the first of each."""
    found: dict[str, Run] = {}
    for run in runs:
        found.setdefault(seed_of(run), run)
    return found
