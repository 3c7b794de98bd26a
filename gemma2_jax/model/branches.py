"""Several continuations of one text, for which the text's keys and values are computed once."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.model.attention import Attention
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Block, Collector, Gemma2, Pair, Taps, in_iteration, over_pairs

# By kind of block: keys and values of all its layers, [P, B, T, K, H] each.
KeptKeys = Mapping[str, tuple[jax.Array, jax.Array]]


class KeysAndValues(Collector):
    """The keys and values of every layer, `KeptKeys`."""

    def of_block(self, block: Block, taps: Taps) -> tuple[jax.Array, jax.Array]:
        return taps["key"], taps["value"]


def branch_hidden(
    model: Gemma2,
    kept: KeptKeys,
    tokens: jax.Array,
    rows: jax.Array,
    starts: jax.Array,
    compute: ComputeConfig,
) -> jax.Array:
    """Final hidden states [A, S, D], normed, of continuations.

    Computes all scores of a layer at once, so continuations should be short.

    Args:
        kept: keys and values of the texts, from `model.collect(KeysAndValues(), …)`.
        tokens: int [A, S], right-padded continuations.
        rows: int [A], the text that each continues; starts: int [A], how many of its tokens precede the continuation.
    """
    positions = starts[:, None] + jnp.arange(tokens.shape[1])

    def run(block: Block, x: jax.Array, kind: str, index: jax.Array) -> jax.Array:
        keys, values = (each[index][rows] for each in kept[kind])

        def attend(layer: Attention, x: jax.Array) -> tuple[jax.Array, None]:
            return layer.extend(x, positions, keys, values), None

        return block(x, attend)[0]

    def body(carry: Any, pair: Pair) -> tuple[Any, None]:
        x, index = carry
        pair = in_iteration(pair, index)
        x = run(pair.local_block, x, "local_block", index)
        x = run(pair.global_block, x, "global_block", index)
        return (x, index + 1), None

    x = model.embedder.encode(tokens, compute.dtype)
    (x, _), _ = over_pairs(body, (x, 0), model.pairs, compute)
    return model.final_norm(x)
