"""The curves of a run: a metric over steps, tokens, FLOPs and time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma2_jax.reports.reported_runs import Run, count_setting

AXES = {
    "steps": "optimizer steps",
    "tokens": "tokens seen",
    "flops": "training FLOPs",
    "seconds": "time in training steps",
}
_MOST_POINTS = 240  # of a curve; longer ones are averaged over neighbouring rows


@dataclass(frozen=True)
class LossCurve:
    """A metric of one run on one split.

    Attributes:
        run: name of the run.
        split: "train" or "validation".
        x: positions of the points on each of `AXES` that is known for the run, increasing.
        y: values of the metric.
        averaged: number of rows that a point is the mean of.
    """

    run: str
    split: str
    x: Mapping[str, Sequence[float]]
    y: Sequence[float]
    averaged: int = 1


def curves(run: Run, metric: str) -> list[LossCurve]:
    """Returns the curves of a metric, one for each split that has it."""
    places = _places(run)
    found = []
    for split in ("train", "validation"):
        rows = [row for row in run.rows if row["split"] == split and _is_finite(row.get(metric))]
        if rows:
            averaged = math.ceil(len(rows) / _MOST_POINTS)
            parts = [rows[start : start + averaged] for start in range(0, len(rows), averaged)]
            x = {
                axis: [at[part[-1]["step"]] for part in parts]
                for axis, at in places.items()
                if all(part[-1]["step"] in at for part in parts)
            }
            y = [sum(row[metric] for row in part) / len(part) for part in parts]
            found.append(LossCurve(run.name, split, x, y, averaged))
    return found


def training_seconds(run: Run) -> float | None:
    """Returns the time of all training steps, without evaluations and checkpoints; None if it is unknown."""
    seconds = _places(run).get("seconds", {})
    return max(seconds.values(), default=None)


def has_estimated_time(run: Run) -> bool:
    """Whether the rows lack their time, as those of older versions do, and it is estimated from their speed."""
    return any(row["split"] == "train" and "seconds" not in row for row in run.rows)


def training_flops(run: Run) -> float | None:
    """Returns the model FLOPs of all steps done; None if they are unknown."""
    tokens = _tokens_per_step(run)
    return None if tokens is None or run.flops_per_token is None else run.step * tokens * run.flops_per_token


def _places(run: Run) -> dict[str, dict[int, float]]:
    """Returns the position of each step that has a row, on each axis that is known."""
    steps = sorted({row["step"] for row in run.rows})
    places: dict[str, dict[int, float]] = {"steps": {step: float(step) for step in steps}}
    tokens = _tokens_per_step(run)
    if tokens is not None:
        places["tokens"] = {step: step * tokens for step in steps}
        if run.flops_per_token is not None:
            places["flops"] = {step: step * tokens * run.flops_per_token for step in steps}
    if seconds := _seconds(run, tokens):
        places["seconds"] = seconds
    return places


def _tokens_per_step(run: Run) -> float | None:
    size, length = (count_setting(run.config, f"data.{key}") for key in ("batch_size", "seq_len"))
    if size is not None and length is not None:
        return float(size * length)
    return next(
        (row["tokens_seen"] / row["step"] for row in run.rows if row.get("tokens_seen") and row["step"]), None
    )


def _seconds(run: Run, tokens_per_step: float | None) -> dict[int, float]:
    """Returns the time from the first step to each step with a row; empty if it is unknown.

    Rows of older versions lack `seconds`; their time follows from the tokens and the speed, if all tokens are targets.
    """
    elapsed, last = 0.0, 0
    found: dict[int, float] = {}
    for row in run.rows:
        if row["split"] == "train":
            seconds = row.get("seconds")
            if seconds is None:
                speed = row.get("tokens_per_second")
                if not speed or tokens_per_step is None:
                    return {}
                seconds = (row["step"] - last) * tokens_per_step / speed
            elapsed, last = elapsed + seconds, row["step"]
            if not math.isfinite(elapsed):
                return {}
        found[row["step"]] = elapsed
    return found if elapsed else {}


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
