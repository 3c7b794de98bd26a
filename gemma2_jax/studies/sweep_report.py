"""The report of a sweep: a table of its runs, a table of means over seeds, and plots."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gemma2_jax.evaluation.evaluate_run import Evaluation
from gemma2_jax.files import write_text
from gemma2_jax.studies.plots import plot_losses, plot_summary
from gemma2_jax.studies.space import SweepConfig
from gemma2_jax.studies.summary import Group, summary_table
from gemma2_jax.studies.tables import Table, print_line
from gemma2_jax.training.metrics import format_number

_SEED = "seed"  # the key whose values are averaged over
_MOST_CURVES = 10  # per plot, since matplotlib cycles through 10 colours


@dataclass(frozen=True)
class Result:
    """Result of one combination of a sweep, done or failed.

    Attributes:
        values: values that the combination sets, by key.
        folder: folder of its run.
        evaluation: scores of the run; None if it failed.
        error: why it failed; None if it did not fail.
        stopped: step and metric where it was stopped, since better trials went on; None if it is done.
        seconds: time of its training.
    """

    values: Mapping[str, str]
    folder: str
    evaluation: Evaluation | None = None
    error: str | None = None
    stopped: tuple[int, float] | None = None
    seconds: float = 0.0


def write_sweep_report(
    results: Sequence[Result], settings: SweepConfig, folder: Path, console: Console
) -> None:
    """Prints a sweep's tables, and writes table.md, summary.png, loss.png and results.json into `folder`."""
    sign = -1.0 if settings.larger_is_better else 1.0
    done = [result for result in results if result.evaluation is not None]
    done.sort(key=lambda result: sign * getattr(_evaluation(result), settings.metric))
    failed = [result for result in results if result.error is not None]
    stopped = [result for result in results if result.error is None and result.evaluation is None]
    stopped.sort(key=lambda result: _rank(result, sign))
    keys = list(dict.fromkeys(key for result in results for key in result.values))
    compared = any(_evaluation(result).kl is not None for result in done)

    parts = []
    order = (
        f"{'highest' if settings.larger_is_better else 'lowest'} {settings.metric.replace('_', '-')} first"
    )
    axis, groups = _groups(done, [key for key in keys if key != _SEED], sign, settings.metric)
    if any(len(group.evaluations) > 1 for group in groups):
        summary = summary_table(groups, "teacher" if compared else None)
        summary.print(console, f"Means and standard deviations over the seeds, {order}")
        parts += [summary.markdown()]
    if len(groups) > 1:
        plot_summary(groups, folder / "summary.png", axis)
        parts += ["![Validation perplexity of each combination](summary.png)"]
    table = _table(done, failed, keys, compared)
    table.print(console, f"{len(done)} of {len(results)} runs, {order}")
    parts += [table.markdown()]
    if done:
        best = done[:_MOST_CURVES]
        plot_losses({_name(result.values): result.folder for result in best}, folder / "loss.png")
        parts += ["![Loss against steps](loss.png)"]
    if stopped:
        stops = _stopped_table(stopped, keys, settings.metric)
        stops.print(console, "Stopped at a rung, where better trials went on")
        parts += ["Stopped at a rung, where better trials went on:", stops.markdown()]
    if failed:
        parts += ["\n".join(f"- {_name(result.values)} failed: {result.error}" for result in failed)]
    write_text(folder / "table.md", "\n\n".join(parts) + "\n")
    write_text(
        folder / "results.json",
        json.dumps([_record(result) for result in [*done, *stopped, *failed]], ensure_ascii=False, indent=1),
    )
    if groups:
        best = statistics.mean(getattr(found, settings.metric) for found in groups[0].evaluations)
        name = settings.metric.replace("_", "-")
        print_line(console, f"best: {groups[0].name} ({name} {format_number(best, 4)})", "bold")
    for result in failed:
        print_line(console, f"failed: {_name(result.values)}: {result.error}", "red")
    print_line(console, f"table in {folder / 'table.md'}" + (f", plots in {folder}" if done else ""))


