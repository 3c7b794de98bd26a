"""Matrices in four or eight bits, for a frozen model that must be small: quantised once, dequantised wherever used.

In four bits, a block of neighbouring numbers shares one constant, and each number is a code. Blocks run along the last
axis that a product sums over, within a head: D of query, key, value, gate, up and the embedding, H of the attention's
output, F of down. These are the blocks of bitsandbytes in Hugging Face's layout. They have 64 (nf4) or 32 (int4)
numbers, or, where that does not divide the axis, its largest even divisor below.

`nf4` (QLoRA, arXiv 2305.14314, section 3): a code stands for one of 16 levels, quantiles of a normal distribution,
times the block's largest magnitude c. The constants c are quantised in turn (double quantisation): their mean over the
weight is subtracted, and a code of eight bits stands for one of 256 levels (the dynamic map, arXiv 2110.02861, section
1.3) times the largest magnitude of a group, which is 256 constants along the last axis. 4.127 bits per number.

`int4`: a code stands for an integer from -8 to 7, times the block's scale in float16, with which the number of largest
magnitude is -8. (The grid of llama.cpp's Q4_0.) 4.5 bits per number.

`int8`: a code stands for an integer from -127 to 127, times a float32 scale that all numbers share which a product sums
over, such as a row of the embedding. It holds axes of any length.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma2_jax.kernels.tuning import stays_in_loop
from gemma2_jax.sharding.layout import constrain, even_weight_sharding, weight_sharding

# The levels of nf4, from bitsandbytes.
NF4_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_GROUP = 256  # constants that share one scale
_EXPONENTS = 7  # of the dynamic map
_INT4_LOWEST = -8
_INT8_HIGHEST = 127


@dataclass(frozen=True)
class Format:
    """A representation of weights in four or eight bits.

    Attributes:
        name: its name in configurations.
        block: numbers that share one constant; None for all that a product sums over.
    """

    name: str
    block: int | None

    def overflows(self, weight: np.ndarray) -> bool:
        """Whether numbers of the weight are too large for this format's constants."""
        largest = float(np.max(np.abs(weight), initial=0.0))
        return self == INT4 and largest > -_INT4_LOWEST * float(np.finfo(np.float16).max)

    def holding(self, dims: str, shape: tuple[int, ...]) -> "Format":
        """This format, or int8 if it cannot hold a weight of these letters: two codes of a block share a byte."""
        return INT8 if self.block is not None and shape[len(dims) + block_axis(dims)] % 2 else self


NF4, INT4, INT8 = Format("nf4", 64), Format("int4", 32), Format("int8", None)
FORMATS = {format_.name: format_ for format_ in (NF4, INT4)}  # of the base of an adapter
WEIGHT_FORMATS = {format_.name: format_ for format_ in (INT8, INT4)}  # of a whole model that is not trained


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "group_scales", "offset", "iteration"],
    meta_fields=["format", "axis"],
)
@dataclass(frozen=True)
class QuantisedWeight:
    """A matrix in four or eight bits, in place of its array; its axes have the same letters.

    Attributes:
        codes: int8, shaped like the weight. In four bits uint8, and half as long along the blocks. A byte then holds
            two numbers of a block: number i in its lower half, and number i + block / 2 in its upper half.
        scales: one entry per block: float16, or with nf4 uint8, the code of a constant. With int8 float32, shaped like
            the weight with 1 in place of the axes that a product sums over.
        group_scales: with nf4, float32: the scale of each group of neighbours in `scales` along the last axis.
        offset: with nf4, float32: the mean of the constants, a scalar or [P].
        format: how numbers are represented.
        axis: the axis that blocks run along (the last one of those with int8), counted from the end, so that it is
            the same without a leading P.
        iteration: int32, the number of the loop's iteration that uses the weight: `dequantise` depends on it, so that
            the compiler cannot dequantise the weights of all iterations before the loop. None outside of loops.
    """

    codes: Any
    scales: Any
    group_scales: Any
    offset: Any
    format: Format
    axis: int
    iteration: Any = None


def is_quantised(node: Any) -> bool:
    """Whether a node of a tree of parameters is a `QuantisedWeight`."""
    return isinstance(node, QuantisedWeight)


def block_axis(dims: str) -> int:
    """The last axis that a product with a weight of these letters sums over, counted from the end."""
    return _summed_axes(dims)[-1]


