"""Sweeps: one run after another, even if one of them fails."""

import json
import shutil
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gemma2_jax import stops
from gemma2_jax.config import UserError
from gemma2_jax.distill.teacher_record import TeacherRecord
from gemma2_jax.evaluation.evaluate_run import Evaluation
from gemma2_jax.files import locked
from gemma2_jax.studies import stages, sweep, sweep_report, worker
from gemma2_jax.studies.journal import Journal
from gemma2_jax.studies.samplers import tpe_point
from gemma2_jax.studies.space import SweepConfig, axes
from gemma2_jax.studies.trials import Combination, Sweep
from tests.parameters import mostly_thorough


def run_sweep(combinations: list[Combination], output: str, console: Console) -> bool:
    """A sweep of given runs."""
    settings = SweepConfig(
        "list", runs={run.key.replace("=", "-").replace(".", "-"): () for run in combinations}
    )
    trials = [[run] for run in combinations]
    return sweep.run_sweep(Sweep(settings, output, trials, lambda number, point: trials[number]), console)


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


@mostly_thorough("error", [RuntimeError("out of memory"), UserError("too hot.")])
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


@pytest.mark.thorough
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


def test_a_sweep_in_the_folder_of_a_running_study_is_refused(stage, combinations):
    with locked("out", wait=False), pytest.raises(UserError, match=r"^out is in use by another command"):
        run_sweep(combinations, "out", Console())
    assert stage.calls == []


@pytest.mark.thorough
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

    def interrupted(config, until):
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


def with_rate(base, name, rate):
    optimizer = replace(base.optimizer, learning_rate=float(rate))
    return replace(base, name=name, output=f"out/{name}", optimizer=optimizer)


def tuned(toy, rates, *overrides, **settings):
    """A sweep of learning rates, which are also the losses of the stand-in, with rungs at 10 and 20 of 40 steps."""
    base = toy("base", *overrides)
    trials = [[Combination({"rate": str(rate)}, with_rate(base, f"rate={rate}", rate))] for rate in rates]
    chosen = {"rungs": (10, 20), **settings}
    config = SweepConfig("grid", space={"optimizer.learning_rate": tuple(rates)}, **chosen)
    return Sweep(config, "out", trials, lambda number, point: trials[number])


@pytest.fixture
def no_plots(monkeypatch):
    for name in ("plot_losses", "plot_summary"):
        monkeypatch.setattr(sweep_report, name, lambda *_: None)


RATES = [0.5, 0.3, 0.9, 0.1, 0.7, 0.2, 0.8, 0.4, 0.6]


def trained(stage):
    return Counter(name for kind, name in stage.calls if kind == "train")


def test_only_the_best_trials_go_on_beyond_each_rung(stage, no_plots, toy, capsys):
    assert sweep.run_sweep(tuned(toy, RATES), Console())
    assert trained(stage) == {f"rate={rate}": 1 + (rate <= 0.3) + (rate <= 0.1) for rate in RATES}
    assert [call for call in stage.calls if call[0] == "evaluate"] == [("evaluate", "rate=0.1")]
    assert "best: rate=0.1 (cross-entropy 0.1000)" in capsys.readouterr().out
    results = json.loads(Path("out/results.json").read_text())
    assert results[0]["values"] == {"rate": "0.1"}
    assert results[1:3] == [
        {"run": "rate=0.2", "values": {"rate": "0.2"}, "stopped": 20, "metric": pytest.approx(0.25)},
        {"run": "rate=0.3", "values": {"rate": "0.3"}, "stopped": 20, "metric": pytest.approx(0.35)},
    ]
    assert [result["stopped"] for result in results[3:]] == [10] * 6
    stage.calls.clear()
    assert sweep.run_sweep(tuned(toy, RATES), Console())
    assert not trained(stage)


def test_the_worst_go_on_where_larger_is_better(stage, no_plots, toy, monkeypatch):
    taught = ["objective=distillation", "distill=online", "distill.teacher=teacher"]

    def rows(folder):
        rate = float(Path(folder).name.removeprefix("rate="))
        return [{"step": 10, "split": "validation", "agreement": rate}]

    monkeypatch.setattr(worker, "read_metrics", rows)
    compared = tuned(toy, [0.5, 0.1, 0.9], *taught, rungs=(10,), metric="agreement")
    assert sweep.run_sweep(compared, Console())
    assert [call for call in stage.calls if call[0] == "evaluate"] == [("evaluate", "rate=0.9")]