def _rank(result: Result, sign: float) -> tuple[int, float]:
    """Sorts runs that were stopped later first, then by their metric there."""
    step, value = result.stopped or (0, 0.0)
    return -step, sign * value


def _stopped_table(stopped: Sequence[Result], keys: Sequence[str], metric: str) -> Table:
    rows = []
    for result in stopped:
        step, value = result.stopped or (0, None)
        rows.append([*_cells(result, keys), str(step), format_number(value, 4)])
    return Table([*keys, "step", metric.replace("_", "-")], rows, left=len(keys))


def _table(done: Sequence[Result], failed: Sequence[Result], keys: Sequence[str], compared: bool) -> Table:
    columns = [*keys, "validation cross-entropy", "perplexity"]
    if compared:
        columns += ["agrees with teacher, %", "KL from teacher"]
    rows = []
    for result in done:
        found = _evaluation(result)
        row = [format_number(found.cross_entropy, 4), format_number(found.perplexity, 2)]
        if compared:
            row.append(format_number(None if found.agreement is None else 100 * found.agreement, 1))
            row.append(format_number(found.kl, 4))
        rows.append([*_cells(result, keys), *row])
    blank = ["–"] * (len(columns) - len(keys) - 1)
    rows += [[*_cells(result, keys), "failed", *blank] for result in failed]
    return Table(columns, rows, left=len(keys))


def _groups(done: Sequence[Result], keys: Sequence[str], sign: float, metric: str) -> tuple[str, list[Group]]:
    """Groups the combinations that differ only in the seed.

    Args:
        sign: -1 if a larger metric is better, else 1.

    Returns:
        The key on the horizontal axis of the plot, and the groups, best mean metric first. The key is the one with the
        most distinct numbers; if no key has two, the groups have no `x` and the plot has a row for each of them.
    """
    together: dict[tuple[str, ...], list[Result]] = {}
    for result in done:
        together.setdefault(tuple(_cells(result, keys)), []).append(result)
    numbers = {key: {_number(result.values.get(key)) for result in done} for key in keys}
    axis = max(keys, key=lambda key: 0 if None in numbers[key] else len(numbers[key]), default="")
    has_axis = bool(axis) and None not in numbers[axis] and len(numbers[axis]) > 1
    groups = []
    for cells, results in together.items():
        values = dict(zip(keys, cells, strict=True))
        name = _name(values) or "all"
        rest = _name({key: value for key, value in values.items() if key != axis})
        spent = [result.seconds for result in results]
        groups.append(
            Group(
                name,
                (rest or axis) if has_axis else None,
                _number(values[axis]) if has_axis else None,
                tuple(_evaluation(result) for result in results),
                sum(spent) / len(spent),
            )
        )
    groups.sort(
        key=lambda group: sign * statistics.mean(getattr(found, metric) for found in group.evaluations)
    )
    return axis, groups


def _evaluation(result: Result) -> Evaluation:
    assert result.evaluation is not None
    return result.evaluation


def _record(result: Result) -> dict[str, object]:
    found: dict[str, object] = {"run": Path(result.folder).name, "values": dict(result.values)}
    if result.evaluation is not None:
        return {**found, **dataclasses.asdict(result.evaluation), "seconds": result.seconds}
    if result.error is not None:
        return {**found, "error": result.error}
    step, value = result.stopped or (0, None)
    return {**found, "stopped": step, "metric": value}


def _cells(result: Result, keys: Sequence[str]) -> list[str]:
    return [result.values.get(key, "") for key in keys]


def _name(values: Mapping[str, str]) -> str:
    """Formats the values on one line as `key=value`, with the last part of each key where that is unambiguous."""
    ends = [key.split(".")[-1] for key in values]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(values, ends, strict=True)}
    return " ".join(f"{short[key]}={value}" for key, value in values.items())


def _number(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None
