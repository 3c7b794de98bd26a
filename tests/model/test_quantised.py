"""Weights in four bits: the definitions of bitsandbytes and llama.cpp, and products that dequantise layer by layer."""

import math
import re
from dataclasses import replace
from functools import partial
from statistics import NormalDist
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError, build
from gemma2_jax.model.adaptation import AdaptationConfig, build_adaptation
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.linear import for_use, linear, linear_in_float32
from gemma2_jax.model.lora import TARGETS
from gemma2_jax.model.quantised import (
    FORMATS,
    INT4,
    NF4,
    NF4_LEVELS,
    Format,
    QuantisedWeight,
    dequantise,
    is_quantised,
    quantise,
    stored,
)
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import (
    Params,
    abstract_params,
    frozen_dtypes,
    init_params,
    map_specs,
    weight_specs,
)
from gemma2_jax.planning.memory import frozen_bytes
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.parameters import mostly_thorough

TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, 96)
# Letters of the layers' matrices, the axis of their blocks, and shapes with blocks of 64 and, last, of 48 and 8.
MATRICES = [
    ("DNH", 0, (128, 2, 32)),
    ("NHD", 1, (2, 64, 512)),
    ("DF", 0, (64, 256)),
    ("FD", 0, (192, 384)),
    ("DKH", 0, (96, 2, 8)),
    ("NHD", 1, (4, 8, 96)),
]
SMALL = ModelConfig(
    vocab_size=96,
    num_layers=16,
    d_model=64,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    d_ff=128,
    sliding_window=8,
    query_pre_attn_scalar=32,
)
ALL_LAYERS = SMALL.num_pairs * SMALL.d_model * SMALL.d_ff  # the size of a matrix of the MLP
QLORA = AdaptationConfig("qlora", rank=4, alpha=8.0, targets=tuple(TARGETS), base="nf4")


def gaussian(shape: tuple[int, ...], key: int = 0) -> jax.Array:
    return 0.02 * jax.random.normal(jax.random.key(key), shape)


def dynamic_map() -> np.ndarray:
    """The signed map with 7 exponent bits of 8, as bitsandbytes makes it (`create_dynamic_map`)."""
    levels = [0.0, 1.0]
    for exponent in range(7):
        bounds = np.linspace(0.1, 1, 2**exponent + 1)
        means = 10.0 ** (exponent - 6) * (bounds[1:] + bounds[:-1]) / 2
        levels += [*means, *-means]
    return np.sort(np.array(levels)).astype(np.float32)


def nearest(x: np.ndarray, levels: np.ndarray) -> np.ndarray:
    return np.argmin(np.abs(x[..., None] - levels), axis=-1)


