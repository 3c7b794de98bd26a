"""Blockwise losses equal the dense ones, in values and gradients, and never hold [tokens, V]."""

from dataclasses import replace
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_jax.kernels.lm_head import LMHead, dense_sums, lm_head_sums, token_log_probs
from gemma2_jax.kernels.softcap import mask_padding
from gemma2_jax.objectives.objective import ObjectiveConfig, build_coefficients, token_loss
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.heads import student_and_teacher
from tests.parameters import mostly_thorough
from tests.programs import arrays

D, D_TEACHER, V = 12, 20, 61


def heads(B: int, T: int, dtype: Any = jnp.float32) -> tuple[LMHead, LMHead, jax.Array, jax.Array]:
    """Student, teacher, targets, mask; the logits are large enough for the soft cap to bite."""
    keys = jax.random.split(jax.random.key(B * 100 + T), 6)
    student = LMHead(
        jax.random.normal(keys[0], (B, T, D), dtype), 4 * jax.random.normal(keys[1], (V, D)), softcap=30.0
    )
    teacher = LMHead(
        jax.random.normal(keys[2], (B, T, D_TEACHER), dtype),
        3 * jax.random.normal(keys[3], (V, D_TEACHER)),
        30.0,
    )
    targets = jax.random.randint(keys[4], (B, T), 0, V)
    mask = (jax.random.uniform(keys[5], (B, T)) > 0.3).astype(jnp.float32)
    return student, teacher, targets, mask


def objective(cross_entropy: float, forward_kl: float, temperature: float = 1.0) -> ObjectiveConfig:
    return ObjectiveConfig(cross_entropy, forward_kl, temperature, block_tokens=8)


def now(config: ObjectiveConfig) -> Any:
    """The coefficients, none of which is scheduled."""
    return build_coefficients(config, steps=1)(0)


@settings(max_examples=3, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 19),
    block_tokens=st.integers(1, 40),
    config=st.sampled_from([objective(1, 0), objective(0, 1), objective(0.3, 0.7, temperature=2.5)]),
)
def test_equals_dense(B: int, T: int, block_tokens: int, config: ObjectiveConfig) -> None:
    student, teacher, targets, mask = heads(B, T)
    given_teacher = teacher if config.needs_teacher else None

    def value_and_gradients(loss: Any) -> Any:
        def total(hidden: jax.Array, embedding: jax.Array) -> Any:
            head = LMHead(hidden, embedding, 30.0)
            named = student_and_teacher(head, given_teacher, targets)
            return loss(token_loss(config), *named, mask, coefficients=now(config))

        differentiated = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        return differentiated(student.hidden, student.embedding)

    dense = value_and_gradients(dense_sums)
    blockwise = value_and_gradients(partial(lm_head_sums, block_tokens=block_tokens))
    # float32 sums over up to 57 tokens in another order: a few roundings of 6e-8 each.
    chex.assert_trees_all_close(dense, blockwise, rtol=2e-5, atol=2e-5)


def test_without_gradient_the_value_is_the_same() -> None:
    student, teacher, targets, mask = heads(2, 9)
    config = objective(0.5, 0.5)
    loss = partial(lm_head_sums, token_loss(config), block_tokens=4, coefficients=now(config))
    value, metrics = loss(*student_and_teacher(student, teacher, targets), mask)

    def of_hidden(hidden: jax.Array) -> jax.Array:
        head = LMHead(hidden, student.embedding, 30.0)
        return loss(*student_and_teacher(head, teacher, targets), mask)[0]

    differentiated, _ = jax.value_and_grad(of_hidden)(student.hidden)
    np.testing.assert_allclose(value, differentiated, rtol=1e-6)
    np.testing.assert_allclose(value, 0.5 * metrics["cross_entropy"] + 0.5 * metrics["kl"], rtol=1e-6)


