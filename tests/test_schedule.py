"""Values of schedules over a run, and rejected schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError, build
from gemma2_jax.schedule import ScheduleConfig, build_schedule, count_steps, values_of


def values(steps: int, **config: Any) -> list[float]:
    schedule = build_schedule(ScheduleConfig(**config), steps)
    return [float(schedule(step)) for step in range(steps)]


def test_constant() -> None:
    assert values(3, kind="constant", peak=2.0) == [2, 2, 2]
    found = values(4, kind="constant", start=1.0, peak=2.0, warmup_steps=2)
    assert found == pytest.approx([1, 1.5, 2, 2])


def test_linear_begins_with_its_start_and_ends_with_its_end() -> None:
    assert values(5, kind="linear", peak=3.0, end=1.0) == pytest.approx([3, 2.5, 2, 1.5, 1])
    found = values(5, kind="linear", start=0.0, peak=1.0, end=0.0, warmup_steps=2)
    assert found == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_cosine_moves_either_way_and_from_zero() -> None:
    assert values(5, kind="cosine", peak=4.0, end=2.0)[::2] == pytest.approx([4, 3, 2])
    rising = values(5, kind="cosine", peak=0.0, end=1.0)
    assert rising[::2] == pytest.approx([0, 0.5, 1])
    assert rising[1] == pytest.approx(0.5 - 0.5**0.5 / 2)


def test_wsd_stays_and_then_falls() -> None:
    found = values(8, kind="wsd", start=0.0, peak=1.0, end=0.5, warmup_steps=2, decay_steps=2)
    assert found == pytest.approx([0, 0.5, 1, 1, 1, 1, 0.75, 0.5])
    assert values(4, kind="wsd", peak=1.0, end=0.0, decay_steps=4) == pytest.approx([0.75, 0.5, 0.25, 0])
    assert values(3, kind="wsd", peak=1.0, end=0.0, decay_steps=1) == [1, 1, 0]
    tight = values(4, kind="wsd", start=0.0, peak=1.0, end=0.0, warmup_steps=2, decay_steps=2)
    assert tight == pytest.approx([0, 0.5, 0.5, 0])


def test_a_warm_up_as_long_as_the_run() -> None:
    found = values(3, kind="linear", start=0.3, peak=0.9, end=0.1, warmup_steps=3)
    assert found == pytest.approx([0.3, 0.5, 0.1])
    assert values(2, kind="constant", start=0.0, peak=1.0, warmup_steps=2) == pytest.approx([0, 0.5])


@pytest.mark.parametrize("kind", ["linear", "cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3, 20, 777])
def test_both_ends_are_exact(kind: str, steps: int) -> None:
    decay = 0.3 if kind == "wsd" else 0
    found = values(steps, kind=kind, start=0.3, peak=0.9, end=0.1, warmup_steps=0.2, decay_steps=decay)
    assert found[-1] == np.float32(0.1)
    if steps > 1:
        assert found[0] == np.float32(0.3)
    if steps > 2:
        assert max(found) == np.float32(0.9)


def test_a_traced_step_and_all_steps_at_once() -> None:
    schedule = build_schedule(ScheduleConfig("wsd", 1.0, 0.0, 0.5, 2, 2), 8)
    at_once = schedule(jnp.arange(8))
    assert at_once.dtype == jnp.float32
    np.testing.assert_allclose(jax.jit(jax.vmap(schedule))(jnp.arange(8)), at_once, rtol=1e-6)
    assert at_once.tolist() == [float(schedule(step)) for step in range(8)]


@pytest.mark.parametrize(
    ("warmup", "decay", "steps", "expected"),
    [
        (50, 100, 500, (50, 100)),
        (0.1, 0.2, 500, (50, 100)),
        (0.05, 0, 500, (25, 0)),
        (0.1, 0.2, 20, (2, 4)),
        (0.001, 0.0, 20, (1, 0)),  # at least one step
        (0.1, 0.2, 2, (1, 1)),
        (0.1, 0.2, 1, (0, 1)),  # of which there is one only
        (0.5, 0.5, 7, (3, 4)),  # both rounded up
        (10, 0.5, 20, (10, 10)),
    ],
)
def test_numbers_of_steps(warmup: Any, decay: Any, steps: int, expected: tuple[int, int]) -> None:
    assert count_steps("optimizer", warmup, decay, steps) == expected


@pytest.mark.parametrize(
    ("warmup", "decay", "steps", "taken"), [(9, 0, 8, 9), (4, 5, 8, 9), (0.6, 0.6, 10, 12), (8, 0.1, 8, 9)]
)
def test_more_steps_than_the_run_has(warmup: Any, decay: Any, steps: int, taken: int) -> None:
    with pytest.raises(
        UserError, match=rf"optimizer\.warmup_steps .* take {taken} steps, more than training\.steps"
    ):
        count_steps("optimizer", warmup, decay, steps)


def test_fractions_in_a_file() -> None:
    data = {"kind": "wsd", "peak": 1, "end": 0, "decay_steps": 5}
    whole = build(ScheduleConfig, data, "here").decay_steps
    assert (whole, type(whole)) == (5, int)
    assert build(ScheduleConfig, data | {"decay_steps": 0.5}, "here").decay_steps == 0.5


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
        (
            dict(kind="wsd", peak=1.0, end=0.0),
            "decay_steps is 0; it must be at least 1",
        ),
        (dict(kind="linear", peak=1.0, end=0.0, decay_steps=3), "decay_steps is 3; it must be"),
        (dict(kind="constant", peak=1.0, warmup_steps=-1), "warmup_steps is -1; it must not be negative"),
        (
            dict(kind="constant", peak=1.0, start=0.0, warmup_steps=2.5),
            "warmup_steps is 2.5; it must be a whole number of steps, or a fraction below 1",
        ),
    ],
)
def test_refused(config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ScheduleConfig(**config)
