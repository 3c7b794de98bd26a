"""The parts of a block besides attention: RMSNorm, GeGLU, rotary positions, the tied embedder.

Modules compute in the dtype of their input, with weights of any dtype.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax.kernels.softcap import mask_padding, softcap
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.sharding.layout import constrain, constrain_in_lookup

WEIGHT_PRODUCT = "weight_product"  # what remat policies know the results of `product` by


def weight_for_use(weight: nnx.Param, dims: str, dtype: Any) -> jax.Array:
    """A weight as it enters a product: cast first, so that what fsdp gathers is already small."""
    return constrain(weight[...].astype(dtype), dims)


def product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """`jnp.einsum(spec, x, weight)`, where x's last letters are summed over and are the weight's first.

    JAX's own rule for the weight's gradient computes it transposed and turns it; for that XLA on CPU
    takes a matrix product three times slower than for the gradient as written here. Nor does it choose
    an order for the letters summed over, which for "BTNH,NHD->BTD" can cost a copy of the weight.
    """
    return checkpoint_name(_product(spec, x, weight), WEIGHT_PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    x_dims, weight_dims, _ = _letters(spec)
    return jnp.tensordot(x, weight, axes=len(set(x_dims) & set(weight_dims)))


def _product_forward(
    spec: str, x: jax.Array, weight: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(spec, x, weight), (x, weight)


def _product_backward(
    spec: str, saved: tuple[jax.Array, jax.Array], d_out: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    x_dims, weight_dims, out_dims = _letters(spec)
    d_x = jnp.einsum(f"{out_dims},{weight_dims}->{x_dims}", d_out, weight)
    d_weight = jnp.einsum(f"{x_dims},{out_dims}->{weight_dims}", x, d_out)
    return d_x, d_weight


_product.defvjp(_product_forward, _product_backward)


def _letters(spec: str) -> tuple[str, str, str]:
    operands, out = spec.split("->")
    x, weight = operands.split(",")
    return x, weight, out


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32, scaled by (1 + w) (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig):
        self.scale = nnx.Param(weights["scale"])
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., D] to [..., D]."""
        x32 = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        # In float32 whatever the weights are held in: bfloat16 has no room for w beside the 1.
        scale = 1.0 + self.scale[...].astype(jnp.float32)
        return (x32 * jax.lax.rsqrt(variance + self.eps) * scale).astype(x.dtype)


class MLP(nnx.Module):
    """GeGLU with the tanh approximation of GELU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, weights: Mapping[str, Any]):
        self.gate = nnx.Param(weights["gate"])
        self.up = nnx.Param(weights["up"])
        self.down = nnx.Param(weights["down"])

    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        gate = product("BTD,DF->BTF", x, weight_for_use(self.gate, "DF", x.dtype))
        up = product("BTD,DF->BTF", x, weight_for_use(self.up, "DF", x.dtype))
        hidden = constrain(jax.nn.gelu(gate, approximate=True) * up, "BTF")
        return product("BTF,FD->BTD", hidden, weight_for_use(self.down, "FD", x.dtype))


def rotate(x: jax.Array, positions: jax.Array, base: float, scale: float = 1.0) -> jax.Array:
    """Rotary position embedding: halves i and i + H/2 are a pair, turned by position * base^(-2i/H), times `scale`.

    (Su et al., arXiv 2104.09864.) Angles and scale are float32: position 8191 has no room in bfloat16.

    Args:
        x: [B, T, N, H]; positions: [B, T].
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[:, :, None, None].astype(jnp.float32) * frequency
    # Taken by index, which changes nothing but how XLA on CPU compiles it: it would else compute sines
    # again in each of the many loops that use them, 3 % of a training step of a small model.
    rows = jnp.arange(x.shape[1])
    sin, cos = jnp.sin(angle)[:, rows], jnp.cos(angle)[:, rows]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (turned * scale).astype(x.dtype)


class Embedder(nnx.Module):
    """The embedding table, tied: tokens enter through it and logits leave through it."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig):
        self.embedding = nnx.Param(weights["embedding"])
        self.d_model = config.d_model
        self.final_logit_softcap = config.final_logit_softcap
        self.vocab_padding = config.vocab_padding

    def encode(self, tokens: jax.Array, dtype: Any) -> jax.Array:
        """[B, T] to [B, T, D]: rows of the table times sqrt(D), which is itself rounded to `dtype`."""
        table = constrain_in_lookup(self.embedding[...], "VD")
        x = constrain_in_lookup(table[constrain_in_lookup(tokens, "BT")].astype(dtype), "BTD")
        return constrain(x * jnp.sqrt(jnp.float32(self.d_model)).astype(dtype), "BTD")

    def decode(self, x: jax.Array) -> jax.Array:
        """Final hidden states [..., D] to soft-capped float32 logits [..., V]; -1e30 where rows are padding."""
        table = weight_for_use(self.embedding, "VD", x.dtype)
        logits = jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)
        return mask_padding(softcap(logits, self.final_logit_softcap), self.vocab_padding)
