"""The key/value cache: all past tokens for a global layer, only those of the window for a local layer."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.model.config import ModelConfig

EMPTY = -1  # the position of a slot that holds nothing


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "positions"], meta_fields=[])
@dataclass(frozen=True)
class LayerCaches:
    """Keys and values of all local, or all global, layers. The token at position p is in slot p mod S.

    Attributes:
        keys, values: [P, B, K, S, H]: heads before slots, the order in which attention multiplies them.
        positions: int32 [B, S], position of the token in each slot, or EMPTY.
    """

    keys: jax.Array
    values: jax.Array
    positions: jax.Array

    @classmethod
    def from_prompt(cls, keys: jax.Array, values: jax.Array, lengths: jax.Array, size: int) -> "LayerCaches":
        """Stores right-padded prompts: the last `size` tokens of each row, without padding.

        Args:
            keys, values: [P, B, T, K, H]; lengths: [B], number of tokens of each row without padding.
        """
        P, B, T, K, H = keys.shape
        position = jnp.broadcast_to(jnp.arange(T), (B, T))
        kept = (position < lengths[:, None]) & (position >= lengths[:, None] - size)
        slot = jnp.where(kept, position % size, size)  # slot `size` does not exist: the write is dropped
        row = jnp.arange(B)[:, None]
        empty = jnp.zeros((P, B, size, K, H), keys.dtype)
        return cls(
            keys=empty.at[:, row, slot].set(keys, mode="drop").swapaxes(2, 3),
            values=empty.at[:, row, slot].set(values, mode="drop").swapaxes(2, 3),
            positions=jnp.full((B, size), EMPTY, jnp.int32).at[row, slot].set(position, mode="drop"),
        )

    def occupy(self, position: jax.Array) -> "LayerCaches":
        """Assigns the slot of `position` [B] to a new token, whose key and value `write` then stores."""
        rows, slot = self._slot(position)
        return replace(self, positions=self.positions.at[rows, slot].set(position))

    def write(
        self, pair: jax.Array | int, position: jax.Array, key: jax.Array, value: jax.Array
    ) -> "LayerCaches":
        """Stores the new token's key and value [B, K, H] of one layer."""
        rows, slot = self._slot(position)
        return replace(
            self,
            keys=self.keys.at[pair, rows, :, slot].set(key),
            values=self.values.at[pair, rows, :, slot].set(value),
        )

    def _slot(self, position: jax.Array) -> tuple[jax.Array, jax.Array]:
        B, S = self.positions.shape
        return jnp.arange(B), position % S


@partial(jax.tree_util.register_dataclass, data_fields=["local_block", "global_block"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """The caches of local and of global layers, each in the order of `by_window`."""

    local_block: LayerCaches
    global_block: LayerCaches


def by_window(config: ModelConfig, first: Any, second: Any) -> tuple[Any, Any]:
    """Stacks of the local and of the global layers, from trees of stacks [P, …] of each pair's first and second layer.

    With `global_every` above 1, the second layers that are local follow all first ones.
    """
    if config.global_every == 1:
        return first, second
    local = np.array([window is not None for window in config.windows[1::2]])
    joined = jax.tree.map(lambda one, other: jnp.concatenate([one, other[local]]), first, second)
    return joined, jax.tree.map(lambda stack: stack[~local], second)


def local_size(config: ModelConfig, size: int) -> int:
    """The number of slots that a local layer needs if a global one has `size`."""
    return size if config.sliding_window is None else min(size, config.sliding_window)