def test_the_gradient_follows_what_is_done_with_the_loss() -> None:
    student, _, targets, mask = heads(2, 9)
    config = objective(1, 0)
    loss = partial(lm_head_sums, token_loss(config), block_tokens=4, coefficients=now(config))

    def gradient(scale: float) -> jax.Array:
        def scaled(embedding: jax.Array) -> jax.Array:
            head = LMHead(student.hidden, embedding, 30.0)
            return scale * loss({"model": head}, {"targets": targets}, mask)[0]

        return jax.grad(scaled)(student.embedding)

    np.testing.assert_allclose(gradient(3.0), 3.0 * gradient(1.0), rtol=1e-6)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher, targets, mask = heads(2, 9)
    config = objective(0, 1)

    def loss(embedding: jax.Array) -> jax.Array:
        head = LMHead(teacher.hidden, embedding, 30.0)
        named = student_and_teacher(student, head, targets)
        return lm_head_sums(token_loss(config), *named, mask, 4, now(config))[0]

    assert float(loss(teacher.embedding)) > 0
    assert not np.any(jax.grad(loss)(teacher.embedding))


@pytest.mark.parametrize("caps", [(50.0, 30.0), (30.0, 50.0)])
def test_both_soft_caps_count(caps: tuple[float, float]) -> None:
    student, teacher, targets, mask = heads(1, 8)

    def value(student_cap: float, teacher_cap: float) -> float:
        capped = LMHead(student.hidden, student.embedding, student_cap)
        capped_teacher = LMHead(teacher.hidden, teacher.embedding, teacher_cap)
        config = objective(0, 1)
        named = student_and_teacher(capped, capped_teacher, targets)
        return float(lm_head_sums(token_loss(config), *named, mask, 4, now(config))[0])

    assert abs(value(*caps) - value(30.0, 30.0)) > 1e-2


def test_no_array_over_all_tokens_and_the_vocabulary() -> None:
    B, T = 4, 64
    student, teacher, targets, mask = heads(B, T)

    def largest(loss: Any) -> int:
        def total(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
            head, config = LMHead(hidden, embedding, 30.0), objective(0.5, 0.5)
            named = student_and_teacher(head, teacher, targets)
            return loss(token_loss(config), *named, mask, coefficients=now(config))[0]

        jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1)))(student.hidden, student.embedding)
        return max(size for shape, size in arrays(jaxpr.jaxpr) if V in shape and D not in shape)

    assert largest(dense_sums) == B * T * V
    assert largest(partial(lm_head_sums, block_tokens=32)) <= 32 * V


@pytest.mark.thorough
def test_bfloat16_states_give_close_gradients() -> None:
    student, teacher, targets, mask = heads(2, 16)

    def gradient(dtype: Any) -> jax.Array:
        def loss(embedding: jax.Array) -> jax.Array:
            head = LMHead(student.hidden.astype(dtype), embedding, 30.0)
            frozen = LMHead(teacher.hidden.astype(dtype), teacher.embedding, 30.0)
            config = objective(0, 1)
            named = student_and_teacher(head, frozen, targets)
            return lm_head_sums(token_loss(config), *named, mask, 8, now(config))[0]

        return jax.grad(loss)(student.embedding)

    exact, rounded = gradient(jnp.float32), gradient(jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    # bfloat16 keeps 8 bits: logits of size 15 are off by up to 0.06, probabilities by that fraction.
    assert float(jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact)) < 0.05


BOTH_LOSSES = pytest.mark.parametrize(
    "loss", [dense_sums, partial(lm_head_sums, block_tokens=8)], ids=["dense", "blockwise"]
)
PADDED = [objective(1, 0), objective(0, 1), objective(0.3, 0.7, temperature=0.01), objective(0, 1, 50.0)]


def pad(head: LMHead, padding: int) -> LMHead:
    """The same distributions, with rows behind them whose logits, unmasked, would be the largest."""
    rows = 100 * jax.random.normal(jax.random.key(5), (padding, head.embedding.shape[1]))
    return replace(head, embedding=jnp.concatenate([head.embedding, rows]), vocab_padding=padding)


