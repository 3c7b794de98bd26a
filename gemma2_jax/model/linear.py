"""Products of activations and weights: the only file that depends on how a weight is represented.

A weight is an array, or an `AdaptedWeight`. Another tree in its place (such as a quantised array) passes through models
unchanged, and is interpreted by a branch in `for_use`, or in `linear` if the product itself differs.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax.kernels.lm_head import head_logits
from gemma2_jax.sharding.layout import constrain, constrain_in_lookup

WEIGHT_PRODUCT = "weight_product"  # name of the results of `linear` in remat policies


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "dropout_key"],
    meta_fields=["scale", "dropout"],
)
@dataclass(frozen=True)
class AdaptedWeight:
    """A weight W with a LoRA adapter (Hu et al., arXiv 2106.09685): x W' = x W + scale (x A) B, never summed to W'.

    W has the letters in… out…, the first of which a product sums over; R is the adapter's rank. All parts may have a
    leading axis P.

    Attributes:
        base: W, [in…, out…]; an array, or any other tree that `linear` takes.
        a: A, [in…, R]; b: B, [R, out…].
        scale: factor of the adapter's part.
        dropout: fraction of x's elements that are dropped before they meet A, if there is a key.
        dropout_key: uint32 [2], the data of a random key; None for no dropout.
    """

    base: Any
    a: Any
    b: Any
    scale: float
    dropout: float = 0.0
    dropout_key: Any = None


def linear(spec: str, x: jax.Array, weight: Any, dims: str) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` in x's dtype.

    Args:
        spec: einsum letters; those summed over are the last of x and the first of the weight.
        weight: of any dtype; dims: its letters.
    """
    if isinstance(weight, AdaptedWeight):
        product = _product(spec, x, for_use(weight.base, dims, x.dtype)) + _adapter_product(
            spec, x, weight, dims
        )
    else:
        product = _product(spec, x, for_use(weight, dims, x.dtype))
    return checkpoint_name(product, WEIGHT_PRODUCT)


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
    """The array that enters a product, cast first, so that fsdp gathers the smaller array.

    An adapted weight becomes the dense sum W', which is computed in float32.
    """
    if isinstance(weight, AdaptedWeight):
        weight = merged(weight.base, weight.a, weight.b, weight.scale, stacked=dims.startswith("P"))
    return constrain(cast(weight, dtype), dims)


def gathered(weight: Any, dims: str, dtype: Any) -> Any:
    """As `for_use`, but the parts of an adapted weight stay apart. For weights that are used many times."""
    if not isinstance(weight, AdaptedWeight):
        return for_use(weight, dims, dtype)
    dims_a, dims_b = adapter_dims(dims, weight.a.ndim)
    return replace(
        weight,
        base=gathered(weight.base, dims, dtype),
        a=for_use(weight.a, dims_a, dtype),
        b=for_use(weight.b, dims_b, dtype),
    )


def cast(weight: Any, dtype: Any) -> Any:
    """The weight in the dtype of its products."""
    if isinstance(weight, AdaptedWeight):
        base, a, b = (cast(part, dtype) for part in (weight.base, weight.a, weight.b))
        return replace(weight, base=base, a=a, b=b)
    return weight.astype(dtype)


def merged(base: Any, a: Any, b: Any, scale: float, stacked: bool = False) -> Any:
    """W + scale A B in float32, of JAX's or NumPy's arrays; `stacked`: whether all have a leading axis P."""
    base, a, b = (part.astype(jnp.float32) for part in (base, a, b))
    lead, rank = a.shape[:stacked], a.shape[-1]
    change = a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)
    return base + scale * change.reshape(base.shape)


def adapter_dims(dims: str, axes: int) -> tuple[str, str]:
    """The letters of A and B for a weight with these letters, if A has so many axes: "PDR" and "PRNH" for "PDNH"."""
    lead = "P" if dims.startswith("P") else ""
    return f"{dims[: axes - 1]}R", f"{lead}R{dims[axes - 1 :]}"


def _adapter_product(spec: str, x: jax.Array, weight: AdaptedWeight, dims: str) -> jax.Array:
    """scale (x A) B, for the spec and the letters of x W."""
    dims_a, dims_b = adapter_dims(dims, weight.a.ndim)
    x_dims, _, out_dims = _letters(spec)
    inner = f"{x_dims[: len(x_dims) - len(dims_a) + 1]}R"
    if weight.dropout_key is not None:
        kept = jax.random.bernoulli(jax.random.wrap_key_data(weight.dropout_key), 1 - weight.dropout, x.shape)
        x = jnp.where(kept, x / (1 - weight.dropout), 0)
    narrow = _product(f"{x_dims},{dims_a}->{inner}", x, for_use(weight.a, dims_a, x.dtype))
    narrow = constrain(narrow * weight.scale, inner)
    return _product(f"{inner},{dims_b}->{out_dims}", narrow, for_use(weight.b, dims_b, x.dtype))


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
