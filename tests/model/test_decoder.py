"""The cached forward pass, token by token or several at once, equals the forward pass over the whole text."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.model import decoder as decoder_module
from gemma2_jax.model.cache import EMPTY, LayerCaches, local_size
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.transformer import Gemma2
from tests.parameters import mostly_thorough

LENGTHS = np.array([3, 21, 8])  # shorter than the window of 8, far longer, and exactly it
STEPS = 20
TOKENS = np.asarray(jax.random.randint(jax.random.key(2), (3, 48), 0, 97))

prefill = jax.jit(Decoder.prefill, static_argnames=("cache_size", "revocable"))
extend = jax.jit(Decoder.extend)
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


@mostly_thorough("chunk", [7, 5, 21])
def test_prompts_run_in_chunks(toy_model, full, monkeypatch, chunk):
    """Chunks that are shorter than the window or cross it, and a last one that is full or not; rows that end early."""
    monkeypatch.setattr(decoder_module, "CHUNK", chunk)
    decoder = Decoder(toy_model, ComputeConfig(unroll_layers=True))
    rows = np.arange(3)
    in_chunks = jax.jit(lambda decoder, tokens, lengths: decoder.prefill(tokens, lengths, cache_size=48))
    logits, cache = in_chunks(decoder, right_padded(TOKENS, LENGTHS, filler=50), LENGTHS)
    np.testing.assert_allclose(logits, full[rows, LENGTHS - 1], atol=2e-5)
    held = [sorted(int(p) for p in row if p != EMPTY) for row in cache.local_block.positions]
    assert held == [[0, 1, 2], list(range(13, 21)), list(range(8))]
    logits, cache = decode(decoder, TOKENS[rows, LENGTHS], LENGTHS, cache)
    np.testing.assert_allclose(logits, full[rows, LENGTHS], atol=2e-5)


@mostly_thorough("unroll_layers", [True, False])
def test_several_tokens_at_once_replace_rejected_ones(toy_model, full, unroll_layers):
    """Each row keeps 0 to 4 of every 4 tokens, across the window; the others were of another text."""
    decoder = Decoder(toy_model, ComputeConfig(unroll_layers=unroll_layers))
    rows = np.arange(3)
    _, cache = prefill(decoder, right_padded(TOKENS, LENGTHS), LENGTHS, cache_size=48, revocable=4)
    assert cache.local_block.keys.shape[3] == 12
    position = LENGTHS.copy()
    for kept in ([1, 4, 2], [3, 1, 1], [1, 1, 4], [4, 2, 3], [2, 1, 1]):
        index = position[:, None] + np.arange(4)
        tokens = np.where(np.arange(4) < np.array(kept)[:, None], TOKENS[rows[:, None], index], 90)
        hidden, cache = extend(decoder, tokens, position, cache)
        logits = decoder.logits(hidden)
        for row, number in enumerate(kept):
            expected = full[row, position[row] : position[row] + number]
            np.testing.assert_allclose(logits[row, :number], expected, atol=2e-5)
        position += kept
    logits, cache = decode(decoder, TOKENS[rows, position], position, cache)
    np.testing.assert_allclose(logits, full[rows, position], atol=2e-5)


@pytest.mark.thorough
def test_memory_of_a_long_prompt_is_that_of_a_chunk(toy_config):
    """Temporaries of 4096 tokens, compiled: those of one chunk of them, and none that grow with the text's length."""
    config = replace(toy_config, sliding_window=64)
    model = jax.eval_shape(lambda: Gemma2.init(config, jax.random.key(0)))
    decoder = jax.eval_shape(partial(Decoder, compute=ComputeConfig()), model)

    def temporaries(tokens):
        arguments = (decoder, jax.ShapeDtypeStruct((1, tokens), np.int32), np.array([tokens], np.int32))
        compiled = jax.jit(Decoder.prefill, static_argnames="cache_size").lower(*arguments, cache_size=4096)
        memory = compiled.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    scores = 4 * config.num_heads * decoder_module.CHUNK * (4096 + decoder_module.CHUNK)
    assert temporaries(4096) < 4 * scores
    assert temporaries(4096) - temporaries(2048) < 100_000


def test_of_more_tokens_than_slots_the_last_are_kept(toy_config):
    cache = LayerCaches.empty(
        replace(toy_config, num_kv_heads=1, head_dim=2), layers=2, rows=1, slots=4, dtype="float32"
    )
    keys = jnp.broadcast_to(jnp.arange(10.0)[None, :, None, None], (1, 10, 1, 2))
    used = jnp.arange(10)[None] < 9
    positions = jnp.arange(10)[None]
    cache = cache.occupy(positions, used).write(0, positions, keys, keys, used)
    assert cache.positions.tolist() == [[8, 5, 6, 7]]
    assert isinstance(cache.keys, jax.Array)
    assert cache.keys[0, 0, 0, :, 0].tolist() == [8.0, 5.0, 6.0, 7.0]