def reference(
    weight: np.ndarray, axis: int, block: int, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Codes of the numbers and of the constants, and values, of a weight in nf4, by definition (QLoRA, section 3).

    Blocks run along `axis`, groups of constants along the last axis. The offset is the mean of the constants, which is
    also returned, up to rounding.
    """
    last = np.moveaxis(weight, axis, -1)
    blocks = last.reshape(*last.shape[:-1], -1, block)
    constants = np.abs(blocks).max(-1, keepdims=True)
    codes = nearest(blocks / constants, np.array(NF4_LEVELS, np.float32))
    in_place = np.moveaxis(constants[..., 0], -1, axis)
    group = max(size for size in range(1, 257) if in_place.shape[-1] % size == 0)
    groups = (in_place - offset).reshape(*in_place.shape[:-1], -1, group)
    scales = np.abs(groups).max(-1, keepdims=True)
    constant_codes = nearest(groups / scales, dynamic_map())
    approximate = (dynamic_map()[constant_codes] * scales).reshape(in_place.shape) + offset
    values = np.array(NF4_LEVELS, np.float32)[codes] * np.moveaxis(approximate, axis, -1)[..., None]
    back = partial(np.moveaxis, source=-1, destination=axis)
    return (
        back(codes.reshape(last.shape)),
        constant_codes.reshape(in_place.shape),
        back(values.reshape(last.shape)),
        in_place.mean(dtype=np.float64),
    )


def unpacked(weight: QuantisedWeight) -> np.ndarray:
    """The code of each number."""
    axis = weight.codes.ndim + weight.axis
    parts = np.split(np.asarray(weight.codes), weight.scales.shape[axis], axis)
    return np.concatenate([half for part in parts for half in (part & 15, part >> 4)], axis)


def error(weight: jax.Array, format_: Format, dims: str) -> float:
    found = dequantise(quantise(weight, dims, format_), jnp.float32)
    return float(jnp.linalg.norm(found - weight) / jnp.linalg.norm(weight))


def test_levels_of_nf4_are_quantiles_of_a_normal_distribution() -> None:
    """bitsandbytes' `create_normal_map`: 8 quantiles above 0, 7 below, and 0."""
    offset = (1 - 1 / 30 + 1 - 1 / 32) / 2
    above, below = (
        [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, count)[:-1]] for count in (9, 8)
    )
    expected = np.sort([*above, 0.0, *(-level for level in below)]) / max(above)
    np.testing.assert_allclose(NF4_LEVELS, expected, atol=2e-7)


@mostly_thorough(("dims", "axis", "shape"), MATRICES)
def test_nf4_is_that_of_bitsandbytes(dims: str, axis: int, shape: tuple[int, ...]) -> None:
    weight = gaussian(shape)
    block = max(size for size in range(2, 65, 2) if shape[axis] % size == 0)
    found = quantise(weight, dims, NF4)
    codes, constant_codes, values, offset = reference(
        np.asarray(weight), axis, block, np.asarray(found.offset)
    )
    np.testing.assert_array_equal(unpacked(found), codes)
    np.testing.assert_array_equal(found.scales, constant_codes)
    assert found.offset == pytest.approx(offset, rel=1e-6)
    np.testing.assert_allclose(dequantise(found, jnp.float32), values, rtol=1e-5)


def test_int4_is_that_of_llama_cpp() -> None:
    quants = pytest.importorskip("gguf.quants")
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_0
    weight = gaussian((192, 80))
    expected = quants.dequantize(quants.quantize(np.asarray(weight.T), kind), kind).T
    np.testing.assert_array_equal(dequantise(quantise(weight, "DF", INT4), jnp.float32), expected)


@pytest.mark.parametrize(("format_", "expected", "bits"), [(NF4, 0.092, 4.127), (INT4, 0.086, 4.5)])
def test_error_on_gaussians_and_size(format_: Format, expected: float, bits: float) -> None:
    weight = gaussian((512, 1024))
    assert error(weight, format_, "FD") == pytest.approx(expected, abs=0.001)
    parts = jax.tree.leaves(quantise(weight, "FD", format_))
    assert 8 * sum(part.nbytes for part in parts) / weight.size == pytest.approx(bits, abs=0.001)


@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
def test_special_weights(format_: Format) -> None:
    zeros = jnp.zeros((2, 64, 32))
    np.testing.assert_array_equal(dequantise(quantise(zeros, "PDF", format_), jnp.float32), zeros)
    one_value = jnp.full((64, 32), -3.0)
    np.testing.assert_allclose(
        dequantise(quantise(one_value, "DF", format_), jnp.float32), one_value, rtol=1e-6
    )
    # The largest magnitude of a block is kept.
    outlier = gaussian((64, 32)).at[5, 7].set(9.0)
    assert dequantise(quantise(outlier, "DF", format_), jnp.float32)[5, 7] == pytest.approx(9.0, rel=0.005)
    narrow = gaussian((64, 32)).astype(jnp.bfloat16)
    chex.assert_trees_all_equal(
        quantise(narrow, "DF", format_), quantise(narrow.astype(jnp.float32), "DF", format_)
    )


