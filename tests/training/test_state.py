"""The average of the weights in the train state: moved once a step, sharded like the weights, absent by default."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.methods.choose import build_method
from gemma2_jax.model.weights import weight_specs
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from gemma2_jax.training.state import Update
from tests.methods.test_adaptation import NormsOnly
from tests.steps import prepared
from tests.training.test_averaged import averaging


@pytest.fixture(scope="module")
def batches(toy_run: RunConfig) -> list[Batch]:
    iterator = train_batches(toy_run.data)
    return [next(iterator) for _ in range(3)]


@pytest.mark.thorough
def test_each_step_moves_the_average_and_a_broken_one_does_not(
    toy_run: RunConfig, batches: list[Batch]
) -> None:
    """Once a step, not once a microbatch; sharded like the weights."""
    run = averaging(replace(toy_run, mesh=MeshConfig(1, 2, 1)), accumulation=2)
    mesh = build_mesh(run.mesh, jax.devices()[:2])
    broken = replace(batches[1], loss_mask=np.array(batches[1].loss_mask) * np.nan)
    with jax.set_mesh(mesh):
        step, state, frozen = prepared(run, mesh)
        expected = jax.tree.map(np.asarray, state.trainable)
        chex.assert_trees_all_equal(state.averaged, expected)
        for batch in (batches[0], broken, batches[2]):
            before = int(state.step)
            state, _ = step(state, frozen, on_mesh(batch, mesh))
            if int(state.step) > before:
                expected = jax.tree.map(
                    lambda a, w: 0.75 * a + 0.25 * np.asarray(w), expected, state.trainable
                )
            chex.assert_trees_all_close(state.averaged, expected, rtol=1e-6, atol=1e-8)
    assert int(state.step) == 2
    for average, weight in zip(
        jax.tree.leaves(state.averaged), jax.tree.leaves(state.trainable), strict=True
    ):
        assert average.dtype == np.float32
        assert average.sharding.is_equivalent_to(weight.sharding, weight.ndim)
    assert any(leaf.addressable_shards[0].data.size < leaf.size for leaf in jax.tree.leaves(state.averaged))


def test_without_an_average_the_program_has_no_further_inputs(toy_run: RunConfig) -> None:
    mesh = build_mesh(toy_run.mesh, jax.devices()[:1])
    for ema in (None, 0.0):
        run = averaging(toy_run, ema)
        assert run == toy_run
        state = Update(run, build_method(run).specs).abstract_state(mesh)
        assert len(jax.tree.leaves(state)) == 1 + len(jax.tree.leaves((state.trainable, state.optimizer)))


def test_only_trained_weights_are_averaged(toy_run: RunConfig) -> None:
    run = averaging(toy_run)
    method = build_method(run, NormsOnly())
    state = Update(run, method.specs).abstract_state(build_mesh(run.mesh, jax.devices()[:1]))
    assert state.averaged["params"].keys() == method.specs["params"].keys()
    assert len(jax.tree.leaves(state.averaged)) < len(jax.tree.leaves(weight_specs(run.model)))
