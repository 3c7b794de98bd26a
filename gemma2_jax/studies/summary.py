"""Results over several seeds: means and standard deviations, for a table and a plot."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gemma2_jax.evaluation.evaluate_run import Evaluation
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.studies.stages import Measurement
from gemma2_jax.studies.tables import Table
from gemma2_jax.training.metrics import format_number


@dataclass(frozen=True)
class Group:
    """A run of a study, or a combination of a sweep, with all of its seeds.

    Attributes:
        name: name of the run, or values of the combination.
        series: the line of the plot that the group is a point of; None if it is not on a line.
        x: position along the horizontal axis; None if the group is not on a line.
        evaluations: one evaluation for each seed.
        seconds: mean seconds per seed, including the time of its cache.
    """

    name: str
    series: str | None
    x: float | None
    evaluations: tuple[Evaluation, ...]
    seconds: float


def group_by_run(
    study: StudyConfig, measurements: Mapping[str, Measurement], seconds: Mapping[str, float]
) -> list[Group]:
    """Returns a group for each run of the study, in order.

    Args:
        measurements: measurements by folder.
        seconds: seconds of each stage, from `read_times`.
    """
    groups = []
    for name, run in study.runs.items():
        folders = study.folders(name)
        spent = sum(
            seconds.get(f"{stage} {folder}", 0.0) for stage in ("cache", "train") for folder in folders
        )
        evaluations = tuple(measurements[folder].evaluation for folder in folders)
        x = None if run.series is None else evaluations[0].parameters
        groups.append(Group(name, run.series, x, evaluations, spent / len(folders)))
    return groups


def summary_table(groups: Sequence[Group], reference: str | None) -> Table:
    """Returns a table of means ± standard deviations over the seeds.

    Args:
        reference: name of the model that all are compared with; None: no comparison.
    """
    columns = ["run", "parameters", "seeds", "validation cross-entropy", "perplexity"]
    measures: list[Callable[[Evaluation], float | None]] = [
        lambda found: found.cross_entropy,
        lambda found: found.perplexity,
    ]
    digits = [4, 2]
    if reference is not None:
        columns += [f"agrees with {reference}, %", f"KL from {reference}"]
        measures += [
            lambda found: None if found.agreement is None else 100 * found.agreement,
            lambda found: found.kl,
        ]
        digits += [1, 4]
    rows = []
    for group in groups:
        row = [group.name, f"{group.evaluations[0].parameters:,}", str(len(group.evaluations))]
        for measure, places in zip(measures, digits, strict=True):
            row.append(_spread([measure(found) for found in group.evaluations], places))
        rows.append([*row, f"{group.seconds:,.0f} s"])
    return Table([*columns, "time per seed"], rows)


def _spread(values: Sequence[float | None], places: int) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    mean = format_number(statistics.mean(numbers), places)
    if len(numbers) == 1 or not all(map(math.isfinite, numbers)):  # a run that diverged
        return mean
    return f"{mean} ± {format_number(statistics.stdev(numbers), places)}"