@mostly_thorough("format_", FORMATS.values(), ids=FORMATS)
@mostly_thorough(("dims", "axis", "shape"), MATRICES)
def test_layers_of_a_stack_are_those_of_single_layers(
    dims: str, axis: int, shape: tuple[int, ...], format_: Format
) -> None:
    stack = gaussian((3, *shape))
    whole = quantise(stack, f"P{dims}", format_)
    layers = [quantise(layer, dims, format_) for layer in stack]
    for index, layer in enumerate(layers):
        found = jax.tree.map(lambda part, index=index: part[index], whole)
        np.testing.assert_array_equal(found.codes, layer.codes)
        chex.assert_trees_all_close(found, layer, rtol=1e-6)
    expected = [dequantise(layer, jnp.float32) for layer in layers]
    np.testing.assert_allclose(dequantise(whole, jnp.float32), expected, rtol=1e-4)


def quantised(config: ModelConfig, format_: Format, seed: int = 0) -> tuple[Params, Params]:
    """A model's parameters with quantised matrices, and the same with their values as arrays."""
    specs = weight_specs(config)
    kinds = frozen_dtypes(specs, "float32", format_)

    @jax.jit
    def make(key: jax.Array) -> tuple[Params, Params]:
        params = init_params(specs, key)
        found = map_specs(lambda _, spec, weight, kind: stored(weight, spec.dims, kind), specs, params, kinds)
        return found, map_specs(lambda _, spec, weight: for_use(weight, spec.dims, jnp.float32), specs, found)

    return make(jax.random.key(seed))


@pytest.mark.parametrize("format_", FORMATS.values(), ids=FORMATS)
def test_products_are_those_of_the_dequantised_weight(format_: Format) -> None:
    weight = quantise(gaussian((4, 32, 64)), "NHD", format_)
    dense = dequantise(weight, jnp.float32)
    x = jax.random.normal(jax.random.key(1), (2, 5, 4, 32))

    def loss(x: jax.Array, weight: Any) -> jax.Array:
        return jnp.sum(jnp.sin(linear("BTNH,NHD->BTD", x, weight, "NHD")))

    np.testing.assert_allclose(jax.grad(loss)(x, weight), jax.grad(loss)(x, dense), rtol=1e-5)
    arguments = "BTNH,NHD->BTD", x
    np.testing.assert_array_equal(linear(*arguments, weight, "NHD"), linear(*arguments, dense, "NHD"))
    np.testing.assert_array_equal(
        linear_in_float32(*arguments, weight, "NHD"), linear_in_float32(*arguments, dense, "NHD")
    )


@pytest.mark.thorough
@pytest.mark.parametrize("format_", [NF4, INT4])
def test_an_adapter_on_a_quantised_base_has_the_gradients_of_one_on_its_values(
    toy_config: ModelConfig, format_: Format
) -> None:
    params, dense = quantised(toy_config, format_)
    settings: dict[str, Any] = {"base": format_.name}
    lora = build_adaptation(replace(QLORA, **settings), toy_config)
    adapter = map_specs(
        lambda path, spec: 0.1 * jax.random.normal(jax.random.key(len(path)), spec.shape),
        lora.specs(weight_specs(toy_config))[0],
    )

    def loss(adapter: Params, base: Params) -> jax.Array:
        hidden = Gemma2(toy_config, lora.join(adapter, base)).hidden(
            TOKENS, compute=ComputeConfig(remat="full")
        )
        return jnp.sum(jnp.sin(hidden))

    found, expected = (jax.jit(jax.value_and_grad(loss))(adapter, base) for base in (params, dense))
    chex.assert_trees_all_close(found, expected, rtol=2e-4, atol=1e-4)
    joined = (
        lora.join(adapter, base)["pairs"]["local_block"]["attention"]["query"] for base in (params, dense)
    )
    one, other = (for_use(weight, "PDNH", jnp.float32) for weight in joined)
    np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.thorough
