"""What a sweep shows: how much each key matters, and a grid of results over two keys."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from gemma2_jax.reports.groups import SEEDS
from gemma2_jax.reports.reported_runs import Run

_MOST_VALUES = 6  # a number with more distinct values is divided into quarters of the runs
_QUARTERS = 4


@dataclass(frozen=True)
class Grid:
    """Results over two keys of a sweep.

    Attributes:
        rows: key and its values, in order.
        columns: key and its values, in order.
        cells: mean cross-entropy in nats over the runs of each pair of values (row, column).
    """

    rows: tuple[str, tuple[str, ...]]
    columns: tuple[str, tuple[str, ...]]
    cells: Mapping[tuple[str, str], float]


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """Returns the keys that have several values in the runs of a sweep, in order."""
    keys = dict.fromkeys(key for run in runs for key in run.values)
    return [key for key in keys if len({run.values.get(key) for run in runs}) > 1]


def importance(runs: Sequence[Run]) -> dict[str, float]:
    """Returns the share of the variance of the results that each key of a sweep explains by itself, largest first.

    The results are the ranks of the cross-entropies, so that a diverged run counts no more than any other bad one.
    Unfinished runs rank below finished ones, those that stopped earlier lower, as when a sweep stops bad runs. The
    share is epsilon squared (Kelley 1935): 1 - (variance within the values) / (total variance), each variance divided
    by its degrees of freedom, so that a key does not gain from having many values; at least 0. Interactions between
    keys are in none of the shares. Empty with fewer than two keys, or where the runs are too few.
    """
    scored = [run for run in runs if run.cross_entropy is not None]
    keys = swept_keys(scored)
    ranks = _ranks([_standing(run) for run in scored])
    if len(keys) < 2 or len(set(ranks)) < 2:
        return {}
    shares = {}
    for key in keys:
        parts = _parts([run.values.get(key, "") for run in scored])
        share = _epsilon_squared(parts, ranks)
        if share is not None:
            shares[key] = share
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def heat_grid(runs: Sequence[Run]) -> Grid | None:
    """Returns the grid of a sweep over exactly two keys besides the seed; None for other sweeps."""
    scored = [run for run in runs if run.cross_entropy is not None]
    keys = [key for key in swept_keys(scored) if key not in SEEDS]
    if len(keys) != 2 or any(len({run.values.get(key) for run in scored}) > 20 for key in keys):
        return None
    axes = [(key, tuple(ordered({run.values.get(key, "") for run in scored}))) for key in keys]
    rows, columns = sorted(axes, key=lambda axis: len(axis[1]))
    found: dict[tuple[str, str], list[float]] = {}
    for run in scored:
        place = run.values.get(rows[0], ""), run.values.get(columns[0], "")
        found.setdefault(place, []).append(run.cross_entropy or 0.0)
    if len(found) < 0.5 * len(rows[1]) * len(
        columns[1]
    ):  # values drawn at random, which leave most cells empty
        return None
    return Grid(rows, columns, {place: fmean(losses) for place, losses in found.items()})


def numeric_value(text: str) -> float | None:
    """Returns the finite number that a value is; None for other values."""
    try:
        found = float(text)
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def ordered(values: set[str]) -> list[str]:
    numbers = {value: numeric_value(value) for value in values}
    if None in numbers.values():
        return sorted(values)
    return sorted(values, key=lambda value: numbers[value] or 0.0)


def _parts(values: Sequence[str]) -> list[int]:
    """Returns the number of the part that each run falls into: its value, or its quarter of many numbers."""
    distinct = ordered(set(values))
    if len(distinct) <= _MOST_VALUES or any(numeric_value(value) is None for value in distinct):
        return [distinct.index(value) for value in values]
    ranks = _ranks([numeric_value(value) or 0.0 for value in values])
    return [min(int(_QUARTERS * (rank - 0.5) / len(values)), _QUARTERS - 1) for rank in ranks]


def _standing(run: Run) -> tuple[bool, int, float]:
    """Something that is smaller for a better run."""
    return not run.is_finished, 0 if run.is_finished else -run.step, run.cross_entropy or 0.0


def _ranks(values: Sequence[Any]) -> list[float]:
    """Returns the ranks of comparable values from 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in set(values)}
    return [first[value] + (ordered.count(value) + 1) / 2 for value in values]


def _epsilon_squared(parts: Sequence[int], results: Sequence[float]) -> float | None:
    """Returns the share of the variance between the parts; None if no part has two runs."""
    count, used = len(results), len(set(parts))
    if count <= used:
        return None
    mean = fmean(results)
    total = sum((result - mean) ** 2 for result in results)
    within = 0.0
    for part in set(parts):
        members = [result for place, result in zip(parts, results, strict=True) if place == part]
        within += sum((result - fmean(members)) ** 2 for result in members)
    return max(0.0, 1 - within / (count - used) * (count - 1) / total)