def quantise(weight: jax.Array, dims: str, format_: Format) -> QuantisedWeight:
    """The weight in a format. Each number gets the nearest level.

    Args:
        weight: a matrix of any dtype, with or without a leading axis P; dims: its letters.
    """
    axis = block_axis(dims)
    if format_.block is None:
        return _in_int8(weight.astype(jnp.float32), _summed_axes(dims), axis)
    block = _largest_divisor(weight.shape[axis], format_.block, step=2)
    x = _split(weight.astype(jnp.float32), axis, block)
    high, low = jnp.max(x, axis, keepdims=True), jnp.min(x, axis, keepdims=True)
    largest = jnp.where(high >= -low, high, low)
    group_scales = offset = None
    if format_ == NF4:
        codes = _nearest(x / _above_zero(jnp.abs(largest)), NF4_LEVELS)
        constants = jnp.abs(jnp.squeeze(largest, axis))
        scales, group_scales, offset = _quantised_constants(constants, dims.startswith("P"))
    else:
        scale = largest / _INT4_LOWEST
        codes = jnp.clip(jnp.round(x / _above_zero(scale)) - _INT4_LOWEST, 0, 15).astype(jnp.uint8)
        scales = jnp.squeeze(scale, axis).astype(jnp.float16)
    lower, upper = jnp.split(codes, 2, axis)
    return QuantisedWeight(_joined(lower | upper << 4, axis), scales, group_scales, offset, format_, axis)


