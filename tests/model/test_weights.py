"""The table of weights: initial values, and what is derived from it."""

from functools import reduce
from operator import getitem
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import (
    Weight,
    abstract_params,
    init_params,
    map_specs,
    specs_by_path,
    weight_specs,
)


def test_initial_values_are_the_same_in_every_process(toy_config):
    """Noted from another process: nothing here may hang on Python's salted hash or on the order of weights."""
    params = init_params(weight_specs(toy_config), jax.random.key(0))
    found = [
        float(params["embedder"]["embedding"][0, 0]),
        float(params["pairs"]["local_block"]["attention"]["query"][0, 0, 0, 0]),
        float(params["pairs"]["global_block"]["mlp"]["down"][1, 63, 31]),
    ]
    np.testing.assert_allclose(
        found, [-0.2876674234867096, 0.055535051971673965, -0.19411352276802063], rtol=1e-6
    )


def test_initial_sizes(toy_config):
    """A product with a weight keeps the variance; norms start as the identity."""

    def check(path, weight):
        value: Any = reduce(getitem, path.split("/"), params)
        if weight.fan_in:
            fan_in = {"D": 32, "NH": 4 * 8, "F": 64}[weight.fan_in]
            np.testing.assert_allclose(jnp.std(value), fan_in**-0.5, rtol=0.1)
        else:
            assert not value.any()

    params = init_params(weight_specs(toy_config), jax.random.key(1))
    map_specs(check, weight_specs(toy_config))


def test_no_two_weights_are_alike(toy_config):
    params = init_params(weight_specs(toy_config), jax.random.key(0))
    leaves = [leaf.ravel()[:8] for leaf in jax.tree.leaves(params) if leaf.any()]
    firsts = {float(leaf[0]) for leaf in leaves}
    assert len(firsts) == len(leaves) == 15


def test_abstract_and_real_parameters_agree(toy_config, toy_model):
    described = abstract_params(weight_specs(toy_config))
    real = jax.tree.map(lambda x: (x.shape, x.dtype), toy_model.params())
    assert real == jax.tree.map(lambda x: (x.shape, x.dtype), described)


def test_a_model_is_its_parameters(toy_config, toy_model):
    again = Gemma2(toy_config, toy_model.params())
    chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(toy_model))


def test_a_tree_of_any_weights():
    """Projections beside a model: the same functions describe, draw and place them."""
    specs = {"projections": Weight("MDE", (2, 32, 48), fan_in="D")}
    assert specs["projections"].sizes == {"M": 2, "D": 32, "E": 48}
    assert abstract_params(specs)["projections"].shape == (2, 32, 48)
    drawn = init_params(specs, jax.random.key(0), prefix="matching")["projections"]
    np.testing.assert_allclose(jnp.std(drawn), 32**-0.5, rtol=0.1)
    alone = init_params(specs["projections"], jax.random.key(0), prefix="matching/projections")
    np.testing.assert_array_equal(alone, drawn)
    assert np.any(init_params(specs, jax.random.key(0))["projections"] != drawn)


def test_a_part_of_a_model_is_drawn_as_in_the_whole(toy_config):
    specs, key = weight_specs(toy_config), jax.random.key(0)
    part = init_params(specs["pairs"], key, prefix="pairs")
    chex.assert_trees_all_equal(part, init_params(specs, key)["pairs"])
    assert set(specs_by_path(specs["final_norm"])) == {"scale"}


def test_leaves_may_be_trees_of_their_own(toy_config):
    """A weight that is held as several arrays passes as one."""
    specs = weight_specs(toy_config)["pairs"]["local_block"]["mlp"]
    split = map_specs(lambda path, spec: {"base": path, "scale": spec.dims}, specs)
    found = map_specs(lambda path, spec, leaf: leaf == {"base": path, "scale": spec.dims}, specs, split)
    assert found == {"gate": True, "up": True, "down": True}
