"""Attention maps and the logit lens: those of a plain loop over blocks, and of the model's own output."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.kernels.reference_attention import attention_weights, visible_keys
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.lens import attention_maps, layer_states, logit_lens
from gemma2_jax.model.transformer import Block, Collector, Gemma2, Taps
from tests.model.apart import layers_apart

TOKENS = jax.random.randint(jax.random.key(5), (2, 20), 0, 97)
PLACES = jnp.broadcast_to(jnp.arange(20), (2, 20)), jnp.ones((2, 20), jnp.int32)


@pytest.fixture(scope="module")
def apart(toy_model: Gemma2) -> Any:
    return jax.jit(layers_apart)(toy_model, TOKENS, *PLACES)


@pytest.mark.parametrize("unroll_layers", [False, True])
def test_attention_maps(toy_model: Gemma2, apart: Any, unroll_layers: bool) -> None:
    found = attention_maps(toy_model, TOKENS, (0, 3), compute=ComputeConfig(unroll_layers=unroll_layers))
    assert list(found) == [0, 3]
    for layer, window in ((0, 8), (3, None)):
        assert found[layer].shape == (2, 4, 20, 20)
        visible = visible_keys(PLACES[0], PLACES[0], PLACES[1], PLACES[1], window)
        expected = attention_weights(apart[layer]["query"], apart[layer]["key"], visible, 50.0)
        np.testing.assert_allclose(found[layer], expected.reshape(2, 4, 20, 20), atol=1e-5)
        np.testing.assert_allclose(found[layer].sum(axis=-1), 1.0, rtol=1e-5)
        assert not np.any(np.where(visible[:, None], 0.0, found[layer]))


@pytest.mark.thorough
def test_attention_maps_of_packed_documents(toy_model: Gemma2) -> None:
    """A document is attended to as if it were alone."""
    positions = jnp.concatenate([jnp.arange(12), jnp.arange(8)])[None]
    segments = jnp.array([[1] * 12 + [2] * 8])
    packed = attention_maps(toy_model, TOKENS[:1], (1,), positions, segments)[1]
    alone = attention_maps(toy_model, TOKENS[:1, 12:], (1,))[1]
    np.testing.assert_allclose(packed[:, :, 12:, 12:], alone, atol=1e-5)
    assert not np.any(packed[:, :, 12:, :12])


def test_the_logit_lens_ends_with_the_models_own_logits(toy_model: Gemma2, apart: Any) -> None:
    found = logit_lens(toy_model, TOKENS, (1, 3))
    np.testing.assert_allclose(found[3], toy_model(TOKENS), atol=1e-5)
    expected = toy_model.embedder.decode(toy_model.final_norm(apart[1]["hidden"]))
    np.testing.assert_allclose(found[1], expected, atol=1e-4)


@pytest.mark.parametrize("view", [attention_maps, layer_states, logit_lens])
@pytest.mark.parametrize("layer", [4, -1])
def test_a_layer_that_the_model_does_not_have_is_refused(toy_model: Gemma2, view: Any, layer: int) -> None:
    with pytest.raises(UserError) as error:
        view(toy_model, TOKENS, (0, layer))
    assert str(error.value) == (
        f"the model has no layer {layer}; accepted: 0 to 3, since layers are counted from 0."
    )


class AllTaps(Collector):
    def of_block(self, block: Block, taps: Taps) -> Taps:
        return taps


@pytest.mark.parametrize("remat", ["none", "full"])
def test_every_tap_has_its_shape_and_meaning(toy_model: Gemma2, apart: Any, remat: Any) -> None:
    hidden, kept = toy_model.collect(AllTaps(), TOKENS, compute=ComputeConfig(remat=remat))
    shapes = {name: array.shape for name, array in kept["local_block"].items()}
    assert shapes == {
        "attention_input": (2, 2, 20, 32),
        "query": (2, 2, 20, 4, 8),
        "key": (2, 2, 20, 2, 8),
        "value": (2, 2, 20, 2, 8),
        "heads": (2, 2, 20, 4, 8),
        "mlp_input": (2, 2, 20, 32),
        "mlp_hidden": (2, 2, 20, 64),
        "hidden": (2, 2, 20, 32),
    }
    np.testing.assert_allclose(hidden, toy_model.hidden(TOKENS), atol=1e-6)
    taps = jax.tree.map(lambda stack: stack[1], kept["global_block"])  # of layer 3
    np.testing.assert_allclose(taps["hidden"], apart[3]["hidden"], atol=1e-5)
    block = jax.tree.map(lambda weight: weight[1], toy_model.pairs.global_block)
    before = block.pre_attention_norm(kept["local_block"]["hidden"][1])
    np.testing.assert_allclose(taps["attention_input"], before, atol=1e-5)
    visible = visible_keys(PLACES[0], PLACES[0], PLACES[1], PLACES[1], None)
    weights = attention_weights(taps["query"], taps["key"], visible, 50.0)
    heads = jnp.einsum("BKGTS,BSKH->BTKGH", weights, taps["value"]).reshape(2, 20, 4, 8)
    np.testing.assert_allclose(taps["heads"], heads, atol=1e-5)
    np.testing.assert_allclose(taps["mlp_hidden"], block.mlp.neurons(taps["mlp_input"]), atol=1e-5)
