"""A forward pass that also gives what some layers had inside: hidden states, queries and keys."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.model.attention import Attention
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2, Pair, over_pairs, rematerialised
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.sharding.layout import constrain

_DIMS = {"hidden": "BTD", "query": "BTNH", "key": "BTKH"}


@dataclass(frozen=True)
class Capture:
    """What a forward pass is to give beside its final states.

    Attributes:
        layers: of which layers, counted from 0, each once.
        hidden: their hidden states; attention: the queries and keys that their attention comes from.
    """

    layers: tuple[int, ...]
    hidden: bool
    attention: bool

    @property
    def names(self) -> tuple[str, ...]:
        return ("hidden",) * self.hidden + ("query", "key") * self.attention


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["hidden", "query", "key"],
    meta_fields=["window", "softcap"],
)
@dataclass(frozen=True)
class CapturedLayer:
    """One layer of a forward pass, in its dtype; None where it was not to be captured.

    Attributes:
        hidden: [B, T, D], the residual stream after the layer.
        query: [B, T, N, H], rotated and scaled; key: [B, T, K, H], rotated.
        window, softcap: of its attention.
    """

    window: int | None
    softcap: float
    hidden: jax.Array | None = None
    query: jax.Array | None = None
    key: jax.Array | None = None


def hidden_and_captured(
    model: Gemma2,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    compute: ComputeConfig,
    capture: Capture,
) -> tuple[jax.Array, dict[int, CapturedLayer]]:
    """`model.hidden`, and the layers asked for by their number; differentiable in the model.

    What is captured is written into buffers with a slot for each layer asked for: stacked by the scan, it would be
    there of every layer. They are written outside of what is rematerialised, which would save them with each pair.
    """

    slots = _slots(model.config.num_layers, capture.layers)

    def attend(layer: Attention, x: jax.Array) -> tuple[jax.Array, Any]:
        mixed, (query, key, _) = layer(x, positions, segment_ids, compute.attention)
        return mixed, {"query": query, "key": key}

    def wanted(found: dict[str, jax.Array]) -> dict[str, jax.Array]:
        return {name: found[name] for name in capture.names}

    def read_pair(x: jax.Array, pair: Pair) -> tuple[jax.Array, Any]:
        x, heads = pair.local_block(x, attend)
        local = wanted({"hidden": x, **heads})
        x, heads = pair.global_block(x, attend)
        return x, (local, wanted({"hidden": x, **heads}))

    read_pair_again = rematerialised(read_pair, compute)

    def body(carry: Any, pair: Pair) -> tuple[Any, None]:
        x, index, buffers = carry
        x, found = read_pair_again(x, pair, index)
        for kind, values in enumerate(found):  # local, global
            if any(layer % 2 == kind for layer in capture.layers):
                buffers = _write(buffers, slots[index, kind], values)
        return (x, index + 1, buffers), None

    with jax.named_scope("embed"):
        x = model.embedder.encode(tokens, compute.dtype)
    carry = (x, 0, _empty_buffers(model.config, x, capture))
    (x, _, buffers), _ = over_pairs(body, carry, model.pairs, compute)
    layers = {}
    for slot, layer in enumerate(capture.layers):
        block = model.pairs.global_block if layer % 2 else model.pairs.local_block
        values = {name: buffer[slot] for name, buffer in buffers.items()}
        layers[layer] = CapturedLayer(block.attention.window, model.config.attn_logit_softcap, **values)
    return model.final_norm(x), layers


def _slots(num_layers: int, captured: tuple[int, ...]) -> jax.Array:
    """The slot [P, 2] of each pair's local and global layer; all that are not captured share the one after the last."""
    slot = {layer: index for index, layer in enumerate(captured)}
    return jnp.array([slot.get(layer, len(captured)) for layer in range(num_layers)]).reshape(-1, 2)


def _empty_buffers(config: ModelConfig, x: jax.Array, capture: Capture) -> dict[str, jax.Array]:
    """Of each name, [slots, B, T, ...]."""
    sizes = {**dim_sizes(config), "B": x.shape[0], "T": x.shape[1]}
    shapes = {name: [len(capture.layers) + 1, *(sizes[d] for d in _DIMS[name])] for name in capture.names}
    return {name: _lay_out(name, jnp.zeros(shape, x.dtype)) for name, shape in shapes.items()}


def _write(
    buffers: dict[str, jax.Array], slot: jax.Array, values: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    return {
        name: _lay_out(name, jax.lax.dynamic_update_index_in_dim(buffer, values[name], slot, axis=0))
        for name, buffer in buffers.items()
    }


def _lay_out(name: str, buffer: jax.Array) -> jax.Array:
    return constrain(buffer, "_" + _DIMS[name])  # slots are never split
