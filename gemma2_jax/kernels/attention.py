"""Soft-capped, grouped-query attention: the plain form and the form that skips what the window hides."""

import jax
import jax.numpy as jnp

# Queries are taken in blocks of at least this many, and in at most so many blocks: smaller blocks skip
# more hidden keys, but each is compiled on its own.
_MIN_BLOCK = 128
_MAX_BLOCKS = 16


def visible_keys(
    query_positions: jax.Array,
    key_positions: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    window: int | None,
) -> jax.Array:
    """Which keys each query may see: its own document's, not later than itself, inside the window.

    Args:
        query_positions, query_segments: [B, T].
        key_positions, key_segments: [B, S].
        window: the query at position i sees i - window + 1 .. i; None sees 0 .. i.

    Returns:
        bool [B, T, S].
    """
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = (distance >= 0) & (query_segments[:, :, None] == key_segments[:, None, :])
    if window is not None:
        visible &= distance < window
    return visible


def attention(query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array, softcap: float) -> jax.Array:
    """The reference: every score is computed, softmax in float32 (Gemma 2 report, section 2).

    Args:
        query: [B, T, N, H], already scaled. Query heads k*G .. k*G + G - 1 share key/value head k.
        key, value: [B, S, K, H].
        visible: bool [B, T, S].
        softcap: scores become softcap * tanh(scores / softcap) before the mask.

    Returns:
        [B, T, N, H] in query's dtype.
    """
    B, T, N, H = query.shape
    K = key.shape[2]
    grouped = query.reshape(B, T, K, N // K, H)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, key, preferred_element_type=jnp.float32)
    scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, value).reshape(B, T, N, H)


def self_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    softcap: float,
) -> jax.Array:
    """`attention` of a sequence to itself, block of queries by block, without the keys no query of it can see.

    Within a segment positions go up by one from token to token, so a key after the block, or more than a
    window before it, is hidden whatever the segments are.

    Args:
        query: [B, T, N, H]; key, value: [B, T, K, H]; positions, segment_ids: [B, T].

    Returns:
        [B, T, N, H].
    """
    T = query.shape[1]
    block = max(_MIN_BLOCK, -(-T // _MAX_BLOCKS))
    outputs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        first = 0 if window is None else max(0, start - window + 1)
        queries, keys = slice(start, end), slice(first, end)
        visible = visible_keys(
            positions[:, queries], positions[:, keys], segment_ids[:, queries], segment_ids[:, keys], window
        )
        outputs.append(attention(query[:, queries], key[:, keys], value[:, keys], visible, softcap))
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=1)
