"""Sweeps: one run after another, even if one of them fails."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemma2_jax import stops
from gemma2_jax.config import UserError
from gemma2_jax.distill.teacher_record import TeacherRecord
from gemma2_jax.evaluation.evaluate_run import Evaluation
from gemma2_jax.files import locked
from gemma2_jax.studies import stages, sweep_report
from gemma2_jax.studies.sweep import Combination, run_sweep


@pytest.fixture
def combinations(toy):
    rates = ["0.3", "0.1", "0.2"]
    return [
        Combination({"rate": rate}, toy(f"rate={rate}", f"optimizer.learning_rate={rate}")) for rate in rates
    ]


def rows() -> list[str]:
    return [line for line in Path("out/table.md").read_text().splitlines() if line.startswith("|")]


def test_the_table_is_sorted_by_loss(stage, combinations):
    assert run_sweep(combinations, "out", Console())
    assert rows() == [
        "| rate | validation cross-entropy | perplexity |",
        "| --- | ---: | ---: |",
        "| 0.1 | 0.1000 | 2.00 |",
        "| 0.2 | 0.2000 | 2.00 |",
        "| 0.3 | 0.3000 | 2.00 |",
    ]
    results = json.loads(Path("out/results.json").read_text())
    assert [result["values"] for result in results] == [{"rate": "0.1"}, {"rate": "0.2"}, {"rate": "0.3"}]
    assert results[0]["cross_entropy"] == 0.1
    assert results[0]["run"] == "rate=0.1"


@pytest.mark.parametrize("error", [UserError("too hot."), RuntimeError("out of memory")])
def test_the_sweep_continues_after_a_failure(stage, combinations, error):
    stage.fails["rate=0.1"] = error
    assert not run_sweep(combinations, "out", Console())
    assert rows()[2:] == ["| 0.2 | 0.2000 | 2.00 |", "| 0.3 | 0.3000 | 2.00 |", "| 0.1 | failed | – |"]
    assert (
        f"- rate=0.1 failed: {'' if isinstance(error, UserError) else 'RuntimeError: '}{error}"
        in Path("out/table.md").read_text()
    )
    assert "Traceback" in Path("out/rate=0.1/error.txt").read_text()

    stage.fails.clear()
    stage.calls.clear()
    assert run_sweep(combinations, "out", Console())
    assert [call for call in stage.calls if call[0] != "prepare"] == [
        ("train", "rate=0.1"),
        ("evaluate", "rate=0.1"),
    ]
    assert not Path("out/rate=0.1/error.txt").exists()


def test_a_diverged_run_has_a_readable_figure(stage, combinations, monkeypatch):
    diverged = Evaluation(12345, 67890, 37.8, 27299923570824560.0, None, None)
    monkeypatch.setattr(stages, "evaluate_run", lambda folder, teacher: diverged)
    assert run_sweep(combinations, "out", Console())
    assert rows()[2] == "| 0.3 | 37.8000 | 2.73e+16 |"


def test_runs_with_a_teacher_are_compared_with_it(stage, toy):
    taught = ["objective=distillation", "distill=online", "distill.teacher=teacher"]
    both = [
        Combination({"objective": "cross_entropy"}, toy("text", "optimizer.learning_rate=0.2")),
        Combination({"objective": "distillation"}, toy("taught", "optimizer.learning_rate=0.1", *taught)),
    ]
    assert run_sweep(both, "out", Console())
    assert rows() == [
        "| objective | validation cross-entropy | perplexity | agrees with teacher, % | KL from teacher |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| distillation | 0.1000 | 2.00 | 75.0 | 0.1250 |",
        "| cross_entropy | 0.2000 | 2.00 | – | – |",
    ]
    stage.calls.clear()
    assert run_sweep(both, "out", Console())
    assert [call for call in stage.calls if call[0] == "evaluate"] == []


def test_a_run_with_another_teacher_is_evaluated_again(stage, toy):
    taught = ["objective=distillation", "distill=online", "distill.teacher=teacher"]
    run = toy("taught", *taught)
    run_sweep([Combination({}, run)], "out", Console())
    TeacherRecord("0" * 64).save(Path(run.output))
    stage.calls.clear()
    run_sweep([Combination({}, run)], "out", Console())
    assert ("evaluate", "taught") in stage.calls


def test_seeds_are_averaged(stage, toy):
    both = [
        Combination(
            {"optimizer.learning_rate": rate, "seed": seed},
            toy(f"{rate}-{seed}", f"optimizer.learning_rate={float(rate) + float(seed)}"),
        )
        for rate in ("0.1", "0.4")
        for seed in ("0", "2")
    ]
    assert run_sweep(both, "out", Console())
    means = rows()[:4]
    assert means[0].startswith("| run | parameters | seeds | validation cross-entropy | perplexity |")
    assert "| learning_rate=0.1 | 12,345 | 2 | 1.1000 ± 1.4142 | 2.00 ± 0.00 |" in means[2]
    assert "| learning_rate=0.4 | 12,345 | 2 | 1.4000 ± 1.4142 | 2.00 ± 0.00 |" in means[3]
    for picture in ("summary.png", "loss.png"):
        assert Path("out", picture).read_bytes().startswith(b"\x89PNG")


def test_the_plot_uses_the_key_with_the_most_numbers(stage, toy, monkeypatch):
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(
        sweep_report, "plot_summary", lambda groups, target, axis: drawn.update(groups=groups, axis=axis)
    )
    three = [
        Combination({"model": model, "optimizer.learning_rate": rate}, toy(f"{model}-{rate}"))
        for model, rate in (("toy", "0.1"), ("toy", "0.2"), ("small_1m", "0.1"))
    ]
    run_sweep(three, "out", Console())
    assert drawn["axis"] == "optimizer.learning_rate"
    assert sorted((group.series, group.x) for group in drawn["groups"]) == [
        ("model=small_1m", 0.1),
        ("model=toy", 0.1),
        ("model=toy", 0.2),
    ]
    assert run_sweep(three[1:], "out", Console())
    assert {(group.series, group.x) for group in drawn["groups"]} == {
        ("model=toy", 0.2),
        ("model=small_1m", 0.1),
    }


def test_a_second_sweep_of_the_same_folder_is_refused(stage, combinations):
    with locked("out", wait=False), pytest.raises(UserError, match=r"^out is in use by another"):
        run_sweep(combinations, "out", Console())
    assert stage.calls == []


def test_an_interrupt_stops_the_sweep(stage, combinations):
    stage.fails["rate=0.1"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run_sweep(combinations, "out", Console())
    assert [call for call in stage.calls if call[0] == "train"] == [
        ("train", "rate=0.3"),
        ("train", "rate=0.1"),
    ]
    stage.fails.clear()
    stage.calls.clear()
    assert run_sweep(combinations, "out", Console())
    assert [call for call in stage.calls if call[0] == "train"] == [
        ("train", "rate=0.1"),
        ("train", "rate=0.2"),
    ]


def test_a_signal_that_looks_like_a_failure_stops_the_sweep(stage, combinations, monkeypatch):
    """C++ code may turn our exception into another type."""
    train = stage.train

    def interrupted(config):
        train(config)
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as stop:
            raise RuntimeError("INTERNAL") from stop

    monkeypatch.setattr(stages, "train", interrupted)
    with stops.handled(), pytest.raises(stops.Stopped):
        run_sweep(combinations, "out", Console())
    assert [call for call in stage.calls if call[0] == "train"] == [("train", "rate=0.3")]
    assert not Path("out/table.md").exists()
    assert not Path("out/rate=0.3/error.txt").exists()
