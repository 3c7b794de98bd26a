"""Soft-capped, grouped-query attention in XLA: each block of queries is compiled with only the keys visible to it.

For sequences of up to `LONGEST` tokens; `looped_attention` is for longer ones.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.reference_attention import visible_keys

# Queries per block. Smaller blocks skip more hidden keys, but each block is compiled separately.
_BLOCK = 128

# Longer sequences would have too many blocks to compile, with too many keys each.
LONGEST = 16 * _BLOCK

# Scores are always in (-softcap, softcap). Up to this cap, exp(score) and sums of millions of them stay well
# inside float32 (e^60 is 1e26), so softmax needs no pass over the scores to find the largest.
_LARGEST_CAP_WITHOUT_SHIFT = 60.0

# The batch dimensions of every product below: sequences and key/value heads.
BK = ((0, 1), (0, 1))


def blockwise_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    softcap: float,
) -> jax.Array:
    """`attention` of a sequence to itself, one block of queries at a time, without keys that none of them attends to.

    Within a segment, positions go up by one from token to token, so a key after the block, or more than a window before
    it, is hidden whatever the segments are. Differentiable in query, key and value; the backward pass recomputes each
    block's scores, so that none are kept (as in FlashAttention-2, Dao, arXiv 2307.08691).

    Args:
        query: [B, T, N, H]; key, value: [B, T, K, H]; positions, segment_ids: [B, T].

    Returns:
        [B, T, N, H].
    """
    return _self_attention(window, softcap, query, key, value, positions, segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _self_attention(window: int | None, softcap: float, *arrays: jax.Array) -> jax.Array:
    return _forward(window, softcap, *arrays)[0]


def _forward(
    window: int | None,
    softcap: float,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
) -> tuple[jax.Array, Any]:
    query, key, value = group(query, key.shape[2]), key.swapaxes(1, 2), value.swapaxes(1, 2)
    outputs, log_sums = [], []
    for queries, keys in _blocks(positions.shape[1], window):
        visible = _visible(positions, segment_ids, queries, keys, window)
        scores = softcap * capped(query[:, :, :, queries], key[:, :, keys], softcap)
        shift = jnp.float32(0)
        # Weights are cast before they are divided by their sum, and float16 ends at 65,504.
        if softcap > _LARGEST_CAP_WITHOUT_SHIFT or value.dtype == jnp.float16:
            shift = jnp.max(scores, axis=-1, where=visible, initial=-softcap, keepdims=True)
        weights = jnp.where(visible, jnp.exp(scores - shift), 0.0)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        mixed = dot(weights.astype(value.dtype), value[:, :, keys], (((4,), (2,)), BK)) / total
        outputs.append(mixed.astype(query.dtype))
        log_sums.append(shift + jnp.log(total))
    output, log_sum = jnp.concatenate(outputs, axis=3), jnp.concatenate(log_sums, axis=3)
    return ungroup(output), (query, key, value, positions, segment_ids, output, log_sum)


def _backward(window: int | None, softcap: float, saved: Any, d_output: jax.Array) -> tuple[Any, ...]:
    # Without this barrier XLA would recognise the scores of the forward pass, and keep those instead.
    saved, d_output = jax.lax.optimization_barrier((saved, d_output))
    query, key, value, positions, segment_ids, output, log_sum = saved
    dtype = query.dtype
    d_output = group(d_output, key.shape[1])
    # sum_s weight_s * d_weight_s, which softmax's gradient subtracts: one number per query.
    delta = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1, keepdims=True)
    d_queries = []
    # [B, K, H, S]: with S last, the products below read weights and scores without a transposition.
    d_key = d_value = jnp.zeros(key.swapaxes(2, 3).shape, jnp.float32)
    for queries, keys in _blocks(positions.shape[1], window):
        block_query, d_block = query[:, :, :, queries], d_output[:, :, :, queries]
        visible = _visible(positions, segment_ids, queries, keys, window)
        tanh = capped(block_query, key[:, :, keys], softcap)
        weights = jnp.where(visible, jnp.exp(softcap * tanh - log_sum[:, :, :, queries]), 0.0)
        d_weights = dot(d_block, value[:, :, keys], (((4,), (3,)), BK))
        d_scores = weights * (d_weights - delta[:, :, :, queries]) * (1.0 - jnp.square(tanh))
        weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
        d_queries.append(dot(d_scores, key[:, :, keys], (((4,), (2,)), BK)).astype(dtype))
        d_key = _add_at(d_key, keys, dot(block_query, d_scores, (((2, 3), (2, 3)), BK)))
        d_value = _add_at(d_value, keys, dot(d_block, weights, (((2, 3), (2, 3)), BK)))
    d_query = ungroup(jnp.concatenate(d_queries, axis=3))
    d_key, d_value = (jnp.moveaxis(d, 3, 1).astype(dtype) for d in (d_key, d_value))
    return d_query, d_key, d_value, None, None


_self_attention.defvjp(_forward, _backward)


def _blocks(T: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Yields each block of queries with the keys that any of them may attend to; those start at a block's beginning."""
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        first = 0 if window is None else max(0, start - window + 1) // _BLOCK * _BLOCK
        yield slice(start, end), slice(first, end)


def _visible(
    positions: jax.Array, segment_ids: jax.Array, queries: slice, keys: slice, window: int | None
) -> jax.Array:
    """`visible_keys` of one block, [B, 1, 1, T, S]."""
    return visible_keys(
        positions[:, queries], positions[:, keys], segment_ids[:, queries], segment_ids[:, keys], window
    )[:, None, None]


def capped(query: jax.Array, key: jax.Array, softcap: float) -> jax.Array:
    """tanh(score / softcap), [B, K, G, T, S]; the gradient of the soft cap is 1 minus its square."""
    return jnp.tanh(dot(query, key, (((4,), (3,)), BK)) / softcap)


def dot(x: jax.Array, y: jax.Array, dimensions: Any) -> jax.Array:
    """A product with float32 results. An einsum may swap x and y, and then transposes the larger one."""
    return jax.lax.dot_general(x, y, dimensions, preferred_element_type=jnp.float32)


def _add_at(total: jax.Array, keys: slice, addend: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(total, total[..., keys] + addend, keys.start, axis=3)


def group(x: jax.Array, K: int) -> jax.Array:
    """[B, T, N, H] to [B, K, G, T, H]."""
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def ungroup(x: jax.Array) -> jax.Array:
    """[B, K, G, T, H] to [B, T, N, H]."""
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)
