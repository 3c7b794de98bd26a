"""The forward pass against the report's formulas, and its variants against each other."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.kernels.self_attention import AttentionConfig
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from tests.model import numpy_gemma2 as formulas
from tests.model.models import vivid
from tests.parameters import mostly_thorough

TOKENS = jax.random.randint(jax.random.key(5), (2, 20), 0, 97)

forward = jax.jit(Gemma2.__call__)


def logits_by_formula(model: Gemma2, tokens, positions=None, segment_ids=None) -> np.ndarray:
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape) if positions is None else positions
    segment_ids = np.ones(tokens.shape, int) if segment_ids is None else segment_ids
    rows = zip(np.asarray(tokens), np.asarray(positions), np.asarray(segment_ids), strict=True)
    return np.stack([formulas.forward(model.config, model.params(), *row) for row in rows])


@mostly_thorough(
    "change",
    [
        {},
        {"sliding_window": None},
        {"sliding_window": 1},
        {"num_kv_heads": 4},
        {"num_kv_heads": 1},
        {"num_layers": 2, "d_ff": 48, "head_dim": 16},
        {"query_pre_attn_scalar": 3.0},
    ],
    ids=str,
)
def test_equals_the_formulas(toy_config, change):
    model = vivid(replace(toy_config, **change))
    found = forward(model, TOKENS)
    np.testing.assert_allclose(found, logits_by_formula(model, TOKENS), atol=2e-4)


def test_both_caps_bite_where_they_should(toy_config):
    """Far into both caps the formulas still hold, and neither cap can stand in for the other."""
    model = vivid(toy_config, size=20.0)
    found = forward(model, TOKENS)
    assert 20 < np.abs(found).max() < 30
    np.testing.assert_allclose(found, logits_by_formula(model, TOKENS), atol=2e-2)
    for change in (
        {"attn_logit_softcap": 30.0, "final_logit_softcap": 50.0},
        {"attn_logit_softcap": 1e6},
        {"final_logit_softcap": 1e6},
    ):
        other = forward(Gemma2(replace(toy_config, **change), model.params()), TOKENS)
        assert np.abs(other - found).max() > 0.5


def test_packed_documents_equal_separate_ones(toy_model):
    lengths = [7, 11, 2]
    positions = jnp.concatenate([jnp.arange(length) for length in lengths])[None]
    segment_ids = jnp.repeat(jnp.arange(1, 4), jnp.array(lengths))[None]
    packed = forward(toy_model, TOKENS[:1], positions, segment_ids)[0]
    start = 0
    for length in lengths:
        # At the beginning of a row by itself; what follows it there, it does not see.
        alone = forward(
            toy_model, jnp.roll(TOKENS[:1], -start, axis=1), jnp.arange(20)[None], jnp.ones((1, 20), int)
        )
        np.testing.assert_allclose(packed[start : start + length], alone[0, :length], atol=2e-5)
        start += length


def test_how_far_a_token_reaches(toy_config):
    """With every layer local in effect (one pair, its global block silenced), 8 tokens: itself and the 7 after."""
    model = vivid(replace(toy_config, num_layers=2))
    params = model.params()
    params["pairs"]["global_block"]["attention"]["output"] *= 0
    model = Gemma2(model.config, params)
    changed = TOKENS[:1].at[0, 4].add(1)
    moved = np.abs(forward(model, TOKENS[:1]) - forward(model, changed))[0].max(-1) > 0
    assert moved.nonzero()[0].tolist() == list(range(4, 12))


def loss_and_gradients(model: Gemma2, compute: ComputeConfig):
    def loss(model):
        logits = model(TOKENS[:, :-1], compute=compute)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), TOKENS[:, 1:, None], axis=-1))

    return jax.jit(jax.value_and_grad(loss))(model)


@pytest.fixture(scope="module")
def plain(toy_model):
    return loss_and_gradients(toy_model, ComputeConfig())


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("remat", "unroll_layers"),
    [
        ("dots", False),
        ("full", False),
        ("offload", False),
        ("none", True),
        ("dots", True),
        ("full", True),
        ("offload", True),
    ],
)
def test_how_it_is_executed_changes_nothing(toy_model, plain, remat, unroll_layers):
    found = loss_and_gradients(toy_model, ComputeConfig(remat=remat, unroll_layers=unroll_layers))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


@mostly_thorough("kernel", ["reference", "splash"])
def test_which_kernel_attends_changes_nothing(toy_model, plain, kernel):
    """Within the scan, with layers recomputed."""
    compute = ComputeConfig(remat="full", attention=AttentionConfig(kernel))
    found = loss_and_gradients(toy_model, compute)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)


@pytest.mark.thorough
def test_remat_recomputes_what_its_policy_names(toy_model):
    """`dots` recomputes fewer products than `full`, since it keeps those with weights; `none` recomputes none."""

    def products(remat):
        def loss(model):
            return model.hidden(TOKENS, compute=ComputeConfig(remat=remat)).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(toy_model)).count("dot_general")

    assert products("none") < products("dots") < products("full") == products("offload")


def test_offload_keeps_the_residual_stream_with_the_host(toy_model):
    """What the scan stacks of each pair: the embedded tokens before it."""

    def stacked(remat):
        def loss(model):
            return model.hidden(TOKENS, compute=ComputeConfig(remat=remat)).sum()

        program = str(jax.make_jaxpr(jax.grad(loss))(toy_model))
        return [f"f32{space}[2,2,20,32] = scan[" in program for space in ("", "<host>")]

    assert stacked("full") == [True, False]
    assert stacked("offload") == [False, True]


@pytest.mark.thorough
def test_bfloat16_is_close_to_float32(toy_model, plain):
    half = ComputeConfig(dtype="bfloat16")
    assert jax.eval_shape(lambda model: model.hidden(TOKENS, compute=half), toy_model).dtype == jnp.bfloat16
    loss, gradients = loss_and_gradients(toy_model, half)
    np.testing.assert_allclose(loss, plain[0], rtol=2e-2)
    for one, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(plain[1]), strict=True):
        assert one.dtype == jnp.float32
        assert jnp.linalg.norm(one - other) < 0.1 * jnp.linalg.norm(other)