@pytest.mark.parametrize("killed", [1, 4, 10, 13])
def test_a_sweep_whose_workers_are_killed_ends_with_the_same_best_trial(
    stage, no_plots, toy, monkeypatch, killed
):
    """The process ends in the middle of a training, after a checkpoint, or before its result is noted."""
    places = [(stage, "train"), (Journal, "append")]
    owner, name = places[killed % 2]
    original, left = getattr(owner, name), killed

    def dying(*arguments, **options):
        nonlocal left
        left -= 1
        if not left:
            raise SystemExit  # not an Exception, which would be noted as a failure
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, dying)
    monkeypatch.setattr(stages, "train", stage.train)
    with pytest.raises(SystemExit):
        sweep.run_sweep(tuned(toy, RATES), Console(quiet=True))
    assert sweep.run_sweep(tuned(toy, RATES), Console(quiet=True))
    results = json.loads(Path("out/results.json").read_text())
    assert [(result["values"]["rate"], result.get("stopped", 40)) for result in results] == [
        ("0.1", 40), ("0.2", 20), ("0.3", 20), *((str(rate), 10) for rate in (0.4, 0.5, 0.6, 0.7, 0.8, 0.9))
    ]  # fmt: skip


def test_workers_share_the_runs(stage, no_plots, toy):
    """Each run is trained by one of them, to each of its rungs once."""
    monitor = threading.Lock()
    busy: set[str] = set()
    train = stage.train

    def slow(config, until=None):
        with monitor:
            assert config.name not in busy
            busy.add(config.name)
        time.sleep(0.01)
        train(config, until)
        with monitor:
            busy.remove(config.name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", slow)
        patch.setattr(worker, "_POLL", 0.01)
        with ThreadPoolExecutor(3) as pool:
            ends = [pool.submit(sweep.run_sweep, tuned(toy, RATES), Console(quiet=True)) for _ in range(3)]
            assert all(end.result() for end in ends)
    assert trained(stage) == {f"rate={rate}": 1 + (rate <= 0.3) + (rate <= 0.1) for rate in RATES}


def test_a_failed_trial_makes_way_for_the_next_best(stage, no_plots, toy, capsys):
    stage.fails["rate=0.1"] = UserError("too hot.")
    assert not sweep.run_sweep(tuned(toy, RATES), Console())
    printed = capsys.readouterr().out
    assert "best: rate=0.2 (cross-entropy 0.2000)" in printed
    assert "failed: rate=0.1: too hot." in printed
    assert trained(stage)["rate=0.4"] == 2


def test_seeds_of_a_trial_go_on_together(stage, no_plots, toy):
    rates, base = (0.1, 0.2, 0.3), toy("base")
    trials = [
        [
            Combination({"rate": str(rate), "seed": str(seed)}, with_rate(base, f"{rate}-{seed}", loss))
            for seed, loss in enumerate((rate, 1 - 2 * rate))  # their mean is lowest for the rate 0.3
        ]
        for rate in rates
    ]
    config = SweepConfig("grid", space={"rate": rates}, rungs=(10,), seeds=(0, 1))
    assert sweep.run_sweep(Sweep(config, "out", trials, lambda number, point: trials[number]), Console())
    assert {name for kind, name in stage.calls if kind == "evaluate"} == {"0.3-0", "0.3-1"}


def test_a_folder_that_was_deleted_is_trained_again(stage, no_plots, combinations):
    assert run_sweep(combinations, "out", Console(quiet=True))
    shutil.rmtree("out/rate=0.2")
    stage.calls.clear()
    assert run_sweep(combinations, "out", Console(quiet=True))
    assert trained(stage) == {"rate=0.2": 1}


def test_runs_of_another_sweep_in_the_folder_are_refused_before_any_training(stage, no_plots, toy):
    base = toy("base")
    others = [Combination({"rate": rate}, with_rate(base, "same", rate)) for rate in ("0.1", "0.2")]
    assert run_sweep(others[:1], "out", Console(quiet=True))
    stage.calls.clear()
    with pytest.raises(UserError, match=r"^out/same holds a run with optimizer.learning_rate=0.1, but"):
        run_sweep(others[1:], "out", Console(quiet=True))
    assert stage.calls == []


@pytest.mark.thorough
@pytest.mark.parametrize("workers", [1, 3])
def test_points_drawn_from_results_do_not_depend_on_the_workers(stage, no_plots, toy, workers, monkeypatch):
    pytest.importorskip("optuna")
    space: Any = {"optimizer.learning_rate": {"uniform": (0.1, 0.9)}}
    config = SweepConfig("tpe", space=space, trials=14, parallel=3, sampler_seed=5)

    base = toy("base")

    def build(number, point):
        return [Combination(point, with_rate(base, f"{number:03}", point["optimizer.learning_rate"]))]

    def begin(_):
        corner = build(0, {"optimizer.learning_rate": "0.1"})
        return sweep.run_sweep(Sweep(config, "out", [corner], build), Console(quiet=True))

    monkeypatch.setattr(worker, "_POLL", 0.01)
    with ThreadPoolExecutor(workers) as pool:
        assert all(pool.map(begin, range(workers)))
    points = Journal(Path("out")).read().points
    history: list = []
    for number in range(14):
        known = max(0, number - 2)
        waiting = [point for point, _ in history[known:]]
        expected = tpe_point(axes(config), history[:known], waiting, 5, number)
        assert points[number] == expected
        history.append((expected, float(expected["optimizer.learning_rate"])))
