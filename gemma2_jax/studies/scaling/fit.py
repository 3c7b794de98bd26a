"""Fits a law to losses: minimises a Huber loss of log L from a grid of starts, and repeats it on resampled runs.

Hoffmann et al. (arXiv 2203.15556, section 3.3 and appendix D.3) minimise the same loss with L-BFGS from a grid of
starts that suits their units. Here, each start of the grid sets the exponents, and the factors follow from least
squares.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from scipy.optimize import minimize, nnls

from gemma2_jax.studies.scaling.laws import SUPERVISED, Array, Law, Points, distillation_law, log_values

DELTA = 1e-3  # Huber's delta, of the logarithm of the loss
CONFIDENCE = 0.95
_STARTS = 12  # starts from which the loss is minimised: the best of the grid
_TRIES = 1000  # draws of a sample that determines a law, before it is taken as it is
LEAST_DIFFERENT = (
    3  # the terms E, A and alpha are not determined by fewer different N, nor B and beta by fewer D
)


@dataclass(frozen=True)
class Curve:
    """A law with values: the loss over parameters and tokens, at one teacher.

    Attributes:
        parameters: the law's parameters by name.
        teacher_loss: loss of the teacher in nats; None if the law has no teacher.
    """

    law: Law
    parameters: Mapping[str, float]
    teacher_loss: float | None = None

    def loss(self, n: Array | float, d: Array | float) -> Array:
        """Returns the losses in nats at `n` parameters and `d` tokens, which have the same shape."""
        n, d = np.broadcast_arrays(np.asarray(n, float), np.asarray(d, float))
        teacher = None
        if self.teacher_loss is not None:
            teacher = np.full(n.size, np.log(self.teacher_loss))
        points = Points(np.log(n).ravel(), np.log(d).ravel(), teacher)
        return self.law.loss(self.parameters, points).reshape(n.shape)


@dataclass(frozen=True)
class Sample:
    """Runs that one law is fitted to.

    Attributes:
        n, d: parameters and tokens, float [runs].
        losses: validation cross-entropy in nats, float [runs].
        teacher_losses: those of the teachers, float [runs]; None without teachers.
    """

    n: Array
    d: Array
    losses: Array
    teacher_losses: Array | None = None

    @property
    def points(self) -> Points:
        teacher = None if self.teacher_losses is None else np.log(self.teacher_losses)
        return Points(np.log(self.n), np.log(self.d), teacher)

    def resampled(self, generator: np.random.Generator, least_runs: int) -> "Sample":
        """Draws as many runs with replacement, again until the different ones can determine a law.

        Args:
            least_runs: number of different runs that the law needs.
        """
        for _ in range(_TRIES):
            drawn = generator.integers(len(self.losses), size=len(self.losses))
            columns = [self.n, self.d]
            enough = len(set(drawn)) >= least_runs and all(
                len(set(column[drawn])) >= LEAST_DIFFERENT for column in columns
            )
            teachers = self.teacher_losses
            if enough and (teachers is None or len(set(teachers[drawn])) > 1):
                break
        return Sample(
            self.n[drawn], self.d[drawn], self.losses[drawn], None if teachers is None else teachers[drawn]
        )


def fit_supervised(sample: Sample, warm: Mapping[str, float] | None = None) -> dict[str, float]:
    """Fits `SUPERVISED`.

    Args:
        warm: parameters of a fit to similar runs, to start from in place of the grid.
    """
    return _fit(SUPERVISED, sample, warm, _supervised_starts)


def fit_distillation(law: Law, sample: Sample, warm: Mapping[str, float] | None = None) -> dict[str, float]:
    """Fits a `distillation_law` to runs with a teacher; arguments as in `fit_supervised`."""
    return _fit(law, sample, warm, partial(_distillation_starts, law))


def bootstrap(
    groups: Mapping[str, Sample], fitted: Mapping[str, Mapping[str, float]], count: int, seed: int
) -> list[dict[str, dict[str, float]]]:
    """Fits the supervised law to each group, resampled `count` times.

    Args:
        fitted: parameters of each group, fitted to all of its runs.
    """
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        drawn = {name: sample.resampled(generator, len(SUPERVISED.names)) for name, sample in groups.items()}
        found.append({name: fit_supervised(sample, fitted[name]) for name, sample in drawn.items()})
    return found


def bootstrap_distillation(
    students: Sample,
    fitted: Mapping[str, float],
    baselines: Sequence[Mapping[str, float]],
    seed: int,
) -> list[tuple[Law, dict[str, float]]]:
    """Fits the distillation law to resampled students, once for each of the resampled supervised laws."""
    generator = np.random.default_rng((seed, 1))
    found = []
    for baseline in baselines:
        law = distillation_law(baseline)
        drawn = students.resampled(generator, len(law.names))
        found.append((law, fit_distillation(law, drawn, fitted)))
    return found


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the central interval that holds `CONFIDENCE` of the values."""
    rest = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.asarray(values, float), [rest, 1 - rest])
    return float(low), float(high)


