"""The identity of a model's weights, as 64 hexadecimal digits: shows whether a teacher or a base model has changed.

The identity is of the configuration and of each weight's values as float32. It is the same for a copy, in another
format, on another mesh, and with other padding of the vocabulary. A model that is loaded in bfloat16 has rounded
weights, and so another identity than its float32 checkpoint; records of teachers keep the dtype beside the identity.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import to_dict
from gemma2_jax.formats.layouts import EMBEDDING, WeightPlace
from gemma2_jax.formats.source import WeightSource, all_places
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import weight_specs

_CHUNK = 1 << 18  # numbers hashed at a time on the host, whose intermediate results fit in its caches

_Words = TypeVar("_Words", jax.Array, np.ndarray)  # uint32


def model_identity(model: Gemma2) -> str:
    """The identity of a model on devices, by one pass over the weights where they lie."""

    def weights() -> Iterator[tuple[WeightPlace, jax.Array]]:
        for path, weight in jax.tree.leaves_with_path(model.params()):
            yield WeightPlace(jax.tree_util.keystr(path, simple=True, separator="/"), None), weight

    return weights_identity(model.config, weights())


def source_identity(source: WeightSource) -> str:
    """The identity of a checkpoint. Reads all weights once, one at a time: some seconds for every billion.

    Raises:
        UserError: the checkpoint is not whole.
    """
    source.check()
    places = all_places(weight_specs(source.config))
    return weights_identity(source.config, ((place, source.weight(place)) for place in places))


def weights_identity(
    config: ModelConfig, weights: Iterable[tuple[WeightPlace, jax.Array | np.ndarray]]
) -> str:
    """Sha256 over a configuration and two sums for each named weight, in hexadecimal.

    Args:
        weights: all of the model's, in any order; one of a layer either as a whole (`pair` None) or pair by pair.
    """
    tokens = config.num_tokens
    sums: dict[str, list[jax.Array | int]] = {}
    for place, weight in weights:
        rows = tokens if place.path == EMBEDDING else len(weight)
        first = (place.pair or 0) * weight.size % 2**32
        found = _sums_on_host(weight[:rows], first) if isinstance(weight, np.ndarray) else _sums(weight, rows)
        # All of a model's are in progress on the devices before the first is waited for below.
        sums.setdefault(place.path, []).extend(found)
    without_padding = to_dict(replace(config, vocab_size=tokens, vocab_padding=0))
    digest = hashlib.sha256(json.dumps(without_padding, sort_keys=True).encode())
    for path, parts in sorted(sums.items()):
        totals = (sum(map(int, parts[number::2])) % 2**32 for number in range(2))
        digest.update("{} {:08x} {:08x}\n".format(path, *totals).encode())
    return digest.hexdigest()


def _mixed(bits: _Words, place: _Words) -> tuple[_Words, _Words]:
    """Two hashes of each number's bits and place, uint32. For the same place, different bits have different first ones.

    They are to be added up: integers have the same sum in any order, and so on any mesh and layer by layer.
    """
    mixed = bits ^ place * np.uint32(0x9E3779B9)
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):  # MurmurHash3's finaliser
        mixed = (mixed ^ mixed >> np.uint32(shift)) * np.uint32(factor)
    mixed = mixed ^ mixed >> np.uint32(16)
    return mixed, mixed * (mixed | np.uint32(1))


@partial(jax.jit, static_argnames="rows")
def _sums(weight: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Sums of the two hashes over the first rows of a whole weight, uint32 scalars."""
    if weight.dtype == jnp.bfloat16:  # by hand, since a conversion may take the smallest numbers for 0
        bits = jax.lax.bitcast_convert_type(weight, jnp.uint16).astype(jnp.uint32) << 16
    else:
        bits = jax.lax.bitcast_convert_type(weight.astype(jnp.float32), jnp.uint32)
    place = jnp.zeros(weight.shape, jnp.uint32)
    for axis in range(weight.ndim):
        stride = math.prod(weight.shape[axis + 1 :]) % 2**32
        place += jax.lax.broadcasted_iota(jnp.uint32, weight.shape, axis) * jnp.uint32(stride)
    counts = jax.lax.broadcasted_iota(jnp.int32, weight.shape, 0) < rows
    one, other = (jnp.sum(jnp.where(counts, mixed, 0), dtype=jnp.uint32) for mixed in _mixed(bits, place))
    return one, other


def _sums_on_host(weight: np.ndarray, first: int) -> tuple[int, int]:
    """As `_sums`, of all rows of a part whose first number has the place `first`, modulo 2**32."""
    numbers, totals = weight.reshape(-1), [0, 0]
    for start in range(0, len(numbers), _CHUNK):
        chunk = numbers[start : start + _CHUNK].astype(np.float32)
        place = np.arange(len(chunk), dtype=np.uint32) + np.uint32((first + start) % 2**32)
        for number, mixed in enumerate(_mixed(chunk.view(np.uint32), place)):
            totals[number] += int(np.sum(mixed, dtype=np.uint64))
    return totals[0], totals[1]
