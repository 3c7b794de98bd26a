"""Views into a model: attention maps, hidden states, and what each layer would predict."""

from collections.abc import Sequence

import jax

from gemma2_jax.kernels.reference_attention import attention_weights, visible_keys
from gemma2_jax.model.capture import Capture, forward
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2, default_positions


def attention_maps(
    model: Gemma2,
    tokens: jax.Array,
    layers: Sequence[int],
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> dict[int, jax.Array]:
    """Each head's attention distributions by layer: float32 [B, N, T, S], where S is over the same tokens as T.

    Args:
        tokens: int [B, T].
        layers: layer numbers from 0, each once.
        positions, segment_ids: [B, T], as in `Gemma2.hidden`.

    Raises:
        UserError: the model has no layer of one of these numbers.
    """
    positions, segment_ids = default_positions(tokens, positions, segment_ids)
    capture = Capture(tuple(layers), hidden=False, attention=True)
    _, captured = forward(model, tokens, positions, segment_ids, compute, capture)
    maps = {}
    for number, layer in captured.items():
        assert layer.query is not None
        assert layer.key is not None
        visible = visible_keys(positions, positions, segment_ids, segment_ids, layer.window)
        weights = attention_weights(layer.query, layer.key, visible, layer.softcap)  # [B, K, G, T, S]
        maps[number] = weights.reshape(weights.shape[0], -1, *weights.shape[3:])
    return maps


def layer_states(
    model: Gemma2,
    tokens: jax.Array,
    layers: Sequence[int],
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> dict[int, jax.Array]:
    """The residual stream after each layer, by layer number: [B, T, D], in compute's dtype, before the final norm.

    Arguments and errors as in `attention_maps`. `Gemma2.hidden` gives the final hidden states.
    """
    capture = Capture(tuple(layers), hidden=True, attention=False)
    _, captured = forward(model, tokens, positions, segment_ids, compute, capture)
    states = {}
    for number, layer in captured.items():
        assert layer.hidden is not None
        states[number] = layer.hidden
    return states


def logit_lens(
    model: Gemma2,
    tokens: jax.Array,
    layers: Sequence[int],
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    compute: ComputeConfig = ComputeConfig(),
) -> dict[int, jax.Array]:
    """Logits [B, T, V] from the residual stream after each layer, through the final norm and the LM head.

    (nostalgebraist, "interpreting GPT: the logit lens", 2020.) Arguments and errors as in `attention_maps`; the
    last layer's logits are the model's own.
    """
    states = layer_states(model, tokens, layers, positions, segment_ids, compute)
    return {number: model.embedder.decode(model.final_norm(x)) for number, x in states.items()}
