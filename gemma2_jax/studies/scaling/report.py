"""The report of a fit: tables on the terminal, fit.json and fit.png."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
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


def beyond(fit: Fit, name: str, n: float, d: float) -> str | None:
    """A sentence if a point is outside the span of the source's runs; None inside it."""
    runs = fit.sources[name].runs or [
        run for each in fit.sources.values() if each.teacher for run in each.runs
    ]
    spans = {
        f"N={n:.4g}": (n, [run.parameters for run in runs]),
        f"D={d:.4g}": (d, [run.tokens for run in runs]),
    }
    found = [
        f"{what} (runs: {min(values):.4g} to {max(values):.4g})"
        for what, (value, values) in spans.items()
        if not min(values) * 0.999 <= value <= max(values) * 1.001
    ]
    return f"beyond the span of the runs: {' and '.join(found)}" if found else None


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
    notes: dict[str, None] = {}
    for question in questions:
        if question.teacher_loss is None:
            asked, names = fit, list(fit.sources)
        else:
            name = f"a teacher of loss {question.teacher_loss:g}"
            if fit.law != "distillation":
                raise UserError(
                    f"--predict has T={question.teacher_loss:g}, but no law of the fit depends on the teacher's loss; "
                    "leave T out, or fit runs of several teachers with --law distillation."
                )
            asked, names = fit.with_teacher(name, question.teacher_loss), [name]
        for name in names:
            loss, around = asked.loss(name, question.parameters, question.tokens)
            outside = beyond(asked, name, question.parameters, question.tokens)
            if question.teacher_loss is not None:
                outside = _beyond_teachers(fit, question.teacher_loss) or outside
            if outside is not None:
                notes[outside] = None
            rows.append(
                [
                    name,
                    _number(question.parameters),
                    _number(question.tokens),
                    f"{loss:.4f}",
                    *_range(around, ".4f"),
                ]
            )
            found.append(
                {
                    "source": name,
                    **dataclasses.asdict(question),
                    "loss": loss,
                    "interval": around,
                    "extrapolated": outside,
                }
            )
    Table(["source", "N", "D", "loss", "from", "to"], rows).print(
        console, "Predicted validation cross-entropy"
    )
    _print_notes(notes, console)
    return found


def _beyond_teachers(fit: Fit, loss: float) -> str | None:
    known = [source.teacher.loss for source in fit.sources.values() if source.teacher is not None]
    if min(known) <= loss <= max(known):
        return None
    return f"beyond the span of the runs: T={loss:.4g} (teachers: {min(known):.4g} to {max(known):.4g})"


def _budgets(fit: Fit, budgets: Sequence[float], console: Console) -> list[dict[str, Any]]:
    found, rows = [], []
    notes: dict[str, None] = {}
    for flops in budgets:
        for name, label, cost in _ways(fit):
            best = best_model(fit, name, cost, flops)
            if best is None:
                rows.append([label, _number(flops), "–", "–", "the teacher alone costs more", "–", "–"])
                continue
            outside = beyond(fit, name, best.parameters, best.tokens)
            if outside is not None:
                notes[f"{label}: {outside}"] = None
            numbers = [_number(flops), _number(best.parameters), _number(best.tokens)]
            rows.append([label, *numbers, f"{best.loss:.4f}", *_range(best.interval, ".4f")])
            found.append(
                {
                    "flops": flops,
                    "source": name,
                    "cost": label,
                    **dataclasses.asdict(best),
                    "extrapolated": outside,
                }
            )
    columns = ["source", "FLOPs", "N", "D", "loss", "from", "to"]
    Table(columns, rows).print(console, "The best model for each number of FLOPs")
    _print_notes(notes, console)
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


def _print_notes(notes: Mapping[str, None], console: Console) -> None:
    for note in notes:
        print_line(console, f"caution: {note}; the law is extrapolated", "yellow")


def _number(value: float) -> str:
    return f"{value:.4g}"


def _range(interval: tuple[float, float] | None, form: str = ".4g") -> list[str]:
    return ["–", "–"] if interval is None else [f"{value:{form}}" for value in interval]
