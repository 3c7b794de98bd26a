"""Tables of the files that `gemma2 eval --json` writes."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError
from gemma2_jax.reports.report_tables import Cell, Column, text_cell
from gemma2_jax.reports.reported_runs import setting
from gemma2_jax.training.metrics import format_number, is_number

_FORMAT = 1
_ALL = "all domains"


def check_evaluation(path: Path, content: Any) -> dict[str, Any]:
    """Returns the content of a file of `gemma2 eval`. Raises UserError if it is another file."""
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise UserError(
            f"{path} is not a file of gemma2 eval; accepted: run folders, folders above them, such files."
        )
    if content.get("format") != _FORMAT:
        raise UserError(
            f"{path} has the format {content.get('format')}, and this version reads format {_FORMAT}; run gemma2 eval "
            "again."
        )
    found: dict[str, Any] = content
    return found


def _is_row(row: Any) -> bool:
    """Whether the results of one checkpoint have their parts; a part that is missing or null is empty."""
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        return False
    groups = [row.get(key) or {} for key in ("scores", "tasks", "left_out")]
    if not all(isinstance(group, dict) for group in groups):
        return False
    parts = [*groups[0].values(), row.get("memorisation") or {}]
    tasks = list(groups[1].values())
    if not all(isinstance(part, dict) for part in [*parts, *tasks]):
        return False
    tables = [part.get("domains") or {} for part in parts] + [task.get("metrics") or {} for task in tasks]
    totals = [part.get("total") or {} for part in parts]
    if not all(isinstance(table, dict) for table in [*tables, *totals]):
        return False
    return all(isinstance(values or {}, dict) for table in tables for values in table.values())


def evaluation_tables(evaluations: Mapping[str, Any]) -> Iterator[tuple[str, list[Column]]]:
    """Yields a title and a table for each file, each kind of windows, the memorisation test, and the harness's tasks.

    A table of text has a row for each checkpoint and domain; numbers of different kinds of windows are not comparable.
    """
    for path, content in evaluations.items():
        rows = content["rows"]
        teacher = setting(content, "teacher.path")
        beside = "" if teacher is None else f", compared with {teacher}"
        for kind in dict.fromkeys(kind for row in rows for kind in row.get("scores") or {}):
            parts = [(row["name"], row["scores"][kind]) for row in rows if kind in (row.get("scores") or {})]
            yield f"{path}: {kind} windows of {content.get('context')} tokens{beside}", _table(parts)
        tested = [(row["name"], row["memorisation"]) for row in rows if row.get("memorisation")]
        if tested:
            yield f"{path}: memorisation", _table(tested)
        if any(row.get("tasks") or row.get("left_out") for row in rows):
            yield f"{path}: tasks of the evaluation harness", _tasks_table(rows)


def _table(parts: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Column]:
    """A table with a row for each checkpoint and domain, and the totals if there are several domains."""
    lines: list[tuple[str, str, dict[str, Any]]] = []
    for name, part in parts:
        domains = dict(part.get("domains") or {})
        if len(domains) != 1 and part.get("total"):
            domains[_ALL] = part["total"]
        lines += [(name, domain, dict(_numbers(values or {}))) for domain, values in domains.items()]
    columns = [
        Column("checkpoint", [text_cell(name) for name, _, _ in lines], True),
        Column("domain", [text_cell(domain) for _, domain, _ in lines], True),
    ]
    for key in dict.fromkeys(key for _, _, values in lines for key in values):
        columns.append(Column(key.replace("_", " "), [_cell(values.get(key)) for _, _, values in lines]))
    return columns


def _tasks_table(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """A table with a row for each checkpoint, task and metric, and for each task that was left out."""
    lines: list[tuple[str, str, Mapping[str, Any], str, Mapping[str, Any], str]] = []
    for row in rows:
        for task, scores in (row.get("tasks") or {}).items():
            for metric, found in (scores.get("metrics") or {}).items():
                lines.append((row["name"], task, scores, metric, found or {}, ""))
        lines += [
            (row["name"], task, {}, "", {}, str(why)) for task, why in (row.get("left_out") or {}).items()
        ]
    columns = [
        Column("checkpoint", [text_cell(line[0]) for line in lines], True),
        Column("task", [text_cell(line[1]) for line in lines], True),
        Column("metric", [text_cell(line[3]) for line in lines], True),
        Column("value", [_cell(line[4].get("value")) for line in lines]),
        Column("standard error", [_cell(line[4].get("stderr")) for line in lines]),
        *(Column(key, [_cell(line[2].get(key)) for line in lines]) for key in ("shots", "documents")),
        Column("left out", [text_cell(line[5]) for line in lines], True),
    ]
    return [column for column in columns if any(cell.value is not None for cell in column.cells)]


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if is_number(value):
            yield key, value


def _cell(value: Any) -> Cell:
    """A cell of a number; an empty one for anything else."""
    if not is_number(value):
        return Cell()
    return Cell(f"{value:,}" if isinstance(value, int) else format_number(value, 4), value)
