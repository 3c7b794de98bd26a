"""A forward pass as a plain loop over blocks."""

from typing import Any

import jax

from gemma2_jax.model.attention import Attention
from gemma2_jax.model.transformer import Gemma2


def layers_apart(
    model: Gemma2, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> list[dict[str, jax.Array]]:
    """Of each layer its hidden state [B, T, D], queries [B, T, N, H] and keys [B, T, K, H]."""

    def attend(layer: Attention, x: jax.Array) -> tuple[jax.Array, Any]:
        return layer(x, positions, segment_ids)

    x = model.embedder.encode(tokens, "float32")
    layers = []
    for index in range(model.config.num_pairs):
        pair = jax.tree.map(lambda weight, index=index: weight[index], model.pairs)
        for block in (pair.local_block, pair.global_block):
            x, _, heads = block(x, attend)
            layers.append({"hidden": x, "query": heads["query"], "key": heads["key"]})
    return layers
