"""The one product, and weights that are more than one array: a branch in linear.py is all that they need."""

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.model import linear as linear_file
from gemma2_jax.model.capture import CapturedLayer
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.linear import linear
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, map_specs, weight_specs
from gemma2_jax.objectives.distances import hidden_distance, relative_squared_error
from tests.parameters import mostly_thorough

TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, 97)


@pytest.mark.parametrize(
    ("spec", "shape"), [("BTD,DF->BTF", (6, 4)), ("BTD,DNH->BTNH", (6, 2, 3)), ("BTNH,NHD->BTD", (2, 3, 6))]
)
def test_equals_an_einsum_and_its_gradients(spec: str, shape: tuple[int, ...]) -> None:
    dims = spec.split("->")[0].split(",")[1]
    x = jax.random.normal(jax.random.key(0), (2, 5, *((2, 3) if dims == "NHD" else (6,))))
    weight = jax.random.normal(jax.random.key(1), shape)

    def total(product: Any, x: jax.Array, weight: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(product(x, weight)))

    found = jax.value_and_grad(partial(total, lambda x, w: linear(spec, x, w, dims)), (0, 1))(x, weight)
    expected = jax.value_and_grad(partial(total, partial(jnp.einsum, spec)), (0, 1))(x, weight)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert linear(spec, x.astype(jnp.bfloat16), weight, dims).dtype == jnp.bfloat16


@partial(jax.tree_util.register_dataclass, data_fields=["base", "change"], meta_fields=["share"])
@dataclass(frozen=True)
class Sum:
    """A weight that is base + share * change."""

    base: Any
    change: Any
    share: float


@pytest.fixture
def sums_are_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_cast, plain_for_use = linear_file.cast, linear_file.for_use

    def cast(weight: Any, dtype: Any) -> Any:
        if isinstance(weight, Sum):
            return Sum(weight.base.astype(dtype), weight.change.astype(dtype), weight.share)
        return plain_cast(weight, dtype)

    def for_use(weight: Any, dims: str, dtype: Any) -> jax.Array:
        assert isinstance(weight, Sum)
        return (weight.base + weight.share * weight.change).astype(dtype)

    monkeypatch.setattr(linear_file, "cast", cast)
    monkeypatch.setattr("gemma2_jax.model.decoder.cast", cast)
    monkeypatch.setattr(
        linear_file,
        "for_use",
        lambda weight, *how: (
            for_use(weight, *how) if isinstance(weight, Sum) else plain_for_use(weight, *how)
        ),
    )


@pytest.fixture
def params(toy_model: Gemma2) -> Params:
    return toy_model.params()


def as_sums(config: ModelConfig, params: Params, share: float) -> Params:
    """The matrices of all blocks as sums, whose change is the weight itself; with share 0 the same model."""

    def split(path: str, spec: Any, value: jax.Array) -> Any:
        return Sum(value, value, share) if path.startswith("pairs/") and spec.fan_in else value

    found: Params = map_specs(split, weight_specs(config), params)
    return found


@pytest.mark.usefixtures("sums_are_weights")
@pytest.mark.parametrize(
    ("remat", "unroll_layers"),
    [("none", False), ("full", False), pytest.param("dots", True, marks=pytest.mark.thorough)],
)
@pytest.mark.thorough
def test_weights_of_two_arrays_pass_through_a_model(
    toy_config: ModelConfig, params: Params, remat: Any, unroll_layers: bool
) -> None:
    compute = ComputeConfig(remat=remat, unroll_layers=unroll_layers)
    half = as_sums(toy_config, params, 0.5)
    scaled = map_specs(
        lambda path, spec, x: 1.5 * x if path.startswith("pairs/") and spec.fan_in else x,
        weight_specs(toy_config),
        params,
    )

    @jax.jit
    def both(params: Params) -> Any:
        def loss(params: Params) -> jax.Array:
            return jnp.mean(jnp.square(Gemma2(toy_config, params)(TOKENS, compute=compute)))

        return jax.value_and_grad(loss)(params)

    value, gradient = both(half)
    expected, dense = both(scaled)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    gate, wanted = (tree["pairs"]["local_block"]["mlp"]["gate"] for tree in (gradient, dense))
    assert isinstance(gate, Sum)
    np.testing.assert_allclose(gate.base, wanted, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(gate.change, 0.5 * wanted, rtol=1e-3, atol=1e-6)
    kept = Gemma2(toy_config, half).params()["pairs"]["global_block"]["attention"]["output"]
    assert isinstance(kept, Sum)


@pytest.mark.usefixtures("sums_are_weights")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_projection_can_be_a_weight_of_two_arrays(dtype: str) -> None:
    """The product is in float32, whatever the dtype of the states."""
    keys = jax.random.split(jax.random.key(0), 3)
    states, target = jax.random.normal(keys[0], (2, 6, 8), dtype), jax.random.normal(keys[1], (2, 6, 12))
    weight = jax.random.normal(keys[2], (8, 12))
    student, teacher = CapturedLayer(None, 50.0, hidden=states), CapturedLayer(None, 50.0, hidden=target)
    found = hidden_distance(student, teacher, cast(Any, Sum(weight, weight, 0.5)), "mse")
    product = states.astype(jnp.float32) @ (1.5 * weight).astype(dtype).astype(jnp.float32)
    expected = relative_squared_error(product, target)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.usefixtures("sums_are_weights")
@mostly_thorough("unroll_layers", [False, True])
def test_weights_of_two_arrays_pass_through_the_decoder(
    toy_config: ModelConfig, params: Params, unroll_layers: bool
) -> None:
    compute = ComputeConfig(unroll_layers=unroll_layers)
    model = Gemma2(toy_config, as_sums(toy_config, params, 0.0))

    @jax.jit
    def read(model: Gemma2) -> Any:
        decoder = Decoder(model, compute)
        prompt, cache = decoder.prefill(TOKENS[:, :11], jnp.array([11, 11]), 12)
        return prompt, decoder.decode(TOKENS[:, 11], jnp.array([11, 11]), cache)[0]

    logits = Gemma2(toy_config, params)(TOKENS)
    for found, place in zip(read(model), (10, 11), strict=True):
        np.testing.assert_allclose(found, logits[:, place], atol=1e-4)
