"""Each term against its formula in float64."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gemma2_jax.objectives import terms

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
    """Its limit is a quadratic form of the logits' difference, which tau^2 leaves as it is."""

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
