"""Packs weights into the K types of GGUF: Q4_K (4.5 bits a weight), Q5_K (5.5) and Q6_K (6.5625).

A super-block holds 256 consecutive weights of a row. In Q4_K and Q5_K it has 8 sub-blocks of 32 weights,

    x = d * scale * q - dmin * min      q of 4 or 5 bits; scale and min of 6 bits for each sub-block; d and dmin float16

and in Q6_K it has 16 sub-blocks of 16 weights,

    x = d * scale * q                   q from -32 to 31; scale an int8 for each sub-block; d float16

Packing minimises the squared error, weighted by the importance of the inputs, in four steps. For each sub-block,
several spacings of the grid are tried; for the numbers q that each gives, the best scale and min follow in closed form.
The best scales and mins are rounded to their few bits. The weights are rounded again to the grid that results. And d
and dmin are fitted once more to all numbers q of the super-block. The formats are those that llama.cpp and `gguf` read;
`gguf` does not write them.

The computation is one program for a fixed number of super-blocks, jitted for the CPU, which several threads run. So
memory is bounded whatever the tensor's size, and a block's bytes do not depend on the tensor that it is in.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

SUPER_BLOCK = 256  # weights
BYTES = {"q4_k": 144, "q5_k": 176, "q6_k": 210}  # of a super-block

_TOGETHER = (
    512  # super-blocks that the program packs at a time, so that its arrays fit in a processor's cache
)
_SPACINGS = 12  # tried for each sub-block
_LEAST = 1e-3  # importance of an input that never occurs, as a fraction of the mean
_DETERMINED = (
    1e-5  # determinant of the normal equations, as a fraction of its first term, above rounding errors
)
_TINY = 1e-30  # divisor in place of 0


def pack(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> np.ndarray:
    """Packs a tensor.

    Args:
        values: [..., n], of any float dtype; n must be a multiple of 256.
        kind: one of `BYTES`.
        importance: [n], at least 0; the weight of each input's squared error, the same for all rows. None for 1.

    Returns:
        uint8 [..., n / 256 * BYTES[kind]]. A super-block with a number that is not finite, or too large for the type,
        gets a scale that is not finite.
    """
    in_row = values.shape[-1] // SUPER_BLOCK
    blocks = values.reshape(-1, SUPER_BLOCK)
    packed = np.empty((len(blocks), BYTES[kind]), np.uint8)
    weights = _weights(importance, values.shape[-1]).reshape(in_row, SUPER_BLOCK)
    device = jax.local_devices(backend="cpu")[0]

    def pack_some(start: int) -> None:
        some = blocks[start : start + _TOGETHER].astype(np.float32)
        count = len(some)
        if count < _TOGETHER:
            some = np.concatenate([some, np.zeros((_TOGETHER - count, SUPER_BLOCK), np.float32)])
        own = weights[np.arange(start, start + _TOGETHER) % in_row]
        found = _pack_blocks(jax.device_put(some, device), jax.device_put(own, device), kind)
        packed[start : start + count] = np.asarray(found)[:count]

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        list(threads.map(pack_some, range(0, len(blocks), _TOGETHER)))
    return packed.reshape(*values.shape[:-1], -1)


def _weights(importance: np.ndarray | None, inputs: int) -> np.ndarray:
    """The weights [n] of the squared errors, with mean 1 and none of 0."""
    if importance is None:
        return np.ones(inputs, np.float32)
    mean = float(importance.mean())
    return (importance / mean + _LEAST).astype(np.float32) if mean > 0 else np.ones(inputs, np.float32)


@partial(jax.jit, static_argnames="kind")
def _pack_blocks(x: jax.Array, weights: jax.Array, kind: str) -> jax.Array:
    """Packs super-blocks [n, 256] to uint8 [n, BYTES[kind]]."""
    if kind == "q6_k":
        return _pack_symmetric(x, weights)
    return _pack_affine(x, weights, 4 if kind == "q4_k" else 5)


def _pack_affine(x: jax.Array, weights: jax.Array, bits: int) -> jax.Array:
    """Q4_K and Q5_K; see the top of this file."""
    n, top = len(x), float(2**bits - 1)
    columns, w = _columns(x, 32), _columns(weights, 32)
    spacing, offset = (found.reshape(n, 8) for found in _search_affine(columns, w, top))
    d = _unit(spacing.max(axis=1) / 63)
    scales = jnp.clip(jnp.round(spacing * _inverse(d)[:, None]), 0, 63)
    # Of a sub-block whose scale is 0, all numbers become its offset: the best one is their mean.
    mean = _by_block(w * columns, 8) / _by_block(w, 8)
    offset = jnp.where(scales == 0, jnp.maximum(-mean, 0.0), offset)
    dmin = _unit(offset.max(axis=1) / 63)
    mins = jnp.clip(jnp.round(offset * _inverse(dmin)[:, None]), 0, 63)

    def rounded(d: jax.Array, dmin: jax.Array) -> jax.Array:
        """The numbers q [32, n * 8] on a grid."""
        grid, least = (d[:, None] * scales).reshape(-1), (dmin[:, None] * mins).reshape(-1)
        return jnp.clip(jnp.round((columns + least) * _inverse(grid)), 0, top)

    d, dmin = _fit_affine(columns, w, rounded(d, dmin), scales, mins, d, dmin)
    numbers = rounded(d, dmin).astype(jnp.uint8).T.reshape(n, 8, 32)
    d = jnp.where(jnp.isfinite(x).all(axis=1), d, jnp.nan)
    parts = [_bytes(d), _bytes(dmin), _pack_six_bits(scales.astype(jnp.uint8), mins.astype(jnp.uint8))]
    if bits == 5:  # the fifth bits: those of sub-block i are bits i
        parts.append(_or(numbers >> 4 << jnp.arange(8, dtype=jnp.uint8)[:, None], axis=1))
    low = numbers & 15
    parts.append((low[:, 0::2] | low[:, 1::2] << 4).reshape(n, -1))
    return jnp.concatenate(parts, axis=1)


def _search_affine(x: jax.Array, w: jax.Array, top: float) -> tuple[jax.Array, jax.Array]:
    """The spacing and offset, both [m] and at least 0, of each column of x [32, m] = spacing * q - offset."""
    low, high = jnp.minimum(x.min(axis=0), 0.0), x.max(axis=0)
    extent = jnp.maximum(high - low, _TINY)
    sum_w, sum_x, sum_xx = w.sum(axis=0), (w * x).sum(axis=0), (w * x * x).sum(axis=0)
    # A grid of fewer steps than the extent has cuts off the largest numbers.
    steps = top + jnp.linspace(-1.6, 0.4, _SPACINGS)

    def attempt(number: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q = jnp.clip(jnp.round((x - low) * (steps[number] / extent)), 0, top)
        wq = w * q
        sum_q, sum_qq, sum_qx = wq.sum(axis=0), (wq * q).sum(axis=0), (wq * x).sum(axis=0)
        # Least squares in spacing and offset; if the offset would be negative, in the spacing alone.
        determinant = sum_w * sum_qq - sum_q * sum_q
        spacing = (sum_w * sum_qx - sum_q * sum_x) / determinant
        offset = (sum_q * sum_qx - sum_qq * sum_x) / determinant
        is_inside = offset >= 0
        spacing = jnp.where(is_inside, spacing, sum_qx / jnp.maximum(sum_qq, _TINY))
        offset = jnp.where(is_inside, offset, 0.0)
        error = sum_xx + spacing * (spacing * sum_qq - 2 * sum_qx)
        error += offset * (offset * sum_w + 2 * sum_x - 2 * spacing * sum_q)
        # If all numbers q are the same, neither is determined.
        is_better = (error < best[0]) & (spacing >= 0) & (determinant > _DETERMINED * sum_w * sum_qq)
        return tuple(
            jnp.where(is_better, new, old) for new, old in zip((error, spacing, offset), best, strict=True)
        )

    spacing = extent / top
    error = (w * (jnp.round((x - low) / spacing) * spacing + low - x) ** 2).sum(axis=0)
    start = (error, spacing, -low)
    _, spacing, offset = jax.lax.fori_loop(0, _SPACINGS, attempt, start)
    return spacing, offset


def _fit_affine(
    x: jax.Array,
    w: jax.Array,
    q: jax.Array,
    scales: jax.Array,
    mins: jax.Array,
    d: jax.Array,
    dmin: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The d and dmin [n] that fit x [32, n * 8] best, given q [32, n * 8], scales and mins [n, 8].

    The given ones stay where the best are negative or not determined.
    """
    wq = w * q
    sum_w, sum_q, sum_x = (_by_block(found, 8) for found in (w, wq, w * x))
    sum_qq, sum_qx = _by_block(wq * q, 8), _by_block(wq * x, 8)
    scale_scale = (scales * scales * sum_qq).sum(axis=1)
    scale_min = (scales * mins * sum_q).sum(axis=1)
    min_min = (mins * mins * sum_w).sum(axis=1)
    x_scale, x_min = (scales * sum_qx).sum(axis=1), (mins * sum_x).sum(axis=1)
    determinant = scale_scale * min_min - scale_min * scale_min
    best = (min_min * x_scale - scale_min * x_min) / determinant
    best_min = (scale_min * x_scale - scale_scale * x_min) / determinant
    is_better = (determinant > 0) & (best > 0) & (best_min >= 0)
    return jnp.where(is_better, _float16(best), d), jnp.where(is_better, _float16(best_min), dmin)


