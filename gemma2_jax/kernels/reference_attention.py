"""Soft-capped, grouped-query attention: the plain reference that the other kernels are compared with."""

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.softcap import softcap as apply_softcap


def visible_keys(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    window: int | None,
) -> jax.Array:
    """The keys that each query attends to: those of its own document, not after itself, inside the window.

    Args:
        query_positions, query_segments: [B, T].
        key_positions, key_segments: [B, S].
        window: the query at position i attends to i - window + 1 .. i; None for 0 .. i.

    Returns:
        bool [B, T, S].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & (query_segments[:, :, None] == key_segments[:, None, :])
    if window is not None:
        visible &= distance < window
    return visible


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float
) -> jax.Array:
    """The reference: computes every score, with softmax in float32 (Gemma 2 report, section 2).

    Args:
        query: [B, T, N, H], already scaled. Query heads k*G .. k*G + G - 1 share key/value head k.
        key, value: [B, S, K, H].
        visible: bool [B, T, S].
        softcap: scores become softcap * tanh(scores / softcap) before the mask.

    Returns:
        [B, T, N, H] in query's dtype.
    """
    weights = attention_weights(query, key, visible, softcap).astype(query.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(query.shape)


def attention_weights(query: jax.Array, key: jax.Array, visible: jax.Array, softcap: float) -> jax.Array:
    """Each head's attention distributions over the keys, float32 [B, K, G, T, S]; arguments as in `attention`."""
    B, T, N, H = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
    scores = apply_softcap(scores, softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return jax.nn.softmax(scores, axis=-1)
