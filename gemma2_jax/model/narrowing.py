"""Weights in a narrower dtype: a finite number must not become infinite."""

import math
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.config import UserError

_BLOCK = 2**24  # numbers compared at a time


def narrows(source: Any, target: Any) -> bool:
    """Whether the dtype `source` has finite numbers beyond the largest of `target`."""
    if not (jnp.issubdtype(source, jnp.inexact) and jnp.issubdtype(target, jnp.inexact)):
        return False
    return float(jnp.finfo(source).max) > float(jnp.finfo(target).max)


def check_range(array: np.ndarray, dtype: Any, name: str) -> None:
    """Raises UserError, which names the weight, if a finite number of `array` becomes infinite in `dtype`."""
    if not narrows(array.dtype, dtype):
        return
    rows = max(1, _BLOCK // max(1, math.prod(array.shape[1:])))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(array), rows):
            block = array[start : start + rows]
            if (np.isinf(block.astype(dtype)) & np.isfinite(block)).any():
                refuse_overflow(name, dtype)


def check_restored(loaded: Any, saved: Any, read: Callable[[Any], Any], name: str) -> None:
    """`check_range` for a tree of arrays that was restored from a checkpoint in narrower dtypes.

    Args:
        saved: the tree's dtypes in the checkpoint.
        read: restores the tree again, in the dtypes and with the shardings of its argument.
    """
    suspects = jax.tree.map(
        lambda leaf, info: narrows(info.dtype, leaf.dtype) and bool(jnp.any(jnp.isinf(leaf))), loaded, saved
    )
    if not any(jax.tree.leaves(suspects)):
        return
    wide = jax.tree.map(
        lambda leaf, info: jax.ShapeDtypeStruct(leaf.shape, info.dtype, sharding=leaf.sharding), loaded, saved
    )
    before = jax.tree.leaves_with_path(read(wide))
    for (path, original), leaf in zip(before, jax.tree.leaves(loaded), strict=True):
        if bool(jnp.any(jnp.isinf(leaf) & jnp.isfinite(original))):
            refuse_overflow(f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}", leaf.dtype)


def refuse_overflow(name: str, dtype: Any) -> NoReturn:
    wider = "bfloat16 or float32" if jnp.dtype(dtype).name == "float16" else "float32"
    raise UserError(f"{name} has values beyond what {jnp.dtype(dtype).name} can hold; choose {wider}.")
