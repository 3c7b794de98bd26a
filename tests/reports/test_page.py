"""The page: well formed, without other files, with all text escaped; and the report as Markdown and CSV."""

import csv
import dataclasses
import io
import json
import re
import xml.etree.ElementTree as ET
from datetime import datetime
from pathlib import Path

import pytest

from gemma2_jax.reports.collect import collect
from gemma2_jax.reports.content import ReportContent
from gemma2_jax.reports.curves import training_seconds
from gemma2_jax.reports.markdown import markdown
from gemma2_jax.reports.page import page
from gemma2_jax.reports.report_tables import runs_csv
from gemma2_jax.reports.reported_runs import Report, TextSample
from tests.reports.conftest import WriteRun

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&|\x00"
SVG = "{http://www.w3.org/2000/svg}"


def written(report: Report) -> str:
    return page(ReportContent(report), datetime(2026, 1, 2, 3, 4))


def parsed(text: str) -> ET.Element:
    """The page as XML, without the contents of styles and scripts."""
    body = re.sub(r"(<style>|<script[^>]*>).*?(</style>|</script>)", r"\1\2", text, flags=re.DOTALL)
    return ET.fromstring(body.removeprefix("<!doctype html>"))


def data(text: str) -> dict:
    (found,) = re.findall(r'<script type="application/json" id="values">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


def headings(text: str) -> list[str]:
    return [str(each.text) for each in parsed(text).iter("h2")]


def test_the_page_of_a_study(study: Path) -> None:
    text = written(collect([study]))
    assert headings(text) == [
        "Runs",
        "Over the seeds",
        "What the students gain",
        "Curves",
        "Settings",
        "Machine",
    ]
    root = parsed(text)
    frames = [each for each in root.iter("div") if each.get("class") == "frame"]
    # The teachers of the students are unknown, so there are no FLOPs for them; others have them.
    assert {(each.get("data-axis"), each.get("data-log")) for each in frames} == {
        (axis, log) for axis in ("steps", "tokens", "flops", "seconds") for log in ("true", "false")
    }
    assert [each.get("data-axis") for each in frames if each.get("hidden") is None] == ["steps"]
    series = list(frames[0].iter(f"{SVG}g"))
    assert len(series) == 2 * 10  # training and validation
    values = data(text)["cross_entropy"]
    for each in series:
        line = each.find(f"{SVG}polyline")
        assert line is not None
        curve = values[int(str(each.get("data-curve")))]
        assert curve["run"] == each.get("data-run")
        assert len(str(line.get("points")).split()) == len(curve["y"]) == len(curve["steps"])


def test_seeds_share_a_colour(study: Path) -> None:
    frame = next(
        each for each in parsed(written(collect([study]))).iter("div") if each.get("class") == "frame"
    )
    colours: dict[str, set[str]] = {}
    for each in frame.iter(f"{SVG}g"):
        colours.setdefault(str(each.get("data-run")).partition("-")[0], set()).add(
            str(each.get("class")).split()[-1]
        )
    assert all(len(found) == 1 for found in colours.values())
    assert len(set.union(*colours.values())) == 4


def test_the_page_needs_no_other_file(study: Path, sweep: Path) -> None:
    text = written(collect([study, sweep]))
    root = parsed(text)
    assert not [each.tag for each in root.iter() if each.get("src") is not None or each.tag == "link"]
    assert all(each.get("href", "#").startswith("#") for each in root.iter())
    assert set(re.findall(r"https?://[^\"' )]*", text)) == {"http://www.w3.org/2000/svg"}
    assert "@import" not in text
    assert "url(" not in text


def test_the_page_of_a_sweep(sweep: Path) -> None:
    text = written(collect([sweep]))
    assert headings(text) == ["Runs", "Over the seeds", "Curves", "Sweep", "Settings", "Machine"]
    root = parsed(text)
    heat = next(each for each in root.iter("table") if each.get("class") == "heat")
    best = [cell.text for cell in heat.iter("td") if "best" in str(cell.get("class"))]
    assert best == ["3.0050"]
    bars = next(each for each in root.iter("table") if each.get("class") == "bars")
    assert next(iter(bars.iter("th"))).text == "optimizer.learning_rate"
    assert "the loss is &lt;nan&gt;" in text


def test_identities_are_unique(study: Path, sweep: Path) -> None:
    found = [each.get("id") for each in parsed(written(collect([study, sweep]))).iter() if each.get("id")]
    assert len(found) == len(set(found))
    assert {f"#{name}" for name in found} >= {
        each.get("href") for each in parsed(written(collect([study]))).iter("a")
    }


def test_a_page_of_evaluations_alone() -> None:
    content = {"format": 1, "rows": [{"name": "a", "scores": {"document": {"domains": {"d": {"kl": 0.5}}}}}]}
    text = written(Report("a", ["a.json"], [], evaluations={"a.json": content}))
    assert headings(text) == ["Evaluations"]
    assert "1 evaluation in a.json" in text
    assert "0.5000" in text


def test_all_text_is_escaped(write_run: WriteRun) -> None:
    report = collect([write_run("a"), write_run("b", 3.0, {"optimizer.kind": HOSTILE})])
    runs = [
        dataclasses.replace(
            run, name=f"{HOSTILE}{place}", samples=[TextSample(HOSTILE, HOSTILE)], error=HOSTILE
        )
        for place, run in enumerate(report.runs)
    ]
    evaluation = {
        "format": 1,
        "rows": [{"name": HOSTILE, "scores": {HOSTILE: {"domains": {HOSTILE: {HOSTILE: 1}}}}}],
    }
    hostile = Report(HOSTILE, [HOSTILE], runs, [HOSTILE], {HOSTILE: evaluation}, [HOSTILE])
    text = written(hostile)
    root = parsed(text)
    assert len(list(root.iter("script"))) == 2
    assert len(re.findall("<script", text)) == 2
    assert not list(root.iter("img"))
    assert not [each for each in root.iter() if any(name.startswith("on") for name in each.attrib)]
    assert data(text)["cross_entropy"][0]["run"] == f"{HOSTILE}0"
    assert "<script" not in re.sub(r"`[^`]*`", "", markdown(ReportContent(hostile)))


@pytest.mark.parametrize("losses", [[None], [4.0], [None, 4.0]])
def test_pages_of_few_values(write_run: WriteRun, losses: list[float | None]) -> None:
    report = collect([write_run(f"run{place}", loss) for place, loss in enumerate(losses)])
    assert "Curves" in headings(written(report))


def test_a_run_of_one_row_and_one_of_none(write_run: WriteRun) -> None:
    short, empty = write_run("short", steps=10), write_run("empty")
    (empty / "metrics.jsonl").write_text("")
    root = parsed(written(collect([short, empty])))
    assert len(list(root.iter(f"{SVG}path"))) == 2 * 4 * 1  # a single point is a dot
    assert headings(written(collect([empty]))) == ["Runs", "Settings", "Machine"]


def test_long_curves_are_averaged(write_run: WriteRun) -> None:
    folder = write_run("run")
    rows = [
        {"step": step, "split": "train", "loss": 1.0, "cross_entropy": float(step)} for step in range(1, 1001)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = written(collect([folder]))
    (curve,) = data(text)["cross_entropy"]
    assert (len(curve["y"]), curve["steps"][0], curve["y"][0]) == (200, 5, 3.0)
    assert "mean of up to 5 rows" in text


def test_a_method_with_a_loss_of_its_own_has_its_curve(write_run: WriteRun) -> None:
    folder = write_run("run")
    rows = [{"step": step, "split": "train", "loss": 0.5} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(data(written(collect([folder])))) == ["loss"]


def test_time_is_that_of_the_rows_or_estimated(write_run: WriteRun) -> None:
    folder = write_run("run")
    (run,) = collect([folder]).runs
    assert training_seconds(run) == 4 * 20.0
    older = [{key: value for key, value in row.items() if key != "seconds"} for row in run.rows]
    run = dataclasses.replace(run, rows=older)
    assert training_seconds(run) == 40 * 128 / 64.0
    assert "it is estimated from tokens and speed" in written(Report("", [], [run]))


def test_the_csv_has_plain_numbers(study: Path) -> None:
    content = ReportContent(collect([study]))
    rows = list(csv.DictReader(io.StringIO(runs_csv(content.report.runs, content.groups))))
    row = next(row for row in rows if row["run"] == "cached-1")
    assert (row["group"], row["seed"], row["distill.cache"]) == ("cached", "1", "elsewhere/caches/1")
    assert float(row["cross_entropy"]) == pytest.approx(3.59)
    assert float(row["training_seconds"]) == 80.0
    assert "optimizer.learning_rate" not in row  # it is the same for all


def test_the_markdown_has_the_tables(study: Path, sweep: Path) -> None:
    text = markdown(ReportContent(collect([study])))
    assert text.startswith("# Which &lt;source>?\n")
    assert "| online | 50.0 % | 50.0 % to 50.0 % |" in text.replace("50.0 to", "50.0 % to")
    assert "95 % t interval over 3 seeds" in text
    assert "- A machine, 2 cores" in text
    assert "| optimizer.learning_rate |" in markdown(ReportContent(collect([sweep])))