def loss_and_gradients(
    loss: Any, config: ObjectiveConfig, student: LMHead, teacher: LMHead, targets: jax.Array, mask: jax.Array
) -> Any:
    """((loss, metrics), gradients in the form of an LMHead)."""
    given_teacher = teacher if config.needs_teacher else None

    def total(head: LMHead) -> Any:
        named = student_and_teacher(head, given_teacher, targets)
        return loss(token_loss(config), *named, mask, coefficients=now(config))

    return jax.jit(jax.value_and_grad(total, has_aux=True))(student)


@BOTH_LOSSES
@mostly_thorough("config", PADDED, ids=str)
def test_rows_of_padding_take_no_part(loss: Any, config: ObjectiveConfig) -> None:
    """Everything is as without them, and their own gradient is 0."""
    student, teacher, targets, mask = heads(2, 9)
    without, expected = loss_and_gradients(loss, config, student, teacher, targets, mask)
    values, found = loss_and_gradients(loss, config, pad(student, 7), pad(teacher, 7), targets, mask)
    chex.assert_trees_all_close(values, without, rtol=2e-6)
    size = float(jnp.max(jnp.abs(expected.embedding)))
    np.testing.assert_allclose(found.embedding[:V], expected.embedding, rtol=1e-5, atol=1e-6 * size)
    np.testing.assert_allclose(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5 * size)
    assert found.embedding.shape == (V + 7, D)
    assert not np.any(found.embedding[V:])


def test_unmasked_those_rows_would_take_part() -> None:
    student, teacher, targets, mask = heads(2, 9)
    open_student = replace(pad(student, 7), vocab_padding=0)
    (value, _), found = loss_and_gradients(dense_sums, objective(1, 0), open_student, teacher, targets, mask)
    (without, _), _ = loss_and_gradients(dense_sums, objective(1, 0), student, teacher, targets, mask)
    assert float(value) > float(without) + 10
    assert np.all(np.any(found.embedding[V:], axis=1))


@pytest.mark.thorough
@BOTH_LOSSES
@pytest.mark.parametrize("config", PADDED, ids=str)
def test_rows_of_padding_take_no_part_on_a_mesh(loss: Any, config: ObjectiveConfig) -> None:
    """With the vocabulary split: of 96 rows, 24 a device, the last 35 are padding."""
    student, teacher, targets, mask = heads(4, 9)
    without, expected = loss_and_gradients(loss, config, student, teacher, targets, mask)
    with jax.set_mesh(build_mesh(MeshConfig(1, 2, 4))):
        values, found = loss_and_gradients(loss, config, pad(student, 35), pad(teacher, 35), targets, mask)
    chex.assert_trees_all_close(values, without, rtol=1e-5)
    size = float(jnp.max(jnp.abs(expected.embedding)))
    np.testing.assert_allclose(found.embedding[:V], expected.embedding, rtol=1e-4, atol=1e-5 * size)
    assert not np.any(found.embedding[V:])


def test_without_padding_nothing_is_computed_for_it() -> None:
    logits = jnp.zeros((2, 3))
    assert mask_padding(logits, 0) is logits
    assert mask_padding(logits, 2) is not logits


def two_students(tables: Any, states: Any, teacher: LMHead) -> dict[str, LMHead]:
    return {
        "a": LMHead(states[0], tables[0], 30.0),
        "b": LMHead(states[1], tables[1], 20.0),
        "teacher": replace(teacher, trained=False),
    }


def of_both(logits: Any, per_token: Any, coefficients: Any) -> Any:
    """One loss for two students of one teacher, with metrics in a tree of their own."""
    losses = {}
    for name in ("a", "b"):
        log_s, log_t = (jax.nn.log_softmax(logits[key]) for key in (name, "teacher"))
        losses[name] = per_token["weight"][..., 0] * jnp.sum(jnp.exp(log_t) * (log_t - log_s), axis=-1)
    return losses["a"] + coefficients["b"] * losses["b"], {
        "each": losses,
        "seen": (per_token["targets"] * 1.0,),
    }