@pytest.mark.parametrize("unroll", [True, False])
def test_generation_takes_quantised_weights(toy_config: ModelConfig, unroll: bool) -> None:
    compute = ComputeConfig(unroll_layers=unroll)
    lengths = jnp.array([12, 9])
    logits = []
    for params in quantised(toy_config, NF4):
        decoder = jax.jit(Decoder, static_argnums=1)(Gemma2(toy_config, params), compute)
        first, cache = decoder.prefill(TOKENS, lengths, 16)
        second, _ = jax.jit(lambda decoder, *arguments: decoder.decode(*arguments))(
            decoder, TOKENS[:, 0], lengths, cache
        )
        logits.append((first, second))
    chex.assert_trees_all_close(*logits, rtol=1e-4, atol=1e-4)


def largest_array(program: str, dtypes: str = "f32|bf16|f16") -> int:
    """The number of elements of the largest array of these dtypes in a compiled program."""
    shapes = re.findall(rf"\b(?:{dtypes})\[([\d,]+)\]", program)
    return max(math.prod(map(int, shape.split(","))) for shape in shapes)


def compiled_gradient(config: ModelConfig, compute: ComputeConfig) -> Any:
    """The compiled gradient of an adapter on a quantised base, from abstract arrays."""
    lora = build_adaptation(QLORA, config)
    trained, frozen = lora.specs(weight_specs(config))
    base = abstract_params(frozen, frozen_dtypes(frozen, compute.dtype, NF4))

    def loss(adapter: Params, base: Params) -> jax.Array:
        hidden = Gemma2(config, lora.join(adapter, base)).hidden(TOKENS, compute=compute)
        return jnp.sum(hidden.astype(jnp.float32))

    return jax.jit(jax.grad(loss)).lower(abstract_params(trained), base).compile()


@pytest.mark.parametrize(
    ("dtype", "remat"),
    [
        ("bfloat16", "full"),
        *(
            pytest.param(dtype, remat, marks=pytest.mark.thorough)
            for dtype, remat in (
                ("float32", "none"),
                ("float32", "full"),
                ("bfloat16", "dots"),
                ("bfloat16", "none"),
            )
        ),
    ],
)
@pytest.mark.thorough
def test_a_program_never_dequantises_all_layers(dtype: Any, remat: Any) -> None:
    """In the forward and the backward pass, no array has half the size of a matrix of all layers."""
    program = str(compiled_gradient(SMALL, ComputeConfig(dtype=dtype, remat=remat)).as_text())
    assert largest_array(program, "u8") == ALL_LAYERS // 2  # the codes, of which no copy is longer
    assert largest_array(program) < ALL_LAYERS // 2


@pytest.mark.thorough
def test_more_layers_need_no_more_room_for_weights() -> None:
    compute = ComputeConfig(dtype="bfloat16", remat="full")
    one, double = (
        compiled_gradient(replace(SMALL, num_layers=layers), compute).memory_analysis().temp_size_in_bytes
        for layers in (SMALL.num_layers, 2 * SMALL.num_layers)
    )
    assert (
        double - one < 2 * ALL_LAYERS // 4
    )  # the input of each pair is saved; a weight in bfloat16 takes 2 bytes


def test_the_check_of_programs_finds_weights_that_are_dequantised_before_the_loop() -> None:
    specs = weight_specs(SMALL)

    def hidden(params: Params) -> jax.Array:
        dense = map_specs(lambda _, spec, weight: for_use(weight, spec.dims, jnp.bfloat16), specs, params)
        return Gemma2(SMALL, dense).hidden(TOKENS)

    params = abstract_params(specs, frozen_dtypes(specs, "float32", NF4))
    program = str(jax.jit(hidden).lower(params).compile().as_text())
    assert largest_array(program) >= ALL_LAYERS


