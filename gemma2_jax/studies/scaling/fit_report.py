"""The report of a fit: tables on the terminal, fit.json and fit.png."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.studies.scaling.compute import Cost, best_model, costs, payoff
from gemma2_jax.studies.scaling.fit import CONFIDENCE, DELTA
from gemma2_jax.studies.scaling.fitted import SCRATCH, Fit
from gemma2_jax.studies.scaling.plot import plot_fit
from gemma2_jax.studies.scaling.runs import Collected
from gemma2_jax.studies.tables import Table, print_line

JSON_FILE, PLOT_FILE = "fit.json", "fit.png"
_BEYOND = "beyond the runs"


@dataclass(frozen=True)
class Question:
    """A point to predict the loss at.

    Attributes:
        parameters, tokens: N and D.
        teacher_loss: loss of a teacher that no run had; None for the sources of the fit.
    """

    parameters: float
    tokens: float
    teacher_loss: float | None = None


def write_fit(
    fit: Fit,
    collected: Collected,
    embedding: bool,
    questions: Sequence[Question],
    budgets: Sequence[float],
    folder: Path,
    console: Console,
) -> None:
    """Prints the fit and its answers, and writes fit.json and fit.png into `folder`.

    Args:
        embedding: whether N counts the embedding.
        budgets: numbers of FLOPs to find the best model for.
    """
    counted = "with the embedding" if embedding else "without the embedding"
    print_line(console, f"{len(collected.runs)} runs; N counts the parameters {counted}", "bold")
    left_out = {**collected.left_out, **fit.left_out}
    for left, reason in left_out.items():
        print_line(console, f"left out: {left}: {reason}")
    for line in _cautions(collected):
        print_line(console, f"caution: {line}", "yellow")
    record: dict[str, Any] = {
        "embedding_counted": embedding,
        "huber_delta": DELTA,
        "resamples": len(fit.resampled),
        "seed": fit.seed,
        "confidence": CONFIDENCE,
        "left_out": left_out,
        "laws": _laws(fit, console),
        "runs": _runs(fit),
    }
    if questions:
        record["predictions"] = _predictions(fit, questions, console)
    if budgets:
        record["compute"] = _budgets(fit, budgets, console)
    if SCRATCH in fit.sources and len(fit.sources) > 1:
        record["teacher_pays"] = _payoffs(fit, console)
    write_text(folder / JSON_FILE, json.dumps(record, ensure_ascii=False, indent=1))
    plot_fit(fit, folder / PLOT_FILE)
    print_line(console, f"numbers in {folder / JSON_FILE}, plot in {folder / PLOT_FILE}")


def beyond(fit: Fit, name: str, n: float, d: float, teacher_loss: float | None = None) -> dict[str, str]:
    """The inputs that are outside the span of the source's runs: N, D or T, each with a clause that says so.

    Args:
        teacher_loss: loss of a teacher that no run had.
    """
    students = [run for source in fit.sources.values() if source.teacher is not None for run in source.runs]
    runs = fit.sources[name].runs if teacher_loss is None else students
    spans: dict[str, tuple[float, list[float]]] = {
        "N": (n, [run.parameters for run in runs]),
        "D": (d, [run.tokens for run in runs]),
    }
    if teacher_loss is not None:
        spans["T"] = teacher_loss, [run.teacher.loss for run in students if run.teacher is not None]
    return {
        letter: f"{letter}={value:.4g} is beyond the runs ({min(values):.4g} to {max(values):.4g})"
        for letter, (value, values) in spans.items()
        if not min(values) * 0.999 <= value <= max(values) * 1.001
    }


def _cautions(collected: Collected) -> Iterator[str]:
    targets = [run.targets for run in collected.runs]
    if min(targets) != max(targets):
        yield (
            f"the runs were validated on different numbers of tokens ({min(targets):,} to {max(targets):,}), so their "
            "losses differ for that reason too; training.eval_batches=null uses all held-out documents."
        )


def _laws(fit: Fit, console: Console) -> list[dict[str, Any]]:
    """Prints and returns the parameters of each law, once if several sources share it."""
    found: list[dict[str, Any]] = []
    shared: dict[int, list[str]] = {}
    for name, curve in fit.curves.items():
        shared.setdefault(id(curve.parameters), []).append(name)
    for names in shared.values():
        curve = fit.curves[names[0]]
        runs = [run for name in names for run in fit.sources[name].runs]
        intervals = {parameter: fit.parameter_interval(names[0], parameter) for parameter in curve.parameters}
        rows = [
            [parameter, _number(value), *_range(intervals[parameter])]
            for parameter, value in curve.parameters.items()
        ]
        which = SCRATCH if names == [SCRATCH] else f"with the teacher {' or '.join(names)}"
        title = f"{curve.law.formula}, of {len(runs)} runs {which}"
        Table(["parameter", "value", "from", "to"], rows).print(console, title)
        values = {
            parameter: {"value": value, "interval": intervals[parameter]}
            for parameter, value in curve.parameters.items()
        }
        found.append({"law": curve.law.formula, "sources": names, "runs": len(runs), "parameters": values})
    if fit.resampled:
        print_line(
            console,
            f"from, to: {CONFIDENCE:.0%} intervals of {len(fit.resampled)} sets of resampled runs (seed {fit.seed}); "
            "they do not include the noise of a single run",
        )
    return found


def _runs(fit: Fit) -> list[dict[str, Any]]:
    found = []
    for name, source in fit.sources.items():
        for run in source.runs:
            loss = float(fit.curves[name].loss(float(run.parameters), float(run.tokens)))
            found.append({**dataclasses.asdict(run), "source": name, "fitted": loss})
    return found


def _predictions(fit: Fit, questions: Sequence[Question], console: Console) -> list[dict[str, Any]]:
    found, rows = [], []
    for question in questions:
        n, d, teacher_loss = question.parameters, question.tokens, question.teacher_loss
        asked, names = fit, list(fit.sources)
        if teacher_loss is not None:
            if fit.law != "distillation":
                raise UserError(
                    f"--predict has T={teacher_loss:g}, but no law of the fit depends on the teacher's loss; leave T "
                    "out, or fit runs of several teachers with --law distillation."
                )
            names = [f"a teacher of loss {teacher_loss:g}"]
            asked = fit.with_teacher(names[0], teacher_loss)
        for name in names:
            loss, around = asked.loss(name, n, d)
            outside = beyond(asked, name, n, d, teacher_loss)
            rows.append(
                [name, _number(n), _number(d), f"{loss:.4f}", *_range(around, ".4f"), ", ".join(outside)]
            )
            answer = {"loss": loss, "interval": around, "extrapolated": list(outside.values())}
            found.append({"source": name, **dataclasses.asdict(question), **answer})
    columns = ["source", "N", "D", "loss", "from", "to", _BEYOND]
    Table(columns, rows).print(console, "Predicted validation cross-entropy")
    _warn_if_beyond(rows, console)
    return found


def _budgets(fit: Fit, budgets: Sequence[float], console: Console) -> list[dict[str, Any]]:
    found, rows = [], []
    for flops in budgets:
        for name, label, cost in _ways(fit):
            best = best_model(fit, name, cost, flops)
            if best is None:
                rows.append([f"{label}: costs more", _number(flops), *["–"] * 5, ""])
                continue
            outside = beyond(fit, name, best.parameters, best.tokens)
            numbers = [_number(flops), _number(best.parameters), _number(best.tokens), f"{best.loss:.4f}"]
            rows.append([label, *numbers, *_range(best.interval, ".4f"), ", ".join(outside)])
            answer = {**dataclasses.asdict(best), "extrapolated": list(outside.values())}
            found.append({"flops": flops, "source": name, "cost": label, **answer})
    columns = ["source", "FLOPs", "N", "D", "loss", "from", "to", _BEYOND]
    Table(columns, rows).print(console, "The best model for each number of FLOPs")
    _warn_if_beyond(rows, console)
    return found


def _payoffs(fit: Fit, console: Console) -> list[dict[str, Any]]:
    print_line(console, "Does a teacher pay at equal FLOPs?", "bold")
    found = []
    for name, label, cost in _ways(fit):
        if name == SCRATCH:
            continue
        paid = payoff(fit, name, cost)
        if paid is None:
            print_line(
                console, f"{label}: no number of FLOPs is in the span of these runs and of those from scratch"
            )
            continue
        found.append({"source": name, "cost": label, **dataclasses.asdict(paid)})
        span = f"between {paid.low:.3g} and {paid.high:.3g} FLOPs"
        if paid.until is None:
            verdict = f"never {span}"
        else:
            listed = " and ".join(f"from {low:.3g} to {high:.3g}" for low, high in paid.ranges)
            verdict = f"{listed} FLOPs, of those {span}"
        if paid.interval is not None:
            low, high = paid.interval
            verdict += f"; the end is {low:.3g} to {high:.3g}"
        if paid.share is not None:
            verdict += f"; somewhere in {paid.share:.0%} of the resampled fits"
        print_line(console, f"{label}: {verdict}")
    return found


def _ways(fit: Fit) -> Iterator[tuple[str, str, Cost]]:
    """Each source with each way of counting its cost: its name, a label, the cost."""
    for name, source in fit.sources.items():
        for way, cost in costs(source).items():
            yield name, f"{name}, {way}" if way else name, cost


def _warn_if_beyond(rows: Sequence[Sequence[str]], console: Console) -> None:
    letters = sorted({letter for row in rows for letter in row[-1].split(", ") if letter})
    if letters:
        print_line(
            console,
            f"caution: the law is extrapolated where {' or '.join(letters)} is beyond the runs",
            "yellow",
        )


def _number(value: float) -> str:
    return f"{value:.4g}"


def _range(interval: tuple[float, float] | None, form: str = ".4g") -> list[str]:
    return ["–", "–"] if interval is None else [f"{value:{form}}" for value in interval]
