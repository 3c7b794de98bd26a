"""The report as Markdown: its tables and samples."""

from collections.abc import Sequence

from gemma2_jax.reports.content import ReportContent
from gemma2_jax.reports.evaluations import evaluation_tables
from gemma2_jax.reports.report_tables import Column, percent
from gemma2_jax.reports.reported_runs import Run
from gemma2_jax.reports.sweep_section import IMPORTANCE_SENTENCE
from gemma2_jax.reports.sweeps import importance
from gemma2_jax.studies.tables import Table, code


def markdown(content: ReportContent) -> str:
    """Returns the report as Markdown."""
    report = content.report
    parts = [f"# {_plain(report.title)}"]
    parts += ["\n".join(f"- {_plain(note)}" for note in report.notes)] if report.notes else []
    if report.runs:
        parts += [_table(content.runs_table), " ".join(content.scores_sentences)]
    failed = [run for run in report.runs if run.error is not None]
    if failed:
        parts.append("\n".join(f"- {_plain(run.name)} failed: {_plain(run.error or '')}" for run in failed))
    if content.has_seeds:
        parts += ["## Over the seeds", _table(content.groups_table)]
    if content.shares:
        parts += [
            "## What the students gain",
            _table(content.shares_table),
            " ".join(content.shares_sentences),
        ]
    if shares := importance(report.runs):
        rows = [[key, percent(share)] for key, share in shares.items()]
        parts += ["## Importance of the keys", Table(["key", "share"], rows).markdown(), IMPORTANCE_SENTENCE]
    for title, columns in evaluation_tables(report.evaluations):
        parts += [f"## {_plain(title)}", _table(columns)]
    parts += _samples(report.runs)
    if columns := content.differences_table:
        parts += ["## Settings that differ", _table(columns)]
    if report.machines:
        parts += ["## Machine", "\n".join(f"- {_plain(machine)}" for machine in report.machines)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _samples(runs: Sequence[Run]) -> list[str]:
    parts = []
    for prompt in dict.fromkeys(sample.prompt for run in runs for sample in run.samples):
        lines = [
            f"- {_plain(run.name)}: {code(sample.text)}"
            for run in runs
            for sample in run.samples
            if sample.prompt == prompt
        ]
        parts.append("\n".join([f"## Completions of {code(prompt)}", "", *lines]))
    return parts


def _table(columns: Sequence[Column]) -> str:
    left = next((place for place, column in enumerate(columns) if not column.is_text), len(columns))
    rows = zip(*(column.cells for column in columns), strict=True)
    texts = [[_plain(cell.text) for cell in row] for row in rows]
    return Table([_plain(column.name) for column in columns], texts, left).markdown()


def _plain(text: str) -> str:
    """Text on one line, in which < begins no HTML."""
    return text.replace("\n", " ").replace("<", "&lt;")
