"""LoRA's adapter: its counts, its first values, and the model that it makes with the base."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError, build, load_config
from gemma2_jax.model.adaptation import AdaptationConfig, build_adaptation
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.counts import count_weights, training_flops_per_token
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.linear import for_use, merged
from gemma2_jax.model.lora import TARGETS, Lora, with_dropout
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, map_specs, weight_specs
from tests.parameters import mostly_thorough

MODELS = Path(__file__).parents[2] / "configs" / "model"
ALL = tuple(TARGETS)
TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, 97)


def trained(lora: Lora) -> Params:
    """An adapter whose B is not zero."""
    return map_specs(lambda path, spec: _random(path, spec.shape), lora.adapter)


def _random(path: str, shape: tuple[int, ...]) -> jax.Array:
    return 0.1 * jax.random.normal(jax.random.key(len(path) + 100 * len(shape)), shape)


@pytest.mark.parametrize(("size", "count"), [("2b", 20_766_720), ("9b", 54_018_048), ("27b", 114_180_096)])
def test_rank_16_on_all_weights_has_the_known_number_of_parameters(size: str, count: int) -> None:
    model = load_config(ModelConfig, MODELS / f"gemma2_{size}.yaml")
    config = AdaptationConfig("lora", rank=16, alpha=32.0, targets=ALL)
    assert count_weights(build_adaptation(config, model).specs(weight_specs(model))[0]) == count


def test_a_is_drawn_as_in_peft_and_b_is_zero(toy_config: ModelConfig, toy_model: Gemma2) -> None:
    lora = Lora(toy_config, 4, 2.0, ALL)
    adapter, base = lora.split(toy_model.params(), jax.random.key(3))
    assert base is not adapter
    for path, leaf in jax.tree.leaves_with_path(adapter):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("/b"):
            assert not leaf.any()
        else:
            limit = np.prod(leaf.shape[1:-1]) ** -0.5
            assert 0.9 * limit < jnp.abs(leaf).max() <= limit
            assert leaf.std() == pytest.approx(limit / 3**0.5, rel=0.15)
    model = Gemma2(toy_config, lora.join(adapter, base))
    np.testing.assert_array_equal(model(TOKENS), toy_model(TOKENS))


@mostly_thorough("layers", [None, (0, 1, 2), (3,)])
def test_the_sum_in_the_product_is_that_of_the_merged_weights(
    toy_config: ModelConfig, toy_model: Gemma2, layers: tuple[int, ...] | None
) -> None:
    lora = Lora(toy_config, 4, 1.5, ALL, layers)
    params = lora.join(trained(lora), toy_model.params())
    specs = weight_specs(toy_config)
    dense = map_specs(lambda _, spec, weight: for_use(weight, spec.dims, jnp.float32), specs, params)
    expected = Gemma2(toy_config, dense)(TOKENS)
    assert jnp.abs(expected - toy_model(TOKENS)).max() > 0.1
    np.testing.assert_allclose(Gemma2(toy_config, params)(TOKENS), expected, atol=1e-5)
    layer = dense["pairs"]["global_block"]["attention"]["output"][0]
    base = toy_model.params()["pairs"]["global_block"]["attention"]["output"][0]
    assert np.array_equal(layer, base) == (layers == (3,))
    decoder = jax.jit(Decoder, static_argnums=1)(Gemma2(toy_config, params), ComputeConfig())
    found, _ = decoder.prefill(TOKENS, jnp.array([12, 12]), 16)
    np.testing.assert_allclose(found, expected[:, -1], atol=1e-5)


def test_merged_of_numpy_is_merged_of_jax() -> None:
    base, a, b = (np.random.default_rng(0).normal(size=shape) for shape in ((6, 2, 3), (6, 4), (4, 2, 3)))
    expected = base + 0.5 * np.einsum("DR,RNH->DNH", a, b)
    np.testing.assert_allclose(merged(base, a, b, 0.5), expected, rtol=1e-5)
    stacked = merged(jnp.asarray(base)[None], a[None], b[None], 0.5, stacked=True)
    np.testing.assert_allclose(stacked[0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "compute",
    [
        pytest.param(ComputeConfig(), marks=pytest.mark.thorough),
        ComputeConfig(dtype="bfloat16", remat="full"),
    ],
)
@pytest.mark.thorough
def test_no_array_in_a_step_is_a_gradient_or_a_sum_of_whole_weights(
    toy_config: ModelConfig, toy_model: Gemma2, compute: ComputeConfig
) -> None:
    """The optimised program has no product of the size of a weight, such as the dense sum's A B."""
    lora = Lora(toy_config, 4, 2.0, ("q", "up", "down"))

    def loss(adapter: Params, base: Params) -> jax.Array:
        model = Gemma2(toy_config, lora.join(adapter, base))
        return jnp.sum(model.hidden(TOKENS, compute=compute).astype(jnp.float32))

    D, F = toy_config.d_model, toy_config.d_ff

    def products(argument: int) -> list[str]:
        """The products with results of gate's and up's size in the gradient with respect to an argument of `loss`."""
        gradient = jax.jit(jax.grad(loss, argument)).lower(trained(lora), toy_model.params())
        lines = str(gradient.compile().as_text()).splitlines()
        return [line for line in lines if f"[{D},{F}]{{" in line.split(" dot(")[0] and " dot(" in line]

    assert products(1)
    assert not products(0)


