"""How weights are sharded on a mesh, and that the model's outputs do not depend on it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from gemma2_jax.config import UserError
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.sharding.layout import (
    LayoutConfig,
    batch_sharding,
    batch_shares,
    constrain,
    is_split,
    laid_out,
    layout_in_use,
    sequence_shares,
)
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh

MESHES = [
    MeshConfig(1, 8, 1),
    MeshConfig(4, 1, 2),
    MeshConfig(2, 2, 2),
    MeshConfig(data=1, sequence=4, tensor=2),
    MeshConfig(data=1, replica=2, fsdp=2, sequence=2),
]


def test_the_table():
    layout = LayoutConfig()
    assert layout.spec_of_weight("PDNH") == PartitionSpec(None, "fsdp", "tensor", None)
    assert layout.spec_of_weight("VD") == PartitionSpec("tensor", "fsdp")
    assert layout.spec_of_weight("PD") == PartitionSpec(None, "fsdp")
    tokens = ("replica", "data", "fsdp")
    assert layout.spec("BTD") == PartitionSpec(tokens, "sequence", None)
    assert layout.spec("BTNH") == PartitionSpec(tokens, "sequence", "tensor", None)


def test_where_tokens_meet_the_vocabulary():
    layout = LayoutConfig()
    vocabulary = ("tensor", "sequence", "fsdp")
    assert layout.spec_in_head("BTV") == PartitionSpec(("replica", "data"), None, vocabulary)
    assert layout.spec_in_head("VD") == PartitionSpec(vocabulary, None)
    assert layout.spec_of_lookup("VD") == PartitionSpec("tensor", "fsdp")
    assert layout.spec_of_lookup("BTD") == PartitionSpec(("replica", "data"), "sequence", "fsdp")
    gathered = replace(layout, head=("tensor",))
    assert gathered.spec_in_head("BTV") == PartitionSpec(("replica", "data", "fsdp"), "sequence", "tensor")


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        (
            {"weights": {"D": ("fdsp",)}},
            "layout.weights.D has fdsp, which is not an axis of the mesh, did you mean fsdp "
            "(accepted: data, fsdp, replica, sequence, tensor).",
        ),
        (
            {"weights": {"X": ("fsdp",)}},
            "there is no letter layout.weights.X, accepted: D, F, H, K, N, V.",
        ),
        (
            {"head": ("tensor", "tensor")},
            "layout.head has tensor twice; a mesh axis can split a dimension only once.",
        ),
        (
            {"activations": {"B": ("fsdp",), "V": ("fsdp",)}},
            "layout.activations lays both B and V along mesh axis fsdp, but arrays BTV have both; an axis can "
            "split only one dimension of an array.",
        ),
    ],
)
def test_tables_that_cannot_be(columns, sentence):
    with pytest.raises(UserError) as error:
        LayoutConfig(**columns)
    assert str(error.value) == sentence


def test_a_collision_within_a_weight_is_refused(toy_config):
    mesh = build_mesh(MeshConfig(data=1, fsdp=2, tensor=1, sequence=4))
    with laid_out(LayoutConfig(weights={"D": ("fsdp",), "F": ("fsdp",)})), pytest.raises(UserError) as error:
        abstract_params(weight_specs(toy_config), mesh=mesh)
    assert str(error.value) == (
        "layout.weights lays both F and D along mesh axis fsdp, but arrays PFD have both; an axis can split "
        "only one dimension of an array."
    )


def test_the_layout_in_use_is_the_innermost():
    outer, inner = LayoutConfig(head=()), LayoutConfig(head=("tensor",))
    with laid_out(outer):
        with laid_out(inner):
            assert layout_in_use() == inner
        assert layout_in_use() == outer
    assert layout_in_use() == LayoutConfig()


def test_a_mesh_that_does_not_divide_the_model_is_refused(toy_config):
    mesh = build_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    with pytest.raises(UserError) as error:
        abstract_params(weight_specs(replace(toy_config, vocab_size=96)), mesh=mesh)
    assert str(error.value) == (
        "mesh.tensor is 8, which does not divide dimension K (2) of the model (pairs/global_block/attention/key); "
        "choose a divisor of 2."
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
    assert sequence_shares(build_mesh(MeshConfig(data=2, sequence=4))) == 4
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


@pytest.mark.parametrize(
    "sizes", [MESHES[0], *(pytest.param(sizes, marks=pytest.mark.thorough) for sizes in MESHES[1:])]
)
def test_every_mesh_computes_the_same(model, on_one_device, sizes):
    """Up to the order of sums: float32 rounds at 6e-8, and the longest sums here are of some hundred terms."""
    mesh = build_mesh(sizes)
    described = abstract_params(weight_specs(model.config), mesh=mesh)
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), model.params(), described)
    tokens = jax.device_put(TOKENS, batch_sharding(mesh))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
        found = step(Gemma2(model.config, params), tokens, ComputeConfig())
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(on_one_device), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-6)


def test_fsdp_holds_an_eighth_of_every_weight(model):
    mesh = build_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
    described = abstract_params(weight_specs(model.config), mesh=mesh)
    for leaf in jax.tree.leaves(described):
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == leaf.size
