"""Each term against its formula in float64."""

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