def _pack_six_bits(scales: jax.Array, mins: jax.Array) -> jax.Array:
    """Packs scales and mins, uint8 [n, 8] below 64, into 12 bytes [n, 12]."""
    high = [found[:, :4] | found[:, 4:] >> 4 << 6 for found in (scales, mins)]
    return jnp.concatenate([*high, scales[:, 4:] & 15 | mins[:, 4:] << 4], axis=1)


def _pack_symmetric(x: jax.Array, weights: jax.Array) -> jax.Array:
    """Q6_K; see the top of this file."""
    n = len(x)
    columns, w = _columns(x, 16), _columns(weights, 16)
    spacing = _search_symmetric(columns, w).reshape(n, 16)
    d = _unit(jnp.abs(spacing).max(axis=1) / 127)
    scales = jnp.clip(jnp.round(spacing * _inverse(d)[:, None]), -127, 127)

    def rounded(d: jax.Array) -> jax.Array:
        """The numbers q [16, n * 16] on a grid."""
        grid = (d[:, None] * scales).reshape(-1)
        return jnp.clip(jnp.round(columns * _inverse(grid)), -32, 31)

    q = rounded(d)
    sum_qq, sum_qx = _by_block(w * q * q, 16), _by_block(w * q * columns, 16)
    scale_scale, x_scale = (scales * scales * sum_qq).sum(axis=1), (scales * sum_qx).sum(axis=1)
    d = jnp.where((scale_scale > 0) & (x_scale > 0), _float16(x_scale / scale_scale), d)
    numbers = (rounded(d) + 32).astype(jnp.uint8).T.reshape(n, 2, 2, 2, 32)  # [n, half, nibble, part, 32]
    d = jnp.where(jnp.isfinite(x).all(axis=1), d, jnp.nan)
    low, high = numbers & 15, numbers.reshape(n, 2, 4, 32) >> 4
    return jnp.concatenate(
        [
            (low[:, :, 0] | low[:, :, 1] << 4).reshape(n, -1),
            _or(high << jnp.arange(0, 8, 2, dtype=jnp.uint8)[:, None], axis=2).reshape(n, -1),
            jax.lax.bitcast_convert_type(scales.astype(jnp.int8), jnp.uint8),
            _bytes(d),
        ],
        axis=1,
    )


