"""The tables of a report, for HTML, Markdown and CSV alike."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from gemma2_jax.reports.curves import training_flops, training_seconds
from gemma2_jax.reports.differences import differing_keys
from gemma2_jax.reports.groups import RunGroup
from gemma2_jax.reports.intervals import SeedInterval, seed_interval
from gemma2_jax.reports.reported_runs import Run
from gemma2_jax.reports.scales import power_text
from gemma2_jax.reports.shares import Share
from gemma2_jax.reports.sweeps import numeric_value, swept_keys
from gemma2_jax.training.metrics import format_number
from gemma2_jax.training.progress import duration

NOTHING = "–"  # an empty cell


@dataclass(frozen=True)
class Cell:
    """A cell: its text, and the value that it is sorted by and that CSV files hold; None if it is empty."""

    text: str = NOTHING
    value: float | str | None = None


@dataclass(frozen=True)
class Column:
    """A column with a cell for each row.

    Attributes:
        name: heading.
        cells: cells from the first row to the last.
        is_text: whether it holds text; other columns hold numbers.
        best: whether "lowest" or "highest" is best; None if neither is.
    """

    name: str
    cells: Sequence[Cell]
    is_text: bool = False
    best: str | None = None

    def best_rows(self) -> set[int]:
        """The rows with the best number, if there are several numbers that differ."""
        numbers = [cell.value for cell in self.cells if isinstance(cell.value, int | float)]
        if self.best is None or len(set(numbers)) < 2:
            return set()
        best = min(numbers) if self.best == "lowest" else max(numbers)
        return {row for row, cell in enumerate(self.cells) if cell.value == best}


def runs_table(runs: Sequence[Run]) -> list[Column]:
    """Returns the columns of a table with a row for each run, without columns that are empty for all."""
    states = [text_cell(state(run)) for run in runs]
    columns = [
        Column("run", [text_cell(run.name) for run in runs], True),
        Column("validation cross-entropy", [_score(run, "cross_entropy", 4) for run in runs], best="lowest"),
        Column("perplexity", [_score(run, "perplexity", 2) for run in runs], best="lowest"),
        Column("KL from teacher", [_score(run, "kl", 4) for run in runs], best="lowest"),
        Column(
            "agrees with teacher", [_percentage(run.scores.get("agreement")) for run in runs], best="highest"
        ),
        *([Column("state", states, True)] if any(cell.text != "finished" for cell in states) else []),
        *(_settings_column(key, [run.values.get(key) for run in runs]) for key in swept_keys(runs)),
        Column("parameters", [_whole(run.scores.get("parameters")) for run in runs]),
        Column("tokens seen", [_whole(run.scores.get("tokens_seen")) for run in runs]),
        Column("training FLOPs", [_flops(training_flops(run)) for run in runs]),
        Column("training time", [_time(training_seconds(run)) for run in runs]),
        Column("tokens/s", [_whole(_speed(run)) for run in runs]),
    ]
    return [column for column in columns if any(cell.value is not None for cell in column.cells)]


def groups_table(groups: Sequence[RunGroup]) -> list[Column]:
    """Returns the columns of a table of means over seeds, with a row for each group that has a loss."""
    scored = [group for group in groups if group.losses]
    found = [seed_interval(group.losses) for group in scored]
    return [
        Column("runs", [text_cell(group.name) for group in scored], True),
        Column("seeds", [_whole(each.count) for each in found]),
        Column(
            "mean cross-entropy",
            [Cell(format_number(each.mean, 4), each.mean) for each in found],
            best="lowest",
        ),
        Column("interval", [Cell(range_text(each, 4), each.low) for each in found]),
        Column("kind of interval", [text_cell(each.kind) for each in found], True),
    ]


def shares_table(found: Sequence[Share]) -> list[Column]:
    """Returns the columns of a table with a row for each student."""
    columns = [
        Column("student", [text_cell(share.student) for share in found], True),
        Column("gap to the teacher closed", [_share(share.closed) for share in found]),
        Column("interval", [_share_range(share.closed) for share in found]),
        Column("gain of online distillation kept", [_share(share.kept) for share in found]),
        Column("interval of what is kept", [_share_range(share.kept) for share in found]),
        Column("kind of interval", [text_cell(_kind(share)) for share in found], True),
        Column("compared with", [text_cell(_compared(share)) for share in found], True),
    ]
    return [column for column in columns if any(cell.value is not None for cell in column.cells)]


def differences_table(runs: Sequence[Run]) -> list[Column]:
    """Returns the columns of a table of settings that differ: a row for each key, or for each run if those are many."""
    found = differing_keys(runs)
    if not found:
        return []
    names = [run.name for run in runs]
    if len(runs) <= 6:
        values = zip(*found.values(), strict=True)
        columns = [Column("key", [text_cell(key) for key in found], True)]
        return columns + [
            Column(name, [text_cell(value) for value in own], True)
            for name, own in zip(names, values, strict=True)
        ]
    columns = [Column("run", [text_cell(name) for name in names], True)]
    return columns + [_settings_column(key, values) for key, values in found.items()]


def runs_csv(runs: Sequence[Run], groups: Sequence[RunGroup]) -> str:
    """Returns a CSV file with a row for each run: its settings that differ, and its results in plain numbers."""
    group_of = {run.name: group.name for group in groups for run in group.runs}
    table: dict[str, Sequence[object]] = {
        "run": [run.name for run in runs],
        "group": [group_of[run.name] for run in runs],
        "folder": [str(run.folder) for run in runs],
        "state": [state(run) for run in runs],
        "step": [run.step for run in runs],
        **differing_keys(runs),
        "training_flops": [training_flops(run) for run in runs],
        "training_seconds": [training_seconds(run) for run in runs],
    }
    for name in dict.fromkeys(name for run in runs for name in run.scores):
        table[name] = [run.scores.get(name) for run in runs]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    writer.writerows(zip(*table.values(), strict=True))
    return text.getvalue()


def state(run: Run) -> str:
    """Returns how far a run is: finished, failed, or its steps."""
    if run.error is not None:
        return "failed"
    if run.is_finished:
        return "finished"
    return f"{run.step:,} of {run.steps:,} steps" if run.steps else f"{run.step:,} steps"


def text_cell(text: str) -> Cell:
    """Returns a cell of text; an empty one for no text."""
    return Cell(text, text) if text else Cell()


def range_text(found: SeedInterval, places: int, factor: float = 1.0) -> str:
    """Returns the ends of an interval."""
    if found.low is None or found.high is None:
        return NOTHING
    return f"{format_number(factor * found.low, places)} to {format_number(factor * found.high, places)}"


def percent(value: float) -> str:
    """Returns a fraction as a percentage."""
    return f"{100 * value:.1f} %"


def _settings_column(key: str, values: Sequence[str | None]) -> Column:
    """A column of settings: of numbers if all are numbers."""
    numbers = [None if value is None else numeric_value(value) for value in values]
    if None in numbers:
        return Column(key, [text_cell(value or "") for value in values], True)
    return Column(key, [Cell(str(value), each) for value, each in zip(values, numbers, strict=True)])


def _speed(run: Run) -> float | None:
    speeds = [row["tokens_per_second"] for row in run.rows if "tokens_per_second" in row]
    return median(speeds) if speeds else None


def _whole(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:,.0f}", value)


def _score(run: Run, name: str, places: int) -> Cell:
    value = run.scores.get(name)
    return Cell() if value is None else Cell(format_number(value, places), value)


def _flops(value: float | None) -> Cell:
    return Cell() if value is None else Cell(power_text(value), value)


def _time(seconds: float | None) -> Cell:
    return Cell() if seconds is None else Cell(duration(seconds), seconds)


def _percentage(value: float | None) -> Cell:
    return Cell() if value is None else Cell(percent(value), value)


def _share(found: SeedInterval | None) -> Cell:
    return Cell() if found is None else _percentage(found.mean)


def _share_range(found: SeedInterval | None) -> Cell:
    if found is None or found.low is None:
        return Cell()
    return Cell(f"{range_text(found, 1, 100.0)} %", found.low)


def _kind(share: Share) -> str:
    found = share.closed or share.kept
    return "" if found is None else found.kind


def _compared(share: Share) -> str:
    names: Mapping[str, str | None] = {
        "scratch": share.scratch,
        "teacher": share.teacher,
        "online": share.full,
    }
    return ", ".join(f"{role}: {name}" for role, name in names.items() if name is not None)
