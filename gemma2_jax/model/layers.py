"""The parts of a block besides attention (RMSNorm, GeGLU, rotary positions), and the tied embedder.

Modules compute in the dtype of their input, with weights of any dtype.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma2_jax.kernels.tuning import computed_once
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.linear import linear, logits, lookup
from gemma2_jax.sharding.layout import constrain


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, scaled by (1 + w) (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig):
        self.scale = nnx.Param(weights["scale"])
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        # In float32 whatever the weights' dtype: in bfloat16, 1 + w loses a small w.
        scale = 1.0 + self.scale[...].astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(variance + self.eps) * scale).astype(x.dtype)


class MLP(nnx.Module):
    """GeGLU with the tanh approximation of GELU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, weights: Mapping[str, Any]):
        self.gate = nnx.Param(weights["gate"])
        self.up = nnx.Param(weights["up"])
        self.down = nnx.Param(weights["down"])

    def neurons(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, F]."""
        gate = linear("BTD,DF->BTF", x, self.gate.get_value(), "DF")
        up = linear("BTD,DF->BTF", x, self.up.get_value(), "DF")
        return constrain(jax.nn.gelu(gate, approximate=True) * up, "BTF")

    def mix(self, neurons: jax.Array) -> jax.Array:
        """[B, T, F] back to [B, T, D]."""
        return linear("BTF,FD->BTD", neurons, self.down.get_value(), "FD")


def rotate(x: jax.Array, positions: jax.Array, base: float, scale: float = 1.0) -> jax.Array:
    """Rotary position embedding: elements i and i + H/2 are rotated by position * base^(-2i/H), then scaled by `scale`.

    (Su et al., arXiv 2104.09864.) Angles and scale are float32: bfloat16 cannot represent position 8191.

    Args:
        x: [B, T, N, H]; positions: [B, T].
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    sin, cos = computed_once(jnp.sin(angle)), computed_once(jnp.cos(angle))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (turned * scale).astype(x.dtype)


class Embedder(nnx.Module):
    """The tied embedding table: it embeds tokens, and it is the matrix of the LM head."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig):
        self.embedding = nnx.Param(weights["embedding"])
        self.d_model = config.d_model
        self.final_logit_softcap = config.final_logit_softcap
        self.vocab_padding = config.vocab_padding

    def encode(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """[B, T] to [B, T, D]: rows of the table times sqrt(D), which is first rounded to `dtype`."""
        x = lookup(tokens, self.embedding.get_value(), dtype)
        return constrain(x * jnp.sqrt(jnp.float32(self.d_model)).astype(dtype), "BTD")

    def decode(self, x: jax.Array) -> jax.Array:
        """Final hidden states [..., D] to soft-capped float32 logits [..., V]; -1e30 for rows of padding."""
        return logits(x, self.embedding.get_value(), self.final_logit_softcap, self.vocab_padding)
