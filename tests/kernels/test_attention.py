"""Attention against loops over queries, heads and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_jax.kernels.cached_attention import cached_attention
from gemma2_jax.kernels.reference_attention import attention, visible_keys
from gemma2_jax.kernels.self_attention import self_attention
from tests.model.numpy_gemma2 import attend, seen_keys

# A score of 50 is rounded by up to 2e-6 in float32 and a few more in its sum; a weight, and so a value of up to
# 10, moves by as much.
TOLERANCE = 1e-4

RATIOS = st.sampled_from([(2, 1), (1, 3)])  # K, G


def packed(lengths: list[int], padding: int = 0) -> tuple[jax.Array, jax.Array]:
    """Positions and segment ids [1, T] of documents of these lengths, one after another."""
    positions = [np.arange(length) for length in (*lengths, padding)]
    segments = [np.full(length, number) for number, length in enumerate(lengths, 1)] + [np.zeros(padding)]
    return (
        jnp.asarray(np.concatenate(positions)[None], jnp.int32),
        jnp.asarray(np.concatenate(segments)[None], jnp.int32),
    )


def heads(T: int, K: int, G: int, H: int = 4, seed: int = 0, size: float = 1.0) -> tuple[jax.Array, ...]:
    """Queries, keys and values of one row; `size` makes scores large enough for a soft cap to bite."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((1, T, K * G, H), (1, T, K, H), (1, T, K, H))
    return tuple(size * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def loop(query, key, value, positions, segments, window, softcap) -> np.ndarray:
    query, key, value = (np.asarray(x[0], np.float64) for x in (query, key, value))
    positions, segments = np.asarray(positions[0]), np.asarray(segments[0])
    rows = [
        attend(query[i], key, value, seen_keys(i, positions, segments, window), softcap)
        for i in range(len(query))
    ]
    return np.array(rows)[None]


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.sampled_from([[9], [1, 8], [4, 2, 3], [3, 3, 3]]),  # nine tokens each: one shape to compile
    ratio=RATIOS,
    window=st.sampled_from([None, 1, 2, 5, 9, 100]),
    softcap=st.sampled_from([0.5, 50.0]),
    seed=st.integers(0, 1000),
)
def test_equals_the_loop(lengths, ratio, window, softcap, seed):
    query, key, value = heads(9, ratio[0], ratio[1], seed=seed, size=3.0)
    positions, segments = packed(lengths)
    expected = loop(query, key, value, positions, segments, window, softcap)
    visible = visible_keys(positions, positions, segments, segments, window)
    np.testing.assert_allclose(attention(query, key, value, visible, softcap), expected, atol=TOLERANCE)
    found = self_attention(query, key, value, positions, segments, window, softcap)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200])
def test_long_sequences_equal_the_loop(window):
    """Long enough for several blocks, with documents that begin and end inside of them."""
    query, key, value = heads(300, 1, 2, size=2.0)
    positions, segments = packed([100, 150, 30], padding=20)
    found = jax.jit(self_attention, static_argnums=(5, 6))(
        query, key, value, positions, segments, window, 5.0
    )
    expected = loop(query, key, value, positions, segments, window, 5.0)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.thorough
@pytest.mark.parametrize("window", [None, 50])
def test_gradients_of_long_sequences_equal_those_of_the_plain_form(window):
    query, key, value = heads(300, 2, 2, size=2.0)
    positions, segments = packed([100, 150, 30], padding=20)
    visible = visible_keys(positions, positions, segments, segments, window)
    weight = jax.random.normal(jax.random.key(9), query.shape)

    def fast(query, key, value):
        return jnp.sum(weight * self_attention(query, key, value, positions, segments, window, 5.0))

    def plain(query, key, value):
        return jnp.sum(weight * attention(query, key, value, visible, 5.0))

    found, expected = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(query, key, value) for f in (fast, plain))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=5e-5)


@pytest.mark.parametrize("window", [1, 4, 7])
def test_the_window_ends_exactly(window):
    """The query at position i sees i - window + 1 .. i and nothing else."""
    positions, segments = packed([10])
    visible = np.asarray(visible_keys(positions, positions, segments, segments, window))[0]
    for i in range(10):
        assert visible[i].nonzero()[0].tolist() == list(range(max(0, i - window + 1), i + 1))


def test_nothing_is_seen_across_documents():
    positions, segments = packed([3, 2], padding=2)
    visible = np.asarray(visible_keys(positions, positions, segments, segments, None))[0]
    assert visible.sum(1).tolist() == [1, 2, 3, 1, 2, 1, 2]
    assert not visible[3:, :3].any()
    assert not visible[:5, 5:].any()


def test_the_soft_cap_bounds_every_score():
    """Of two scores far above the cap, the larger has no more weight than tanh leaves it."""
    query = jnp.full((1, 1, 1, 1), 1.0)
    key = jnp.array([1000.0, 500.0]).reshape(1, 2, 1, 1)
    value = jnp.array([1.0, 0.0]).reshape(1, 2, 1, 1)
    visible = jnp.ones((1, 1, 2), bool)
    np.testing.assert_allclose(attention(query, key, value, visible, 50.0).item(), 0.5, atol=1e-6)
    assert attention(query, key, value, visible, 1e4).item() > 0.999


@settings(max_examples=10, deadline=None)
@given(filled=st.integers(1, 6), ratio=RATIOS, seed=st.integers(0, 1000))
def test_attention_to_a_cache_equals_the_plain_form(filled, ratio, seed):
    """One query per row; neither the order of the slots nor the content of empty slots matters."""
    query, key, value = heads(6, ratio[0], ratio[1], seed=seed, size=3.0)
    visible = np.zeros((1, 1, 6), bool)
    visible[..., np.random.default_rng(seed).permutation(6)[:filled]] = True
    expected = attention(query[:, :1], key, value, jnp.asarray(visible), 5.0)[:, 0]
    key, value = (jnp.where(visible[:, 0, :, None, None], x, 1e6).swapaxes(1, 2) for x in (key, value))
    found = cached_attention(query[:, 0], key, value, jnp.asarray(visible[:, 0]), 5.0)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
