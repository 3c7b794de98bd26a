"""Rows come and go, tokens stay; and the layout on the mesh stays too."""

from dataclasses import replace

import chex
import jax
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.vocabulary import check_tokens, resize_rows
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.parameters import mostly_thorough

TOKENS = np.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def padded(toy_config):
    """Eight rows of padding behind 96 tokens."""
    return Gemma2.init(replace(toy_config, vocab_size=104, vocab_padding=8), jax.random.key(0))


@mostly_thorough("rows", [96, 100, 104, 128])
@mostly_thorough("mesh", [MeshConfig(1, 1, 1), MeshConfig(2, 2, 2)], ids=["one", "eight"])
def test_resized(padded, rows, mesh):
    mesh = build_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor])
    shardings = jax.tree.map(
        lambda leaf: leaf.sharding, abstract_params(weight_specs(padded.config), mesh=mesh)
    )
    params, config = resize_rows(jax.device_put(padded.params(), shardings), padded.config, rows)
    assert (config.vocab_size, config.num_tokens) == (rows, 96)
    for leaf, described in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(abstract_params(weight_specs(config), mesh=mesh)),
        strict=True,
    ):
        assert (leaf.shape, leaf.dtype) == (described.shape, described.dtype)
        assert leaf.sharding.is_equivalent_to(described.sharding, leaf.ndim)
    before, after = padded.params()["embedder"]["embedding"], params["embedder"]["embedding"]
    np.testing.assert_array_equal(after[: min(rows, 104)], before[:rows])
    assert not np.any(after[104:])
    found = jax.jit(Gemma2(config, params))(TOKENS)
    np.testing.assert_allclose(found[..., :96], padded(TOKENS)[..., :96], atol=2e-5)


def test_there_and_back_is_the_same(padded):
    longer = resize_rows(padded.params(), padded.config, 128)
    params, config = resize_rows(*longer, 104)
    assert config == padded.config
    chex.assert_trees_all_equal(params, padded.params())


def test_no_token_is_cut_off(padded):
    with pytest.raises(UserError, match="embedding of 96 tokens cannot be cut to 95 rows"):
        resize_rows(padded.params(), padded.config, 95)


def test_tokens_and_not_rows_are_counted(padded):
    check_tokens(padded.config, 96, "tokenizer.path x")
    for tokens in (95, 97, 104):
        sentence = (
            rf"^tokenizer.path x has {tokens} tokens and the model 96; model.vocab_size \(104\) minus model"
        )
        with pytest.raises(UserError, match=sentence):
            check_tokens(padded.config, tokens, "tokenizer.path x")
