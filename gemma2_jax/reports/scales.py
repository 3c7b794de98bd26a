"""Axes of a chart: the span of a scale, its ticks and their labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_UNITS = (
    (86400.0, "d", 3),
    (3600.0, "h", 2),
    (60.0, "min", 2),
    (1.0, "s", 0),
)  # seconds, name, from how many on


@dataclass(frozen=True)
class Scale:
    """A scale from values to fractions of the axis.

    Attributes:
        low: value at 0.
        high: value at 1.
        log: whether the scale is logarithmic.
    """

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Returns where a value is, as a fraction of the axis; outside of 0 to 1 if the axis does not reach it."""
        if self.log:
            low, high = math.log(self.low), math.log(self.high)
            return (math.log(max(value, 1e-300)) - low) / (high - low)
        return (value - self.low) / (self.high - self.low)


def spanning(values: Sequence[float], margin: float = 0.04, log: bool = False) -> Scale:
    """Returns a scale that holds all values, with a margin on both sides as a fraction of their span.

    A logarithmic scale leaves out values that are not positive; without positive values the scale is linear.
    """
    held = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if not held:
        return Scale(0.0, 1.0)
    low, high = min(held), max(held)
    if log:
        reach = math.log(high / low) * margin or math.log(1.2)
        return Scale(low * math.exp(-reach), high * math.exp(reach), True)
    alike = high - low <= 1e-9 * abs(high)  # too close for ticks that differ
    reach = (abs(high) * 0.1 or 1.0) if alike else (high - low) * margin
    return Scale(low - reach, high + reach)


def ticks(scale: Scale, count: int = 6) -> list[float]:
    """Returns round values on the scale, about `count` of them."""
    if not scale.log:
        return _linear_ticks(scale, count)
    decades = math.log10(scale.high / scale.low)
    if decades < 1:
        return _linear_ticks(scale, count)
    first, last = math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high))
    step = max(1, math.ceil((last - first) / count))
    factors = (1, 2, 5) if decades < count / 2 else (1,)
    found = [factor * 10.0**power for power in range(first, last + 1, step) for factor in factors]
    return [value for value in found if scale.low <= value <= scale.high]


def _linear_ticks(scale: Scale, count: int) -> list[float]:
    power = 10.0 ** math.floor(math.log10((scale.high - scale.low) / count))
    steps = [factor * power for factor in (1, 2, 5, 10, 20)]
    candidates = [_multiples(scale, step) for step in steps]
    return min(candidates, key=lambda found: abs(len(found) - count))


def _multiples(scale: Scale, step: float) -> list[float]:
    first, last = math.ceil(scale.low / step - 1e-9), math.floor(scale.high / step + 1e-9)
    return [number * step for number in range(first, last + 1) if number > 0 or not scale.log]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Returns short labels with as many digits as the values need to differ: 0.5, 20k, 1.5M, 2·10¹⁴."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 1e10 or 0 < largest < 1e-3:
        return [power_text(value) for value in values]
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if largest >= size:
            size = 1e3 if letter == "k" else size
            return ["0" if value == 0 else f"{value / size:.6g}{letter}" for value in values]
    return [f"{value:.6g}" for value in values]


def time_unit(seconds: float) -> tuple[float, str]:
    """Returns the unit in which to show times of up to `seconds`: its length in seconds and its name."""
    return next((size, name) for size, name, least in _UNITS if seconds >= least * size)


def power_text(value: float) -> str:
    """Returns a number as a power of ten: 10⁶, 2.5·10¹⁴."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10.0**exponent:.3g}"
    power = f"10{str(exponent).translate(_SUPERSCRIPTS)}"
    return power if factor == "1" else f"{factor}·{power}"
