"""Soft-capped, grouped-query attention from new tokens to a cache."""

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.int8_vectors import Int8Vectors, Vectors
from gemma2_jax.kernels.softcap import softcap as apply_softcap

_HEADS = ((0, 1), (0, 1))  # batch axes of the products: B and K


def cached_attention(
    query: jax.Array, key: Vectors, value: Vectors, visible: jax.Array, softcap: float
) -> jax.Array:
    """`reference_attention.attention` for a single query per row, with keys and values that have heads before slots.

    In this order both products read a head's slots contiguously. In the other order, or with `einsum`, which may swap
    its operands, a CPU copies the whole cache for every token.

    The scales of vectors in eight bits multiply scores and weights, so that these vectors are never dequantised.

    Args:
        query: [B, N, H], already scaled. Query heads k*G .. k*G + G - 1 share key/value head k.
        key, value: [B, K, S, H], both of the same kind.
        visible: bool [B, S].
        softcap: scores become softcap * tanh(scores / softcap) before the mask.

    Returns:
        [B, N, H] in query's dtype.
    """
    B, N, H = query.shape
    K = _numbers(key).shape[1]
    scores = _scores(query.reshape(B, K, N // K, H), key, visible[:, None, None], softcap)
    weights = _weights(scores, value).astype(query.dtype)
    return _mix(weights, value).reshape(B, N, H)


def extended_attention(
    query: jax.Array,
    cached: tuple[Vectors, Vectors],
    visible: jax.Array,
    new: tuple[Vectors, Vectors],
    visible_new: jax.Array,
    softcap: float,
) -> jax.Array:
    """Attention of T new tokens per row to a cache that does not hold them yet, and to each other.

    The scores of both parts enter one softmax; their keys and values are not copied together.

    Args:
        query: [B, T, N, H], already scaled; heads as in `cached_attention`.
        cached: keys and values [B, K, S, H]; visible: bool [B, T, S].
        new: keys and values [B, T, K, H] of the new tokens; visible_new: bool [B, T, T].

    Returns:
        [B, T, N, H] in query's dtype.
    """
    B, T, N, H = query.shape
    K, S = _numbers(cached[0]).shape[1:3]
    G = N // K
    grouped = query.reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H)
    own_key, own_value = jax.tree.map(lambda part: part.swapaxes(1, 2), new)

    def masked(key: Vectors, visible: jax.Array) -> jax.Array:
        return _scores(grouped, key, jnp.tile(visible[:, None], (1, 1, G, 1)), softcap)

    scores = jnp.concatenate([masked(cached[0], visible), masked(own_key, visible_new)], axis=-1)
    weights = _weights(scores, cached[1], own_value).astype(query.dtype)
    mixed = _mix(weights[..., :S], cached[1]) + _mix(weights[..., S:], own_value)
    return mixed.reshape(B, K, G, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _scores(query: jax.Array, key: Vectors, visible: jax.Array, softcap: float) -> jax.Array:
    """Soft-capped, masked float32 scores [B, K, Q, S] of queries [B, K, Q, H]; `visible` broadcasts to them."""
    numbers = _numbers(key).astype(query.dtype)  # exact: bfloat16 holds all integers up to 256
    scores = jax.lax.dot_general(query, numbers, (((3,), (3,)), _HEADS), preferred_element_type=jnp.float32)
    if isinstance(key, Int8Vectors):
        scores = scores * key.scales[:, :, None]
    return jnp.where(visible, apply_softcap(scores, softcap), jnp.finfo(jnp.float32).min)


def _weights(scores: jax.Array, *values: Vectors) -> jax.Array:
    """Float32 weights [B, K, Q, S] of scores, times the scales of the values, which together have S slots."""
    weights = jax.nn.softmax(scores, axis=-1)
    scales = [value.scales for value in values if isinstance(value, Int8Vectors)]
    return weights * jnp.concatenate(scales, axis=-1)[:, :, None] if scales else weights


def _mix(weights: jax.Array, value: Vectors) -> jax.Array:
    """[B, K, Q, S] and values [B, K, S, H] to [B, K, Q, H]."""
    return jax.lax.dot_general(weights, _numbers(value).astype(weights.dtype), (((3,), (2,)), _HEADS))


def _numbers(vectors: Vectors) -> jax.Array:
    """The vectors, without their scales if they have any."""
    return vectors.codes if isinstance(vectors, Int8Vectors) else vectors
