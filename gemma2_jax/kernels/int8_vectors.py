"""Vectors in eight bits with one scale each: the keys and values of a small cache."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

_HIGHEST = 127
SCALE_BYTES = 4  # of each vector


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scales"], meta_fields=[])
@dataclass(frozen=True)
class Int8Vectors:
    """Vectors [..., H]. A code stands for an integer from -127 to 127, times its vector's scale.

    Attributes:
        codes: int8 [..., H]; scales: float32 [...], largest magnitude of each vector / 127.
    """

    codes: Any
    scales: Any


Vectors = jax.Array | Int8Vectors


def quantise_vectors(vectors: jax.Array) -> Int8Vectors:
    """Rounds each number of vectors [..., H] of any float dtype to the nearest level; a vector of zeros stays zero."""
    numbers = vectors.astype(jnp.float32)
    scales = jnp.max(jnp.abs(numbers), axis=-1) / _HIGHEST
    codes = jnp.round(numbers / jnp.where(scales == 0, 1.0, scales)[..., None])
    return Int8Vectors(codes.astype(jnp.int8), scales)
