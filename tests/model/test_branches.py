"""Branches of a text against forward passes over each whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.model.branches import KeysAndValues, branch_hidden
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from tests.model.models import vivid


@pytest.mark.thorough
@pytest.mark.parametrize("unroll", [False, True])
def test_branches_equal_whole_texts(toy_config: ModelConfig, unroll: bool) -> None:
    """Texts of several lengths, beyond the window of 8; a branch may begin before a text's end."""
    model, compute = vivid(toy_config), ComputeConfig(unroll_layers=unroll)
    T, S = 16, 5
    texts = jax.random.randint(jax.random.key(0), (2, T), 0, toy_config.vocab_size)
    branches = jax.random.randint(jax.random.key(1), (4, S), 0, toy_config.vocab_size)
    rows, starts = jnp.array([0, 1, 1, 0]), jnp.array([16, 3, 12, 9])
    _, kept = model.collect(KeysAndValues(), texts, compute=compute)
    found = branch_hidden(model, kept, branches, rows, starts, compute)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        whole = jnp.concatenate([texts[row, :start], branches[number]])
        padded = jnp.pad(whole, (0, T + S - len(whole)))[None]
        expected = jax.jit(model.hidden)(padded)[0, start : start + S]
        np.testing.assert_allclose(found[number], expected, atol=1e-4 * float(jnp.abs(expected).max()))
