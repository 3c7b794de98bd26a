"""Captured activations equal those of a plain loop over blocks, and cover only the requested layers."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.model.capture import Capture, forward
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from tests.model.apart import layers_apart
from tests.parameters import mostly_thorough
from tests.programs import arrays

B, T = 2, 20
TOKENS = jax.random.randint(jax.random.key(5), (B, T), 0, 97)
POSITIONS = jnp.broadcast_to(jnp.concatenate([jnp.arange(12), jnp.arange(8)]), (B, T))
SEGMENTS = jnp.broadcast_to(jnp.array([1] * 12 + [2] * 8), (B, T))


@pytest.fixture(scope="module")
def deep(toy_config: ModelConfig) -> Gemma2:
    """Of 8 layers, so that a stack over all of them, or over pairs, has another shape than one over some."""
    return Gemma2.init(replace(toy_config, num_layers=8), jax.random.key(1))


@pytest.fixture(scope="module")
def apart(deep: Gemma2) -> Any:
    return jax.jit(layers_apart)(deep, TOKENS, POSITIONS, SEGMENTS)


def read(model: Gemma2, capture: Capture, compute: ComputeConfig = ComputeConfig()) -> Any:
    return forward(model, TOKENS, POSITIONS, SEGMENTS, compute, capture)


@mostly_thorough(
    "layers",
    [(1, 2, 3), (0,), (7,), (0, 4), tuple(range(8))],
    ids=lambda layers: str(layers),
)
def test_equals_a_loop_over_blocks(deep: Gemma2, apart: Any, layers: tuple[int, ...]) -> None:
    final, found = jax.jit(read, static_argnums=1)(deep, Capture(layers, hidden=True, attention=True))
    assert tuple(found) == layers
    for layer in layers:
        assert found[layer].window == (None if layer % 2 else 8)
        assert found[layer].softcap == 50.0
        for name in ("hidden", "query", "key"):
            np.testing.assert_allclose(getattr(found[layer], name), apart[layer][name], atol=2e-5)
    np.testing.assert_allclose(final, deep.hidden(TOKENS, POSITIONS, SEGMENTS), atol=2e-5)
    np.testing.assert_allclose(final, deep.final_norm(apart[7]["hidden"]), atol=2e-5)


def of_some(model: Gemma2, compute: ComputeConfig) -> jax.Array:
    """A number that hangs on all that is captured of two layers."""
    final, found = read(model, Capture((3, 6), hidden=True, attention=True), compute)
    return sum((jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(found)), jnp.sum(final))


@pytest.fixture(scope="module")
def gradient_apart(deep: Gemma2) -> Gemma2:
    """Of `of_some`, without capturing."""

    def of_some_apart(model: Gemma2) -> jax.Array:
        layers = layers_apart(model, TOKENS, POSITIONS, SEGMENTS)
        captured = sum(jnp.sum(jnp.sin(x)) for layer in (3, 6) for x in layers[layer].values())
        return jnp.sum(model.final_norm(layers[7]["hidden"])) + captured

    gradient: Gemma2 = jax.jit(jax.grad(of_some_apart))(deep)
    return gradient


@mostly_thorough(("remat", "unroll_layers"), [("none", False), ("dots", True), ("full", False)])
def test_how_it_is_executed_changes_no_gradient(
    deep: Gemma2, gradient_apart: Gemma2, remat: Any, unroll_layers: bool
) -> None:
    compute = ComputeConfig(remat=remat, unroll_layers=unroll_layers)
    found = jax.jit(jax.grad(of_some), static_argnums=1)(deep, compute)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(gradient_apart), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4 * float(jnp.abs(other).max()))


def stacks(function: Any, *arguments: Any) -> list[tuple[int, ...]]:
    """All arrays [number, B, T, ...] of a program, where the number is one of layers or of slots."""
    shapes = [shape for shape, _ in arrays(jax.make_jaxpr(function)(*arguments).jaxpr)]
    return [shape for shape in shapes if len(shape) > 3 and shape[1:3] == (B, T) and shape[0] > B]


def test_a_forward_pass_stacks_only_the_requested_layers(deep: Gemma2) -> None:
    capture = Capture((3, 6), hidden=True, attention=True)
    assert {shape[0] for shape in stacks(lambda model: read(model, capture), deep)} == {
        len(capture.layers) + 1
    }


def test_a_backward_pass_stacks_only_what_rematerialisation_keeps(deep: Gemma2) -> None:
    compute = ComputeConfig(remat="full")
    plain = stacks(jax.grad(lambda model: jnp.sum(model.hidden(TOKENS, POSITIONS, SEGMENTS, compute))), deep)
    found = stacks(jax.grad(lambda model: of_some(model, compute)), deep)
    assert {shape[0] for shape in found} == {3, 4}  # slots, and pairs
    assert {shape for shape in found if shape[0] == 4} == set(plain) == {(4, B, T, 32)}


def test_hidden_states_alone(deep: Gemma2) -> None:
    shapes = stacks(lambda model: read(model, Capture((3, 6), hidden=True, attention=False)), deep)
    assert set(shapes) == {(3, B, T, 32)}
