"""Generation with keys and values in eight bits: its arithmetic, its predictions, and its memory."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.kernels.int8_vectors import Int8Vectors, quantise_vectors
from gemma2_jax.model import decoder as decoder_module
from gemma2_jax.model.cache import Cache, LayerCaches
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.counts import bytes_per_token
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.transformer import Gemma2
from tests.model.models import vivid
from tests.model.test_quantised import largest_array
from tests.parameters import mostly_thorough

LENGTHS = np.array([3, 21, 8])  # shorter than the window of 8, far longer, and exactly it
TOKENS = np.asarray(jax.random.randint(jax.random.key(2), (3, 48), 0, 97))
ROWS = np.arange(3)


def rounded(_: LayerCaches, vectors: jax.Array) -> jax.Array:
    """What eight bits hold of vectors, as floats."""
    found = quantise_vectors(vectors)
    return found.codes * found.scales[..., None]


def in_bfloat16(_: LayerCaches, vectors: jax.Array) -> jax.Array:
    return vectors.astype(jnp.bfloat16).astype(jnp.float32)


def logits(decoder: Decoder) -> np.ndarray:
    """Logits of prompts with padding, of tokens one by one, and of several at once, most of which are then replaced."""
    prompts = np.where(np.arange(21) < LENGTHS[:, None], TOKENS[:, :21], 50)
    prefill = jax.jit(lambda tokens, lengths: decoder.prefill(tokens, lengths, cache_size=48, revocable=4))
    extend = jax.jit(lambda *inputs: decoder.extend(*inputs))
    decode = jax.jit(lambda *inputs: decoder.decode(*inputs))
    first, cache = prefill(prompts, LENGTHS)
    found, position = [first], LENGTHS.copy()
    for kept in ([1, 4, 2], [3, 1, 1], [1, 2, 4]):
        index = position[:, None] + np.arange(4)
        right = np.arange(4) < np.array(kept)[:, None]
        hidden, cache = extend(np.where(right, TOKENS[ROWS[:, None], index], 90), position, cache)
        found.append(np.where(right[..., None], decoder.logits(hidden), 0))
        position = position + kept
    for _ in range(9):  # across the window
        after, cache = decode(TOKENS[ROWS, position], position, cache)
        found.append(after)
        position = position + 1
    return np.concatenate([np.asarray(each).reshape(3, -1, 97) for each in found], axis=1)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.mean((one - other) ** 2)))


@mostly_thorough(("chunk", "unroll_layers"), [(7, False), (7, True), (21, True)])
def test_it_computes_with_what_eight_bits_hold(
    toy_config: ModelConfig, monkeypatch: pytest.MonkeyPatch, chunk: int, unroll_layers: bool
) -> None:
    """As a cache of floats with rounded keys and values: prompts in chunks, rings, replaced tokens.

    Its error is less than that of a cache in bfloat16 times the largest ratio of their steps.
    """
    monkeypatch.setattr(decoder_module, "CHUNK", chunk)
    model, compute = vivid(toy_config), ComputeConfig(unroll_layers=unroll_layers)
    found, plain = (logits(Decoder(model, compute, dtype)) for dtype in ("int8", None))
    monkeypatch.setattr(LayerCaches, "held", rounded)
    same = logits(Decoder(model, compute))
    monkeypatch.setattr(LayerCaches, "held", in_bfloat16)
    narrow = logits(Decoder(model, compute))
    assert (
        np.median(np.abs(found - same)) < 2e-6
    )  # a number on the edge of two levels may move all later logits
    assert distance(found, same) < distance(found, plain) / 20
    # The spacing of levels is a 127th of the largest number, which is at most sqrt(H) times the root mean square, and
    # in bfloat16 at least a 256th of each number.
    assert distance(found, plain) < toy_config.head_dim**0.5 * 256 / 127 * distance(narrow, plain) < 0.1


def test_a_cache_in_eight_bits(toy_config: ModelConfig) -> None:
    """Codes and one scale a vector, in rings as long as those of floats: (H + 4) / (4 H) of float32's bytes."""
    whole, found = (Cache.empty(toy_config, 3, 48, 4, dtype) for dtype in ("float32", "int8"))
    for kind, slots in (("local_block", 12), ("global_block", 48)):
        for vectors in (getattr(found, kind).keys, getattr(found, kind).values):
            assert isinstance(vectors, Int8Vectors)
            assert (vectors.codes.shape, vectors.codes.dtype) == ((2, 3, 2, slots, 8), jnp.int8)
            assert (vectors.scales.shape, vectors.scales.dtype) == ((2, 3, 2, slots), jnp.float32)

    def size(cache: Cache) -> int:
        vectors = [(part.keys, part.values) for part in (cache.local_block, cache.global_block)]
        return sum(leaf.nbytes for leaf in jax.tree.leaves(vectors))

    assert size(found) / size(whole) == (8 + 4) / (4 * 8)
    slots = 3 * 2 * (8 + 40)  # rows, pairs, the window and the context
    numbers = 2 * slots * toy_config.num_kv_heads
    assert 3 * bytes_per_token(toy_config, 0, 40, 1, 4) == numbers * (8 + 4)


@mostly_thorough(
    "compute", [ComputeConfig(dtype="bfloat16"), ComputeConfig(), ComputeConfig(unroll_layers=True)], ids=str
)
def test_a_decoding_program_never_holds_the_cache_in_floats(
    toy_config: ModelConfig, compute: ComputeConfig
) -> None:
    """In a loop over tokens, no float array is longer than one layer's keys; its codes are there once."""
    config = replace(toy_config, num_layers=16)
    slots = 512

    def generate(decoder: Decoder, cache: Cache) -> Any:
        def body(carry: Any, _: None) -> Any:
            tokens, position, cache = carry
            logits, cache = decoder.decode(tokens, position, cache)
            return (jnp.argmax(logits, axis=-1), position + 1, cache), None

        start = (jnp.zeros(3, jnp.int32), jnp.asarray(LENGTHS), cache)
        (tokens, _, cache), _ = jax.lax.scan(body, start, None, length=8)
        return tokens, cache

    model = jax.eval_shape(lambda: Gemma2.init(config, jax.random.key(0)))
    decoder = jax.eval_shape(lambda model: Decoder(model, compute, "int8"), model)
    cache = jax.eval_shape(lambda: Cache.empty(config, 3, slots, 0, "int8"))
    program = jax.jit(generate, donate_argnums=1).lower(decoder, cache).compile().as_text()
    of_a_layer = 3 * config.num_kv_heads * slots * config.head_dim
    assert largest_array(str(program)) == of_a_layer
    assert largest_array(str(program), "s8") == of_a_layer * config.num_pairs
