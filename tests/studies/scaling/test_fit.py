"""Fits recover the parameters that losses were made from, inside intervals that resampling gives."""

import numpy as np
import pytest

from gemma2_jax.studies.scaling.fit import (
    Curve,
    Sample,
    bootstrap,
    bootstrap_distillation,
    fit_distillation,
    fit_supervised,
    interval,
)
from gemma2_jax.studies.scaling.laws import SUPERVISED, distillation_law
from tests.studies.scaling.conftest import TRUE

N, D = (axis.ravel() for axis in np.meshgrid(np.geomspace(1e5, 1e8, 4), np.geomspace(1e6, 1e9, 4)))


def sample(noise: float, seed: int = 0) -> Sample:
    draw = np.random.default_rng(seed)
    return Sample(N, D, Curve(SUPERVISED, TRUE).loss(N, D) * np.exp(draw.normal(0, noise, N.shape)))


def test_exact_losses_give_the_exact_parameters():
    found = fit_supervised(sample(0.0))
    assert found == pytest.approx(TRUE, rel=1e-4)


def test_an_outlier_changes_little():
    clean = sample(0.0)
    losses = clean.losses.copy()
    losses[5] *= 1.5
    assert fit_supervised(Sample(N, D, losses)) == pytest.approx(TRUE, rel=0.04)


@pytest.mark.thorough
def test_noisy_losses_give_intervals_that_hold_the_parameters():
    noisy = sample(0.004, seed=1)
    fitted = fit_supervised(noisy)
    resampled = [each["all"] for each in bootstrap({"all": noisy}, {"all": fitted}, 40, 0)]
    for name, value in TRUE.items():
        low, high = interval([each[name] for each in resampled])
        assert low < value < high, name
        assert low < fitted[name] < high, name
    # The same seed gives the same intervals, and another one does not.
    again, other = (bootstrap({"all": noisy}, {"all": fitted}, 2, seed) for seed in (0, 1))
    assert [each["all"] for each in again] == resampled[:2]
    assert other != again


@pytest.mark.slow
def test_about_as_many_intervals_hold_the_loss_as_they_should():
    """Of nominal 95 % intervals of an extrapolated loss, from 16 runs: resampled pairs of so few runs are rough."""
    true = float(Curve(SUPERVISED, TRUE).loss(np.array(1e9), np.array(1e10)))
    held = 0
    for seed in range(12):
        noisy = sample(0.004, seed)
        fitted = {"all": fit_supervised(noisy)}
        found = [
            float(Curve(SUPERVISED, each["all"]).loss(np.array(1e9), np.array(1e10)))
            for each in bootstrap({"all": noisy}, fitted, 30, seed)
        ]
        low, high = interval(found)
        held += low <= true <= high
    assert held >= 8


def test_a_resampled_set_determines_the_law():
    few = Sample(N[:8], D[[0, 4, 8, 0, 4, 8, 0, 4]], np.linspace(3, 2, 8))
    generator = np.random.default_rng(0)
    for _ in range(20):
        drawn = few.resampled(generator, 5)
        assert len(drawn.losses) == 8
        assert len(set(zip(drawn.n, drawn.d, drawn.losses, strict=True))) >= 5
        assert min(len(set(drawn.n)), len(set(drawn.d))) >= 3


@pytest.mark.slow
def test_the_distillation_law_predicts_what_it_was_fitted_to(true_student):
    """Nine parameters are not determined one by one, but the losses are, also for a teacher that no run had."""
    curve, values = true_student
    teachers = np.concatenate([np.full(N.size, loss) for loss in (2.4, 3.0, 3.8)])
    n, d = np.tile(N, 3), np.tile(D, 3)
    truth = Sample(n, d, np.ones_like(n), teachers)
    exact = curve.law.loss(values, truth.points)
    noisy = exact * np.exp(np.random.default_rng(0).normal(0, 0.003, exact.shape))
    students = Sample(n, d, noisy, teachers)
    fitted = fit_distillation(curve.law, students)
    np.testing.assert_allclose(curve.law.loss(fitted, truth.points), exact, rtol=0.01)
    unseen = Curve(curve.law, values, 2.7), Curve(curve.law, fitted, 2.7)
    expected, found = (each.loss(N, D) for each in unseen)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    redrawn = bootstrap_distillation(students, fitted, [TRUE] * 10, 0)
    losses = [Curve(law, parameters, 2.7).loss(N, D) for law, parameters in redrawn]
    assert np.ptp(losses, axis=0).mean() < 0.1
    assert distillation_law(TRUE).least_runs == 10
