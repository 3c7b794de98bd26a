"""How weights lie on a mesh, and that the model does not care."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gemma2_jax.config import UserError
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params
from gemma2_jax.sharding.layout import batch_sharding, batch_shares, constrain, is_split, weight_spec
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

MESHES = [(1, 8, 1), (4, 1, 2), (2, 2, 2)]


def test_the_table():
    assert weight_spec("PDNH") == PartitionSpec(None, "fsdp", "tensor", None)
    assert weight_spec("VD") == PartitionSpec("tensor", "fsdp")
    assert weight_spec("PD") == PartitionSpec(None, "fsdp")


def test_a_mesh_that_does_not_divide_the_model_is_refused(toy_config):
    mesh = build_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    with pytest.raises(UserError) as error:
        abstract_params(replace(toy_config, vocab_size=96), mesh=mesh)
    assert str(error.value) == (
        "mesh.tensor is 8, which does not divide dimension K (2) of the model's "
        "pairs/global_block/attention/key; choose a divisor of 2."
    )


def test_without_a_mesh_nothing_is_laid_out():
    x = jnp.ones((2, 3))
    assert constrain(x, "BT") is x
    assert batch_shares() == 1
    assert not is_split("D")


def test_which_dimensions_of_weights_are_split():
    with jax.set_mesh(build_mesh(MeshConfig(data=2, fsdp=1, tensor=4))):
        assert (is_split("D"), is_split("V")) == (False, True)
    with jax.set_mesh(build_mesh(MeshConfig(data=2, fsdp=4, tensor=1))):
        assert (is_split("D"), is_split("V")) == (True, False)


def test_shares_of_a_batch():
    mesh = build_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert batch_shares(mesh) == 4
    with jax.set_mesh(mesh):
        assert batch_shares() == 4


@pytest.fixture(scope="module")
def model(toy_config):
    """One pair of layers, and a vocabulary that two devices can share."""
    return Gemma2.init(replace(toy_config, num_layers=2, vocab_size=96), jax.random.key(0))


TOKENS = jax.random.randint(jax.random.key(1), (8, 12), 0, 96)


def loss(model: Gemma2, tokens: jax.Array, compute: ComputeConfig) -> jax.Array:
    logits = model(tokens, compute=compute)[:, :-1]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1))


@pytest.fixture(scope="module")
def on_one_device(model):
    return jax.jit(jax.value_and_grad(loss), static_argnums=2)(model, TOKENS, ComputeConfig())


@pytest.mark.parametrize("sizes", MESHES)
def test_every_mesh_computes_the_same(model, on_one_device, sizes):
    """Up to the order of sums: float32 rounds at 6e-8, and the longest sums here are of some hundred terms."""
    mesh = build_mesh(MeshConfig(*sizes))
    described = abstract_params(model.config, mesh=mesh)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), model.params(), described)
    tokens = jax.device_put(TOKENS, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
        found = step(Gemma2(model.config, params), tokens, ComputeConfig())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(on_one_device), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_fsdp_holds_an_eighth_of_every_weight(model):
    mesh = build_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    described = abstract_params(model.config, mesh=mesh)
    for leaf in jax.tree.leaves(described):
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size