@pytest.mark.thorough
@pytest.mark.parametrize("format_", [NF4, INT4])
def test_weights_are_sharded_like_the_arrays_in_their_place(format_: Format) -> None:
    mesh = build_mesh(MeshConfig(1, 4, 2))
    specs = weight_specs(SMALL)
    target = abstract_params(specs, frozen_dtypes(specs, "float32", format_), mesh)
    dense = abstract_params(specs, mesh=mesh)

    def check(path: str, _: Any, leaf: Any, array: Any) -> None:
        assert is_quantised(leaf) == (path.startswith("pairs") and not path.endswith("scale"))
        if is_quantised(leaf):
            assert leaf.codes.sharding.spec == array.sharding.spec
            parts = math.prod(array.shape) // math.prod(array.sharding.shard_shape(array.shape))
            assert math.prod(leaf.codes.sharding.shard_shape(leaf.codes.shape)) * 2 * parts == math.prod(
                array.shape
            )

    map_specs(check, specs, target, dense)
    params, _ = quantised(SMALL, format_)
    expected = Gemma2(SMALL, params)(TOKENS)
    placed = jax.tree.map(lambda leaf, array: jax.device_put(array, leaf.sharding), target, params)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params: Gemma2(SMALL, params)(TOKENS))(placed)
    np.testing.assert_allclose(found, expected, atol=2e-4)


def test_a_mesh_that_splits_blocks_is_refused() -> None:
    config = replace(SMALL, d_ff=96)  # two blocks of 48
    specs = weight_specs(config)
    with pytest.raises(UserError, match=r"mesh.tensor is 4, .* F \(2\) .*down, in nf4, by blocks"):
        abstract_params(
            specs["pairs"]["local_block"]["mlp"],
            frozen_dtypes(specs["pairs"]["local_block"]["mlp"], "float32", NF4),
            build_mesh(MeshConfig(1, 1, 4), jax.devices()[:4]),
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": None}, r"adaptation.base is null with adaptation.kind qlora; it must be nf4 or int4"),
        ({"base": "fp4"}, r"adaptation.base|base"),
        (
            {"kind": "lora"},
            r"adaptation.base has no effect if adaptation.kind is lora; write adaptation=qlora",
        ),
        ({"rank": 0}, r"adaptation.rank is 0; it must be above 0 and finite with adaptation.kind qlora"),
    ],
)
def test_settings_are_refused(change: dict[str, Any], message: str) -> None:
    settings = {"kind": "qlora", "rank": 4, "alpha": 8, "targets": ["q", "v"], "base": "nf4"}
    assert build(AdaptationConfig, settings, "here").format == NF4
    with pytest.raises(UserError, match=message):
        build(AdaptationConfig, settings | change, "here")


def test_odd_sizes_are_refused(toy_config: ModelConfig) -> None:
    with pytest.raises(UserError, match=r"so model.d_ff must be even; it is 65. Write adaptation=lora"):
        build_adaptation(QLORA, replace(toy_config, d_ff=65))


def test_bytes_of_a_frozen_model(toy_run: RunConfig) -> None:
    run = replace(toy_run, model=SMALL)
    matrices = SMALL.num_layers * SMALL.d_model * (3 * SMALL.d_ff + 4 * 64)
    others = 4 * (SMALL.d_model * (4 * SMALL.num_layers + 1) + SMALL.vocab_size * SMALL.d_model)
    assert frozen_bytes(run) == 0
    assert 4.1 * matrices / 8 < frozen_bytes(_with(run, "nf4")) - others < 4.3 * matrices / 8
    assert frozen_bytes(_with(run, "int4")) - others == 4.5 * matrices / 8


def _with(run: RunConfig, base: Any) -> RunConfig:
    initialise = replace(run.initialise, source="base")
    return replace(run, adaptation=replace(QLORA, base=base), initialise=initialise)
