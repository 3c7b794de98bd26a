"""Scales, ticks and their labels."""

import math

import pytest

from gemma2_jax.reports.scales import Scale, spanning, tick_labels, ticks
from gemma2_jax.reports.svg import time_axis


@pytest.mark.parametrize("low", [0.0, 1e-6, 3.0, -5.0, 1e12])
@pytest.mark.parametrize("span", [1e-5, 0.7, 600.0, 4e13])
def test_linear_ticks_are_on_the_scale_and_differ(low: float, span: float) -> None:
    scale = spanning([low, low + span])
    found = ticks(scale)
    assert 3 <= len(found) <= 10
    assert all(-1e-6 <= scale.place(value) <= 1 + 1e-6 for value in found)
    assert found == sorted(set(found))


def test_labels_differ() -> None:
    for low, high in ((0, 1), (4.31, 4.33), (0, 600), (10_000, 400_000), (0, 4e12), (1e5, 3e6), (1e-5, 9e-5)):
        labels = tick_labels(ticks(Scale(low, high)))
        assert len(set(labels)) == len(labels)
        assert all(len(label) <= 8 for label in labels)
    assert tick_labels([0, 200, 400]) == ["0", "200", "400"]
    assert tick_labels([100_000, 250_000]) == ["100k", "250k"]
    assert tick_labels([0, 5e11, 1e12]) == ["0", "5·10¹¹", "10¹²"]


def test_logarithmic_ticks() -> None:
    assert ticks(Scale(1, 1000, True)) == [1, 10, 100, 1000] or len(ticks(Scale(1, 1000, True))) >= 4
    narrow = ticks(Scale(20, 60, True))
    assert len(narrow) >= 3
    assert all(20 <= value <= 60 for value in narrow)
    assert Scale(1, 100, True).place(10) == pytest.approx(0.5)


def test_scales_of_few_values() -> None:
    assert spanning([]).place(0.5) == 0.5
    assert 0 < spanning([3.0]).place(3.0) < 1
    assert 0 < spanning([0.0]).place(0.0) < 1
    assert 0 < spanning([3.0], log=True).place(3.0) < 1
    assert spanning([0.0, -1.0], log=True) == Scale(0.0, 1.0)
    assert spanning([1.0, math.inf, math.nan]).high < 2


def test_time_is_in_the_unit_that_suits() -> None:
    assert time_axis("time", Scale(0, 90)).title == "time (s)"
    minutes = time_axis("time", Scale(0, 1800))
    assert minutes.title == "time (min)"
    assert dict(minutes.marks)[600.0] == "10"
    assert time_axis("time", Scale(0, 86400)).title == "time (h)"