def dequantise(weight: QuantisedWeight, dtype: Any) -> jax.Array:
    """The weight as an array; computed in float32 and rounded to `dtype`."""
    codes, axis = weight.codes, weight.axis
    if weight.iteration is not None:
        codes = stays_in_loop(codes, jnp.asarray(weight.iteration))
    if weight.format == INT8:
        product: jax.Array = codes.astype(jnp.float32) * weight.scales
        return product.astype(dtype)
    packed = _split(codes, axis, codes.shape[axis] // weight.scales.shape[axis])
    numbers = jnp.concatenate([packed & 15, packed >> 4], axis)
    levels = _nf4_levels(numbers) if weight.format == NF4 else numbers.astype(jnp.float32) + _INT4_LOWEST
    # Behind a barrier, the compiler computes each constant once, and not for every number of its block.
    constants = jax.lax.optimization_barrier(_constants(weight))
    return _joined((levels * jnp.expand_dims(constants, axis)).astype(dtype), axis)


def weight_bytes(params: Any) -> int:
    """Bytes of all arrays of a model's parameters, also of quantised ones."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def rows_of(table: QuantisedWeight, take: Callable[[Any], Any]) -> QuantisedWeight:
    """Rows of a table [V, D]; `take` selects the rows of each part."""
    return replace(table, codes=take(table.codes), scales=take(table.scales))


def gathered_parts(weight: QuantisedWeight, dims: str) -> QuantisedWeight:
    """The weight laid out for use while it is still small; dims: its letters."""
    return replace(weight, codes=constrain(weight.codes, dims), scales=constrain(weight.scales, dims))


def stored(weight: Any, dims: str, kind: Any) -> Any:
    """The weight as a `kind`, which is a dtype or a `Format`; a quantised one stays as it is."""
    if is_quantised(weight):
        return weight
    return quantise(weight, dims, kind) if isinstance(kind, Format) else weight.astype(kind)


def storage_of(leaf: Any) -> Any:
    """The dtype of an array, or the format of a quantised weight."""
    return leaf.format if is_quantised(leaf) else leaf.dtype


def abstract_quantised(
    dims: str, shape: tuple[int, ...], format_: Format, mesh: Mesh | None, path: str
) -> QuantisedWeight:
    """Shapes, dtypes and, on a mesh, shardings of a weight's parts: those of the weight.

    Constants are split along an axis only where that divides it, and scales of groups are on all devices: they are
    small.

    Raises:
        UserError: the mesh does not divide an axis of the codes.
    """
    found = jax.eval_shape(
        partial(quantise, dims=dims, format_=format_), jax.ShapeDtypeStruct(shape, jnp.float32)
    )
    if mesh is None:
        return found

    def place(part: Any, sharding: Any) -> Any:
        return jax.ShapeDtypeStruct(part.shape, part.dtype, sharding=sharding)

    blocks = f"{path}, in {format_.name}"
    axis = len(dims) + found.axis
    if (
        dims[axis] != "D" and format_.block is not None
    ):  # stays split in use: a block must be whole on one device
        weight_sharding(mesh, f"{blocks}, by blocks", dims[axis], (found.scales.shape[axis],))
    whole = even_weight_sharding(mesh, "", ())
    return replace(
        found,
        codes=place(found.codes, weight_sharding(mesh, blocks, dims, found.codes.shape)),
        scales=place(found.scales, even_weight_sharding(mesh, dims, found.scales.shape)),
        group_scales=jax.tree.map(lambda part: place(part, whole), found.group_scales),
        offset=jax.tree.map(lambda part: place(part, whole), found.offset),
    )


def _summed_axes(dims: str) -> tuple[int, ...]:
    """The axes that a product sums over, counted from the end: D, or the others of a weight whose result has D."""
    summed = [d for d in dims if d not in "PD"] if dims.endswith("D") and "V" not in dims else "D"
    return tuple(dims.index(d) - len(dims) for d in summed)


def _in_int8(weight: jax.Array, summed: tuple[int, ...], axis: int) -> QuantisedWeight:
    scales = jnp.max(jnp.abs(weight), summed, keepdims=True) / _INT8_HIGHEST
    codes = jnp.round(weight / _above_zero(scales)).astype(jnp.int8)
    return QuantisedWeight(codes, scales, None, None, INT8, axis)


def _largest_divisor(size: int, limit: int, step: int = 1) -> int:
    """The largest multiple of `step` that divides `size` and is at most `limit`."""
    return next(found for found in range(limit - limit % step, 0, -step) if size % found == 0)


def _split(x: jax.Array, axis: int, length: int) -> jax.Array:
    """Splits an axis, counted from the end, into parts of a length: [..., n, ...] to [..., n / length, length, ...]."""
    return x.reshape(*x.shape[:axis], -1, length, *x.shape[x.ndim + axis + 1 :])


def _joined(x: jax.Array, axis: int) -> jax.Array:
    """The inverse of `_split`."""
    return x.reshape(*x.shape[: axis - 1], -1, *x.shape[x.ndim + axis + 1 :])


def _above_zero(x: jax.Array) -> jax.Array:
    """x, with 1 in place of 0, as a divisor of zeros."""
    return jnp.where(x == 0, 1.0, x)


def _nearest(x: jax.Array, levels: tuple[float, ...]) -> jax.Array:
    """The index of the level nearest to each number, uint8."""
    middles = (np.array(levels[1:]) + np.array(levels[:-1])) / 2
    return sum((x > np.float32(middle)).astype(jnp.uint8) for middle in middles)  # type: ignore[return-value]


def _nf4_levels(codes: jax.Array) -> jax.Array:
    """The levels of codes, by selections: accelerators look up numbers in a table one by one."""
    values: list[Any] = [jnp.float32(level) for level in NF4_LEVELS]
    wide = codes.astype(jnp.int32)  # TPUs have no vectors of narrower integers
    for bit in range(4):
        is_set = (wide & 2**bit) != 0
        values = [jnp.where(is_set, *pair[::-1]) for pair in zip(values[::2], values[1::2], strict=True)]
    found: jax.Array = values[0]
    return found


def _dynamic_segments() -> Iterator[tuple[int, float, float]]:
    """The levels of the dynamic map above 0, as lines: (first number, a, b) for the level a + b * number.

    Level number n, counted from 1, has the exponent e = floor(log2 n): there are 2^e levels from 10^(e-7) to 10^(e-6),
    in the middles of intervals of equal length. The last number, 2^7, stands for 1.
    """
    for exponent in range(_EXPONENTS):
        first, scale = 2**exponent, 10.0 ** (exponent - _EXPONENTS + 1)
        slope = 0.9 * scale / first
        yield first, 0.1 * scale + (0.5 - first) * slope, slope
    yield 2**_EXPONENTS, 1.0, 0.0


def _dynamic_middles() -> np.ndarray:
    """The middles between neighbouring levels of the dynamic map, float32 [255]."""
    segments = [*_dynamic_segments(), (2**_EXPONENTS + 1, 0.0, 0.0)]
    above = [
        start + slope * number
        for (first, start, slope), (end, *_) in itertools.pairwise(segments)
        for number in range(first, end)
    ]
    levels = np.array([*(-level for level in above[-2::-1]), 0.0, *above])
    return ((levels[1:] + levels[:-1]) / 2).astype(np.float32)


def _dynamic_levels(codes: jax.Array) -> jax.Array:
    """The levels of codes in the dynamic map: code 127 stands for 0, and 127 - n for the negative of 127 + n."""
    number = codes.astype(jnp.float32) - 127
    size, found = jnp.abs(number), jnp.zeros(codes.shape, jnp.float32)
    for first, start, slope in _dynamic_segments():
        found = jnp.where(size >= first, start + slope * size, found)
    return jnp.sign(number) * found


def _quantised_constants(constants: jax.Array, is_stacked: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Codes of the constants, scales of their groups, and their mean for the whole weight or for each P."""
    axes = tuple(range(int(is_stacked), constants.ndim))
    offset = jnp.mean(constants, axes, keepdims=True)
    length = _largest_divisor(constants.shape[-1], _GROUP)
    groups = _split(constants - offset, -1, length)
    scales = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    codes = jnp.searchsorted(_dynamic_middles(), groups / _above_zero(scales)).astype(jnp.uint8)
    return _joined(codes, -1), jnp.squeeze(scales, -1), jnp.squeeze(offset, axes)


def _constants(weight: QuantisedWeight) -> jax.Array:
    """The constant of each block, float32."""
    if weight.format == INT4:
        constants: jax.Array = weight.scales.astype(jnp.float32)
        return constants
    scales = weight.scales
    levels = _split(_dynamic_levels(scales), -1, scales.shape[-1] // weight.group_scales.shape[-1])
    constants = _joined(levels * weight.group_scales[..., None], -1)
    return constants + weight.offset.reshape(
        weight.offset.shape + (1,) * (constants.ndim - weight.offset.ndim)
    )
