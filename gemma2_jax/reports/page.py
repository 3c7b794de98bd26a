"""The page of a report: one HTML file that needs no other, with its style and its script inside."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import yaml

import gemma2_jax
from gemma2_jax.reports.charts import loss_charts, share_chart
from gemma2_jax.reports.colours import colours
from gemma2_jax.reports.content import ReportContent
from gemma2_jax.reports.curves import has_estimated_time
from gemma2_jax.reports.evaluations import evaluation_tables
from gemma2_jax.reports.html_tables import html_table
from gemma2_jax.reports.loss_chart import LossChart
from gemma2_jax.reports.markup import Markup, element, together
from gemma2_jax.reports.reported_runs import Run, counted
from gemma2_jax.reports.sweep_section import sweep_section

_HERE = Path(__file__).parent
_MOST_FOR_A_FILTER = 5  # rows that need none
_MOST_DETAILS = 6  # below one another


def page(content: ReportContent, made: datetime) -> str:
    """Returns the report as the text of an HTML file.

    Args:
        made: when it is made.
    """
    report = content.report
    styles = colours(content.groups)
    charts = loss_charts(content.groups, styles)
    sections: dict[str, Markup | None] = {
        "Runs": _runs(content),
        "Over the seeds": _seeds(content),
        "What the students gain": _shares(content),
        "Curves": _curves(charts),
        "Sweep": sweep_section(report.runs, content.groups, styles),
        "Evaluations": _evaluations(content),
        "Samples": _samples(report.runs, styles),
        "Settings": _settings(content),
        "Machine": _machine(content) if report.runs or report.machines else None,
    }
    shown = {title: section for title, section in sections.items() if section is not None}
    links = [element("a", title, href=f"#{_anchor(title)}") for title in shown]
    body = [
        element("h1", report.title),
        element(
            "p",
            f"{counted(report)} in {', '.join(map(str, report.sources))}",
            class_="quiet",
        ),
        _notes(report.notes),
        element("nav", *links),
        *(
            element("section", element("h2", title, id=_anchor(title)), section)
            for title, section in shown.items()
        ),
        element(
            "footer",
            f"Made by gemma2_jax {gemma2_jax.__version__}, {made:%Y-%m-%d %H:%M}. This file needs no other.",
            class_="quiet",
        ),
    ]
    values = {chart.identity: chart.values() for chart in charts}
    # In a script, only < could end it or begin a comment.
    data = Markup(json.dumps(values).replace("<", "\\u003c"))
    head = [
        Markup('<meta charset="utf-8"/>'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1"/>'),
        element("title", report.title),
        element("style", Markup(_asset("page.css"))),
    ]
    scripts = [
        element("script", data, type="application/json", id="values"),
        element("script", Markup(_asset("page.js"))),
    ]
    root = element("html", element("head", *head), element("body", *body, *scripts), lang="en")
    return f"<!doctype html>\n{root}\n"


def _runs(content: ReportContent) -> Markup | None:
    if not content.report.runs:
        return None
    parts: list[Markup] = []
    if len(content.report.runs) > _MOST_FOR_A_FILTER:
        parts.append(
            element(
                "label",
                "Filter ",
                Markup('<input type="search" data-filters="runs-table" placeholder="words"/>'),
            )
        )
    parts.append(html_table(content.runs_table, "runs", [run.name for run in content.report.runs]))
    failed = [
        element("li", element("b", run.name), f" failed: {run.error}")
        for run in content.report.runs
        if run.error is not None
    ]
    if failed:
        parts.append(element("ul", *failed, class_="notes"))
    return together(*parts, element("p", " ".join(content.scores_sentences), class_="quiet"))


def _seeds(content: ReportContent) -> Markup | None:
    if not content.has_seeds:
        return None
    return together(html_table(content.groups_table, "seeds"))


def _shares(content: ReportContent) -> Markup | None:
    if not content.shares:
        return None
    closed = [(share.student, share.closed) for share in content.shares if share.closed is not None]
    kept = [(share.student, share.kept) for share in content.shares if share.kept is not None]
    return together(
        element("h3", "Share of the gap between scratch and teacher that each student closes")
        if closed
        else None,
        share_chart(closed, "scratch", "teacher") if closed else None,
        element("h3", "Share of the gain of online distillation that each source keeps") if kept else None,
        share_chart(kept, "scratch", "online") if kept else None,
        html_table(content.shares_table, "shares"),
        element("p", " ".join(content.shares_sentences), class_="quiet"),
    )


def _curves(charts: Sequence[LossChart]) -> Markup | None:
    return together(*(chart.figure() for chart in charts)) if charts else None


def _evaluations(content: ReportContent) -> Markup | None:
    if not content.report.evaluations:
        return None
    parts = []
    for number, (title, columns) in enumerate(evaluation_tables(content.report.evaluations)):
        parts += [element("h3", title), html_table(columns, f"evaluation-{number}")]
    return together(*parts)


def _samples(runs: Sequence[Run], styles: Mapping[str, str]) -> Markup | None:
    prompts = dict.fromkeys(sample.prompt for run in runs for sample in run.samples)
    if not prompts:
        return None
    parts = []
    for prompt in prompts:
        cards = [
            element(
                "div",
                element("h4", run.name),
                element("p", element("b", sample.prompt), sample.text, class_="sample"),
                class_=f"card {styles[run.name]}",
            )
            for run in runs
            for sample in run.samples
            if sample.prompt == prompt
        ]
        parts += [element("h3", prompt), element("div", *cards, class_="samples")]
    return together(*parts)


def _settings(content: ReportContent) -> Markup | None:
    configured = [run for run in content.report.runs if run.config]
    if not configured:
        return None
    parts: list[Markup] = []
    if len(configured) > 1:
        columns = content.differences_table
        parts.append(
            html_table(columns, "differences", wrap=len(configured) <= 6)
            if columns
            else element("p", "All runs have the same settings.")
        )
    complete = [_complete_settings(run) for run in configured]
    if len(complete) > _MOST_DETAILS:
        complete = [element("details", element("summary", "All settings of each run"), *complete)]
    return together(*parts, *complete)


def _complete_settings(run: Run) -> Markup:
    text = yaml.safe_dump(dict(run.config), sort_keys=False, allow_unicode=True)
    return element("details", element("summary", f"All settings of {run.name}"), element("pre", text))


def _machine(content: ReportContent) -> Markup:
    machines = content.report.machines
    lines = [element("p", machine) for machine in machines]
    if not machines:
        lines.append(element("p", "No folder records the machine.", class_="quiet"))
    if any(has_estimated_time(run) for run in content.report.runs):
        text = "Rows of metrics without their time are of an older version; it is estimated from tokens and speed."
        lines.append(element("p", text, class_="quiet"))
    return together(*lines)


def _notes(notes: Sequence[str]) -> Markup | None:
    return element("ul", *(element("li", note) for note in notes), class_="notes") if notes else None


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


@cache
def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")
