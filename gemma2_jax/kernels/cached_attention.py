"""Soft-capped, grouped-query attention from one new token per row to a cache."""

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.softcap import softcap as apply_softcap


def cached_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float
) -> jax.Array:
    """`reference_attention.attention` for a single query per row, with keys and values that have heads before slots.

    In this order both products read a head's slots contiguously. In the other order, or with `einsum`, which may swap
    its operands, a CPU copies the whole cache for every token.

    Args:
        query: [B, N, H], already scaled. Query heads k*G .. k*G + G - 1 share key/value head k.
        key, value: [B, K, S, H].
        visible: bool [B, S].
        softcap: scores become softcap * tanh(scores / softcap) before the mask.

    Returns:
        [B, N, H] in query's dtype.
    """
    B, N, H = query.shape
    K = key.shape[1]
    heads = ((0, 1), (0, 1))
    scores = jax.lax.dot_general(
        query.reshape(B, K, N // K, H), key, (((3,), (3,)), heads), preferred_element_type=jnp.float32
    )
    scores = apply_softcap(scores, softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jax.lax.dot_general(weights, value, (((3,), (2,)), heads)).reshape(B, N, H)
