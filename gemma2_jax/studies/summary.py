"""What a study with several seeds came to: means and deviations over them, as a table and a picture."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gemma2_jax.evaluation.evaluate import Evaluation
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.studies.stages import Measurement
from gemma2_jax.studies.tables import Table


@dataclass(frozen=True)
class Group:
    """A run of a study with all of its seeds.

    Attributes:
        name: the run's; series: as in `StudyRun`.
        evaluations: one for each seed.
        seconds: mean time of a seed, its cache's included.
    """

    name: str
    series: str | None
    evaluations: tuple[Evaluation, ...]
    seconds: float


def group_by_run(
    study: StudyConfig, measurements: Mapping[str, Measurement], seconds: Mapping[str, float]
) -> list[Group]:
    """The study's runs in order.

    Args:
        measurements: by folder; seconds: of each stage, as `read_times` gives them.
    """
    groups = []
    for name, run in study.runs.items():
        folders = study.folders(name)
        spent = sum(
            seconds.get(f"{stage} {folder}", 0.0) for stage in ("cache", "train") for folder in folders
        )
        evaluations = tuple(measurements[folder].evaluation for folder in folders)
        groups.append(Group(name, run.series, evaluations, spent / len(folders)))
    return groups


def summary_table(study: StudyConfig, groups: Sequence[Group]) -> Table:
    """Each figure as mean ± standard deviation over the seeds."""
    columns = ["run", "parameters", "seeds", "validation cross-entropy", "perplexity"]
    figures: list[Callable[[Evaluation], float | None]] = [
        lambda found: found.cross_entropy,
        lambda found: found.perplexity,
    ]
    digits = [4, 2]
    if study.reference is not None:
        columns += [f"agrees with {study.reference}, %", f"KL from {study.reference}"]
        figures += [
            lambda found: None if found.agreement is None else 100 * found.agreement,
            lambda found: found.kl,
        ]
        digits += [1, 4]
    rows = []
    for group in groups:
        row = [group.name, f"{group.evaluations[0].parameters:,}", str(len(group.evaluations))]
        for figure, places in zip(figures, digits, strict=True):
            row.append(_spread([figure(found) for found in group.evaluations], places))
        rows.append([*row, f"{group.seconds:,.0f} s"])
    return Table([*columns, "time of one"], rows)


def _spread(values: Sequence[float | None], places: int) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    mean = f"{statistics.mean(numbers):.{places}f}"
    return mean if len(numbers) == 1 else f"{mean} ± {statistics.stdev(numbers):.{places}f}"
