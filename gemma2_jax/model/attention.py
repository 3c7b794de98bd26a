"""Grouped-query attention with positions, segments and a window, with or without a key/value cache."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma2_jax.kernels.cached_attention import cached_attention, extended_attention
from gemma2_jax.kernels.reference_attention import attention, visible_keys
from gemma2_jax.kernels.self_attention import AttentionConfig, self_attention
from gemma2_jax.model.cache import EMPTY, LayerCaches
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.layers import rotate
from gemma2_jax.model.linear import linear
from gemma2_jax.sharding.layout import constrain


class Attention(nnx.Module):
    """Attention of one layer (Ainslie et al., arXiv 2305.13245); a layer without a `window` is global."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig, window: int | None):
        self.query = nnx.Param(weights["query"])
        self.key = nnx.Param(weights["key"])
        self.value = nnx.Param(weights["value"])
        self.output = nnx.Param(weights["output"])
        self.config = config
        self.window = window

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array,
        kernel: AttentionConfig = AttentionConfig(),
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Attention of a sequence to itself.

        Args:
            x: [B, T, D]; positions, segment_ids: [B, T].

        Returns:
            [B, T, D], and the taps: `query` [B, T, N, H], scaled and rotated; `key`, rotated, and `value` [B, T, K, H];
                `heads` [B, T, N, H], each head's output.
        """
        query, key, value = self._project(x, positions)
        softcap = self.config.attn_logit_softcap
        heads = self_attention(query, key, value, positions, segment_ids, self.window, softcap, kernel)
        return self._mix(heads), {"query": query, "key": key, "value": value, "heads": heads}

    def extend(self, x: jax.Array, positions: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        """Attention of new tokens to the tokens before them, whose keys and values are known, and to themselves.

        Args:
            x: [B, T, D]; positions: [B, T], ascending from the number of the row's tokens before them.
            keys, values: [B, S, K, H] of positions 0 .. S-1; those from a row's first new token on are ignored.

        Returns:
            [B, T, D].
        """
        query, key, value = self._project(x, positions)
        earlier = jnp.broadcast_to(jnp.arange(keys.shape[1]), keys.shape[:2])
        known = (earlier < positions[:, :1]).astype(jnp.int32)
        new = jnp.ones_like(positions)
        visible = visible_keys(
            positions,
            jnp.concatenate([earlier, positions], axis=1),
            new,
            jnp.concatenate([known, new], axis=1),
            self.window,
        )
        heads = attention(
            query,
            jnp.concatenate([keys, key], axis=1),
            jnp.concatenate([values, value], axis=1),
            visible,
            self.config.attn_logit_softcap,
        )
        return self._mix(heads)

    def extend_cache(
        self,
        x: jax.Array,
        positions: jax.Array,
        used: jax.Array | None,
        cache: LayerCaches,
        pair: jax.Array | int,
    ) -> tuple[jax.Array, LayerCaches]:
        """Attention of new tokens to the cache and to themselves.

        Args:
            x: [B, T, D]; positions: [B, T], consecutive. What the cache holds at these or later positions is ignored.
            used: as in `LayerCaches.occupy`; pair: index of this layer's pair in the stack.

        Returns:
            [B, T, D], and the cache with this layer's new keys and values; `occupy` is yet to be called.
        """
        query, *new_vectors = self._project(x, positions)
        key, value = map(cache.held, new_vectors)  # as later tokens will find them
        before = ((cache.positions != EMPTY) & (cache.positions < positions[:, :1])).astype(jnp.int32)
        new = jnp.ones_like(positions)
        mixed = extended_attention(
            query,
            cache.of_layer(pair),
            visible_keys(positions, cache.positions, new, before, self.window),
            (key, value),
            visible_keys(positions, positions, new, new, self.window),
            self.config.attn_logit_softcap,
        )
        return self._mix(mixed), cache.write(pair, positions, key, value, used)

    def decode(
        self, x: jax.Array, position: jax.Array, cache: LayerCaches, pair: jax.Array | int
    ) -> tuple[jax.Array, LayerCaches]:
        """Attention of one new token per row to the cache, where it already has a slot (`LayerCaches.occupy`).

        Args:
            x: [B, 1, D]; position: [B, 1]; pair: index of this layer's pair in the stack.

        Returns:
            [B, 1, D], and the cache with this layer's new key and value.
        """
        query, key, value = self._project(x, position)
        cache = cache.write(pair, position, cache.held(key), cache.held(value))
        filled = (cache.positions != EMPTY).astype(jnp.int32)
        visible = visible_keys(position, cache.positions, jnp.ones_like(position), filled, self.window)
        mixed = cached_attention(
            query[:, 0], *cache.of_layer(pair), visible[:, 0], self.config.attn_logit_softcap
        )
        return self._mix(mixed[:, None]), cache

    def _project(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, N, H], scaled and rotated; keys, rotated, and values [B, T, K, H]."""
        query = linear("BTD,DNH->BTNH", x, self.query.get_value(), "DNH")
        key = linear("BTD,DKH->BTKH", x, self.key.get_value(), "DKH")
        value = linear("BTD,DKH->BTKH", x, self.value.get_value(), "DKH")
        query = rotate(query, positions, self.config.rope_base, self.config.query_scale)
        key = rotate(key, positions, self.config.rope_base)
        return constrain(query, "BTNH"), constrain(key, "BTKH"), constrain(value, "BTKH")

    def _mix(self, mixed: jax.Array) -> jax.Array:
        """Heads [B, T, N, H] back to [B, T, D]."""
        return linear("BTNH,NHD->BTD", mixed, self.output.get_value(), "NHD")