def _fit(
    law: Law,
    sample: Sample,
    warm: Mapping[str, float] | None,
    grid: Callable[[Sample], Sequence[Array]],
) -> dict[str, float]:
    points, target = sample.points, np.log(sample.losses)
    means = float(points.log_n.mean()), float(points.log_d.mean())
    bounds = np.log(np.array(law.bounds))

    def objective(centred: Array) -> tuple[float, Array]:
        logs = _shifted(law, centred, means)
        found, slopes = law.log_loss(logs, points)
        value, derivative = _huber(found - target)
        gradient = (slopes * derivative).sum(axis=1)  # as a matrix product, it would start threads
        for (factor, exponent), mean in zip(law.terms, means, strict=True):
            gradient[exponent] += gradient[factor] * np.exp(logs[exponent]) * mean
        return value, gradient

    if warm is None:
        chosen = sorted(grid(sample), key=lambda start: objective(start)[0])[:_STARTS]
    else:
        chosen = [_shifted(law, log_values(law.names, warm), (-means[0], -means[1]))]
    # The bounds of the factors are not those of the centred ones; a factor is determined by the data or vanishes.
    free = {factor for factor, _ in law.terms}
    limits = [(-60.0, 60.0) if position in free else tuple(pair) for position, pair in enumerate(bounds)]
    options = {"maxiter": 300, "ftol": 1e-10, "gtol": 1e-8}
    best, least = chosen[0], np.inf
    for start in chosen:
        result = minimize(
            objective,
            np.clip(start, *np.transpose(limits)),
            jac=True,
            method="L-BFGS-B",
            bounds=limits,
            options=options,
        )
        if result.fun < least:
            best, least = result.x, result.fun
    return dict(zip(law.names, np.exp(_shifted(law, best, means)).tolist(), strict=True))


def _shifted(law: Law, logs: Array, means: tuple[float, float]) -> Array:
    """Converts factors of inputs divided by their means into factors of the inputs themselves.

    The minimiser sees the former, since a factor of the inputs themselves is strongly correlated with its exponent.
    """
    logs = logs.copy()
    for (factor, exponent), mean in zip(law.terms, means, strict=True):
        logs[factor] += np.exp(logs[exponent]) * mean
    return logs


def _huber(residuals: Array) -> tuple[float, Array]:
    """The sum of Huber losses divided by delta, and its derivative by each residual [runs]."""
    size = np.abs(residuals)
    values = np.where(size <= DELTA, residuals**2 / (2 * DELTA), size - DELTA / 2)
    return float(values.sum()), np.clip(residuals / DELTA, -1.0, 1.0)


def _supervised_starts(sample: Sample) -> list[Array]:
    """Starts at exponents on a grid; E, A and B follow from least squares of the relative errors."""
    points, losses = sample.points, sample.losses
    n, d = points.log_n - points.log_n.mean(), points.log_d - points.log_d.mean()
    exponents = np.geomspace(0.05, 2.0, 7)
    starts = []
    for alpha, beta in itertools.product(exponents, exponents):
        columns = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], axis=1)
        factors, _ = nnls(columns / losses[:, None], np.ones_like(n))
        least = 1e-3 * losses.mean()  # a term that least squares leaves out starts as a small one
        starts.append(np.log([*np.maximum(factors, least), alpha, beta]))
    return starts


def _distillation_starts(law: Law, sample: Sample) -> list[Array]:
    """Starts on a grid; A' and B' are equal and give the right median of L_S - L_T."""
    points, teachers = sample.points, sample.teacher_losses
    assert teachers is not None
    gaps = np.log(np.maximum(sample.losses - teachers, 1e-3 * teachers))
    means = float(points.log_n.mean()), float(points.log_d.mean())
    grid: Iterable[tuple[float, ...]] = itertools.product(
        (1.0,), (1.0, 10.0), (0.8, 1.0, 1.25), (0.1, 0.4), (1.0,), (1.0,), (0.15, 0.4, 0.8), (0.15, 0.4, 0.8), (0.7,)
    )  # fmt: skip
    starts = []
    for values in grid:
        start = np.log(values)
        found, _ = law.log_loss(_shifted(law, start, means), points)
        now = np.log(np.maximum(np.exp(found) - teachers, 1e-12))
        start[4:6] += np.median(gaps - now) / values[-1]
        starts.append(start)
    return starts
