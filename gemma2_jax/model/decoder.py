"""The forward pass of generation: whole prompts at once, then one token per row at a time, with a cache."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma2_jax.model.branches import KeysAndValues
from gemma2_jax.model.cache import Cache, LayerCaches, by_window, local_size
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.layers import Embedder, RMSNorm
from gemma2_jax.model.linear import cast
from gemma2_jax.model.transformer import (
    Gemma2,
    Pair,
    in_iteration,
    over_pairs,
    run_layers,
)
from gemma2_jax.model.weights import map_specs, weight_specs


class Decoder(nnx.Module):
    """A Gemma 2 with its weights laid out for decoding, where all of them are read for every token.

    Matrices are already in compute's dtype, unless they are quantised, and with `unroll_layers` each pair of layers has
    arrays of its own: on a CPU, slicing a layer out of the stack for every token costs twice as much as its products.

    Args:
        model: source of the weights, which stays unchanged.
        compute: how to execute. Build the decoder under `jax.jit`, so that only arrays that change are copied.
    """

    def __init__(self, model: Gemma2, compute: ComputeConfig):
        params = map_specs(
            lambda _, spec, value: cast(value, compute.dtype) if spec.fan_in else value,
            weight_specs(model.config),
            model.params(),
        )
        self.config = model.config
        self.compute = compute
        self.embedder = Embedder(params["embedder"], self.config)
        self.pairs = self._pairs(params["pairs"])
        self.final_norm = RMSNorm(params["final_norm"], self.config)

    def prefill(self, tokens: jax.Array, lengths: jax.Array, cache_size: int) -> tuple[jax.Array, Cache]:
        """Runs right-padded prompts of different lengths.

        Args:
            tokens: [B, T]; lengths: [B], at least 1; cache_size: number of positions that the cache must hold.

        Returns:
            Soft-capped float32 logits [B, V] after each prompt's last token, and the cache.
        """
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
        x = self.embedder.encode(tokens, self.compute.dtype)
        x, kept = run_layers(self.pairs, x, positions, segment_ids, self.compute, KeysAndValues())
        local, global_ = by_window(self.config, kept["local_block"], kept["global_block"])
        local_slots = local_size(self.config, cache_size)
        last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
        return self._logits(last), Cache(
            local_block=LayerCaches.from_prompt(local[0], local[1], lengths, local_slots),
            global_block=LayerCaches.from_prompt(global_[0], global_[1], lengths, cache_size),
        )

    def decode(self, tokens: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Runs one more token per row.

        Args:
            tokens, position: [B]; cache: keys and values of positions 0 .. position - 1 of each row.

        Returns:
            Soft-capped float32 logits [B, V] for the next token, and the cache with this token added.
        """

        def body(carry: Any, pair: Pair) -> tuple[Any, None]:
            x, index, local, global_ = carry
            pair = in_iteration(pair, index + newest)
            x, _, local = pair.local_block(x, lambda layer, x: layer.decode(x, position, local, index))
            earlier = index if every == 1 else index // every  # global layers before this pair
            if pair.global_block.attention.window is not None:
                place = self.config.num_pairs + index - earlier
                x, _, local = pair.global_block(x, lambda layer, x: layer.decode(x, position, local, place))
            else:
                x, _, global_ = pair.global_block(
                    x, lambda layer, x: layer.decode(x, position, global_, earlier)
                )
            return (x, index + 1, local, global_), None

        every = self.config.global_every
        newest = jnp.max(position)  # differs between tokens
        x = self.embedder.encode(tokens[:, None], self.compute.dtype)
        carry = (x, 0, cache.local_block.occupy(position), cache.global_block.occupy(position))
        (x, _, local, global_), _ = over_pairs(body, carry, self.pairs, self.compute)
        return self._logits(x), Cache(local_block=local, global_block=global_)

    def _logits(self, x: jax.Array) -> jax.Array:
        """[B, 1, D] to [B, V]."""
        return self.embedder.decode(self.final_norm(x)[:, 0])

    def _pairs(self, stacked: Any) -> Pair | nnx.List[Pair]:
        if not self.compute.unroll_layers:
            return Pair(stacked, self.config)

        def pair(index: int) -> Pair:
            return Pair(jax.tree.map(lambda weight: weight[index], stacked), self.config, index)

        return nnx.List([pair(index) for index in range(self.config.num_pairs)])
