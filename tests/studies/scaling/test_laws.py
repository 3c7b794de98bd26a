"""The laws' values against their formulas, and their derivatives against differences."""

import numpy as np
import pytest

from gemma2_jax.studies.scaling.laws import SUPERVISED, Law, Points, distillation_law, log_values
from tests.studies.scaling.conftest import TRUE

TEACHERS = np.array([2.9, 2.4, 3.3])
POINTS = Points(np.log([1e5, 1e6, 3e7]), np.log([1e6, 5e7, 2e8]), np.log(TEACHERS))


def test_the_supervised_law_is_its_formula():
    n, d = np.exp(POINTS.log_n), np.exp(POINTS.log_d)
    expected = TRUE["E"] + TRUE["A"] / n ** TRUE["alpha"] + TRUE["B"] / d ** TRUE["beta"]
    np.testing.assert_allclose(SUPERVISED.loss(TRUE, POINTS), expected, rtol=1e-12)


def test_the_distillation_law_is_its_formula(true_student):
    curve, values = true_student
    n, d, teacher = np.exp(POINTS.log_n), np.exp(POINTS.log_d), TEACHERS
    c0, c1, d1, f1, a, b, alpha, beta, gamma = values.values()
    student = SUPERVISED.loss(TRUE, POINTS)
    broken = (1 + (teacher / (student * d1)) ** (1 / f1)) ** (-c1 * f1)
    expected = teacher + teacher**-c0 * broken * (a / n**alpha + b / d**beta) ** gamma
    np.testing.assert_allclose(curve.law.loss(values, POINTS), expected, rtol=1e-12)


@pytest.mark.parametrize("which", ["supervised", "distillation"])
def test_derivatives(which, true_student):
    law: Law = SUPERVISED if which == "supervised" else distillation_law(TRUE)
    logs = log_values(law.names, TRUE if which == "supervised" else true_student[1])
    _, slopes = law.log_loss(logs, POINTS)
    for position in range(len(logs)):
        step = np.zeros_like(logs)
        step[position] = 1e-6
        ends = [law.log_loss(logs + sign * step, POINTS)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slopes[position], (ends[0] - ends[1]) / 2e-6, atol=1e-8)
