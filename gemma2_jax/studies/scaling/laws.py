"""The functional forms of two scaling laws, with their derivatives.

Both laws have positive parameters alone and are fitted in the logarithms of these. A law's `log_loss` takes the
logarithms of its parameters, float [parameters], and points, each an array [runs] of the logarithm of an input, and
returns the logarithm of the loss [runs] and its derivative by each parameter's logarithm [parameters, runs].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Evaluation = tuple[Array, Array]


@dataclass(frozen=True)
class Points:
    """Inputs of a law, each float [runs].

    Attributes:
        log_n: logarithm of the number of parameters.
        log_d: logarithm of the number of training tokens.
        log_teacher: logarithm of the teacher's loss in nats; None without teachers.
    """

    log_n: Array
    log_d: Array
    log_teacher: Array | None = None

    def take(self, indices: Array) -> "Points":
        """The points of some runs, in the order of `indices` [selected]."""
        teacher = None if self.log_teacher is None else self.log_teacher[indices]
        return Points(self.log_n[indices], self.log_d[indices], teacher)


@dataclass(frozen=True)
class Law:
    """A law without values for its parameters.

    Attributes:
        formula: the law as text.
        names: names of the parameters, in the order of their logarithms.
        bounds: the smallest and the largest value of each parameter.
        terms: factor and exponent of each power of an input, by their positions among the parameters: first the term
            in N, then the one in D.
        log_loss: see the head of this file.
    """

    formula: str
    names: tuple[str, ...]
    bounds: tuple[tuple[float, float], ...]
    terms: tuple[tuple[int, int], tuple[int, int]]
    log_loss: Callable[[Array, Points], Evaluation]

    @property
    def least_runs(self) -> int:
        """The smallest number of runs for a fit: one more than parameters."""
        return len(self.names) + 1

    def loss(self, parameters: Mapping[str, float], points: Points) -> Array:
        """The losses [runs] that the law with these parameters gives."""
        return np.exp(self.log_loss(log_values(self.names, parameters), points)[0])


def log_values(names: Sequence[str], parameters: Mapping[str, float]) -> Array:
    return np.array([math.log(parameters[name]) for name in names])


def _supervised(logs: Array, points: Points) -> Evaluation:
    e, a, b = logs[:3]
    alpha, beta = np.exp(logs[3:])
    terms = np.stack(
        [np.full_like(points.log_n, e), a - alpha * points.log_n, b - beta * points.log_d]
    )  # [3, runs]
    total = np.logaddexp.reduce(terms)
    shares = np.exp(terms - total)
    slopes = [-alpha * points.log_n * shares[1], -beta * points.log_d * shares[2]]
    return total, np.stack([*shares, *slopes])


_EXPONENT = (1e-2, 4.0)
_FACTOR = (1e-9, 1e30)

SUPERVISED = Law(
    "L(N, D) = E + A / N^alpha + B / D^beta",
    ("E", "A", "B", "alpha", "beta"),
    ((1e-3, 1e3), _FACTOR, _FACTOR, _EXPONENT, _EXPONENT),
    ((1, 3), (2, 4)),
    _supervised,
)
"""The law of Hoffmann et al. (Chinchilla), arXiv 2203.15556, section 3.3: L is the cross-entropy in nats of a model of
N parameters after D tokens, E the entropy of the text. The logarithm of L is a log-sum-exp of the logarithms of three
terms, as in equation 3 there."""


def distillation_law(supervised: Mapping[str, float]) -> Law:
    """The law of Busbridge et al., "Distillation Scaling Laws", arXiv 2502.08606, equation 8.

        L_S(N, D, L_T) = L_T + L_T^(-c0) * (1 + (L_T / (L(N, D) * d1))^(1/f1))^(-c1 * f1)
                             * (A' / N^alpha' + B' / D^beta')^gamma'

    L_S is the cross-entropy of a student of N parameters that is distilled on D tokens from a teacher of cross-entropy
    L_T, and L(N, D) is what the same student reaches on text alone: the paper's supervised law, here with the exponent
    gamma = 1 (`SUPERVISED`). A student is never better than its teacher in this form. The second factor is a broken
    power law in the ratio of the losses: below d1, a better teacher helps; above, the student cannot follow it.

    Args:
        supervised: parameters of `SUPERVISED`, fitted to runs of the same data without a teacher.
    """
    baseline = log_values(SUPERVISED.names, supervised)

    def log_loss(logs: Array, points: Points) -> Evaluation:
        assert points.log_teacher is not None
        a, b = logs[4:6]
        c0, c1, d1, f1 = np.exp(logs[:4])
        alpha, beta, gamma = np.exp(logs[6:])
        teacher = points.log_teacher
        student, _ = _supervised(baseline, points)
        ratio = (teacher - student - math.log(d1)) / f1
        softplus = np.logaddexp(0.0, ratio)
        sigmoid = np.exp(ratio - softplus)
        terms = np.stack([a - alpha * points.log_n, b - beta * points.log_d])
        total = np.logaddexp.reduce(terms)
        share = np.exp(terms - total)
        gap = -c0 * teacher - c1 * f1 * softplus + gamma * total  # the logarithm of L_S - L_T
        log_student = np.logaddexp(teacher, gap)
        slopes = np.stack(
            [
                -c0 * teacher,
                -c1 * f1 * softplus,
                c1 * sigmoid,
                -c1 * f1 * (softplus - ratio * sigmoid),
                gamma * share[0],
                gamma * share[1],
                -gamma * alpha * points.log_n * share[0],
                -gamma * beta * points.log_d * share[1],
                gamma * total,
            ]
        )
        return log_student, slopes * np.exp(gap - log_student)

    return Law(
        "L_S(N, D, L_T) = L_T + L_T^-c0 * (1 + (L_T / (L(N, D) * d1))^(1/f1))^(-c1*f1) "
        "* (A' / N^alpha' + B' / D^beta')^gamma'",
        ("c0", "c1", "d1", "f1", "A'", "B'", "alpha'", "beta'", "gamma'"),
        (
            (1e-3, 20.0),
            (1e-3, 1e3),
            (0.1, 10.0),
            (1e-2, 10.0),
            _FACTOR,
            _FACTOR,
            _EXPONENT,
            _EXPONENT,
            (5e-2, 4.0),
        ),
        ((4, 6), (5, 7)),
        log_loss,
    )
