"""A mean over seeds with an interval."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# 97.5 % quantiles of Student's t distribution with 2, 3, … degrees of freedom.
_T = (
    4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_NORMAL = 1.960


@dataclass(frozen=True)
class SeedInterval:
    """A mean over seeds, with an interval.

    Attributes:
        mean: the mean.
        low: lower end of the interval; None with a single value, and if a value is infinite.
        high: upper end.
        kind: what the interval is, in words; empty without one.
        count: number of values.
    """

    mean: float
    low: float | None
    high: float | None
    kind: str
    count: int


def seed_interval(values: Sequence[float]) -> SeedInterval:
    """Returns the mean with its 95 % t interval (three or more values) or with minimum and maximum (two).

    With two values, a t interval spans 12.7 standard errors on each side, wider than any useful difference.
    """
    count = len(values)
    mean = statistics.fmean(values)
    if count == 1 or not math.isfinite(mean):
        return SeedInterval(mean, None, None, "", count)
    if count == 2:
        return SeedInterval(mean, min(values), max(values), "minimum to maximum of 2 seeds", count)
    quantile = _T[count - 3] if count - 3 < len(_T) else _NORMAL
    reach = quantile * statistics.stdev(values) / math.sqrt(count)
    return SeedInterval(mean, mean - reach, mean + reach, f"95 % t interval over {count} seeds", count)
