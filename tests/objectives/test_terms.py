"""Each term against its formula in float64."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma2_jax.objectives import terms
from gemma2_jax.objectives.distances import cosine_distance
from gemma2_jax.objectives.targets import SparseTargets

LOGITS = hnp.arrays(np.float32, (3, 11), elements=st.floats(-30, 30, width=32))


def softmax64(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@settings(max_examples=30, deadline=None)
@given(logits=LOGITS, targets=hnp.arrays(np.int32, (3,), elements=st.integers(0, 10)))
def test_cross_entropy(logits: np.ndarray, targets: np.ndarray) -> None:
    expected = -np.log(np.take_along_axis(softmax64(logits), targets[:, None], axis=-1)[:, 0])
    np.testing.assert_allclose(
        terms.cross_entropy(jnp.asarray(logits), jnp.asarray(targets)), expected, atol=2e-5
    )


@settings(max_examples=30, deadline=None)
@given(student=LOGITS, teacher=LOGITS, temperature=st.sampled_from([0.5, 1.0, 3.0]))
def test_forward_kl(student: np.ndarray, teacher: np.ndarray, temperature: float) -> None:
    p, q = softmax64(teacher / temperature), softmax64(student / temperature)
    expected = temperature**2 * np.sum(p * (np.log(p) - np.log(q)), axis=-1)
    found = terms.forward_kl(jnp.asarray(student), jnp.asarray(teacher), temperature)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-4)


def test_forward_kl_of_a_model_with_itself_is_zero() -> None:
    logits = jax.random.normal(jax.random.key(0), (5, 40)) * 10
    np.testing.assert_allclose(terms.forward_kl(logits, logits, 1.0), 0, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_of_forward_kl_is_the_difference_of_the_distributions(temperature: float) -> None:
    student, teacher = jax.random.normal(jax.random.key(0), (2, 40)) * 5
    gradient = jax.grad(lambda logits: terms.forward_kl(logits, teacher, temperature))(student)
    expected = temperature * (jax.nn.softmax(student / temperature) - jax.nn.softmax(teacher / temperature))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_agreement() -> None:
    student = jnp.array([[1.0, 2.0], [3.0, 1.0]])
    teacher = jnp.array([[0.0, 9.0], [0.0, 9.0]])
    np.testing.assert_array_equal(terms.agreement(student, teacher), [1.0, 0.0])


@settings(max_examples=30, deadline=None)
@given(student=LOGITS, teacher=LOGITS)
def test_acceptance_is_1_less_the_total_variation(student: np.ndarray, teacher: np.ndarray) -> None:
    expected = 1 - np.abs(softmax64(student) - softmax64(teacher)).sum(-1) / 2
    np.testing.assert_allclose(
        terms.acceptance(jnp.asarray(student), jnp.asarray(teacher)), expected, atol=2e-6
    )


def test_entropy() -> None:
    assert terms.entropy(jnp.zeros(8)) == pytest.approx(np.log(8))
    assert terms.entropy(jnp.array([0.0, 0.0, -1e30])) == pytest.approx(np.log(2))


STUDENT, TEACHER = jax.random.normal(jax.random.key(3), (2, 40)) * 2


def test_jsd_tends_to_the_forward_kl_and_to_the_reverse_one() -> None:
    """To first order in beta, the teacher's share of the mixture; float32 leaves 1e-7 / beta of it."""
    low, high = (float(terms.jsd(STUDENT, TEACHER, 1.0, beta)) for beta in (1e-3, 1 - 1e-3))
    assert low / 1e-3 == pytest.approx(float(terms.forward_kl(STUDENT, TEACHER, 1.0)), rel=0.02)
    assert high / 1e-3 == pytest.approx(float(terms.reverse_kl(STUDENT, TEACHER, 1.0)), rel=0.02)
    forward, reverse = (float(kl(STUDENT, TEACHER, 1.0)) for kl in (terms.forward_kl, terms.reverse_kl))
    assert abs(forward / reverse - 1) > 0.1


def test_jsd_in_the_middle_is_symmetric() -> None:
    here, there = terms.jsd(STUDENT, TEACHER, 2.0, 0.5), terms.jsd(TEACHER, STUDENT, 2.0, 0.5)
    assert float(here) == pytest.approx(float(there), rel=1e-5)
    assert float(here) < 4 * np.log(2)


def test_skewed_by_nothing_they_are_not_skew() -> None:
    np.testing.assert_array_equal(
        terms.skew_kl(STUDENT, TEACHER, 2.0, 0.0), terms.forward_kl(STUDENT, TEACHER, 2.0)
    )
    np.testing.assert_array_equal(
        terms.skew_reverse_kl(STUDENT, TEACHER, 2.0, 0.0), terms.reverse_kl(STUDENT, TEACHER, 2.0)
    )


@pytest.mark.parametrize("term", [terms.skew_kl, terms.skew_reverse_kl])
def test_skew_divergences_are_bounded(term: Callable[..., jax.Array]) -> None:
    """By -log(alpha), however far the models are apart; and mirror images of each other."""
    certain, other = jnp.array([30.0, -30.0, -30.0]), jnp.array([-30.0, 30.0, -30.0])
    assert float(term(certain, other, 1.0, 0.1)) == pytest.approx(-np.log(0.1), rel=1e-5)
    mirrored = terms.skew_kl(TEACHER, STUDENT, 1.0, 0.3)
    np.testing.assert_allclose(terms.skew_reverse_kl(STUDENT, TEACHER, 1.0, 0.3), mirrored, rtol=1e-6)


