"""Products of activations and weights: the only file that depends on how a weight is represented.

A weight is an array. Another tree in its place (a sum of two arrays, or a quantised array) passes through models
unchanged, and is interpreted by a branch in `for_use`, or in `linear` if the product itself differs.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax.kernels.lm_head import head_logits
from gemma2_jax.sharding.layout import constrain, constrain_in_lookup

WEIGHT_PRODUCT = "weight_product"  # name of the results of `linear` in remat policies


def linear(spec: str, x: jax.Array, weight: Any, dims: str) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` in x's dtype.

    Args:
        spec: einsum letters; those summed over are the last of x and the first of the weight.
        weight: of any dtype; dims: its letters.
    """
    return checkpoint_name(_product(spec, x, for_use(weight, dims, x.dtype)), WEIGHT_PRODUCT)


def linear_in_float32(spec: str, x: jax.Array, weight: Any, dims: str) -> jax.Array:
    """As `linear`, in float32 and not saved by remat policies: for losses, where rounding would show."""
    return jnp.einsum(spec, x, for_use(weight, dims, x.dtype), preferred_element_type=jnp.float32)


def lookup(tokens: jax.Array, table: Any, dtype: Any) -> jax.Array:
    """Rows of a table [V, D] for tokens [B, T]: [B, T, D], in `dtype`."""
    table = constrain_in_lookup(table, "VD")
    return constrain_in_lookup(table[constrain_in_lookup(tokens, "BT")].astype(dtype), "BTD")


def logits(x: jax.Array, table: Any, cap: float, vocab_padding: int) -> jax.Array:
    """Soft-capped float32 logits [..., V] of final hidden states [..., D] and a table [V, D]; -1e30 for padding."""
    return head_logits(x, for_use(table, "VD", x.dtype), cap, vocab_padding)


def for_use(weight: Any, dims: str, dtype: Any) -> jax.Array:
    """The array that enters a product, cast first, so that fsdp gathers the smaller array."""
    return constrain(cast(weight, dtype), dims)


def cast(weight: Any, dtype: Any) -> Any:
    """The weight in the dtype of its products."""
    return weight.astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: jax.Array, weight: jax.Array) -> jax.Array:
    """An einsum whose gradients are computed in an order that suits XLA on CPU.

    JAX's own rule computes the weight's gradient transposed, and then transposes the result; for that, XLA on CPU takes
    three times as long as for the product written here. Nor does it fix the order of the letters summed over, which for
    "BTNH,NHD->BTD" can cost a copy of the weight.
    """
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
