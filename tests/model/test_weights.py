"""The table of weights: initial values, and what is derived from it."""

from functools import reduce
from operator import getitem
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, init_params, map_weights


def test_initial_values_are_the_same_in_every_process(toy_config):
    """Noted from another process: nothing here may hang on Python's salted hash or on the order of weights."""
    params = init_params(toy_config, jax.random.key(0))
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

    params = init_params(toy_config, jax.random.key(1))
    map_weights(check)


def test_no_two_weights_are_alike(toy_config):
    leaves = [
        leaf.ravel()[:8] for leaf in jax.tree.leaves(init_params(toy_config, jax.random.key(0))) if leaf.any()
    ]
    firsts = {float(leaf[0]) for leaf in leaves}
    assert len(firsts) == len(leaves) == 15


def test_abstract_and_real_parameters_agree(toy_config, toy_model):
    described = abstract_params(toy_config)
    real = jax.tree.map(lambda x: (x.shape, x.dtype), toy_model.params())
    assert real == jax.tree.map(lambda x: (x.shape, x.dtype), described)


def test_a_model_is_its_parameters(toy_config, toy_model):
    again = Gemma2(toy_config, toy_model.params())
    chex.assert_trees_all_equal(jax.tree.leaves(again), jax.tree.leaves(toy_model))
