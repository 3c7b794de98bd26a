"""The soft cap of attention scores and final logits."""

import jax
import jax.numpy as jnp


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """cap * tanh(logits / cap): bounds logits to (-cap, cap) (Gemma 2 report, section 2)."""
    return cap * jnp.tanh(logits / cap)
