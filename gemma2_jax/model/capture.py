"""A forward pass that also returns activations of some layers: hidden states, queries and keys."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Block, Collector, Gemma2, Taps
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.sharding.layout import constrain

_DIMS = {"hidden": "BTD", "query": "BTNH", "key": "BTKH"}


@dataclass(frozen=True)
class Capture:
    """What a forward pass returns besides its final hidden states.

    Attributes:
        layers: numbers of the captured layers, from 0, each once.
        hidden: whether to capture hidden states; attention: whether to capture the queries and keys of attention.
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
    """The captured activations of one layer, in the dtype of the forward pass; None for those not captured.

    Attributes:
        hidden: [B, T, D], the residual stream after the layer.
        query: [B, T, N, H], rotated and scaled; key: [B, T, K, H], rotated.
        window, softcap: settings of the layer's attention.
    """

    window: int | None
    softcap: float
    hidden: jax.Array | None = None
    query: jax.Array | None = None
    key: jax.Array | None = None


def forward(
    model: Gemma2,
    tokens: jax.Array,
    positions: jax.Array | None,
    segment_ids: jax.Array | None,
    compute: ComputeConfig,
    capture: Capture | None,
) -> tuple[jax.Array, dict[int, CapturedLayer]]:
    """`model.hidden` [B, T, D], and the captured layers by number; differentiable in the model.

    Raises:
        UserError: the model has no layer of a number in `capture`.
    """
    if capture is None:
        return model.hidden(tokens, positions, segment_ids, compute), {}
    for layer in capture.layers:
        if not 0 <= layer < model.config.num_layers:
            raise UserError(
                f"the model has no layer {layer}; accepted: 0 to {model.config.num_layers - 1}, since layers are "
                "counted from 0."
            )
    return model.collect(_Capturing(model, capture), tokens, positions, segment_ids, compute)


@dataclass(frozen=True)
class _Capturing(Collector):
    """Writes the taps of some layers into buffers with one slot per layer.

    Stacking them in the scan would keep the taps of every layer. They are written outside of the rematerialised
    function, which would otherwise save the buffers with each pair.
    """

    model: Gemma2
    capture: Capture

    def of_block(self, block: Block, taps: Taps) -> dict[str, jax.Array]:
        return {name: taps[name] for name in self.capture.names}

    def begin(self, x: jax.Array) -> dict[str, jax.Array]:
        return _empty_buffers(self.model.config, x, self.capture)

    def add(
        self, carry: dict[str, jax.Array], index: jax.Array, kept: dict[str, Any]
    ) -> tuple[dict[str, jax.Array], None]:
        slots = _slots(self.model.config.num_layers, self.capture.layers)
        for kind, name in enumerate(("local_block", "global_block")):
            if any(layer % 2 == kind for layer in self.capture.layers):
                carry = _write(carry, slots[index, kind], kept[name])
        return carry, None

    def end(self, carry: dict[str, jax.Array], stacked: None) -> dict[int, CapturedLayer]:
        config = self.model.config
        layers = {}
        for slot, layer in enumerate(self.capture.layers):
            values = {name: buffer[slot] for name, buffer in carry.items()}
            layers[layer] = CapturedLayer(config.windows[layer], config.attn_logit_softcap, **values)
        return layers


def _slots(num_layers: int, captured: tuple[int, ...]) -> jax.Array:
    """Slots [P, 2] of each pair's local and global layer; layers that are not captured share the one after the last."""
    slot = {layer: index for index, layer in enumerate(captured)}
    return jnp.array([slot.get(layer, len(captured)) for layer in range(num_layers)]).reshape(-1, 2)


def _empty_buffers(config: ModelConfig, x: jax.Array, capture: Capture) -> dict[str, jax.Array]:
    """A buffer [slots, B, T, ...] for each name."""
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