def test_dropout_drops_a_part_of_the_adapters_input(toy_config: ModelConfig, toy_model: Gemma2) -> None:
    lora = Lora(toy_config, 4, 1.0, ("down",))
    params = lora.join(trained(lora), toy_model.params())

    @jax.jit
    def outputs(key: jax.Array) -> jax.Array:
        model = Gemma2(toy_config, with_dropout(params, 0.5, key))
        return model.hidden(TOKENS, compute=ComputeConfig(remat="full"))

    one = outputs(jax.random.key(0))
    np.testing.assert_array_equal(one, outputs(jax.random.key(0)))
    assert jnp.abs(one - outputs(jax.random.key(1))).max() > 1e-3
    whole = Gemma2(toy_config, params).hidden(TOKENS)
    none = toy_model.hidden(TOKENS)
    mean = jnp.mean(jax.vmap(outputs)(jax.random.split(jax.random.key(2), 64)), axis=0)
    assert jnp.linalg.norm(mean - whole) < 0.3 * jnp.linalg.norm(whole - none)


def test_layers_of_a_step_drop_different_elements(toy_config: ModelConfig, toy_model: Gemma2) -> None:
    lora = Lora(toy_config, 2, 1.0, ("q", "k"))
    params = with_dropout(lora.join(trained(lora), toy_model.params()), 0.1, jax.random.key(0))
    block = params["pairs"]["local_block"]["attention"]
    keys = [tuple(key) for name in ("query", "key") for key in np.asarray(block[name].dropout_key).tolist()]
    assert len(set(keys)) == 4


def test_flops_have_no_gradients_of_frozen_weights(toy_config: ModelConfig) -> None:
    whole = training_flops_per_token(toy_config, 16)
    assert training_flops_per_token(toy_config, 16, frozen=100, added=10) == whole - 200 + 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"adaptation.rank is 0; it must be above 0"),
        ({"alpha": None}, r"adaptation.alpha is null; it must be above 0"),
        ({"dropout": 1.0}, r"adaptation.dropout is 1.0; it must be at least 0 and below 1"),
        (
            {"targets": ["gat"]},
            r"has gat, which is not a weight, did you mean gate \(accepted: down, gate, k",
        ),
        ({"targets": []}, r"adaptation.targets is \[\]; it must be a list of different weights among q, k"),
        ({"targets": ["q", "q"]}, r"adaptation.targets is \[q, q\]; it must be"),
        ({"layers": [2, 1]}, r"adaptation.layers is \[2, 1\]; it must be a list of different layer numbers"),
        ({"layers": [-1]}, r"adaptation.layers is \[-1\]; it must be"),
        (
            {"kind": "full"},
            r"adaptation.rank has no effect if adaptation.kind is full; write adaptation=lora",
        ),
    ],
)
def test_settings_are_refused(change: dict[str, Any], message: str) -> None:
    settings = {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q", "v"]}
    assert build(AdaptationConfig, settings, "here").scale == 2.0
    with pytest.raises(UserError, match=message):
        build(AdaptationConfig, settings | change, "here")


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert AdaptationConfig("lora", 16, 8.0, rslora=True, targets=("q",)).scale == 2.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(Lora, rank=17, scale=1.0, targets=("q", "k")),
            r"rank is 17, but k is a matrix of 32 x 16; .* at most 16",
        ),
        (partial(Lora, rank=2, scale=1.0, targets=("q",), layers=(4,)), r"has 4, but the model has 4 layers"),
    ],
)
def test_an_adapter_that_does_not_fit_the_model_is_refused(
    toy_config: ModelConfig, make: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make(toy_config)
