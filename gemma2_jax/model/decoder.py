"""The forward pass of generation with a cache: prompts in chunks, then one or several tokens per row at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gemma2_jax.model.attention import Attention
from gemma2_jax.model.cache import Cache, LayerCaches
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.layers import Embedder, RMSNorm
from gemma2_jax.model.linear import cast
from gemma2_jax.model.transformer import Gemma2, Pair, in_iteration, over_pairs
from gemma2_jax.model.weights import map_specs, weight_specs

CHUNK = 256  # tokens of a prompt that are run at a time


class Decoder(nnx.Module):
    """A Gemma 2 with its weights laid out for decoding, where all of them are read for every token.

    Matrices are already in compute's dtype, unless they are quantised, and with `unroll_layers` each pair of layers has
    arrays of its own: on a CPU, slicing a layer out of the stack for every token costs twice as much as its products.

    Args:
        model: source of the weights, which stays unchanged.
        compute: how to execute. Build the decoder under `jax.jit`, so that only arrays that change are copied.
        cache_dtype: "int8" for a cache of `Int8Vectors`; None for arrays of compute's dtype. Tokens of a prompt's first
            chunk attend to each other before they are rounded, all others to what the cache holds.
    """

    def __init__(self, model: Gemma2, compute: ComputeConfig, cache_dtype: str | None = None):
        params = map_specs(
            lambda _, spec, value: cast(value, compute.dtype) if spec.fan_in else value,
            weight_specs(model.config),
            model.params(),
        )
        self.config = model.config
        self.compute = compute
        self.cache_dtype = cache_dtype or compute.dtype
        self.embedder = Embedder(params["embedder"], self.config)
        self.pairs = self._pairs(params["pairs"])
        self.final_norm = RMSNorm(params["final_norm"], self.config)

    def prefill(
        self, tokens: jax.Array, lengths: jax.Array, cache_size: int, revocable: int = 0
    ) -> tuple[jax.Array, Cache]:
        """Runs right-padded prompts of different lengths, CHUNK tokens at a time.

        Temporaries are those of one chunk, and no chunk beyond the longest prompt is run.

        Args:
            tokens: [B, T]; lengths: [B], at least 1; cache_size, revocable: see `Cache.empty`.

        Returns:
            Soft-capped float32 logits [B, V] after each prompt's last token, and the cache.
        """
        B, T = tokens.shape
        chunk = min(T, CHUNK)
        tokens = jnp.pad(tokens, ((0, 0), (0, -T % chunk)))
        cache = Cache.empty(self.config, B, cache_size, revocable, self.cache_dtype)

        def update(final: jax.Array, hidden: jax.Array, left: jax.Array) -> jax.Array:
            """`final` with the hidden states [B, 1, D] of the prompts that end in the chunk, after `left` tokens."""
            place = jnp.clip(left - 1, 0, chunk - 1)[:, None, None]
            ends_here = ((left >= 1) & (left <= chunk))[:, None, None]
            return jnp.where(ends_here, jnp.take_along_axis(hidden, place, axis=1), final)

        def body(number: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
            final, cache = carry
            start = number * chunk
            these = jax.lax.dynamic_slice_in_dim(tokens, start, chunk, axis=1)
            left = lengths - start
            hidden, cache = self.extend(these, jnp.broadcast_to(start, (B,)), cache, left)
            return update(final, hidden, left), cache

        hidden, cache = self._begin(tokens[:, :chunk], lengths, cache)
        final = update(jnp.zeros_like(hidden[:, :1]), hidden, lengths)
        if chunk < T:
            chunks = (jnp.max(lengths) + chunk - 1) // chunk
            final, cache = jax.lax.fori_loop(1, chunks, body, (final, cache))
        return self.logits(final)[:, 0], cache

    def extend(
        self, tokens: jax.Array, start: jax.Array, cache: Cache, count: jax.Array | None = None
    ) -> tuple[jax.Array, Cache]:
        """Runs several more tokens per row.

        Args:
            tokens: [B, T]; start: [B], position of each row's first token.
            cache: keys and values of positions 0 .. start - 1 of each row; what it holds at later positions is
                replaced.
            count: [B], number of a row's tokens; those after them are padding. All T by default.

        Returns:
            The last layer's hidden states [B, T, D], for `logits`, and the cache with the tokens added.
        """
        index = jnp.arange(tokens.shape[1])
        positions = start[:, None] + index
        used = None if count is None else index < count[:, None]

        def attend(
            layer: Attention, x: jax.Array, cache: LayerCaches, pair: Any
        ) -> tuple[jax.Array, LayerCaches]:
            return layer.extend_cache(x, positions, used, cache, pair)

        x, cache = self._run(tokens, jnp.max(start), cache, attend)
        return x, cache.map(lambda layers: layers.occupy(positions, used))

    def _begin(self, tokens: jax.Array, count: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """`extend` of an empty cache, which attention need not read."""
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        used = positions < count[:, None]

        def attend(
            layer: Attention, x: jax.Array, cache: LayerCaches, pair: Any
        ) -> tuple[jax.Array, LayerCaches]:
            mixed, taps = layer(x, positions, used.astype(jnp.int32), self.compute.attention)
            key, value = cache.held(taps["key"]), cache.held(taps["value"])
            return mixed, cache.write(pair, positions, key, value, used)

        x, cache = self._run(tokens, jnp.max(count), cache, attend)
        return x, cache.map(lambda layers: layers.occupy(positions, used))

    def decode(self, tokens: jax.Array, position: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """Runs one more token per row, faster than `extend`.

        Args:
            tokens, position: [B]; cache: keys and values of positions 0 .. position - 1 of each row.

        Returns:
            Soft-capped float32 logits [B, V] for the next token, and the cache with this token added.
        """
        positions = position[:, None]

        def attend(
            layer: Attention, x: jax.Array, cache: LayerCaches, pair: Any
        ) -> tuple[jax.Array, LayerCaches]:
            return layer.decode(x, positions, cache, pair)

        cache = cache.map(lambda layers: layers.occupy(positions))
        x, cache = self._run(tokens[:, None], jnp.max(position), cache, attend)
        return self.logits(x)[:, 0], cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Soft-capped float32 logits [B, T, V] of the last layer's hidden states [B, T, D]."""
        return self.embedder.decode(self.final_norm(hidden))

    def _run(
        self, tokens: jax.Array, newest: jax.Array, cache: Cache, attend: Callable[..., Any]
    ) -> tuple[jax.Array, Cache]:
        """Embeds tokens [B, T] and runs them through all layers; `newest` is a number that differs between calls."""

        def body(carry: Any, pair: Pair) -> tuple[Any, None]:
            x, index, local, global_ = carry
            pair = in_iteration(pair, index + newest)
            x, _, local = pair.local_block(x, lambda layer, x: attend(layer, x, local, index))
            earlier = index if every == 1 else index // every  # global layers before this pair
            if pair.global_block.attention.window is not None:
                place = self.config.num_pairs + index - earlier
                x, _, local = pair.global_block(x, lambda layer, x: attend(layer, x, local, place))
            else:
                x, _, global_ = pair.global_block(x, lambda layer, x: attend(layer, x, global_, earlier))
            return (x, index + 1, local, global_), None

        every = self.config.global_every
        x = self.embedder.encode(tokens, self.compute.dtype)
        carry = (x, 0, cache.local_block, cache.global_block)
        (x, _, local, global_), _ = over_pairs(body, carry, self.pairs, self.compute)
        return x, Cache(local, global_)

    def _pairs(self, stacked: Any) -> Pair | nnx.List[Pair]:
        if not self.compute.unroll_layers:
            return Pair(stacked, self.config)

        def pair(index: int) -> Pair:
            return Pair(jax.tree.map(lambda weight: weight[index], stacked), self.config, index)

        return nnx.List([pair(index) for index in range(self.config.num_pairs)])
