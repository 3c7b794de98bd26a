"""Whole models in int8 and int4, the embedding included: logits, generation, and programs that stay small."""

from dataclasses import replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.model import linear as linear_module
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.counts import bytes_per_token
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.linear import for_use, lookup
from gemma2_jax.model.quantised import (
    INT4,
    INT8,
    WEIGHT_FORMATS,
    Format,
    dequantise,
    is_quantised,
    quantise,
    stored,
    weight_bytes,
)
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.vocabulary import resize_rows
from gemma2_jax.model.weights import (
    Params,
    abstract_params,
    fallbacks,
    frozen_dtypes,
    init_params,
    map_specs,
    weight_specs,
)
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.model.test_quantised import ALL_LAYERS, SMALL, TOKENS, largest_array
from tests.parameters import mostly_thorough

FORMATS = list(WEIGHT_FORMATS.values())


def in_format(config: ModelConfig, format_: Format) -> tuple[Params, Params]:
    """A model's parameters in a format, and the same values as arrays."""
    specs = weight_specs(config)
    kinds = frozen_dtypes(specs, "float32", format_, whole=True)

    @jax.jit
    def make(key: jax.Array) -> tuple[Params, Params]:
        params = init_params(specs, key)
        found = map_specs(lambda _, spec, weight, kind: stored(weight, spec.dims, kind), specs, params, kinds)
        return found, map_specs(lambda _, spec, weight: for_use(weight, spec.dims, jnp.float32), specs, found)

    return make(jax.random.key(0))


@mostly_thorough(
    ("dims", "shape", "summed"), [("NHD", (3, 5, 7), (0, 1)), ("DKH", (7, 3, 4), (0,)), ("VD", (9, 7), (1,))]
)
def test_int8_shares_a_scale_over_what_a_product_sums_over(
    dims: str, shape: tuple[int, ...], summed: tuple[int, ...]
) -> None:
    weight = np.asarray(jax.random.normal(jax.random.key(0), (2, *shape))).astype(np.float32)
    for lead, array, axes in (("", weight[0], summed), ("P", weight, tuple(axis + 1 for axis in summed))):
        found = quantise(jnp.asarray(array), lead + dims, INT8)
        largest = np.abs(array).max(axes, keepdims=True)
        np.testing.assert_allclose(found.scales, largest / 127, rtol=1e-6)
        np.testing.assert_array_equal(np.abs(found.codes).max(axes), 127)
        values = np.asarray(dequantise(found, jnp.float32))
        assert (np.abs(values - array) <= 0.5001 * largest / 127).all()
        np.testing.assert_allclose(values, quantise_again(values, lead + dims), rtol=1e-6)


def quantise_again(values: np.ndarray, dims: str) -> jax.Array:
    return dequantise(quantise(jnp.asarray(values), dims, INT8), jnp.float32)


