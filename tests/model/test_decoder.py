"""Reading token by token through the cache equals reading everything at once."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.model.cache import EMPTY, LayerCaches, local_size
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.transformer import Gemma2

LENGTHS = np.array([3, 21, 8])  # shorter than the window of 8, far longer, and exactly it
STEPS = 20
TOKENS = np.asarray(jax.random.randint(jax.random.key(2), (3, 48), 0, 97))

prefill = jax.jit(Decoder.prefill, static_argnames="cache_size")
decode = jax.jit(Decoder.decode)


def right_padded(tokens: np.ndarray, lengths: np.ndarray, filler: int = 0) -> np.ndarray:
    width = int(lengths.max())
    return np.where(np.arange(width) < lengths[:, None], tokens[:, :width], filler)


@pytest.fixture(scope="module")
def full(toy_model):
    """Logits [B, T, V] of every token of TOKENS, read at once."""
    return np.asarray(jax.jit(toy_model)(TOKENS))


@pytest.mark.parametrize("unroll_layers", [False, True])
def test_equals_the_full_forward(toy_model, full, unroll_layers):
    """Rows of one batch, far shorter and far longer than the window, each against itself without padding."""
    decoder = Decoder(toy_model, ComputeConfig(unroll_layers=unroll_layers))
    rows = np.arange(3)
    prompts = right_padded(TOKENS, LENGTHS, filler=50)
    logits, cache = prefill(decoder, prompts, LENGTHS, cache_size=48)
    np.testing.assert_allclose(logits, full[rows, LENGTHS - 1], atol=2e-5)
    for position in (LENGTHS + step for step in range(STEPS)):
        logits, cache = decode(decoder, TOKENS[rows, position], position, cache)
        np.testing.assert_allclose(logits, full[rows, position], atol=2e-5)


def test_padding_of_the_vocabulary_is_masked(toy_config, toy_model, full):
    decoder = Decoder(Gemma2(replace(toy_config, vocab_padding=7), toy_model.params()), ComputeConfig())
    prompt, cache = prefill(decoder, right_padded(TOKENS, LENGTHS), LENGTHS, cache_size=48)
    next_token, _ = decode(decoder, TOKENS[np.arange(3), LENGTHS], LENGTHS, cache)
    for logits, expected in zip((prompt, next_token), (LENGTHS - 1, LENGTHS), strict=True):
        np.testing.assert_allclose(logits[:, :90], full[np.arange(3), expected, :90], atol=2e-5)
        assert not np.any(jax.nn.softmax(logits)[:, 90:])


def test_a_row_does_not_feel_its_neighbours(toy_model):
    """Only its own prompt is in its cache, no padding and nothing of a longer one."""
    decoder = Decoder(toy_model, ComputeConfig())
    _, together = prefill(decoder, right_padded(TOKENS, LENGTHS), LENGTHS, cache_size=48)
    _, alone = prefill(decoder, TOKENS[:1, :3], LENGTHS[:1], cache_size=48)
    for kind in ("local_block", "global_block"):
        one, other = getattr(together, kind), getattr(alone, kind)
        np.testing.assert_array_equal(one.positions[:1], other.positions)
        np.testing.assert_allclose(one.keys[:, :1], other.keys, atol=1e-5)
        np.testing.assert_allclose(one.values[:, :1], other.values, atol=1e-5)


def test_a_local_layers_cache_holds_its_window_only(toy_config, toy_model):
    decoder = Decoder(toy_model, ComputeConfig())
    _, cache = prefill(decoder, right_padded(TOKENS, LENGTHS), LENGTHS, cache_size=48)
    assert cache.local_block.keys.shape == (2, 3, 2, 8, 8)
    assert cache.global_block.keys.shape == (2, 3, 2, 48, 8)
    held = [sorted(int(p) for p in row if p != EMPTY) for row in cache.local_block.positions]
    assert held == [[0, 1, 2], list(range(13, 21)), list(range(8))]
    assert local_size(toy_config, 5) == 5


def test_the_newest_token_takes_the_place_of_the_oldest(toy_model):
    decoder = Decoder(toy_model, ComputeConfig())
    _, cache = prefill(decoder, TOKENS[:1, :21], np.array([21]), cache_size=48)
    _, after = decode(decoder, TOKENS[:1, 21], np.array([21]), cache)
    assert sorted(after.local_block.positions[0].tolist()) == list(range(14, 22))
    kept = np.arange(8) != 21 % 8
    np.testing.assert_array_equal(after.local_block.keys[..., kept, :], cache.local_block.keys[..., kept, :])


def test_bfloat16_is_close_to_float32(toy_model, full):
    decoder = Decoder(toy_model, ComputeConfig(dtype="bfloat16", unroll_layers=True))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(decoder)}
    assert dtypes == {jnp.dtype("bfloat16"), jnp.dtype("float32")}  # matrices and norms
    logits, cache = prefill(decoder, right_padded(TOKENS, LENGTHS), LENGTHS, cache_size=48)
    assert cache.global_block.keys.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, full[np.arange(3), LENGTHS - 1], atol=0.15)


def test_the_model_is_unchanged(toy_model):
    before = jax.tree.map(np.asarray, toy_model.params())
    jax.block_until_ready(jax.jit(partial(Decoder, compute=ComputeConfig(dtype="bfloat16")))(toy_model))
    chex.assert_trees_all_equal(before, toy_model.params())


def test_a_prompt_longer_than_the_cache_keeps_its_end():
    keys = jnp.arange(10.0).reshape(1, 1, 10, 1, 1)
    cache = LayerCaches.from_prompt(keys, keys, jnp.array([9]), size=4)
    assert cache.positions.tolist() == [[8, 5, 6, 7]]
    assert cache.keys.ravel().tolist() == [8.0, 5.0, 6.0, 7.0]
