"""Functions of scores and logits: the soft cap, the mask of rows that are no tokens, negative log-probabilities."""

import jax
import jax.numpy as jnp

# Finite, since 0 * -inf is NaN in a KL term; far enough from float32's limit to be divided by a temperature.
NEVER = -1e30


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap): bounds logits to (-cap, cap) (Gemma 2 report, section 2)."""
    return cap * jnp.tanh(logits / cap)


def mask_padding(logits: jax.Array, padding: int) -> jax.Array:
    """Capped logits [..., V] whose last `padding` entries have probability 0 and no gradient.

    They are masked and not cut off, so that the mesh still divides V.
    """
    if padding == 0:
        return logits
    V = logits.shape[-1]
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    return jnp.where(ids < V - padding, logits, NEVER)


def negative_log_prob(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log P(target): logits [..., V], targets int32 [...]. Only sums over V, so a split V needs no gather."""
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
