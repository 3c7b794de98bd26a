"""Importance of a sweep's keys, and the grid over two of them."""

import dataclasses
import random
from pathlib import Path

import pytest

from gemma2_jax.reports.collect import collect
from gemma2_jax.reports.reported_runs import Run
from gemma2_jax.reports.sweeps import heat_grid, importance, swept_keys


def run(loss: float | None, **values: str) -> Run:
    scores = {} if loss is None else {"cross_entropy": loss}
    return Run(f"{values}", Path("."), scores=scores, values=values)


def test_importance_by_hand() -> None:
    runs = [
        run(loss, a=a, b=b) for loss, a, b in ((1, "x", "0"), (2, "x", "1"), (3, "y", "0"), (4, "y", "1"))
    ]
    # Of the ranks 1 to 4: total 5 with 3 degrees of freedom; within a 0.5 + 0.5, within b 2 + 2, with 2 each.
    assert importance(runs) == {"a": pytest.approx(1 - (1 / 2) / (5 / 3)), "b": 0.0}


def test_a_diverged_run_counts_as_its_rank() -> None:
    runs = [
        run(loss, a=a, b=b) for loss, a, b in ((1, "x", "0"), (2, "x", "1"), (3, "y", "0"), (4, "y", "1"))
    ]
    diverged = [*runs[:3], run(1e9, a="y", b="1")]
    assert importance(diverged) == importance(runs)


def test_runs_that_were_stopped_rank_below_the_others() -> None:
    def at(step: int, loss: float, **values: str) -> Run:
        rows = [{"step": step, "split": "train"}]
        return dataclasses.replace(run(loss, **values), config={"training": {"steps": 40}}, rows=rows)

    stopped = [
        at(40, 3.0, a="x", b="0"),
        at(40, 3.1, a="x", b="1"),
        at(20, 2.0, a="y", b="0"),
        at(10, 1.0, a="y", b="1"),
    ]
    whole = [run(loss, **each.values) for loss, each in zip((1, 2, 3, 4), stopped, strict=True)]
    assert importance(stopped) == importance(whole)


def test_many_numbers_are_divided_into_quarters() -> None:
    draw = random.Random(0)
    runs = []
    for _ in range(80):
        rate, noise = draw.uniform(-4, -1), draw.uniform(0, 1)
        runs.append(run((rate + 2.5) ** 2, rate=f"{10**rate:.6f}", noise=f"{noise:.6f}"))
    found = importance(runs)
    assert list(found) == ["rate", "noise"]
    assert found["rate"] > 0.6  # a valley, which a correlation would miss
    assert found["noise"] < 0.1


def test_a_key_without_repeated_values_has_no_share() -> None:
    assert importance([run(1.0, a="x", b="p"), run(2.0, a="y", b="q")]) == {}
    assert importance([run(1.0, a="x"), run(2.0, a="y")]) == {}
    assert importance([]) == {}


def test_the_grid_over_two_keys_averages_seeds(sweep: Path) -> None:
    runs = collect([sweep]).runs
    assert swept_keys(runs) == ["optimizer.learning_rate", "optimizer.weight_decay", "seed"]
    found = heat_grid(runs)
    assert found is not None
    assert found.rows == ("optimizer.weight_decay", ("0.0", "0.3"))
    assert found.columns == ("optimizer.learning_rate", ("0.001", "0.01", "0.1"))
    assert found.cells["0.0", "0.01"] == pytest.approx(3.005)
    assert found.cells["0.3", "0.1"] == pytest.approx(9.03)  # its other seed failed


def test_a_sweep_over_other_numbers_of_keys_has_no_grid() -> None:
    assert heat_grid([run(1.0, a="x"), run(2.0, a="y")]) is None
    assert heat_grid([run(1.0, a="x", b="p", c="1"), run(2.0, a="y", b="q", c="2")]) is None
    scattered = [run(float(place), a=str(place), b=str(-place)) for place in range(10)]
    assert heat_grid(scattered) is None
