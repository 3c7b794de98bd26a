"""Schedules at the steps that matter, and settings that are refused."""

from dataclasses import replace
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.optimizer import learning_rate_schedule


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schedule": "cosine"}, {0: 0.0, 5: 0.5, 10: 1.0, 55: 0.55, 100: 0.1}),
        ({"schedule": "wsd", "decay_steps": 20}, {0: 0.0, 10: 1.0, 50: 1.0, 80: 1.0, 90: 0.55, 100: 0.1}),
        ({"schedule": "constant", "final_fraction": 1.0}, {0: 0.0, 10: 1.0, 99: 1.0}),
        ({"schedule": "constant", "final_fraction": 1.0, "warmup_steps": 0}, {0: 1.0, 99: 1.0}),
        ({"schedule": "cosine", "final_fraction": 0.0}, {55: 0.5, 100: 0.0}),
    ],
)
def test_learning_rate(toy_run: RunConfig, changes: dict[str, Any], expected: dict[int, float]) -> None:
    config = replace(toy_run.optimizer, **{"learning_rate": 1.0, "warmup_steps": 10, **changes})
    schedule = learning_rate_schedule(config, steps=100)
    assert {step: float(schedule(step)) for step in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("eps", 0.0),
        ("clip_norm", -1.0),
        ("warmup_steps", -1),
        ("decay_steps", -1),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("final_fraction", 1.5),
    ],
)
def test_refused(toy_run: RunConfig, name: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"optimizer.{name} is {value}"):
        replace(toy_run.optimizer, **{name: value})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"decay_steps": 5}, "decay_steps is 5, which the schedule cosine does not use; it must be 0"),
        (
            {"schedule": "constant", "final_fraction": 1.0, "decay_steps": 5},
            "decay_steps is 5, which the schedule constant does not use; it must be 0",
        ),
        ({"schedule": "wsd"}, "decay_steps is 0; it must be at least 1 with the schedule wsd"),
        (
            {"schedule": "constant"},
            "final_fraction is 0.1, which the schedule constant does not use; it must be 1",
        ),
    ],
)
def test_a_setting_without_effect_is_refused(
    toy_run: RunConfig, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        replace(toy_run.optimizer, **changes)
