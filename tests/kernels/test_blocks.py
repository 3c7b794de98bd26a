"""Blocks of tokens hold each token once, and no more tokens on a device than configured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_jax.kernels.blocks import join_tokens, split_tokens, token_blocks
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh


@pytest.mark.parametrize(
    "mesh", [MeshConfig(), pytest.param(MeshConfig(data=2, sequence=4), marks=pytest.mark.thorough)]
)
@settings(max_examples=3, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 40), block_tokens=st.integers(1, 100))
def test_a_device_has_no_more_tokens_of_a_block_than_configured(
    mesh: MeshConfig, rows: int, columns: int, block_tokens: int
) -> None:
    built = build_mesh(mesh)
    batch, sequence = built.shape["data"], built.shape["sequence"]
    B, T = rows * batch, columns * sequence
    tokens = jnp.arange(1, B * T + 1).reshape(B, T)
    with jax.set_mesh(built):
        blocks = token_blocks(B, T, block_tokens)
        split = split_tokens(blocks, tokens)
        assert np.array_equal(join_tokens(split, T), tokens)
    assert split.shape[0] == blocks
    # A token of each row at least.
    assert split[0].size // (batch * sequence) <= max(block_tokens, rows)
    assert np.array_equal(np.sort(split[split > 0]), np.arange(1, B * T + 1))
