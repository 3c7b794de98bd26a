"""Which law each kind of run gets, and how many runs it needs."""

import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.studies.scaling.compute import Cost, best_model, costs, payoff
from gemma2_jax.studies.scaling.fit import Curve
from gemma2_jax.studies.scaling.fit_report import beyond
from gemma2_jax.studies.scaling.fitted import SCRATCH, Fit, Source, fit_runs
from gemma2_jax.studies.scaling.laws import SUPERVISED
from gemma2_jax.studies.scaling.runs import ScalingRun, Teacher
from tests.studies.scaling.conftest import TRUE


def points(
    teacher: Teacher | None = None, count: int = 16, sizes: int = 4, lengths: int = 4
) -> list[ScalingRun]:
    found = [
        ScalingRun(f"{n}-{d}", 10**5 * 4**n, 10**6 * 4**d, 0.0, 100, teacher)
        for n in range(sizes)
        for d in range(lengths)
    ]
    law = Curve(SUPERVISED, TRUE)
    return [
        ScalingRun(
            run.folder,
            run.parameters,
            run.tokens,
            float(law.loss(np.array(run.parameters), np.array(run.tokens)))
            * (1.0 if teacher is None else 0.97),
            100,
            teacher,
        )
        for run in found
    ][:count]


@pytest.mark.thorough
def test_runs_from_scratch_have_the_supervised_law():
    fit = fit_runs(points(), "distillation", 5, seed=0)
    assert fit.law == "chinchilla"
    assert dict(fit.curves[SCRATCH].parameters) == pytest.approx(TRUE, rel=1e-3)
    loss, around = fit.loss(SCRATCH, 1e7, 1e9)
    assert loss == pytest.approx(float(Curve(SUPERVISED, TRUE).loss(np.array(1e7), np.array(1e9))), rel=1e-3)
    assert around is not None
    assert len(fit.resampled) == 5
    assert fit_runs(points(), "chinchilla", 0, seed=0).loss(SCRATCH, 1e7, 1e9)[1] is None


@pytest.mark.parametrize(
    ("runs", "law", "words"),
    [
        (
            points(count=5),
            "chinchilla",
            "a law of 5 parameters needs at least 6 runs from scratch, and there are 5.",
        ),
        (
            points(sizes=1, lengths=8),
            "chinchilla",
            r"the 8 runs from scratch have only 1 different numbers of parameters \(100,000\), but .* at least 3",
        ),
        (
            points(sizes=5, lengths=2),
            "chinchilla",
            r"have only 2 different numbers of tokens \(1,000,000 and 4,000,000\)",
        ),
        (
            [*points(), *points(Teacher("t", 2.5))],
            "distillation",
            r"all runs with a teacher have one teacher's loss \(2.5000\).* at least 2 different ones; --law chinchilla",
        ),
        (
            [*points(), *points(Teacher("t", 2.5), 5), *points(Teacher("u", 2.7), 4)],
            "distillation",
            "a law of 9 parameters needs at least 10 runs with a teacher, and there are 9; --law chinchilla",
        ),
        (
            [*points(Teacher("t", 2.5)), *points(Teacher("u", 2.7))],
            "distillation",
            "a law of 5 parameters needs at least 6 runs from scratch, and there are 0; --law chinchilla",
        ),
    ],
)
def test_runs_that_do_not_determine_a_law_are_refused(runs, law, words):
    with pytest.raises(UserError, match=words):
        fit_runs(runs, law, 0, seed=0)


@pytest.mark.thorough
def test_each_teacher_may_have_its_own_law():
    few, many = Teacher("few", 2.5, 10**6, 10**8), Teacher("many", 2.6, 10**6, 10**8)
    fit = fit_runs([*points(), *points(few, 4), *points(many)], "chinchilla", 0, seed=0)
    assert list(fit.curves) == [SCRATCH, "many"]
    assert fit.left_out == {
        "few": "a law of 5 parameters needs at least 6 runs of the teacher few, and there are 4."
    }
    scratch, taught = (fit.loss(name, 1e6, 1e7)[0] for name in (SCRATCH, "many"))
    assert taught == pytest.approx(0.97 * scratch, rel=1e-3)


@pytest.mark.thorough
def test_points_beyond_the_span_are_found():
    fit = fit_runs(points(), "chinchilla", 0, seed=0)
    assert beyond(fit, SCRATCH, 2e5, 2e6) == {}
    assert beyond(fit, SCRATCH, 1e9, 2e6) == {"N": "N=1e+09 is beyond the runs (1e+05 to 6.4e+06)"}
    assert list(beyond(fit, SCRATCH, 1e2, 1e12)) == ["N", "D"]
    taught = known(TRUE, Teacher("t", 2.5, 10**5, 10**6))
    assert beyond(taught, "another", 2e5, 2e6, 2.9) == {"T": "T=2.9 is beyond the runs (2.5 to 2.5)"}


def known(student: dict[str, float], teacher: Teacher) -> Fit:
    """A fit whose laws are given."""
    sources = {
        SCRATCH: Source(SCRATCH, None, tuple(points())),
        "t": Source("t", teacher, tuple(points(teacher))),
    }
    curves = {SCRATCH: Curve(SUPERVISED, TRUE), "t": Curve(SUPERVISED, student)}
    return Fit(sources, curves, [curves, curves], "chinchilla", 0)


def test_the_best_model_is_that_of_the_closed_form():
    """With C = 6 N D, N = G (C/6)^(beta/(alpha+beta)), equation 4 of arXiv 2203.15556."""
    fit = known(TRUE, Teacher("t", 2.0, 10**5, 10**6))
    alpha, beta = TRUE["alpha"], TRUE["beta"]
    base = (alpha * TRUE["A"] / (beta * TRUE["B"])) ** (1 / (alpha + beta))
    best = best_model(fit, SCRATCH, Cost(), 1e15)
    assert best is not None
    assert best.parameters == pytest.approx(base * (1e15 / 6) ** (beta / (alpha + beta)), rel=1e-3)
    assert 6 * best.parameters * best.tokens == pytest.approx(1e15)
    assert best.interval == pytest.approx((best.loss, best.loss))
    assert best_model(fit, "t", Cost(0.0, 2e15), 1e15) is None


def test_the_cost_of_a_teacher():
    teacher = Teacher("t", 2.0, 1000, 500)
    fit = known(TRUE, teacher)
    forward, trained = costs(fit.sources["t"]).values()
    n, d = np.array(10.0), np.array(7.0)
    assert forward.flops(n, d) == (6 * 10 + 2 * 1000) * 7
    assert trained.flops(n, d) == forward.flops(n, d) + 6 * 1000 * 500
    assert trained.tokens(trained.flops(n, d), n) == pytest.approx(7.0)


def test_a_teacher_pays_until_its_loss_limits_the_student():
    """A student with a lower B learns faster from each token, and with a higher E stays above the text's entropy."""
    student = {**TRUE, "B": 100.0, "E": 1.9}
    teacher = Teacher("t", 1.9, 10**5, 10**6)
    paid = payoff(
        known(student, teacher), "t", costs(known(student, teacher).sources["t"])["the teacher exists"]
    )
    assert paid is not None
    assert paid.until is not None
    assert paid.low < paid.until < paid.high
    assert paid.share == 1.0
    assert paid.interval == pytest.approx((paid.until, paid.until))
    worse = known({**TRUE, "E": 2.5}, teacher)
    never = payoff(worse, "t", Cost(2e5))
    assert never is not None
    assert (never.until, never.ranges, never.share) == (None, (), 0.0)
    assert payoff(worse, "t", Cost(2e5, 1e30)) is None
