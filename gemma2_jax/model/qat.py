"""Quantisation-aware training: forward passes have the weights as the exported format rounds them.

A weight W is kept in float32, and products take g(W), its values in the format. The gradient of W is that of g(W), as
if g were the identity (the straight-through estimator, Bengio et al., arXiv 1308.3432). Google trained Gemma 3 in this
way, on the unquantised model's probabilities (arXiv 2503.19786, section 2.3).

    q4_0   GGUF's, as `formats.gguf` writes it: blocks of 32 numbers along the axes that a product sums over, flattened,
           with 4 bits each; float16 where these are no multiple of 32. The embedding has 8 bits (Q8_0).
    int4   `quantised.INT4`, of all matrices with the embedding, for our own sampler.

g(g(W)) is g(W), so an export of the values g(W) in the same format changes none of them. (With the exception of int8,
which int4 falls back to for odd sizes: its scales may change by a rounding.)
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.quantised import INT4, block_axis, dequantise, quantise
from gemma2_jax.model.weights import Params, Weight, map_specs, specs_by_path, weight_specs

Q4_0 = "q4_0"
TRAINED_FORMATS = (Q4_0, INT4.name)
_BLOCK = 32  # of GGUF's formats
_HIGHEST = 127  # of Q8_0


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["dims", "format"])
@dataclass(frozen=True)
class RoundedWeight:
    """A trained matrix in whose place products take its rounded values.

    Attributes:
        weight: W, float32, with or without a leading axis P.
        dims: letters of the weight, without P.
        format: one of `TRAINED_FORMATS`.
    """

    weight: Any
    dims: str
    format: str

    def values(self) -> jax.Array:
        """g(W), float32."""
        lead = "P" if self.weight.ndim > len(self.dims) else ""
        return _straight_through(self.weight, lead + self.dims, self.format)


class Qat:
    """Trains all weights, the matrices as a format rounds them (`Adaptation`)."""

    def __init__(self, model: ModelConfig, format_: str) -> None:
        self._specs, self._format = weight_specs(model), format_

    def specs(self, model: Any) -> tuple[Any, Any]:
        return model, {}

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        return params, {}

    def join(self, trained: Params, frozen: Params) -> Params:
        def wrap(_: str, spec: Weight, leaf: Any) -> Any:
            return RoundedWeight(leaf, spec.dims.removeprefix("P"), self._format) if spec.fan_in else leaf

        joined: Params = map_specs(wrap, self._specs, trained)
        return joined


def rounded(weight: jax.Array, dims: str, format_: str) -> jax.Array:
    """g(W): the values, float32, that one of `TRAINED_FORMATS` gives a matrix with these letters."""
    weight = weight.astype(jnp.float32)
    if format_ == INT4.name:
        return dequantise(quantise(weight, dims, INT4.holding(dims, weight.shape)), jnp.float32)
    if _row_length(dims, weight.shape) % _BLOCK:
        return weight.astype(jnp.float16).astype(jnp.float32)
    if "V" in dims:
        return _q8_0(weight)
    flat = weight.reshape(*weight.shape[:-3], -1, weight.shape[-1]) if dims.endswith("NHD") else weight
    return dequantise(quantise(flat, dims.replace("NHD", "FD"), INT4), jnp.float32).reshape(weight.shape)


def fallback_lines(model: ModelConfig, format_: str) -> list[str]:
    """A line about the matrices that the format cannot hold; none if it holds all."""
    found = {}
    for path, spec in specs_by_path(weight_specs(model)).items():
        length = _row_length(spec.dims, spec.shape) if spec.fan_in else 0
        if length % (_BLOCK if format_ == Q4_0 else 2):
            found[path.split("/", 2)[-1] if spec.dims.startswith("P") else path] = length
    if not found:
        return []
    needed, other = (f"multiples of {_BLOCK}", "float16") if format_ == Q4_0 else ("even", "int8")
    names = ", ".join(f"{name} ({length})" for name, length in found.items())
    return [f"{format_} needs rows that are {needed}, so these are in {other}: {names}"]


def _row_length(dims: str, shape: tuple[int, ...]) -> int:
    """The length of a row in GGUF: the size of all axes together that a product sums over."""
    sizes = dict(zip(dims, shape, strict=True))
    return sizes["N"] * sizes["H"] if dims.endswith("NHD") else shape[len(dims) + block_axis(dims)]


def _q8_0(table: jax.Array) -> jax.Array:
    blocks = table.reshape(*table.shape[:-1], -1, _BLOCK)
    scales = jnp.max(jnp.abs(blocks), -1, keepdims=True) / _HIGHEST
    codes = jnp.round(blocks / jnp.where(scales == 0, 1.0, scales))
    return (codes * scales.astype(jnp.float16).astype(jnp.float32)).reshape(table.shape)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _straight_through(weight: jax.Array, dims: str, format_: str) -> jax.Array:
    return rounded(weight, dims, format_)


def _straight_through_forward(weight: jax.Array, dims: str, format_: str) -> tuple[jax.Array, None]:
    return rounded(weight, dims, format_), None


def _straight_through_backward(dims: str, format_: str, saved: None, d_values: jax.Array) -> tuple[jax.Array]:
    return (d_values,)


_straight_through.defvjp(_straight_through_forward, _straight_through_backward)
