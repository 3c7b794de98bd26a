"""Points from Optuna's samplers."""

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.studies import samplers
from gemma2_jax.studies.samplers import check_optuna, quasi_random_points, tpe_point
from gemma2_jax.studies.space import Choices, Interval

SPACE: dict[str, Choices | Interval] = {
    "rate": Interval("log_uniform", 1e-4, 1e-1),
    "layers": Interval("int", 2, 8),
    "model": Choices(("toy", "null")),
}


def test_without_optuna_one_sentence(monkeypatch):
    monkeypatch.setattr(samplers, "is_installed", lambda module: False)
    with pytest.raises(
        UserError, match=r"^method is tpe, which needs Optuna: pip install -e '.\[sweep\]'; grid,"
    ):
        check_optuna("tpe")


def test_quasi_random_points_are_spread():
    pytest.importorskip("optuna")
    points = quasi_random_points(SPACE, 8, seed=0)
    assert points[:4] == quasi_random_points(SPACE, 4, seed=0)
    low = [float(point["rate"]) < 10**-2.5 for point in points]
    assert sum(low) == 4  # a half of the points in each half of the axis
    assert {point["model"] for point in points} == {"toy", "null"}


def test_the_estimator_approaches_the_minimum_and_repeats_itself():
    pytest.importorskip("optuna")
    history: list = []
    for number in range(24):
        point = tpe_point(SPACE, history, [], 0, number)
        assert point == tpe_point(SPACE, history, [], 0, number)
        loss = None if number == 3 else abs(float(point["rate"]) - 1e-2) + (point["model"] == "null")
        history.append((point, loss))
    assert sum(point["model"] == "toy" for point, _ in history[12:]) > 8
    waiting = [{"rate": "0.01", "layers": "3", "model": "toy"}]
    assert tpe_point(SPACE, history, waiting, 0, 24) != tpe_point(SPACE, history, [], 0, 24)
