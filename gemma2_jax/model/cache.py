"""The key/value cache: all past tokens for a global layer, only the most recent ones for a local layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.sharding.layout import constrain

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
    def empty(cls, config: ModelConfig, layers: int, rows: int, slots: int, dtype: Any) -> "LayerCaches":
        """Caches of `layers` layers and `rows` rows, with S = `slots`."""
        shape = (layers, rows, config.num_kv_heads, slots, config.head_dim)
        keys, values = (constrain(jnp.zeros(shape, dtype), "PBKSH") for _ in range(2))
        return cls(keys, values, constrain(jnp.full((rows, slots), EMPTY, jnp.int32), "BS"))

    def occupy(self, positions: jax.Array, used: jax.Array | None = None) -> "LayerCaches":
        """Assigns slots to new tokens, whose keys and values `write` then stores.

        Args:
            positions: [B, T], consecutive. Of more than S tokens of a row, only the last S get a slot.
            used: bool [B, T], true for a row's first tokens; its other tokens are padding and get no slot.
        """
        rows, slots = self._slots(positions, used)
        return replace(self, positions=self.positions.at[rows, slots].set(positions, mode="drop"))

    def write(
        self,
        pair: jax.Array | int,
        positions: jax.Array,
        key: jax.Array,
        value: jax.Array,
        used: jax.Array | None = None,
    ) -> "LayerCaches":
        """Stores the new tokens' keys and values [B, T, K, H] of one layer; other arguments as in `occupy`."""
        rows, slots = self._slots(positions, used)
        return replace(
            self,
            keys=self.keys.at[pair, rows, :, slots].set(key, mode="drop"),
            values=self.values.at[pair, rows, :, slots].set(value, mode="drop"),
        )

    def _slots(self, positions: jax.Array, used: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """Rows [B, 1] and slots [B, T] of tokens; slot S does not exist, so that writes to it are dropped."""
        (B, S), T = self.positions.shape, positions.shape[1]
        slots = positions % S
        if used is not None:
            slots = jnp.where(used, slots, S)
        if T > S:
            count = T if used is None else jnp.sum(used, axis=1, keepdims=True)
            slots = jnp.where(jnp.arange(T) >= count - S, slots, S)
        return jnp.arange(B)[:, None], slots


@partial(jax.tree_util.register_dataclass, data_fields=["local_block", "global_block"], meta_fields=[])
@dataclass(frozen=True)
class Cache:
    """The caches of local and of global layers. Second layers of pairs that are local follow all first ones."""

    local_block: LayerCaches
    global_block: LayerCaches

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, size: int, revocable: int, dtype: Any) -> "Cache":
        """An empty cache.

        Args:
            size: number of positions that it must hold.
            revocable: number of newest tokens of a row that can be replaced by others at the same positions, as
                rejected drafts are; a local layer keeps as many older tokens in addition to its window.
        """
        global_layers = config.num_pairs // config.global_every
        parts = (
            (config.num_layers - global_layers, local_size(config, size, revocable)),
            (global_layers, size),
        )
        return cls(*(LayerCaches.empty(config, layers, rows, slots, dtype) for layers, slots in parts))

    def map(self, function: Callable[[LayerCaches], LayerCaches]) -> "Cache":
        return Cache(function(self.local_block), function(self.global_block))


def local_size(config: ModelConfig, size: int, revocable: int = 0) -> int:
    """The number of slots that a local layer needs if a global one has `size`; `revocable` as in `Cache.empty`."""
    return size if config.sliding_window is None else min(size, config.sliding_window + revocable)
