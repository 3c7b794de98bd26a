"""Vectors in eight bits, and attention to a cache of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.kernels.cached_attention import cached_attention, extended_attention
from gemma2_jax.kernels.int8_vectors import Int8Vectors, Vectors, quantise_vectors
from tests.parameters import mostly_thorough

TINY, HUGE = 1e-30, 3e38  # the latter is close to float32's largest number


def values(vectors: Int8Vectors) -> np.ndarray:
    return np.asarray(vectors.codes, np.float64) * np.asarray(vectors.scales, np.float64)[..., None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_number_gets_the_nearest_level(dtype: str) -> None:
    sizes = jnp.array([1.0, TINY, HUGE / 8, 0.0, 1e-3])[:, None]
    given = (jnp.clip(jax.random.normal(jax.random.key(0), (3, 5, 16)), -8, 8) * sizes).astype(dtype)
    found = quantise_vectors(given)
    assert (found.codes.dtype, found.scales.dtype) == (jnp.int8, jnp.float32)
    assert (found.codes.shape, found.scales.shape) == ((3, 5, 16), (3, 5))
    exact = np.asarray(given, np.float64)
    largest = np.abs(exact).max(axis=-1)
    np.testing.assert_allclose(found.scales, largest / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(found.codes).max(axis=-1), np.where(largest > 0, 127, 0))
    half_a_step = largest[..., None] / 127 / 2
    assert (np.abs(values(found) - exact) <= half_a_step * (1 + 1e-5)).all()
    assert not values(found)[:, 3].any()


def test_numbers_that_are_not_finite_stay_so() -> None:
    """So that NaN logits are reported, as with a cache of floats."""
    found = quantise_vectors(jnp.array([[1.0, jnp.nan], [jnp.inf, 1.0]]))
    assert not np.isfinite(np.asarray(found.scales)).any()


@mostly_thorough("several", [True, False])
def test_attention_differs_by_the_rounding_of_keys_and_values_alone(several: bool) -> None:
    """A bound: half a step of a key moves a score by d at most, and so a weight by a factor of e^(2 d) at most.

    That moves a mean of the values by (e^(2 d) - 1) times the largest, and rounding the values by half a step more.
    """
    draw = np.random.default_rng(0)
    query = jnp.float32(draw.normal(0, 0.3, (2, 3, 4, 8)))
    key, value = jnp.float32(draw.normal(0, 1, (2, 2, 2, 24, 8)))
    visible = jnp.broadcast_to(jnp.arange(24) < jnp.array([[24], [9]]), (2, 24))

    @jax.jit
    def attend(key: Vectors, value: Vectors) -> jax.Array:
        if not several:
            return cached_attention(query[:, 0], key, value, visible, 50.0)
        old = jax.tree.map(lambda part: part[:, :, :21], (key, value))
        new = jax.tree.map(lambda part: part[:, :, 21:].swapaxes(1, 2), (key, value))
        masks = jnp.split(jnp.repeat(visible[:, None], 3, axis=1), [21], axis=2)
        return extended_attention(query, old, masks[0], new, masks[1], 50.0)

    rounded = [quantise_vectors(each) for each in (key, value)]
    found, expected = attend(*rounded), attend(key, value)
    exact = attend(*(jnp.float32(values(each)) for each in rounded))
    np.testing.assert_allclose(found, exact, atol=1e-6)
    steps = [float(jnp.max(each.scales)) for each in rounded]
    d = float(jnp.max(jnp.sum(jnp.abs(query), axis=-1))) * steps[0] / 2
    bound = np.expm1(2 * d) * float(jnp.max(jnp.abs(value))) + steps[1] / 2
    assert 0 < np.abs(found - expected).max() <= bound < 0.3
