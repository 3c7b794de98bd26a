"""Quantisation-aware training: the values are those of the exported format, and gradients pass straight through."""

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError, build
from gemma2_jax.formats.gguf_encodings import encode_tensor, ggml_type, plan_storage
from gemma2_jax.formats.layouts import GGUF, expand
from gemma2_jax.model.adaptation import AdaptationConfig, build_adaptation
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.qat import TRAINED_FORMATS, fallback_lines, rounded
from gemma2_jax.model.quantised import INT4, dequantise, quantise
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, init_params, map_specs, specs_by_path, value_at, weight_specs
from tests.parameters import mostly_thorough

TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, 97)
# Rows of N * H are blocks of 32 across heads, those of F are no blocks of 32.
UNEVEN = ModelConfig(
    vocab_size=97,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=24,
    d_ff=80,
    sliding_window=8,
    query_pre_attn_scalar=24,
)


round_ = jax.jit(rounded, static_argnums=(1, 2))


def qat(model: ModelConfig, format_: Any) -> Any:
    return build_adaptation(AdaptationConfig("qat", quantize=format_), model)


def values_of(model: ModelConfig, params: Params, format_: str) -> Params:
    return map_specs(
        lambda _, spec, weight: round_(weight, spec.dims, format_) if spec.fan_in else weight,
        weight_specs(model),
        params,
    )


@mostly_thorough("format_", TRAINED_FORMATS)
def test_a_model_has_the_values_of_the_format_and_their_gradients(format_: str) -> None:
    params = jax.jit(partial(init_params, weight_specs(UNEVEN)))(jax.random.key(0))
    values, adaptation = values_of(UNEVEN, params, format_), qat(UNEVEN, format_)

    def loss(params: Params, join: Any) -> jax.Array:
        return jnp.sum(jnp.sin(Gemma2(UNEVEN, join(params))(TOKENS)))

    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    found = gradient(params, lambda params: adaptation.join(params, {}))
    expected = gradient(values, lambda params: params)
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
    assert jnp.abs(values["embedder"]["embedding"] - params["embedder"]["embedding"]).max() > 0
    model = Gemma2(UNEVEN, adaptation.join(params, {}))
    np.testing.assert_array_equal(model.head(jnp.ones((1, 1, 64))).embedding, values["embedder"]["embedding"])
    decoder = Decoder(model, ComputeConfig())  # of rollouts
    np.testing.assert_array_equal(decoder.embedder.embedding.get_value(), values["embedder"]["embedding"])


@mostly_thorough("model", [UNEVEN, replace(UNEVEN, d_model=48, d_ff=96, head_dim=32)])
def test_q4_0_is_what_gguf_holds(model: ModelConfig) -> None:
    """Both for a weight and for its values, so that the export of a trained model changes none of them."""
    gguf = pytest.importorskip("gguf")
    specs = weight_specs(model)
    params = jax.jit(partial(init_params, specs))(jax.random.key(0))
    entries = expand(GGUF, specs)
    storage = plan_storage(gguf, {name: entry.shape for name, entry in entries.items()}, "q4_0")
    for name, entry in entries.items():
        (place,) = entry.places
        spec = specs_by_path(specs)[place.path]
        if not spec.fan_in:
            continue
        whole = value_at(params, place.path)
        weight = whole if place.pair is None else whole[place.pair]
        values = np.asarray(round_(weight, spec.dims.removeprefix("P"), "q4_0"))
        for given in (np.asarray(weight), values):
            encoded = encode_tensor(gguf, name, entry.join([given]), storage[name])
            kind = ggml_type(gguf, storage[name].type)
            decoded = gguf.quants.dequantize(encoded, kind).reshape(entry.shape)
            np.testing.assert_array_equal(decoded, entry.join([values]), err_msg=name)


def test_int4_is_idempotent_and_that_of_the_sampler() -> None:
    weight = jax.random.normal(jax.random.key(0), (3, 4, 24, 64))
    values = round_(weight, "PNHD", "int4")
    np.testing.assert_array_equal(values, dequantise(quantise(weight, "PNHD", INT4), jnp.float32))
    np.testing.assert_array_equal(values, round_(values, "PNHD", "int4"))
    assert jnp.abs(values - weight).max() > 0.01


def test_what_a_format_cannot_hold_is_told() -> None:
    assert fallback_lines(UNEVEN, "q4_0") == [
        "q4_0 needs rows that are multiples of 32, so these are in float16: mlp/down (80)"
    ]
    assert fallback_lines(UNEVEN, "int4") == []
    assert fallback_lines(replace(UNEVEN, d_ff=81), "int4") == [
        "int4 needs rows that are even, so these are in int8: mlp/down (81)"
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "qat"}, r"adaptation.quantize is null with adaptation.kind qat; .* q4_0 or int4"),
        (
            {"kind": "full", "quantize": "int4"},
            r"adaptation.quantize has no effect if adaptation.kind is full; write adaptation=qat",
        ),
        (
            {"kind": "qat", "quantize": "int4", "rank": 4},
            r"adaptation.rank has no effect if adaptation.kind is qat",
        ),
    ],
)
def test_settings_of_qat_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(AdaptationConfig, settings, "here")