@mostly_thorough("format_", FORMATS, ids=WEIGHT_FORMATS)
def test_a_model_computes_with_the_values_of_its_format(
    toy_config: ModelConfig, format_: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the rows of the embedding are dequantised in blocks that overlap at the end."""
    monkeypatch.setattr(linear_module, "_ROWS", 40)  # of 97
    params, dense = in_format(toy_config, format_)
    found, expected = (Gemma2(toy_config, each) for each in (params, dense))
    np.testing.assert_allclose(found(TOKENS), expected(TOKENS), atol=1e-5)
    hidden = jnp.ones((1, 2, toy_config.d_model))
    np.testing.assert_array_equal(found.head(hidden).embedding, expected.head(hidden).embedding)
    table = params["embedder"]["embedding"]
    np.testing.assert_array_equal(lookup(TOKENS, table, jnp.float32), dequantise(table, jnp.float32)[TOKENS])


@pytest.mark.thorough
@mostly_thorough("format_", FORMATS, ids=WEIGHT_FORMATS)
def test_generation_computes_with_the_values_of_its_format(toy_config: ModelConfig, format_: Format) -> None:
    logits = []
    for params in in_format(toy_config, format_):
        decoder = jax.jit(Decoder, static_argnums=1)(Gemma2(toy_config, params), ComputeConfig())
        first, cache = decoder.prefill(TOKENS, jnp.array([12, 9]), 16)
        logits.append((first, decoder.decode(TOKENS[:, 0], jnp.array([12, 9]), cache)[0]))
    chex.assert_trees_all_close(*logits, rtol=1e-4, atol=1e-4)


@mostly_thorough(
    ("format_", "compute"),
    [
        (INT4, ComputeConfig(dtype="bfloat16")),
        (INT8, ComputeConfig(dtype="bfloat16")),
        (INT4, ComputeConfig()),
        (INT8, ComputeConfig()),
    ],
)
def test_a_decoding_program_never_dequantises_all_layers_or_the_whole_embedding(
    format_: Format, compute: ComputeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a loop over tokens, no array has half the size of a matrix of all layers, or a quarter of the embedding's."""
    monkeypatch.setattr(linear_module, "_ROWS", 128)
    config = replace(SMALL, vocab_size=2048)
    specs = weight_specs(config)
    kinds = frozen_dtypes(specs, compute.dtype, format_, whole=True)

    def generate(decoder: Decoder) -> jax.Array:
        _, cache = decoder.prefill(TOKENS, jnp.array([12, 9]), 20)

        def body(carry: Any, _: None) -> Any:
            tokens, position, cache = carry
            logits, cache = decoder.decode(tokens, position, cache)
            return (jnp.argmax(logits, axis=-1), position + 1, cache), None

        (tokens, *_), _ = jax.lax.scan(body, (TOKENS[:, 0], jnp.array([12, 9]), cache), None, length=8)
        return tokens

    model = Gemma2(config, abstract_params(specs, kinds))
    decoder = jax.eval_shape(lambda model: Decoder(model, compute), model)
    program = str(jax.jit(generate).lower(decoder).compile().as_text())
    assert largest_array(program) < min(ALL_LAYERS // 2, config.vocab_size * config.d_model // 4)
    in_a_byte, dtype = (2, "u8") if format_ == INT4 else (1, "s8")
    assert (
        largest_array(program, dtype) == config.vocab_size * config.d_model // in_a_byte
    )  # no copy is longer


def test_rows_of_odd_length_fall_back_to_int8(toy_config: ModelConfig) -> None:
    specs = weight_specs(replace(toy_config, d_ff=65))
    assert fallbacks(specs, INT4) == ["mlp/down"]
    assert fallbacks(specs, INT8) == []
    kinds = frozen_dtypes(specs, "float32", INT4, whole=True)
    assert kinds["pairs"]["local_block"]["mlp"] == {"gate": INT4, "up": INT4, "down": INT8}


@mostly_thorough("format_", FORMATS, ids=WEIGHT_FORMATS)
def test_rows_of_padding_can_be_added_and_cut(toy_config: ModelConfig, format_: Format) -> None:
    table = quantise(jax.random.normal(jax.random.key(0), (97, 32)), "VD", format_)
    longer, config = resize_rows({"embedder": {"embedding": table}}, toy_config, 104)
    values = dequantise(longer["embedder"]["embedding"], jnp.float32)
    np.testing.assert_array_equal(values[:97], dequantise(table, jnp.float32))
    assert not values[97:].any()
    shorter, _ = resize_rows(longer, config, 97)
    chex.assert_trees_all_equal(shorter["embedder"]["embedding"], table)


@pytest.mark.thorough
@pytest.mark.parametrize("format_", FORMATS, ids=WEIGHT_FORMATS)
def test_all_matrices_are_sharded_like_the_arrays_in_their_place(format_: Format) -> None:
    mesh, specs = build_mesh(MeshConfig(1, 4, 2)), weight_specs(SMALL)
    kinds = frozen_dtypes(specs, "float32", format_, whole=True)
    params, arrays = abstract_params(specs, kinds, mesh), abstract_params(specs, mesh=mesh)

    def check(path: str, spec: Any, leaf: Any, array: Any) -> None:
        assert is_quantised(leaf) == bool(spec.fan_in)
        if is_quantised(leaf):
            assert leaf.codes.sharding.spec == array.sharding.spec, path

    map_specs(check, specs, params, arrays)
    (found, expected) = in_format(SMALL, format_)
    with jax.set_mesh(mesh):
        placed = jax.device_put(found, jax.tree.map(lambda leaf: leaf.sharding, params))
        logits = jax.jit(lambda params: Gemma2(SMALL, params)(TOKENS))(placed)
    np.testing.assert_allclose(logits, Gemma2(SMALL, expected)(TOKENS), atol=2e-5)


@pytest.mark.thorough
def test_bytes() -> None:
    matrices = 2 * SMALL.num_pairs * SMALL.d_model * (3 * SMALL.d_ff + 4 * 64) + 96 * SMALL.d_model
    norms = 4 * SMALL.d_model * (4 * SMALL.num_layers + 1)
    sizes = {format_: weight_bytes(in_format(SMALL, format_)[0]) for format_ in FORMATS}
    assert sizes[INT4] == 4.5 * matrices / 8 + norms
    assert matrices + norms < sizes[INT8] < 1.1 * matrices + norms
    numbers = 2 * SMALL.num_kv_heads * SMALL.head_dim * SMALL.num_pairs * (100 + 8)  # the window is 8
    assert bytes_per_token(SMALL, 1000, 100, 2) == 1000 + 2 * numbers
