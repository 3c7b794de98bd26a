"""What a fit implies for compute: the best model for a number of FLOPs, and where a teacher pays off.

Training costs 6 FLOPs per parameter and token (Kaplan et al., arXiv 2001.08361, section 2.1), a teacher's forward pass
2, with parameters counted as in the fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar

from gemma2_jax.studies.scaling.fit import Curve, interval
from gemma2_jax.studies.scaling.fitted import SCRATCH, Fit, Source
from gemma2_jax.studies.scaling.laws import Array

_LEAST, _MOST = 1e2, 1e15  # parameters to look for the best model among
_GRID = 200  # numbers of parameters, and of FLOPs, on a logarithmic scale


@dataclass(frozen=True)
class Cost:
    """FLOPs of a run as a function of its parameters and tokens.

    Attributes:
        per_token: FLOPs per token in addition to those of the trained model, for the teacher's forward pass.
        fixed: FLOPs before training, for the teacher's own training.
    """

    per_token: float = 0.0
    fixed: float = 0.0

    def flops(self, n: Array, d: Array) -> Array:
        return self.fixed + (6.0 * n + self.per_token) * d

    def tokens(self, flops: Array, n: Array) -> Array:
        """Returns the tokens that the FLOPs suffice for; 0 if they are below the fixed cost."""
        return np.maximum(flops - self.fixed, 0.0) / (6.0 * n + self.per_token)


@dataclass(frozen=True)
class Optimum:
    """The best model for a number of FLOPs.

    Attributes:
        parameters, tokens: its size and its training.
        loss: its loss in nats.
        interval: of the loss; None without resampling.
    """

    parameters: float
    tokens: float
    loss: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Payoff:
    """Where students of a teacher are better than models from scratch at equal FLOPs, inside the span of the runs.

    Attributes:
        low, high: the FLOPs that are compared: those that runs of both kinds have inside their span.
        ranges: FLOPs between which the students are better.
        until: the largest FLOPs at which they are better; None if there are none.
        interval: of `until`, among the resampled fits in which they are better somewhere.
        share: fraction of the resampled fits in which they are better somewhere; None without resampling.
    """

    low: float
    high: float
    ranges: tuple[tuple[float, float], ...]
    until: float | None
    interval: tuple[float, float] | None
    share: float | None


def costs(source: Source) -> dict[str, Cost]:
    """Returns the ways of counting the cost of a source's runs: without and with the training of the teacher."""
    teacher = source.teacher
    if teacher is None:
        return {"": Cost()}
    if teacher.parameters is None:
        return {"the teacher costs nothing": Cost()}
    forward = 2.0 * teacher.parameters
    found = {"the teacher exists": Cost(forward)}
    if teacher.tokens is not None:
        found["the teacher is trained for it"] = Cost(forward, 6.0 * teacher.parameters * teacher.tokens)
    return found


def best_model(fit: Fit, name: str, cost: Cost, flops: float) -> Optimum | None:
    """Returns the model of the smallest loss for `flops`; None if they are below the cost before training."""
    if flops <= cost.fixed:
        return None
    n = _best_size(fit.curves[name], cost, flops)
    d = float(cost.tokens(np.array(flops), np.array(n)))
    loss, around = fit.loss(name, n, d)
    return Optimum(n, d, loss, around)


def payoff(fit: Fit, name: str, cost: Cost) -> Payoff | None:
    """Compares students with models from scratch at equal FLOPs; None if their spans have none in common."""
    scratch, students = fit.sources[SCRATCH], fit.sources[name]
    spans = _span(scratch, Cost()), _span(students, cost)
    low, high = max(span[0] for span in spans), min(span[1] for span in spans)
    if not low < high:
        return None
    flops = np.geomspace(low, high, _GRID)

    def better(curves: dict[str, Curve]) -> Array:
        text = _lowest(curves[SCRATCH], scratch, Cost(), flops)
        return _lowest(curves[name], students, cost, flops) < text

    found = better(fit.curves)
    last = [flops[each][-1] for each in map(better, fit.resampled) if each.any()]
    return Payoff(
        low,
        high,
        _ranges(found, flops),
        float(flops[found][-1]) if found.any() else None,
        interval(last) if last else None,
        len(last) / len(fit.resampled) if fit.resampled else None,
    )


def _best_size(curve: Curve, cost: Cost, flops: float) -> float:
    def loss(log_n: Array) -> Array:
        n = np.exp(log_n)
        return curve.loss(n, np.maximum(cost.tokens(np.array(flops), n), 1.0))

    grid = np.linspace(np.log(_LEAST), np.log(_MOST), _GRID)
    place = int(np.argmin(loss(grid)))
    around = grid[max(place - 1, 0)], grid[min(place + 1, _GRID - 1)]
    found = minimize_scalar(lambda log_n: float(loss(np.array(log_n))), bounds=around, method="bounded")
    return float(np.exp(found.x))


def _span(source: Source, cost: Cost) -> tuple[float, float]:
    """The FLOPs of the smallest model on the fewest tokens, and of the largest on the most."""
    n, d = source.sample.n, source.sample.d
    return float(cost.flops(n.min(), d.min())), float(cost.flops(n.max(), d.max()))


def _lowest(curve: Curve, source: Source, cost: Cost, flops: Array) -> Array:
    """The lowest loss for each number of FLOPs [flops], of sizes and tokens inside the span of the source's runs."""
    n, d = source.sample.n, source.sample.d
    sizes = np.geomspace(n.min(), n.max(), _GRID)[:, None]
    tokens = cost.tokens(flops[None, :], sizes)
    # Tokens beyond the span are not extrapolated: a model may stop early.
    inside = tokens >= d.min() * (1 - 1e-9)
    losses = curve.loss(np.broadcast_to(sizes, tokens.shape), np.clip(tokens, d.min(), d.max()))
    lowest: Array = np.where(inside, losses, np.inf).min(axis=0)
    return lowest


def _ranges(chosen: Sequence[bool] | Array, flops: Array) -> tuple[tuple[float, float], ...]:
    """The runs of consecutive true entries, as pairs of FLOPs."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(chosen, int), [0]])))
    return tuple((float(flops[begin]), float(flops[end - 1])) for begin, end in edges.reshape(-1, 2))
