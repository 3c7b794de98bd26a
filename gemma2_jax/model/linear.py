"""Products of activations and weights: the only file that depends on how a weight is represented.

A weight is an array, a `RoundedWeight`, a `QuantisedWeight`, an `OutputFirstWeight`, or an `AdaptedWeight` of an array
or a quantised weight. Another tree in its place passes through models unchanged, and is interpreted by a branch in
`for_use`, or in `_base_product` if the product itself differs.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax.kernels.lm_head import capped_logits, head_logits
from gemma2_jax.model.qat import RoundedWeight
from gemma2_jax.model.quantised import QuantisedWeight, dequantise, gathered_parts, rows_of
from gemma2_jax.sharding.layout import constrain, constrain_in_lookup, is_split

_ROWS = 8192  # of a quantised table that are dequantised at a time for logits
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
        base: W, [in…, out…]; an array or a `QuantisedWeight`.
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


@partial(jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["out"])
@dataclass(frozen=True)
class OutputFirstWeight:
    """A matrix in the layout that runtimes of exported models need: one row per output.

    Attributes:
        rows: [out, in]; out and in are merged axes of outputs and of inputs.
        out: sizes of the axes of outputs.
    """

    rows: Any
    out: tuple[int, ...]

    def product(self, x: jax.Array) -> jax.Array:
        """x [B, T, in…] to [B, T, out…]."""
        batch = x.shape[:2]
        product = jax.lax.dot_general(x.reshape(*batch, -1), self.rows, (((2,), (1,)), ((), ())))
        return product.reshape(*batch, *self.out)


def linear(spec: str, x: jax.Array, weight: Any, dims: str) -> jax.Array:
    """`jnp.einsum(spec, x, weight)` in x's dtype.

    Args:
        spec: einsum letters; those summed over are the last of x and the first of the weight.
        weight: of any dtype; dims: its letters.
    """
    if isinstance(weight, AdaptedWeight):
        product = _base_product(spec, x, weight.base, dims) + _adapter_product(spec, x, weight, dims)
    else:
        product = _base_product(spec, x, weight, dims)
    return checkpoint_name(product, WEIGHT_PRODUCT)


def linear_in_float32(spec: str, x: jax.Array, weight: Any, dims: str) -> jax.Array:
    """As `linear`, in float32 and not saved by remat policies: for losses, where rounding would show."""
    return jnp.einsum(spec, x, for_use(weight, dims, x.dtype), preferred_element_type=jnp.float32)


def lookup(tokens: jax.Array, table: Any, dtype: Any) -> jax.Array:
    """Rows of a table [V, D] for tokens [B, T]: [B, T, D], in `dtype`."""
    tokens = constrain_in_lookup(tokens, "BT")

    def take(part: jax.Array) -> jax.Array:
        return constrain_in_lookup(part, "VD")[tokens]

    if isinstance(table, QuantisedWeight):  # only the rows that are looked up are dequantised
        return constrain_in_lookup(dequantise(rows_of(table, take), dtype), "BTD")
    return constrain_in_lookup(take(dense(table, dtype)).astype(dtype), "BTD")


def logits(x: jax.Array, table: Any, cap: float, vocab_padding: int) -> jax.Array:
    """Soft-capped float32 logits [..., V] of final hidden states [..., D] and a table [V, D]; -1e30 for padding."""
    if isinstance(table, QuantisedWeight) and not is_split("V"):
        return capped_logits(_products_by_rows(x, table), cap, vocab_padding)
    return head_logits(x, for_use(table, "VD", x.dtype), cap, vocab_padding)


def _products_by_rows(x: jax.Array, table: QuantisedWeight) -> jax.Array:
    """The float32 products [..., V] with a table [V, D], some rows of which are dequantised at a time."""
    V = table.codes.shape[0]
    count = min(_ROWS, V)

    def add(number: jax.Array, products: jax.Array) -> jax.Array:
        first = number * count  # JAX moves the last slices so that they fit; they overlap with those before
        rows = rows_of(table, lambda part: jax.lax.dynamic_slice_in_dim(part, first, count))
        some = linear_in_float32("...D,VD->...V", x, rows, "VD")
        return jax.lax.dynamic_update_slice_in_dim(products, some, first, axis=-1)

    return jax.lax.fori_loop(0, -(-V // count), add, jnp.zeros((*x.shape[:-1], V), jnp.float32))


def for_use(weight: Any, dims: str, dtype: Any) -> jax.Array:
    """The array that enters a product, cast first, so that fsdp gathers the smaller array.

    An adapted weight becomes the dense sum W', which is computed in float32.
    """
    if isinstance(weight, AdaptedWeight):
        base = weight.base
        base = for_use(base, dims, jnp.float32) if isinstance(base, QuantisedWeight) else base
        weight = merged(base, weight.a, weight.b, weight.scale, stacked=dims.startswith("P"))
    if isinstance(weight, QuantisedWeight):  # is gathered in its few bits
        weight = dequantise(gathered_parts(weight, dims), dtype)
    return constrain(cast(weight, dtype), dims)


def dense(weight: Any, dtype: Any) -> jax.Array:
    """The array of a weight that has no adapter: in `dtype` if it is quantised, else in its own dtype."""
    if isinstance(weight, QuantisedWeight):
        return dequantise(weight, dtype)
    array: jax.Array = weight.values() if isinstance(weight, RoundedWeight) else weight
    return array


def gathered(weight: Any, dims: str, dtype: Any) -> Any:
    """As `for_use`, but the parts of an adapted weight stay apart, and a quantised weight stays quantised.

    For weights that are used many times.
    """
    if isinstance(weight, QuantisedWeight):
        return gathered_parts(weight, dims)
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
    """The weight in the dtype of its products; a quantised weight stays quantised."""
    if isinstance(weight, QuantisedWeight):
        return weight
    if isinstance(weight, AdaptedWeight):
        base, a, b = (cast(part, dtype) for part in (weight.base, weight.a, weight.b))
        return replace(weight, base=base, a=a, b=b)
    return dense(weight, dtype).astype(dtype)


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


def _base_product(spec: str, x: jax.Array, weight: Any, dims: str) -> jax.Array:
    """The product with a weight that has no adapter."""
    if isinstance(weight, OutputFirstWeight):
        return weight.product(x)
    if isinstance(weight, QuantisedWeight):
        return _quantised_product(spec, dims, x, weight)
    return _product(spec, x, for_use(weight, dims, x.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _quantised_product(spec: str, dims: str, x: jax.Array, weight: QuantisedWeight) -> jax.Array:
    """The product with a quantised weight, which is frozen; x gets a gradient.

    The weight is dequantised for the product alone, and again in the backward pass, whatever rematerialisation saves.
    """
    return _product(spec, x, for_use(weight, dims, x.dtype))


def _quantised_forward(
    spec: str, dims: str, x: jax.Array, weight: QuantisedWeight
) -> tuple[jax.Array, QuantisedWeight]:
    return _quantised_product(spec, dims, x, weight), weight


def _quantised_backward(
    spec: str, dims: str, weight: QuantisedWeight, d_out: jax.Array
) -> tuple[jax.Array, None]:
    x_dims, weight_dims, out_dims = _letters(spec)
    # Without the barrier, the compiler would keep the dequantised weights of a whole pair of layers from the forward
    # pass, which rematerialisation runs just before.
    weight, d_out = jax.lax.optimization_barrier((weight, d_out))
    return jnp.einsum(f"{out_dims},{weight_dims}->{x_dims}", d_out, for_use(weight, dims, d_out.dtype)), None


_quantised_product.defvjp(_quantised_forward, _quantised_backward)


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
