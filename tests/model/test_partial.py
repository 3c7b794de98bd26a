"""Training of a part of a model: which weights it is, and that the others get no gradient."""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError, build
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.capture import Capture, forward
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.counts import count_weights
from gemma2_jax.model.partial import Partial
from gemma2_jax.model.stack import as_one
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import Params, map_specs, specs_by_path, weight_specs
from tests.parameters import mostly_thorough

TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, 97)
KEY = jax.random.key(0)
CHOICES = [(["mlp/*", "final_norm/scale"], None), (["*"], [2, 3]), (["attention/*", "mlp/up"], [0, 3])]


@pytest.mark.parametrize(
    ("weights", "layers", "expected"),
    [
        (["mlp/gate"], None, {"local_block/mlp/gate": 2, "global_block/mlp/gate": 2}),
        (["mlp/gate"], [1], {"global_block/mlp/gate": 1}),
        (["*_mlp_norm/*"], [0], {f"local_block/{side}_mlp_norm/scale": 1 for side in ("pre", "post")}),
        (["embedder/*", "final_norm/scale"], None, {"embedder/embedding": 97, "final_norm/scale": 32}),
    ],
)
def test_patterns_and_layers_choose_weights(
    toy_config: ModelConfig, weights: Sequence[str], layers: Sequence[int] | None, expected: dict[str, int]
) -> None:
    model = weight_specs(toy_config)
    trained, frozen = Partial(toy_config, weights, layers).specs(model)
    found = {path.removeprefix("pairs/"): spec.shape[0] for path, spec in specs_by_path(trained).items()}
    assert found == expected
    assert count_weights(trained) + count_weights(frozen) == count_weights(model)


@pytest.mark.parametrize(("weights", "layers"), CHOICES)
def test_the_divided_model_is_the_model(
    toy_config: ModelConfig, toy_model: Gemma2, weights: Sequence[str], layers: Sequence[int] | None
) -> None:
    partial = Partial(toy_config, weights, layers)
    params = partial.join(*partial.split(toy_model.params(), KEY))
    whole = map_specs(lambda _, spec, leaf: as_one(leaf), weight_specs(toy_config), params)
    chex.assert_trees_all_equal(whole, toy_model.params())

    def outputs(params: Params) -> Any:
        model = Gemma2(toy_config, params)
        return forward(model, TOKENS, None, None, ComputeConfig(), Capture((0, 3), True, False))

    chex.assert_trees_all_close(jax.jit(outputs)(params), jax.jit(outputs)(toy_model.params()), atol=1e-6)


def loss(config: ModelConfig, params: Params, compute: ComputeConfig = ComputeConfig()) -> jax.Array:
    hidden = Gemma2(config, params).hidden(TOKENS, compute=compute)
    return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))


@mostly_thorough(("weights", "layers"), CHOICES)
def test_gradients_are_those_of_training_all_weights(
    toy_config: ModelConfig, toy_model: Gemma2, weights: Sequence[str], layers: Sequence[int] | None
) -> None:
    partial = Partial(toy_config, weights, layers)
    trained, frozen = partial.split(toy_model.params(), KEY)
    found = jax.jit(jax.grad(lambda part: loss(toy_config, partial.join(part, frozen))))(trained)
    whole = jax.jit(jax.grad(lambda params: loss(toy_config, params)))(toy_model.params())
    expected = partial.split(whole, KEY)[0]
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(leaf.any() for leaf in jax.tree.leaves(found))


@pytest.mark.thorough
def test_frozen_weights_have_no_gradient_and_lower_layers_no_backward_pass(
    toy_config: ModelConfig, toy_model: Gemma2
) -> None:
    """Counts the optimised program's products whose result has the size of gate and up."""
    D, F = toy_config.d_model, toy_config.d_ff

    def program(weights: Sequence[str], layers: Sequence[int] | None) -> list[str]:
        partial = Partial(toy_config, weights, layers)
        trained, frozen = partial.split(toy_model.params(), KEY)
        gradient = jax.jit(jax.grad(lambda part, frozen: loss(toy_config, partial.join(part, frozen))))
        return str(gradient.lower(trained, frozen).compile().as_text()).splitlines()

    def products(lines: Sequence[str]) -> int:
        return sum(f"[{D},{F}]{{" in line.split(" dot(")[0] and " dot(" in line for line in lines)

    def loops(lines: Sequence[str]) -> int:
        return sum(" while(" in line for line in lines)

    assert products(program(["mlp/*"], None)) == 4  # gate and up of a local and of a global layer
    assert products(program(["mlp/gate", "attention/*"], [3])) == 1
    assert not products(program(["attention/*"], None))
    # Each loop over layers with trained weights has a backward pass: there are two pairs, in one loop or in two.
    assert loops(program(["*"], [1, 3])) - loops(program(["final_norm/scale"], None)) == 1


@pytest.mark.thorough
def test_rematerialisation_and_bfloat16_keep_the_gradients(
    toy_config: ModelConfig, toy_model: Gemma2
) -> None:
    partial = Partial(toy_config, ["*"], [2, 3])
    trained, frozen = partial.split(toy_model.params(), KEY)

    def gradient(compute: ComputeConfig, frozen: Params) -> Any:
        return jax.jit(jax.grad(lambda part: loss(toy_config, partial.join(part, frozen), compute)))(trained)

    expected = gradient(ComputeConfig(), frozen)
    chex.assert_trees_all_close(gradient(ComputeConfig(remat="full"), frozen), expected, rtol=1e-4, atol=1e-4)
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), frozen)
    found = gradient(ComputeConfig(dtype="bfloat16", remat="dots"), cast)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == jnp.float32
        assert np.linalg.norm(one - other) < 0.1 * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("weights", "layers", "message"),
    [
        (
            ["mlp/gat"],
            None,
            r"has mlp/gat, which matches no weight, did you mean mlp/gate \(accepted: attention/key",
        ),
        (["mlp/*", "*lora*"], None, r"has \*lora\*, which matches no weight, accepted: attention/key"),
        (
            ["final_norm/scale"],
            [0],
            r"has final_norm/scale, which matches no weight of a layer, did you mean",
        ),
        (["*"], None, r"every weight is trained; write adaptation=full, or choose fewer, as in adaptation.w"),
        (["*"], [9], r"adaptation.layers has 9, but the model has 4 layers, counted from 0"),
    ],
)
def test_choices_that_the_model_lacks_are_refused(
    toy_config: ModelConfig, weights: Sequence[str], layers: Sequence[int] | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Partial(toy_config, weights, layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "partial"}, r"adaptation.weights is \[\]; it must be a list of patterns of weights' names"),
        (
            {"kind": "partial", "weights": ["*"], "rank": 4},
            r"adaptation.rank has no effect if adaptation.kind is partial; write adaptation=lora or adaptation=qlora\.",
        ),
        (
            {"kind": "lora", "rank": 4, "alpha": 8, "targets": ["q"], "weights": ["*"]},
            r"adaptation.weights has no effect if adaptation.kind is lora; write adaptation=partial\.",
        ),
        (
            {"kind": "full", "layers": [0]},
            r"adaptation.layers has no effect if adaptation.kind is full; write adaptation=partial or adaptation=lora",
        ),
        ({"kind": "partial", "weights": ["*"], "layers": [1, 0]}, r"adaptation.layers is \[1, 0\]; it must"),
    ],
)
def test_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(AdaptationConfig, settings, "here")
