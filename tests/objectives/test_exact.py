"""Every objective, blockwise, against the same written down in float64: values, gradients, and what is in memory."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma2_jax.kernels.lm_head import LMHead, dense_sums, lm_head_sums
from gemma2_jax.objectives.objective import (
    DIVERGENCES,
    ObjectiveConfig,
    build_coefficients,
    token_loss,
)
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.heads import student_and_teacher
from tests.objectives.dense import value_and_gradients
from tests.parameters import mostly_thorough
from tests.programs import arrays

D, D_TEACHER, V = 12, 20, 61


def objective(**values: Any) -> ObjectiveConfig:
    defaults: dict[str, Any] = dict(cross_entropy=0.0, forward_kl=0.0, temperature=1.0, block_tokens=8)
    return ObjectiveConfig(**(defaults | values))


SUM = dict(
    cross_entropy=0.5, forward_kl=0.2, reverse_kl=0.3, jsd=0.4, skew_kl=0.6, skew_reverse_kl=0.7, z_loss=0.01
)
OBJECTIVES = {
    "cross_entropy": objective(cross_entropy=1.0),
    "z_loss": objective(cross_entropy=1e-6, z_loss=1.0),
    **{name: objective(**{name: 1.0}) for name in DIVERGENCES},
    **{f"warm {name}": objective(**{name: 1.0}, temperature=2.5) for name in DIVERGENCES},
    "cold forward_kl": objective(forward_kl=1.0, temperature=0.5),
    "leaning jsd": objective(jsd=1.0, jsd_beta=0.05),
    "leaning skews": objective(skew_kl=1.0, skew_reverse_kl=1.0, skew_alpha=0.8),
    "sum": objective(**SUM, temperature=1.7),
}
EACH = pytest.mark.parametrize("config", OBJECTIVES.values(), ids=OBJECTIVES.keys())


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def heads(
    B: int, T: int, padding: int = 0, scale: float = 1.0
) -> tuple[LMHead, LMHead, jax.Array, jax.Array]:
    """Student, teacher, targets, mask. Logits reach 40 x scale: at 1 the cap bites. Rows of padding would be larger."""
    keys = jax.random.split(jax.random.key(B * 100 + T), 6)
    last = 1 + 30 * (jnp.arange(V + padding) >= V)[:, None]
    student = LMHead(
        jax.random.normal(keys[0], (B, T, D)),
        last * 4 * scale * jax.random.normal(keys[1], (V + padding, D)),
        softcap=30.0,
        vocab_padding=padding,
    )
    teacher = LMHead(
        jax.random.normal(keys[2], (B, T, D_TEACHER)),
        last * 3 * scale * jax.random.normal(keys[3], (V + padding, D_TEACHER)),
        softcap=25.0,
        vocab_padding=padding,
    )
    targets = jax.random.randint(keys[4], (B, T), 0, V)
    mask = (jax.random.uniform(keys[5], (B, T)) > 0.3) * (1 + jnp.arange(T) / T)
    return student, teacher, targets, mask.astype(jnp.float32)


@partial(jax.jit, static_argnums=(0, 1, 2))
def entries(B: int, T: int, K: int = 5, share: float = 0.9) -> SparseTargets:
    """K - 1 tokens a position with `share` of the weight in all, and a place without one."""
    keys = jax.random.split(jax.random.key(B * 100 + T), 2)
    ids = jnp.argsort(jax.random.uniform(keys[0], (B, T, V)), axis=-1)[..., :K].at[..., -1].set(0)
    weights = jax.nn.softmax(2 * jax.random.normal(keys[1], (B, T, K - 1)), axis=-1)
    log_weights = jnp.concatenate([jnp.log(share * weights), jnp.full((B, T, 1), -1e30)], axis=-1)
    return SparseTargets(ids.astype(jnp.int32), log_weights, 1 - jnp.sum(jnp.exp(log_weights), axis=-1))


def found(
    config: ObjectiveConfig,
    student: LMHead,
    teacher: Any,
    targets: jax.Array,
    mask: jax.Array,
) -> Any:
    """Value and gradients of the loss that is trained on."""
    coefficients = build_coefficients(config, steps=1)(0)
    value, gradients = differentiated(config)(
        student.hidden, student.embedding, student, teacher, targets, mask, coefficients
    )
    return value, *gradients


@cache
def differentiated(config: ObjectiveConfig) -> Any:
    """One program for all inputs of the same shapes."""

    def total(
        hidden: jax.Array, embedding: jax.Array, student: LMHead, teacher: Any, *rest: Any
    ) -> jax.Array:
        head = replace(student, hidden=hidden, embedding=embedding)
        targets, mask, coefficients = rest
        named = student_and_teacher(head, teacher, targets)
        return lm_head_sums(token_loss(config), *named, mask, config.block_tokens, coefficients)[0]

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1)))


def check(actual: Any, expected: Any, tolerance: float) -> None:
    """Of float32 against float64, relative to the largest entry."""
    assert np.isfinite(actual[0])
    assert float(actual[0]) == pytest.approx(expected[0], rel=tolerance, abs=tolerance)
    for gradient, exact in zip(actual[1:], expected[1:], strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=0, atol=tolerance * np.abs(exact).max())


# Logits of size 40 are rounded by 2e-6 in float32, and exp makes of that a relative error of their probabilities;
# log-probabilities and sums over 61 tokens add to it. 8e-6 were seen in the worst of these.
TOLERANCE = 5e-5


@EACH
@pytest.mark.parametrize("padding", [7, pytest.param(0, marks=pytest.mark.thorough)])
def test_each_objective(config: ObjectiveConfig, padding: int) -> None:
    student, teacher, targets, mask = heads(2, 11, padding)  # blocks of 4 do not divide 11
    signal = teacher if config.needs_teacher else None
    actual = found(config, student, signal, targets, mask)
    check(actual, value_and_gradients(config, student, signal, targets, mask), TOLERANCE)
    assert not np.any(actual[2][V:])


@pytest.mark.thorough
@settings(max_examples=6, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 19),
    block_tokens=st.integers(1, 40),
    name=st.sampled_from(sorted(OBJECTIVES)),
)
def test_blocks_of_any_size(B: int, T: int, block_tokens: int, name: str) -> None:
    config = replace(OBJECTIVES[name], block_tokens=block_tokens)
    # Of one token that the student is sure of, the gradient is what float32's rounding leaves of 1 - 0.999.
    student, teacher, targets, mask = heads(B, T, scale=0.25)
    signal = teacher if config.needs_teacher else None
    actual = found(config, student, signal, targets, mask)
    check(actual, value_and_gradients(config, student, signal, targets, mask), TOLERANCE)


@pytest.mark.thorough
@settings(max_examples=6, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.integers(1, 19),
    block_tokens=st.integers(1, 40),
    K=st.integers(2, 9),
    share=st.sampled_from([0.2, 0.9, 0.9999, 1.0]),
    temperature=st.sampled_from([0.7, 1.0, 2.5]),
)
def test_sparse_targets(B: int, T: int, block_tokens: int, K: int, share: float, temperature: float) -> None:
    config = objective(
        cross_entropy=0.5, forward_kl=1.0, z_loss=0.01, block_tokens=block_tokens, temperature=temperature
    )
    student, _, targets, mask = heads(B, T, padding=7)
    signal = entries(B, T, K, share)
    actual = found(config, student, signal, targets, mask)
    check(actual, value_and_gradients(config, student, signal, targets, mask), TOLERANCE)


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["sum", "sparse", "cross_entropy"])
@pytest.mark.parametrize("mesh", [MeshConfig(1, 1, 8), MeshConfig(2, 2, 2)], ids=["tensor", "all-three"])
def test_with_the_vocabulary_split(name: str, mesh: MeshConfig) -> None:
    """Of 96 rows, the last 35 are padding: three of eight devices hold nothing else."""
    student, teacher, targets, mask = heads(4, 9, padding=35)
    config = objective(forward_kl=1.0, z_loss=0.01) if name == "sparse" else OBJECTIVES[name]
    signal: Any = entries(4, 9) if name == "sparse" else teacher if config.needs_teacher else None
    expected = value_and_gradients(config, student, signal, targets, mask)
    with jax.set_mesh(build_mesh(mesh)):
        check(found(config, student, signal, targets, mask), expected, TOLERANCE)


@mostly_thorough("name", ["sum", "sparse"])
def test_logits_are_never_gathered(name: str) -> None:
    """On a mesh that splits the vocabulary, no device computes anything over all of it."""
    student, teacher, targets, mask = heads(4, 9, padding=35)
    config = objective(forward_kl=1.0) if name == "sparse" else OBJECTIVES[name]
    signal: Any = entries(4, 9) if name == "sparse" else teacher
    mesh = build_mesh(MeshConfig(1, 1, 8))
    split = jax.NamedSharding(mesh, jax.P("tensor"))

    def total(embedding: jax.Array, signal: Any) -> jax.Array:
        head = replace(student, embedding=embedding)
        coefficients = build_coefficients(config, steps=1)(0)
        named = student_and_teacher(head, signal, targets)
        return lm_head_sums(token_loss(config), *named, mask, 8, coefficients)[0]

    with jax.set_mesh(mesh):
        if isinstance(signal, LMHead):
            signal = replace(signal, embedding=jax.device_put(signal.embedding, split))
        embedding = jax.device_put(student.embedding, split)
        text = jax.jit(jax.grad(total)).lower(embedding, signal).compile().as_text()
    assert text is not None
    assert ",12]" in text or "12,12" in text  # its eighth
    assert ",96]" not in text
    assert "[96," not in text


@mostly_thorough("name", [*OBJECTIVES, "sparse"])
def test_no_array_over_all_tokens_and_the_vocabulary(name: str) -> None:
    B, T, block_tokens = 4, 64, 32
    student, teacher, targets, mask = heads(B, T)
    config = objective(forward_kl=1.0) if name == "sparse" else OBJECTIVES[name]
    signal: Any = entries(B, T) if name == "sparse" else teacher if config.needs_teacher else None

    def largest(loss: Any) -> int:
        def total(hidden: jax.Array, embedding: jax.Array, coefficients: Any) -> jax.Array:
            head = replace(student, hidden=hidden, embedding=embedding)
            named = student_and_teacher(head, signal, targets)
            return loss(token_loss(config), *named, mask, coefficients=coefficients)[0]

        coefficients = build_coefficients(config, steps=1)(0)
        gradient = jax.grad(total, argnums=(0, 1))
        jaxpr = jax.make_jaxpr(gradient)(student.hidden, student.embedding, coefficients)
        return max(size for shape, size in arrays(jaxpr.jaxpr) if V in shape and D not in shape)

    assert largest(dense_sums) >= B * T * V
    assert largest(partial(lm_head_sums, block_tokens=block_tokens)) <= block_tokens * V


@pytest.mark.thorough
def test_coefficients_get_no_gradient_and_are_not_compiled_in() -> None:
    student, teacher, targets, mask = heads(2, 9)
    config = OBJECTIVES["sum"]
    traced = 0

    @jax.jit
    def value(coefficients: Any) -> jax.Array:
        nonlocal traced
        traced += 1
        named = student_and_teacher(student, teacher, targets)
        return lm_head_sums(token_loss(config), *named, mask, 4, coefficients)[0]

    now = build_coefficients(config, steps=1)(0)
    other = {**now, "temperature": jnp.float32(3.0), "jsd": jnp.float32(2.0)}
    assert float(value(now)) != float(value(other))
    assert traced == 1
    gradient = jax.grad(lambda values: value(values))(now)
    assert not any(np.any(leaf) for leaf in gradient.values())


@pytest.mark.thorough
@pytest.mark.parametrize("share", [0.999, 1 - 1e-6, 1.0])
def test_a_tail_that_goes_to_nothing(share: float) -> None:
    """The gradient goes to that without one: no infinity on the way, and nothing left of it."""
    student, _, targets, mask = heads(1, 6)
    signal = entries(1, 6, K=5, share=share)
    config = objective(forward_kl=1.0)
    _, with_tail, _ = found(config, student, signal, targets, mask)
    _, without, _ = found(config, student, replace(signal, tail=jnp.zeros_like(signal.tail)), targets, mask)
    assert np.all(np.isfinite(with_tail))
    size = float(jnp.abs(without).max())
    np.testing.assert_allclose(with_tail, without, atol=5 * (1 - share + 1e-7) * size)


@pytest.mark.thorough
@pytest.mark.parametrize("temperature", [0.3, 1.0, 100.0])
@pytest.mark.parametrize("padding", [0, 7])
def test_a_tail_with_no_token_to_be_of_is_left_out(padding: int, temperature: float) -> None:
    student, teacher, targets, mask = heads(2, 5, padding)
    logits = 25.0 * jnp.tanh((teacher.hidden @ teacher.embedding.T)[..., :V] / 25.0)
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), logits.shape)
    log_weights = jax.nn.log_softmax(logits / temperature).clip(
        -60
    )  # none is 0: that one would be another token
    config = objective(forward_kl=1.0, temperature=temperature)
    tails = [jnp.full(targets.shape, tail) for tail in (0.0, 6e-8)]
    without, rounding = (
        found(config, student, SparseTargets(ids, log_weights, tail), targets, mask) for tail in tails
    )
    for one, other in zip(rounding, without, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_tail_is_learnt() -> None:
    """The student's mass outside the ids is pushed to the tail's, which no renormalised loss would do."""
    targets = jnp.zeros((1, 1), jnp.int32)
    config = objective(forward_kl=1.0)
    logits = jnp.zeros((1, 1, V))
    signal = SparseTargets(jnp.array([[[3, 5]]]), jnp.log(jnp.array([[[0.6, 0.3]]])), jnp.array([[0.1]]))

    @jax.jit
    @jax.value_and_grad
    def loss(logits: jax.Array) -> jax.Array:
        per_token = {"targets": targets, "teacher_targets": signal}
        return token_loss(config)({"model": logits}, per_token, build_coefficients(config, 1)(0))[0].sum()

    for _ in range(400):
        logits -= 2.0 * loss(logits)[1]
    P = jax.nn.softmax(logits)[0, 0]
    np.testing.assert_allclose([P[3], P[5], 1 - P[3] - P[5]], [0.6, 0.3, 0.1], atol=1e-3)
    assert float(loss(logits)[0]) == pytest.approx(0, abs=1e-4)


def test_entries_for_the_whole_vocabulary_are_the_dense_teacher() -> None:
    student, teacher, targets, mask = heads(2, 5)
    logits = 25.0 * jnp.tanh(teacher.hidden @ teacher.embedding.T / 25.0)
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), logits.shape)
    whole = SparseTargets(ids, jax.nn.log_softmax(logits), jnp.zeros(targets.shape))
    config = objective(forward_kl=1.0)
    expected = value_and_gradients(config, student, teacher, targets, mask)
    check(found(config, student, whole, targets, mask), expected, TOLERANCE)
