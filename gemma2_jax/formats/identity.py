"""The identity of a model's weights: a digest of 64 hexadecimal digits, to detect another teacher or base model.

The digest covers the configuration and each weight's values as float32. It does not depend on the checkpoint's path and
format, on the mesh, or on the padding of the vocabulary. A model loaded in bfloat16 has rounded weights, and so a
different identity than its float32 checkpoint; records of teachers keep the dtype next to the identity.
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

_CHUNK = 1 << 18  # numbers hashed at a time on the host, so that intermediate results fit in the CPU's cache

_Words = TypeVar("_Words", jax.Array, np.ndarray)  # uint32


def model_identity(model: Gemma2) -> str:
    """The identity of a model on devices, in one pass over its weights, which stay where they are."""

    def weights() -> Iterator[tuple[WeightPlace, jax.Array]]:
        for path, weight in jax.tree.leaves_with_path(model.params()):
            yield WeightPlace(jax.tree_util.keystr(path, simple=True, separator="/"), None), weight

    return weights_identity(model.config, weights())


def source_identity(source: WeightSource) -> str:
    """The identity of a checkpoint. Reads all weights once, one at a time: some seconds per billion parameters.

    Raises:
        UserError: the checkpoint is not intact.
    """
    source.check()
    places = all_places(weight_specs(source.config))
    return weights_identity(source.config, ((place, source.weight(place)) for place in places))


def weights_identity(
    config: ModelConfig, weights: Iterable[tuple[WeightPlace, jax.Array | np.ndarray]]
) -> str:
    """The SHA-256, in hexadecimal, of a configuration and of two sums for each weight.

    Args:
        weights: all weights of the model, in any order; those of layers either stacked (`pair` None) or pair by pair.
    """
    tokens = config.num_tokens
    sums: dict[str, list[jax.Array | int]] = {}
    for place, weight in weights:
        rows = tokens if place.path == EMBEDDING else len(weight)
        first = (place.pair or 0) * weight.size % 2**32
        found = _sums_on_host(weight[:rows], first) if isinstance(weight, np.ndarray) else _sums(weight, rows)
        # All sums are dispatched to the devices before the code below waits for the first one.
        sums.setdefault(place.path, []).extend(found)
    settings = to_dict(replace(config, vocab_size=tokens, vocab_padding=0))
    if config.global_every == 1:
        del settings["global_every"]  # Digests of models without the key stay valid.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for path, parts in sorted(sums.items()):
        totals = (sum(map(int, parts[number::2])) % 2**32 for number in range(2))
        digest.update("{} {:08x} {:08x}\n".format(path, *totals).encode())
    return digest.hexdigest()


def _mixed(bits: _Words, place: _Words) -> tuple[_Words, _Words]:
    """Two hashes of each number's bits and place, uint32. For a given place, the first hash is unique to the bits.

    The caller sums them: sums of integers do not depend on the order, and so not on the mesh or the order of layers.
    """
    mixed = bits ^ place * np.uint32(0x9E3779B9)
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):  # MurmurHash3's finaliser
        mixed = (mixed ^ mixed >> np.uint32(shift)) * np.uint32(factor)
    mixed = mixed ^ mixed >> np.uint32(16)
    return mixed, mixed * (mixed | np.uint32(1))


@partial(jax.jit, static_argnames="rows")
def _sums(weight: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """Sums of the two hashes over the first rows of a whole weight, uint32 scalars."""
    if weight.dtype == jnp.bfloat16:  # by hand, since a conversion may flush the smallest numbers to 0
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
    """As `_sums`, for all rows of a part of a weight; `first` is the place of its first number, modulo 2**32."""
    numbers, totals = weight.reshape(-1), [0, 0]
    for start in range(0, len(numbers), _CHUNK):
        chunk = numbers[start : start + _CHUNK].astype(np.float32)
        place = np.arange(len(chunk), dtype=np.uint32) + np.uint32((first + start) % 2**32)
        for number, mixed in enumerate(_mixed(chunk.view(np.uint32), place)):
            totals[number] += int(np.sum(mixed, dtype=np.uint64))
    return totals[0], totals[1]
