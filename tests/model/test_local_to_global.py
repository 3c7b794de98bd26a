"""More local layers for each global one (`global_every`): each layer has its window, however layers are executed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.formats.identity import model_identity
from gemma2_jax.model.branches import KeysAndValues, branch_hidden
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.counts import count_parameters, forward_flops_per_token
from gemma2_jax.model.decoder import Decoder
from gemma2_jax.model.lens import attention_maps
from gemma2_jax.model.partial import Partial
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.model import numpy_gemma2 as formulas
from tests.model.models import vivid
from tests.parameters import mostly_thorough

TOKENS = jax.random.randint(jax.random.key(5), (2, 12), 0, 96)
WHOLE = dict(positions=np.arange(12), segment_ids=np.ones(12, int))


@pytest.fixture(scope="module")
def config(toy_config: ModelConfig) -> ModelConfig:
    """Of 8 layers, only 3 and 7 are global; the others have a window of 4."""
    return replace(toy_config, vocab_size=96, num_layers=8, sliding_window=4, global_every=2)


@pytest.fixture(scope="module")
def model(config: ModelConfig) -> Gemma2:
    return vivid(config)


@pytest.fixture(scope="module")
def expected(model: Gemma2) -> np.ndarray:
    """Logits [B, T, V] by the formulas in NumPy, one layer after another."""
    return np.stack(
        [formulas.forward(model.config, model.params(), np.asarray(row), **WHOLE) for row in TOKENS]
    )


def test_windows(config: ModelConfig) -> None:
    assert config.windows == (4, 4, 4, None, 4, 4, 4, None)
    assert replace(config, global_every=1).windows == (4, None) * 4
    assert replace(config, global_every=4).windows == (4,) * 7 + (None,)


@mostly_thorough("unroll_layers", [False, True])
def test_equals_the_formulas(model: Gemma2, expected: np.ndarray, unroll_layers: bool) -> None:
    compute = ComputeConfig(unroll_layers=unroll_layers)
    found = jax.jit(lambda model: model(TOKENS, compute=compute))(model)
    np.testing.assert_allclose(found, expected, atol=5e-4)
    other = Gemma2(replace(model.config, global_every=1), model.params())
    assert np.abs(jax.jit(other)(TOKENS) - expected).max() > 0.1


def gradients(model: Gemma2, compute: ComputeConfig) -> Any:
    def total(model: Gemma2) -> jax.Array:
        return jnp.sum(jnp.sin(model.hidden(TOKENS, compute=compute)))

    return jax.jit(jax.grad(total))(model)


@pytest.fixture(scope="module")
def plain(model: Gemma2) -> Any:
    return gradients(model, ComputeConfig())


@pytest.mark.thorough
@pytest.mark.parametrize(("remat", "unroll_layers"), [("dots", False), ("full", False), ("full", True)])
def test_recomputation_changes_no_gradient(
    model: Gemma2, plain: Any, remat: Any, unroll_layers: bool
) -> None:
    found = gradients(model, ComputeConfig(remat=remat, unroll_layers=unroll_layers))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@mostly_thorough("unroll_layers", [False, True])
def test_token_by_token(model: Gemma2, expected: np.ndarray, unroll_layers: bool) -> None:
    """Through caches of which only the two global layers' hold more than the window."""
    decoder = Decoder(model, ComputeConfig(unroll_layers=unroll_layers))
    rows, lengths = np.arange(2), np.array([3, 7])
    prefill = jax.jit(Decoder.prefill, static_argnames="cache_size")
    logits, cache = prefill(decoder, TOKENS[:, :7], lengths, cache_size=12)
    assert cache.local_block.keys.shape == (6, 2, 2, 4, 8)
    assert cache.global_block.keys.shape == (2, 2, 2, 12, 8)
    np.testing.assert_allclose(logits, expected[rows, lengths - 1], atol=5e-4)
    decode = jax.jit(Decoder.decode)
    for position in (lengths + step for step in range(5)):
        logits, cache = decode(decoder, TOKENS[rows, position], position, cache)
        np.testing.assert_allclose(logits, expected[rows, position], atol=5e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("layers", [[2, 3], [4, 5, 6, 7]])
def test_frozen_layers_below(model: Gemma2, expected: np.ndarray, layers: Sequence[int]) -> None:
    """The stack in parts, which need not consist of whole groups of pairs."""
    partial = Partial(model.config, ["attention/*"], layers)
    params = partial.join(*partial.split(model.params(), jax.random.key(0)))
    found = jax.jit(lambda params: Gemma2(model.config, params)(TOKENS))(params)
    np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.thorough
@pytest.mark.parametrize("unroll_layers", [False, True])
def test_on_a_mesh(model: Gemma2, expected: np.ndarray, unroll_layers: bool) -> None:
    mesh = build_mesh(MeshConfig(2, 2, 2))
    described = abstract_params(weight_specs(model.config), mesh=mesh)
    params = jax.device_put(model.params(), jax.tree.map(lambda leaf: leaf.sharding, described))
    compute = ComputeConfig(unroll_layers=unroll_layers)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda params: Gemma2(model.config, params)(TOKENS, compute=compute))(params)
    np.testing.assert_allclose(found, expected, atol=5e-4)


@pytest.mark.thorough
def test_branches_equal_whole_texts(model: Gemma2) -> None:
    rows, starts = jnp.array([0, 1]), jnp.array([7, 3])
    branches = jnp.stack([TOKENS[0, 7:12], TOKENS[1, 3:8]])
    _, kept = model.collect(KeysAndValues(), TOKENS)
    found = branch_hidden(model, kept, branches, rows, starts, ComputeConfig())
    whole = jax.jit(model.hidden)(TOKENS)
    for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
        np.testing.assert_allclose(found[number], whole[row, start : start + 5], rtol=1e-3, atol=1e-3)


@pytest.mark.thorough
def test_attention_maps(model: Gemma2) -> None:
    """Layer 5 is the second of its pair, and local; layer 7 is global."""
    found = attention_maps(model, TOKENS, (5, 7))
    distance = np.arange(12)[:, None] - np.arange(12)
    assert not np.any(np.where(distance < 4, 0.0, found[5]))
    assert np.any(np.where(distance < 4, 0.0, found[7]))


def test_flops(config: ModelConfig) -> None:
    """By hand, as in test_counts: a global layer sees 1 .. 16 keys, a local one 1 .. 4."""
    scores = 2 * sum(range(1, 17)) / 16 + 6 * (sum(range(1, 5)) + 4 * 12) / 16
    weights = count_parameters(config).total
    assert forward_flops_per_token(config, 16) == pytest.approx(2 * weights + 4 * 4 * 8 * scores)


@pytest.mark.thorough
def test_the_digest_of_a_gemma_2_stays(toy_config: ModelConfig) -> None:
    """Adapters and caches record it; the setting counts only where it is used."""
    model = Gemma2(
        toy_config, jax.tree.map(jnp.ones_like, Gemma2.init(toy_config, jax.random.key(0)).params())
    )
    assert model_identity(model) == "7ebd5568d8cee365b942b499cde52071ab5b333bdf7cb1c4a9d4ddc715bf2683"
    assert model_identity(Gemma2(replace(toy_config, global_every=2), model.params())) != model_identity(
        model
    )