def test_several_heads_learn_from_one_whose_logits_are_computed_once() -> None:
    student, teacher, targets, mask = heads(2, 9)
    keys = jax.random.split(jax.random.key(3), 3)
    tables = student.embedding, 3 * jax.random.normal(keys[0], (V, 7))
    states = student.hidden, jax.random.normal(keys[1], (2, 9, 7))
    per_token = {"targets": targets, "weight": jax.random.uniform(keys[2], (2, 9, 1))}
    seen = []

    def token_loss(logits: Any, *others: Any) -> Any:
        seen.append(set(logits))
        return of_both(logits, *others)

    def total(loss: Any, tables: Any, states: Any) -> Any:
        named = two_students(tables, states, teacher)
        return loss(token_loss, named, per_token, mask, coefficients={"b": jnp.float32(0.5)})

    def found(loss: Any) -> Any:
        return jax.jit(jax.value_and_grad(partial(total, loss), (0, 1), has_aux=True))(tables, states)

    dense, blockwise = found(dense_sums), found(partial(lm_head_sums, block_tokens=4))
    chex.assert_trees_all_close(blockwise, dense, rtol=2e-5, atol=2e-5)
    (value, metrics), _ = blockwise
    each = metrics["each"]
    assert float(value) == pytest.approx(float(each["a"] + 0.5 * each["b"]), rel=1e-6)
    assert float(metrics["seen"][0]) == pytest.approx(float(jnp.sum(targets * mask)), rel=1e-6)
    assert all(names == {"a", "b", "teacher"} for names in seen)


def test_without_a_trained_head_there_are_sums_and_no_gradient() -> None:
    _, teacher, targets, mask = heads(2, 9)

    def total(embedding: jax.Array) -> jax.Array:
        named = {"model": replace(teacher, embedding=embedding, trained=False)}
        return lm_head_sums(
            token_loss(objective(1, 0)), named, {"targets": targets}, mask, 4, now(objective(1, 0))
        )[0]

    value, gradient = jax.value_and_grad(total)(teacher.embedding)
    assert float(value) > 0
    assert not np.any(gradient)


def dense_log_probs(head: LMHead, targets: jax.Array, _: int) -> jax.Array:
    V = head.embedding.shape[0] - head.vocab_padding
    logits = jnp.einsum("BTD,VD->BTV", head.hidden, head.embedding[:V].astype(head.hidden.dtype))
    capped = head.softcap * jnp.tanh(logits.astype(jnp.float32) / head.softcap)
    return jnp.take_along_axis(jax.nn.log_softmax(capped), targets[..., None], axis=-1)[..., 0]


def pulled_back(
    log_probs: Any, head: LMHead, targets: jax.Array, block_tokens: int, cotangent: jax.Array
) -> Any:
    """log P [B, T], and the gradients of hidden states and embedding for this cotangent."""

    @jax.jit
    def both(hidden: jax.Array, embedding: jax.Array, cotangent: jax.Array) -> Any:
        def of(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
            return log_probs(replace(head, hidden=hidden, embedding=embedding), targets, block_tokens)

        values, pull = jax.vjp(of, hidden, embedding)
        return values, *pull(cotangent)

    return both(head.hidden, head.embedding, cotangent)


def cotangent_of(B: int, T: int) -> jax.Array:
    """Of both signs, and zero at some tokens."""
    found = jax.random.normal(jax.random.key(9), (B, T))
    return found.at[:, ::3].set(0.0)


@settings(max_examples=3, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 19),
    block_tokens=st.integers(1, 40),
    padding=st.sampled_from([0, 7]),
)
def test_log_probs_equal_dense_ones(B: int, T: int, block_tokens: int, padding: int) -> None:
    student, _, targets, _ = heads(B, T)
    head = pad(student, padding)
    dense, blockwise = (
        pulled_back(function, head, targets, block_tokens, cotangent_of(B, T))
        for function in (dense_log_probs, token_log_probs)
    )
    assert blockwise[0].dtype == jnp.float32
    chex.assert_trees_all_close(blockwise, dense, rtol=2e-5, atol=2e-5)


