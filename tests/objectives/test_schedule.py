"""Values of schedules over a run, and which are refused."""

from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.objectives.schedule import ScheduleConfig, build_schedule, values_of


def values(steps: int, **config: Any) -> list[float]:
    schedule = build_schedule(ScheduleConfig(**config), steps)
    return [float(schedule(step)) for step in range(steps + 1)]


def test_constant() -> None:
    assert values(3, kind="constant", peak=2.0) == [2, 2, 2, 2]
    found = values(4, kind="constant", start=1.0, peak=2.0, warmup_steps=2)
    assert found == pytest.approx([1, 1.5, 2, 2, 2])


def test_linear_reaches_its_end_when_the_run_is_done() -> None:
    assert values(4, kind="linear", peak=3.0, end=1.0) == pytest.approx([3, 2.5, 2, 1.5, 1])
    found = values(4, kind="linear", start=0.0, peak=1.0, end=0.0, warmup_steps=2)
    assert found == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_cosine_moves_either_way_and_from_zero() -> None:
    assert values(4, kind="cosine", peak=4.0, end=2.0)[::2] == pytest.approx([4, 3, 2])
    rising = values(4, kind="cosine", peak=0.0, end=1.0)
    assert rising[::2] == pytest.approx([0, 0.5, 1])
    assert rising[1] == pytest.approx(0.5 - 0.5**0.5 / 2)


def test_wsd_stays_and_then_falls() -> None:
    found = values(8, kind="wsd", start=0.0, peak=1.0, end=0.5, warmup_steps=2, decay_steps=2)
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.75, 0.5])
    assert values(4, kind="wsd", peak=1.0, end=0.0, decay_steps=4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


def test_a_warm_up_as_long_as_the_run() -> None:
    assert values(2, kind="linear", start=0.0, peak=1.0, end=0.0, warmup_steps=2) == pytest.approx(
        [0, 0.5, 1]
    )


def test_values_of() -> None:
    assert values_of(2.0) == (2.0,)
    assert values_of(ScheduleConfig("linear", peak=3.0, end=1.0)) == (3.0, 1.0)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            dict(kind="constant", peak=1.0, end=0.0),
            "schedule's end is 0.0; it must be a number with the kinds",
        ),
        (dict(kind="linear", peak=1.0), "schedule's end is null; it must be a number"),
        (
            dict(kind="linear", peak=1.0, end=0.0, start=0.5),
            "start is 0.5; it must be a number with warmup_steps",
        ),
        (dict(kind="constant", peak=1.0, warmup_steps=2), "schedule's start is null"),
        (dict(kind="wsd", peak=1.0, end=0.0), "decay_steps is 0; it must be at least 1 with the kind wsd"),
        (dict(kind="linear", peak=1.0, end=0.0, decay_steps=3), "decay_steps is 3; it must be"),
        (dict(kind="constant", peak=1.0, warmup_steps=-1), "warmup_steps is -1; it must not be negative"),
    ],
)
def test_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ScheduleConfig(**config)