def _search_symmetric(x: jax.Array, w: jax.Array) -> jax.Array:
    """The spacing [m], of either sign, of each column of x [16, m] = spacing * q."""
    largest = jnp.take_along_axis(x, jnp.abs(x).argmax(axis=0)[None], axis=0)[0]
    largest = jnp.where(jnp.abs(largest) > _TINY, largest, _TINY)
    steps = jnp.linspace(
        -33.0, -30.5, _SPACINGS
    )  # to the largest number: the grid has one more below 0 than above

    def attempt(number: jax.Array, best: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        q = jnp.clip(jnp.round(x * (steps[number] / largest)), -32, 31)
        sum_qq, sum_qx = (w * q * q).sum(axis=0), (w * q * x).sum(axis=0)
        spacing = sum_qx / jnp.maximum(sum_qq, _TINY)
        gain = spacing * sum_qx  # the error's decrease below the sum of x^2
        return tuple(
            jnp.where(gain > best[0], new, old) for new, old in zip((gain, spacing), best, strict=True)
        )

    start = jnp.full_like(largest, -jnp.inf), jnp.zeros_like(largest)
    return jax.lax.fori_loop(0, _SPACINGS, attempt, start)[1]


def _columns(x: jax.Array, size: int) -> jax.Array:
    """[n, 256] as sub-blocks [size, n * 256 / size]: sums over the first axis are fast."""
    return x.reshape(-1, size).T


def _by_block(x: jax.Array, sub_blocks: int) -> jax.Array:
    """Sums of columns [size, n * sub_blocks], as [n, sub_blocks]."""
    return x.sum(axis=0).reshape(-1, sub_blocks)


def _inverse(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 0.0, 1 / x)


def _float16(x: jax.Array) -> jax.Array:
    """Rounded to float16, as float32."""
    return x.astype(jnp.float16).astype(jnp.float32)


def _unit(x: jax.Array) -> jax.Array:
    """A unit of scales, at least 0: rounded to float16, but up where that has few digits, so that scales suffice."""
    return jnp.where(x < 2.0**-14, jnp.ceil(x * 2.0**24) / 2.0**24, _float16(x))


def _bytes(x: jax.Array) -> jax.Array:
    """Numbers [n] as float16, uint8 [n, 2]."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float16), jnp.uint8)


def _or(x: jax.Array, axis: int) -> jax.Array:
    return jnp.bitwise_or.reduce(x, axis=axis)
