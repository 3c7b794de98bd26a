"""The key/value cache: all past tokens for a global layer, only the most recent ones for a local layer."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.int8_vectors import Int8Vectors, Vectors, quantise_vectors
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.sharding.layout import constrain

EMPTY = -1  # the position of a slot that holds nothing


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "positions"], meta_fields=[])
@dataclass(frozen=True)
class LayerCaches:
    """Keys and values of all local, or all global, layers. The token at position p is in slot p mod S.

    Attributes:
        keys, values: [P, B, K, S, H]: heads before slots, the order in which attention multiplies them. Both are
            arrays, or both `Int8Vectors`.
        positions: int32 [B, S], position of the token in each slot, or EMPTY.
    """

    keys: Vectors
    values: Vectors
    positions: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, layers: int, rows: int, slots: int, dtype: Any) -> "LayerCaches":
        """Caches of `layers` layers and `rows` rows, with S = `slots`; dtype int8 stands for `Int8Vectors`."""
        shape = (layers, rows, config.num_kv_heads, slots, config.head_dim)
        keys, values = (_empty_vectors(shape, dtype) for _ in range(2))
        return cls(keys, values, constrain(jnp.full((rows, slots), EMPTY, jnp.int32), "BS"))

    def occupy(self, positions: jax.Array, used: jax.Array | None = None) -> "LayerCaches":
        """Assigns slots to new tokens, whose keys and values `write` then stores.

        Args:
            positions: [B, T], consecutive. Of more than S tokens of a row, only the last S get a slot.
            used: bool [B, T], true for a row's first tokens; its other tokens are padding and get no slot.
        """
        rows, slots = self._slots(positions, used)
        return replace(self, positions=self.positions.at[rows, slots].set(positions, mode="drop"))

    def held(self, vectors: jax.Array) -> Vectors:
        """New keys or values [B, T, K, H] as this cache holds them."""
        return quantise_vectors(vectors) if isinstance(self.keys, Int8Vectors) else vectors

    def of_layer(self, pair: jax.Array | int) -> tuple[Vectors, Vectors]:
        """Keys and values [B, K, S, H] of one layer."""
        keys, values = jax.tree.map(lambda leaf: leaf[pair], (self.keys, self.values))
        return keys, values

    def write(
        self,
        pair: jax.Array | int,
        positions: jax.Array,
        key: Vectors,
        value: Vectors,
        used: jax.Array | None = None,
    ) -> "LayerCaches":
        """Stores the new tokens' keys and values [B, T, K, H] of one layer, as `held` returns them.

        Other arguments as in `occupy`.
        """
        rows, slots = self._slots(positions, used)

        def stored(leaf: jax.Array, new: jax.Array) -> jax.Array:
            return leaf.at[pair, rows, :, slots].set(new, mode="drop")

        return replace(
            self,
            keys=jax.tree.map(stored, self.keys, key),
            values=jax.tree.map(stored, self.values, value),
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
            dtype: of keys and values; int8 stands for `Int8Vectors`.
        """
        global_layers = config.num_pairs // config.global_every
        parts = (
            (config.num_layers - global_layers, local_size(config, size, revocable)),
            (global_layers, size),
        )
        return cls(*(LayerCaches.empty(config, layers, rows, slots, dtype) for layers, slots in parts))

    def map(self, function: Callable[[LayerCaches], LayerCaches]) -> "Cache":
        return Cache(function(self.local_block), function(self.global_block))


def _empty_vectors(shape: tuple[int, ...], dtype: Any) -> Vectors:
    """Zeros [P, B, K, S, H]."""
    numbers = constrain(jnp.zeros(shape, dtype), "PBKSH")
    if jnp.dtype(dtype) != jnp.int8:
        return numbers
    return Int8Vectors(numbers, constrain(jnp.zeros(shape[:-1], jnp.float32), "PBKS"))


def local_size(config: ModelConfig, size: int, revocable: int = 0) -> int:
    """The number of slots that a local layer needs if a global one has `size`; `revocable` as in `Cache.empty`."""
    return size if config.sliding_window is None else min(size, config.sliding_window + revocable)
