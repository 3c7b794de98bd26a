"""The report of a study: tables on the terminal, report.md, plots and results.json."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
from rich.console import Console

from gemma2_jax.files import write_text
from gemma2_jax.machine import describe_machine, peak_memory_gib
from gemma2_jax.run import RunConfig
from gemma2_jax.studies.config import StudyConfig
from gemma2_jax.studies.costs import costs_by_run, costs_table
from gemma2_jax.studies.plots import plot_losses, plot_summary
from gemma2_jax.studies.stages import Measurement, read_times
from gemma2_jax.studies.summary import group_by_run, summary_table
from gemma2_jax.studies.tables import Table, code, print_line
from gemma2_jax.training.metrics import format_number
from gemma2_jax.training.progress import duration


def write_report(
    study: StudyConfig,
    runs: Mapping[str, RunConfig],
    measurements: Mapping[str, Measurement],
    folder: Path,
    console: Console,
) -> None:
    """Prints the study's tables and samples, and writes report.md, its plots and results.json into `folder`."""
    table = _table(study, measurements)
    seconds = read_times(folder)
    table.print(console, f"Results of {folder}")
    summary: Table | None = None
    if study.seeds:
        groups = group_by_run(study, measurements, seconds)
        summary = summary_table(groups, study.reference)
        summary.print(console, "Means and standard deviations over the seeds")
        plot_summary(groups, folder / "summary.png")
    costs = costs_by_run(study, runs, seconds)
    costs_table(costs).print(console, "Costs of the runs")
    for number, prompt in enumerate(study.prompts):
        print_line(console, f"Completions of {prompt!r}", "bold")
        for name, measurement in measurements.items():
            print_line(console, f"  {name + ':':<11} {measurement.samples[number]!r}")
    shown = [name for name, (_, seed) in study.trained_runs().items() if seed in (None, *study.seeds[:1])]
    plot_losses({name: runs[name].output for name in shown}, folder / "loss.png")
    write_text(
        folder / "report.md", _markdown(study, summary, table, measurements, costs_table(costs), seconds)
    )
    results = {
        "title": study.title,
        "machine": describe_machine(jax.devices()),
        "seconds": seconds,
        "costs": {name: dataclasses.asdict(cost) for name, cost in costs.items()},
        "runs": {
            name: {**dataclasses.asdict(measurement.evaluation), "samples": list(measurement.samples)}
            for name, measurement in measurements.items()
        },
    }
    write_text(folder / "results.json", json.dumps(results, ensure_ascii=False, indent=1))
    spent = duration(sum(seconds.values()))
    memory = f"{peak_memory_gib():.1f} GiB of memory"
    print_line(console, f"{spent} of work in total; at most {memory} in any process of this command")
    print_line(console, f"report in {folder / 'report.md'}, curves in {folder / 'loss.png'}")


def _table(study: StudyConfig, measurements: Mapping[str, Measurement]) -> Table:
    columns = ["run", "parameters", "tokens seen", "validation cross-entropy", "perplexity"]
    if study.reference is not None:
        columns += [f"agrees with {study.reference}", f"KL from {study.reference}"]
    rows = []
    for name, measurement in measurements.items():
        found = measurement.evaluation
        row = [
            name,
            f"{found.parameters:,}",
            f"{found.tokens_seen:,}",
            format_number(found.cross_entropy, 4),
            format_number(found.perplexity, 2),
        ]
        if study.reference is not None:
            row.append("–" if found.agreement is None else f"{100 * found.agreement:.1f} %")
            row.append(format_number(found.kl, 4))
        rows.append(row)
    return Table(columns, rows)


def _markdown(
    study: StudyConfig,
    summary: Table | None,
    table: Table,
    measurements: Mapping[str, Measurement],
    costs: Table,
    seconds: Mapping[str, float],
) -> str:
    parts = [f"# {study.title}"]
    if summary is not None:
        parts += [summary.markdown(), "![Perplexity of each run, over its seeds](summary.png)"]
    parts += [table.markdown(), "![Cross-entropy against steps](loss.png)"]
    notes = [
        "Cross-entropy is the mean over the validation split's tokens in nats; perplexity is its exponential."
    ]
    if study.reference is not None:
        notes.append(
            f"A run agrees with {study.reference} where both give the highest probability to the same next token."
        )
    parts.append(" ".join(notes))
    for number, prompt in enumerate(study.prompts):
        samples = [
            f"- {name}: {code(measurement.samples[number])}" for name, measurement in measurements.items()
        ]
        parts.append("\n".join([f"## Completions of {code(prompt)}", "", *samples]))
    stages = Table(["stage", "time"], [[stage, duration(spent)] for stage, spent in seconds.items()])
    total = duration(sum(seconds.values()))
    parts += [
        "## Machine and time",
        describe_machine(jax.devices()) + ".",
        costs.markdown(),
        f"{total} in total:",
        stages.markdown(),
    ]
    return "\n\n".join(parts) + "\n"