DIVERGENCES: dict[str, Callable[..., jax.Array]] = {
    "forward_kl": terms.forward_kl,
    "reverse_kl": terms.reverse_kl,
    "jsd": partial(terms.jsd, beta=0.3),
    "skew_kl": partial(terms.skew_kl, alpha=0.2),
    "skew_reverse_kl": partial(terms.skew_reverse_kl, alpha=0.2),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_temperature_keeps_the_gradients_size(name: str) -> None:
    """At high temperature, tau^2 times the loss tends to a quadratic form of the difference of the logits."""

    def size(temperature: float) -> float:
        gradient = jax.grad(lambda logits: DIVERGENCES[name](logits, TEACHER, temperature))(STUDENT)
        return float(jnp.linalg.norm(gradient))

    assert size(100.0) == pytest.approx(size(50.0), rel=0.05)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_padding_takes_no_part(name: str) -> None:
    padded = [jnp.concatenate([logits, jnp.full(3, -1e30)]) for logits in (STUDENT, TEACHER)]
    for temperature in (0.01, 1.0, 50.0):
        value, gradient = jax.value_and_grad(DIVERGENCES[name])(*padded, temperature)
        without, expected = jax.value_and_grad(DIVERGENCES[name])(STUDENT, TEACHER, temperature)
        assert float(value) == pytest.approx(float(without), rel=1e-5)
        np.testing.assert_allclose(gradient[:40], expected, rtol=1e-4, atol=1e-6)
        assert not np.any(gradient[40:])


def kl64(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


def log_mixture(share: float, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return jnp.log(share * jnp.exp(log_p) + (1 - share) * jnp.exp(log_q))


@partial(jax.jit, static_argnames="name")
@jax.value_and_grad
def formula(student: jax.Array, teacher: jax.Array, tau: jax.Array, name: str) -> jax.Array:
    """The divergence of that name, and its gradient by the student's logits."""
    log_s, log_t = (jax.nn.log_softmax(x / tau) for x in (student, teacher))
    if name == "jsd":
        log_m = log_mixture(0.3, log_t, log_s)
        return tau**2 * (0.3 * kl64(log_t, log_m) + 0.7 * kl64(log_s, log_m))
    first, second = {
        "forward_kl": (log_t, log_s),
        "reverse_kl": (log_s, log_t),
        "skew_kl": (log_t, log_mixture(0.2, log_t, log_s)),
        "skew_reverse_kl": (log_s, log_mixture(0.2, log_s, log_t)),
    }[name]
    return tau**2 * kl64(first, second)


def divergence64(name: str, student: np.ndarray, teacher: np.ndarray, tau: float) -> tuple[Any, Any]:
    """A divergence by its formula in float64, and its gradient by the student's logits."""
    with jax.enable_x64(True):
        found, gradient = formula(*(jnp.asarray(x, jnp.float64) for x in (student, teacher, tau)), name=name)
        return float(found), np.asarray(gradient)


@pytest.mark.parametrize("V", [97, pytest.param(256_000, marks=pytest.mark.thorough)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_temperature_leaves_rounding_alone(name: str, V: int) -> None:
    """Where T and S are close, T log(T / S) cancels: 1,000 leaves nothing of it in float32."""
    first, second = jax.random.split(jax.random.key(7))
    teacher = 0.5 * jax.random.normal(first, (V,))
    student = teacher + 0.5 * jax.random.normal(second, (V,))
    find = jax.jit(jax.value_and_grad(DIVERGENCES[name]))
    for temperature in (0.1, 1.0, 30.0, 1e3, 1e4):
        value, gradient = find(student, teacher, temperature)
        expected, exact = divergence64(name, np.asarray(student), np.asarray(teacher), temperature)
        # At 10,000, what rounding does to the two sums over V is left, squared.
        assert float(value) == pytest.approx(expected, rel=2e-3 if temperature > 1e3 else 5e-5)
        assert np.linalg.norm(gradient - exact) < 1e-5 * np.linalg.norm(exact)


@pytest.mark.parametrize("temperature", [1.0, 1e3])
def test_no_temperature_leaves_rounding_alone_of_sparse_targets(temperature: float) -> None:
    V, K = 50_000, 40
    first, second, third = jax.random.split(jax.random.key(8), 3)
    teacher = 0.5 * jax.random.normal(first, (V,))
    student = teacher + 0.5 * jax.random.normal(second, (V,))
    ids = jax.random.choice(third, V, (K,), replace=False).astype(jnp.int32)
    log_t = np.asarray(jax.nn.log_softmax(teacher / temperature), np.float64)
    weights = np.exp(log_t[ids])
    targets = SparseTargets(ids, jnp.log(jnp.asarray(weights, jnp.float32)), jnp.float32(1 - weights.sum()))
    kept, tail = np.exp(np.asarray(targets.log_weights, np.float64)), float(targets.tail)
    s = softmax64(np.asarray(student, np.float64) / temperature)
    others = 1 - s[ids].sum()
    parts = [*(s[ids] - kept - kept * np.log(s[ids] / kept)), others - tail - tail * np.log(others / tail)]
    found = float(terms.sparse_forward_kl(student, targets, temperature))
    assert found == pytest.approx(temperature**2 * sum(parts), rel=0.02)
    assert found > 0


def test_entropy_at_a_high_temperature() -> None:
    logits = jax.random.normal(jax.random.key(0), (256_000,)) / 1e3
    assert float(terms.entropy(logits)) == pytest.approx(np.log(256_000), rel=2e-6)


def test_cosine_distance_of_what_is_nearly_parallel() -> None:
    states = jax.random.normal(jax.random.key(1), (5, 64))
    near = states + 1e-4 * jax.random.normal(jax.random.key(2), (5, 64))
    a, b = (np.asarray(x, np.float64) for x in (states, near))
    exact = 1 - np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(cosine_distance(states, near), exact, rtol=1e-3)
