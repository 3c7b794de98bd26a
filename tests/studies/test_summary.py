"""Studies with several seeds: the runs that are trained, and their report."""

import dataclasses
import json
from pathlib import Path

import pytest
from rich.console import Console

from gemma2_jax.config import UserError
from gemma2_jax.evaluation.evaluate_run import Evaluation
from gemma2_jax.studies.config import StudyConfig, StudyRun
from gemma2_jax.studies.plots import plot_summary
from gemma2_jax.studies.stages import Measurement
from gemma2_jax.studies.study import run_study
from gemma2_jax.studies.summary import Group, group_by_run, summary_table

STUDY = StudyConfig(
    "Which?",
    {"teacher": StudyRun("a"), "plain": StudyRun("b"), "taught": StudyRun("c", teacher="teacher")},
    reference="teacher",
    seeds=(0, 5),
)


def test_every_seed_of_every_run_but_the_teacher():
    assert STUDY.trained_runs() == {
        "teacher": ("teacher", None),
        "plain-0": ("plain", 0),
        "plain-5": ("plain", 5),
        "taught-0": ("taught", 0),
        "taught-5": ("taught", 5),
    }
    assert list(dataclasses.replace(STUDY, seeds=()).trained_runs()) == ["teacher", "plain", "taught"]


def test_a_cache_needs_a_teacher():
    with pytest.raises(UserError, match=r"runs.plain.cache is true, but runs.plain.teacher is null"):
        dataclasses.replace(STUDY, runs={**STUDY.runs, "plain": StudyRun("b", cache=True)})


def measured(perplexity: float, kl: float | None) -> Measurement:
    return Measurement(Evaluation(1200, 99, 3.0, perplexity, None if kl is None else 0.5, kl))


MEASUREMENTS = {
    "teacher": measured(10.0, None),
    "plain-0": measured(20.0, 0.3),
    "plain-5": measured(24.0, 0.5),
    "taught-0": measured(15.0, 0.1),
    "taught-5": measured(16.0, 0.1),
}


def test_a_run_that_diverged_has_no_deviation():
    found = tuple(measured(perplexity, None).evaluation for perplexity in (20.0, float("inf")))
    (row,) = summary_table([Group("plain", None, None, found, 1.0)], None).rows
    assert row[3:5] == ["3.0000 ± 0.0000", "inf"]


def test_means_and_deviations():
    seconds = {"train plain-0": 3.0, "train plain-5": 5.0, "train taught-0": 8.0, "cache taught-0": 4.0}
    groups = group_by_run(STUDY, MEASUREMENTS, seconds)
    assert [(group.name, group.seconds) for group in groups] == [
        ("teacher", 0.0),
        ("plain", 4.0),
        ("taught", 6.0),
    ]
    table = summary_table(groups, STUDY.reference)
    assert table.rows[0] == ["teacher", "1,200", "1", "3.0000", "10.00", "–", "–", "0 s"]
    assert table.rows[1] == [
        *("plain", "1,200", "2", "3.0000 ± 0.0000", "22.00 ± 2.83", "50.0 ± 0.0", "0.4000 ± 0.1414", "4 s")
    ]


@pytest.mark.parametrize("series", [None, "one"])
def test_the_picture_is_a_png(tmp_path: Path, series: str | None):
    groups = [
        dataclasses.replace(group, series=series if group.name != "teacher" else None)
        for group in group_by_run(STUDY, MEASUREMENTS, {})
    ]
    plot_summary(groups, tmp_path / "summary.png")
    assert (tmp_path / "summary.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_of_two_seeds(stage, toy):
    distill = ["objective=distillation", "distill=online", "distill.teacher=out/teacher"]
    runs = {
        name: toy(name, f"optimizer.learning_rate={rate}", *(distill if name.startswith("taught") else []))
        for name, rate in zip(STUDY.trained_runs(), (0.1, 0.3, 0.4, 0.2, 0.25), strict=True)
    }
    console = Console(width=200, record=True)
    run_study(STUDY, runs, "out", console)
    assert [name for kind, name in stage.calls if kind == "train"] == list(STUDY.trained_runs())
    report = Path("out/report.md").read_text()
    assert "| plain | 12,345 | 2 | 0.3500 ± 0.0707 |" in report
    assert "summary.png" in report
    assert Path("out/summary.png").exists()
    assert set(json.loads(Path("out/results.json").read_text())["runs"]) == set(STUDY.trained_runs())
    assert "Means and standard deviations over the seeds" in console.export_text()
