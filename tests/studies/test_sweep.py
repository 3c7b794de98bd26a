"""A sweep: one run after another, whatever becomes of one of them."""

import json
import signal
from pathlib import Path

import pytest
from rich.console import Console

from gemma2_jax import stops
from gemma2_jax.config import UserError
from gemma2_jax.studies import stages
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
        "| rate | validation loss | perplexity |",
        "| --- | ---: | ---: |",
        "| 0.1 | 0.1000 | 2.00 |",
        "| 0.2 | 0.2000 | 2.00 |",
        "| 0.3 | 0.3000 | 2.00 |",
    ]
    results = json.loads(Path("out/results.json").read_text())
    assert [result["values"] for result in results] == [{"rate": "0.1"}, {"rate": "0.2"}, {"rate": "0.3"}]
    assert results[0]["loss"] == 0.1


@pytest.mark.parametrize("error", [UserError("too hot."), RuntimeError("out of memory")])
def test_the_rest_goes_on_after_a_failure(stage, combinations, error):
    stage.fails["rate=0.1"] = error
    assert not run_sweep(combinations, "out", Console())
    assert rows()[2:] == ["| 0.2 | 0.2000 | 2.00 |", "| 0.3 | 0.3000 | 2.00 |", "| 0.1 | failed | – |"]
    assert (
        f"- 0.1 failed: {'' if isinstance(error, UserError) else 'RuntimeError: '}{error}"
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


def test_a_combination_that_cannot_be_composed_fails_alone(stage, combinations):
    broken = Combination({"rate": "x"}, UserError("rate is x."))
    assert not run_sweep([broken, *combinations], "out", Console())
    assert rows()[-1] == "| x | failed | – |"
    assert len(rows()) == 6


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
    """C++ code may make another exception of ours."""
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
