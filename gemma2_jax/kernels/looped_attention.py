"""Soft-capped, grouped-query attention in XLA for long sequences: a loop over key blocks for each query block.

Only one block of queries by one block of keys exists at a time, however long the sequence is, and one body is compiled
for all blocks. Key blocks that are later than the queries, or outside their window, are skipped.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.blockwise_attention import BK, capped, dot, group, ungroup
from gemma2_jax.kernels.reference_attention import visible_keys

_BLOCK = 512  # of queries and of keys

_NONE = -1  # segment of the padding to whole blocks; no token has it


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def looped_attention(window: int | None, softcap: float, *arrays: jax.Array) -> jax.Array:
    """Attention of consecutive queries to the keys of a whole sequence, by an online softmax.

    (Milakov and Gimelshein, arXiv 1805.02867; the backward pass recomputes scores as in FlashAttention-2, Dao, arXiv
    2307.08691.) Differentiable in query, key and value. Within a segment, positions must go up by one from token to
    token.

    Args:
        arrays: query [B, T, N, H]; key, value [B, S, K, H]; query_segments [B, T], key_segments [B, S]; and indices
            [T], the consecutive indices of the queries in the sequence of S tokens.

    Returns:
        [B, T, N, H].
    """
    return _forward(window, softcap, *arrays)[0]


def _forward(window: int | None, softcap: float, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    query, key, value, query_segments, key_segments, start = _padded(*arrays)
    B, K, G, T, _ = query.shape

    def of_queries(_: None, i: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
        block_query = _take(query, i, axis=3)

        def add_keys(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, mixed = sums
            visible = _visible(query_segments, key_segments, start, i, j, window)
            scores = softcap * capped(block_query, _take(key, j, axis=2), softcap)
            found = jnp.max(scores, axis=-1, where=visible, initial=-softcap, keepdims=True)
            shift = jnp.maximum(largest, found)
            weights = jnp.where(visible, jnp.exp(scores - shift), 0.0)
            shrink = jnp.exp(largest - shift)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            added = dot(weights.astype(value.dtype), _take(value, j, axis=2), (((4,), (2,)), BK))
            return shift, total, mixed * shrink + added

        zeros = jnp.zeros((B, K, G, _BLOCK, 1), jnp.float32)
        sums = (zeros - softcap, zeros, jnp.zeros(block_query.shape, jnp.float32))
        largest, total, mixed = jax.lax.fori_loop(*_visible_blocks(start, i, key, window), add_keys, sums)
        total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)  # padding may have no visible key
        return None, ((mixed / total).astype(query.dtype), largest + jnp.log(total))

    _, outputs = jax.lax.scan(of_queries, None, jnp.arange(T // _BLOCK))
    output, log_sum = (_join(x) for x in outputs)
    return ungroup(output)[:, : arrays[0].shape[1]], (arrays, output, log_sum)


def _backward(window: int | None, softcap: float, saved: Any, d_output: jax.Array) -> tuple[Any, ...]:
    arrays, output, log_sum = saved
    query, key, value, query_segments, key_segments, start = _padded(*arrays)
    dtype = query.dtype
    d_output = group(_pad(d_output, axis=1), key.shape[1])
    # sum_s weight_s * d_weight_s, which softmax's gradient subtracts: one number a query.
    delta = jnp.sum(d_output.astype(jnp.float32) * output, axis=-1, keepdims=True)

    def of_queries(sums: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[Any, jax.Array]:
        block_query, d_block, log_block, block_delta = (
            _take(x, i, axis=3) for x in (query, d_output, log_sum, delta)
        )

        def add_keys(j: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            d_query, d_key, d_value = sums
            block_key, block_value = (_take(x, j, axis=2) for x in (key, value))
            visible = _visible(query_segments, key_segments, start, i, j, window)
            tanh = capped(block_query, block_key, softcap)
            weights = jnp.where(visible, jnp.exp(softcap * tanh - log_block), 0.0)
            d_weights = dot(d_block, block_value, (((4,), (3,)), BK))
            d_scores = weights * (d_weights - block_delta) * (1.0 - jnp.square(tanh))
            weights, d_scores = weights.astype(dtype), d_scores.astype(dtype)
            d_query += dot(d_scores, block_key, (((4,), (2,)), BK))
            d_key = _add_at(d_key, j, dot(block_query, d_scores, (((2, 3), (2, 3)), BK)))
            d_value = _add_at(d_value, j, dot(d_block, weights, (((2, 3), (2, 3)), BK)))
            return d_query, d_key, d_value

        carry = (jnp.zeros(block_query.shape, jnp.float32), *sums)
        d_query, *sums_after = jax.lax.fori_loop(*_visible_blocks(start, i, key, window), add_keys, carry)
        return tuple(sums_after), d_query.astype(dtype)

    zeros = jnp.zeros(key.swapaxes(2, 3).shape, jnp.float32)  # [B, K, H, S], as in `blockwise_attention`
    d_keys_values, d_query = jax.lax.scan(of_queries, (zeros, zeros), jnp.arange(query.shape[3] // _BLOCK))
    T, S = arrays[0].shape[1], arrays[1].shape[1]
    d_key, d_value = (jnp.moveaxis(d, 3, 1)[:, :S].astype(dtype) for d in d_keys_values)
    return ungroup(_join(d_query))[:, :T], d_key, d_value, None, None, None


looped_attention.defvjp(_forward, _backward)


def _padded(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    indices: jax.Array,
) -> tuple[jax.Array, ...]:
    """The arrays in whole blocks: query [B, K, G, T, H], key, value [B, K, S, H], segments; the first query's index."""
    query = group(_pad(query, axis=1), key.shape[2])
    key, value = (_pad(x, axis=1).swapaxes(1, 2) for x in (key, value))
    segments = (_pad(x, axis=1, fill=_NONE) for x in (query_segments, key_segments))
    return query, key, value, *segments, indices[0]


def _pad(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % _BLOCK)
    return jnp.pad(x, widths, constant_values=fill)


def _visible_blocks(start: jax.Array, i: jax.Array, key: jax.Array, window: int | None) -> tuple[Any, Any]:
    """The key blocks that query block i may attend to: the first, and one past the last."""
    first = start + i * _BLOCK
    last = first + _BLOCK - 1
    begin = 0 if window is None else jnp.maximum(0, first - window + 1) // _BLOCK
    return begin, jnp.minimum(last // _BLOCK + 1, key.shape[2] // _BLOCK)


def _visible(
    query_segments: jax.Array,
    key_segments: jax.Array,
    start: jax.Array,
    i: jax.Array,
    j: jax.Array,
    window: int | None,
) -> jax.Array:
    """`visible_keys` of one block of queries and one of keys, [B, 1, 1, T, S], by their indices in the sequence."""
    within = jnp.arange(_BLOCK)[None]
    segments = _take(query_segments, i, axis=1), _take(key_segments, j, axis=1)
    visible = visible_keys(start + i * _BLOCK + within, j * _BLOCK + within, *segments, window)
    return visible[:, None, None]


def _take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, index * _BLOCK, _BLOCK, axis)


def _add_at(total: jax.Array, index: jax.Array, addend: jax.Array) -> jax.Array:
    at = index * _BLOCK
    return jax.lax.dynamic_update_slice_in_dim(total, _take(total, index, axis=3) + addend, at, axis=3)


def _join(blocks: jax.Array) -> jax.Array:
    """[blocks, B, K, G, block, X] to [B, K, G, T, X]."""
    count, B, K, G, block, X = blocks.shape
    return jnp.moveaxis(blocks, 0, 3).reshape(B, K, G, count * block, X)