@mostly_thorough("dtype", [jnp.float32, jnp.bfloat16])
@mostly_thorough("mesh", [MeshConfig(1, 2, 4), MeshConfig(2, 4, 1), MeshConfig(1, 1, 8)], ids=str)
def test_log_probs_on_a_mesh(mesh: MeshConfig, dtype: Any) -> None:
    """With 35 rows of padding among 96, and weights split over devices."""
    student, _, targets, _ = heads(8, 9, dtype)
    head = pad(student, 35)
    expected = pulled_back(dense_log_probs, head, targets, 4, cotangent_of(8, 9))
    devices = build_mesh(mesh)
    with jax.set_mesh(devices):
        split = jax.NamedSharding(devices, jax.P("tensor", "fsdp"))
        head = replace(head, embedding=jax.device_put(head.embedding, split))
        found = pulled_back(token_log_probs, head, targets, 4, cotangent_of(8, 9))
    # bfloat16 rounds the gradient of each logit, and hidden states, to 8 bits.
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for one, other in zip(found, expected, strict=True):
        exact = np.asarray(other, np.float32)
        np.testing.assert_allclose(np.asarray(one, np.float32), exact, atol=tolerance * np.abs(exact).max())
    assert not np.any(found[2][V:])


def test_log_probs_of_a_frozen_head_have_no_gradient() -> None:
    student, _, targets, _ = heads(2, 9)
    frozen = replace(student, trained=False)
    values, *gradients = pulled_back(token_log_probs, frozen, targets, 4, cotangent_of(2, 9))
    np.testing.assert_allclose(values, dense_log_probs(student, targets, 4), rtol=1e-5)
    assert not any(np.any(gradient) for gradient in gradients)


def test_log_probs_hold_no_array_over_all_tokens_and_the_vocabulary() -> None:
    student, _, targets, _ = heads(4, 64)

    def largest(log_probs: Any) -> int:
        jaxpr = jax.make_jaxpr(partial(pulled_back, log_probs, block_tokens=32))(
            student, targets, cotangent=cotangent_of(4, 64)
        )
        return max(size for shape, size in arrays(jaxpr.jaxpr) if V in shape and D not in shape)

    assert largest(dense_log_probs) == 4 * 64 * V
    assert largest(token_log_probs) <= 32 * V


@mostly_thorough("block_tokens", [4, 48])
def test_a_fixed_embedding_costs_no_gradient(block_tokens: int) -> None:
    """Hidden states have the same gradient, and no array is a gradient of the embedding."""
    student, _, targets, mask = heads(2, 9)
    terms, coefficients = token_loss(objective(1, 0)), now(objective(1, 0))

    def loss(embedding_trained: bool, sums: Any, head: LMHead) -> jax.Array:
        head = replace(head, embedding_trained=embedding_trained)
        found, _ = sums(terms, {"model": head}, {"targets": targets}, mask, coefficients=coefficients)
        return jnp.asarray(found)

    blockwise = partial(lm_head_sums, block_tokens=block_tokens)
    whole = jax.grad(partial(loss, True, blockwise))(student)
    for sums in (blockwise, dense_sums):
        fixed = jax.grad(partial(loss, False, sums))(student)
        np.testing.assert_allclose(fixed.hidden, whole.hidden, rtol=1e-5, atol=1e-6)
        assert not np.any(fixed.embedding)

    def gradients(embedding_trained: bool) -> int:
        """The number of arrays [.., V, D] or [.., D, V] that the gradient of the hidden states computes."""

        def of_hidden(hidden: jax.Array) -> jax.Array:
            return loss(embedding_trained, blockwise, replace(student, hidden=hidden))

        jaxpr = jax.make_jaxpr(jax.grad(of_hidden))(student.hidden)
        return sum(set(shape[-2:]) == {V, D} for shape, _ in arrays(jaxpr.jaxpr))

    assert gradients(False) < gradients(True)
