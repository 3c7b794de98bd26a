"""How arrays are divided into chunks in a checkpoint, so that a part of one is read without the rest."""

import math
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

_LARGEST = 2**24  # bytes of a chunk of an array that is not stacked
_SMALLEST = 2**20  # bytes; smaller chunks of a large array would take long to write and read

_StorageOptions = ocp.options.ArrayOptions.Saving.StorageOptions


def storage_options(path: Any, array: Any) -> Any:
    """Returns how Orbax stores an array of a tree: stacks of layers by pair, other large arrays by rows."""
    shape = array.sharding.shard_shape(array.shape) if isinstance(array, jax.Array) else array.shape
    if not shape:
        return None
    if any(getattr(key, "key", None) == "pairs" for key in path):
        return _StorageOptions(shard_axes=(0,))
    row = array.dtype.itemsize * math.prod(shape[1:])
    if len(shape) == 1 or shape[0] * row <= _LARGEST:
        return None
    # Orbax divides the longest axis, into equal parts; the number of rows may have no suitable divisor.
    if shape[0] == max(shape) and any(
        shape[0] % rows == 0 and _SMALLEST <= rows * row <= _LARGEST for rows in range(1, _LARGEST // row + 1)
    ):
        return _StorageOptions(chunk_byte_size=_LARGEST)
    return None
