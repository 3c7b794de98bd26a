"""Distances of a student's hidden states and attention from a teacher's, for each token.

Both distances are relative, so that a weight means the same for every layer, whatever the magnitude of its states
and the number of keys that a query attends to. The teacher gets no gradient.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.blocks import join_tokens, split_tokens
from gemma2_jax.kernels.reference_attention import attention_weights, visible_keys
from gemma2_jax.model.capture import CapturedLayer
from gemma2_jax.model.linear import linear_in_float32
from gemma2_jax.sharding.layout import constrain

DistanceName = Literal["mse", "cosine"]

# Queries whose distributions over the keys are in memory at a time; for all T queries, they would take [B, N, T, S].
_BLOCK_QUERIES = 128

# Prevents NaN for a state that is all zeros, such as one of a token with weight 0; negligible for any other state.
_TINY = 1e-12


def relative_squared_error(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """|s - t|^2 / |t|^2 over the last axis: the mean squared error over the teacher's mean square."""
    error = jnp.sum(jnp.square(student - teacher), axis=-1)
    return error / (jnp.sum(jnp.square(teacher), axis=-1) + _TINY)


def cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cos(s, t) over the last axis.

    It is computed as half the squared distance of the normalised vectors, which stays precise where they are nearly
    parallel.
    """
    student, teacher = (
        x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _TINY) for x in (student, teacher)
    )
    return 0.5 * jnp.sum(jnp.square(student - teacher), axis=-1)


DISTANCES: Mapping[DistanceName, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "mse": relative_squared_error,
    "cosine": cosine_distance,
}


def hidden_distance(
    student: CapturedLayer, teacher: CapturedLayer, projection: jax.Array | None, distance: DistanceName
) -> jax.Array:
    """Distance between hidden states (TinyBERT, arXiv 1909.10351, section 3.1), float32 [B, T].

    Args:
        student, teacher: layers whose hidden states were captured, [B, T, D] and [B, T, E].
        projection: [D, E], maps the student's states to the teacher's width; None if the widths are equal.
        distance: which of `DISTANCES`.
    """
    assert student.hidden is not None
    assert teacher.hidden is not None
    states = student.hidden
    if projection is not None:
        states = linear_in_float32("BTD,DE->BTE", states, projection, "DE")
    target = jax.lax.stop_gradient(teacher.hidden.astype(jnp.float32))
    return DISTANCES[distance](constrain(states.astype(jnp.float32), "BTE"), target)


def attention_distance(
    student: CapturedLayer,
    teacher: CapturedLayer,
    positions: jax.Array,
    segment_ids: jax.Array,
    distance: DistanceName,
) -> jax.Array:
    """Distance between each query's distributions over the keys, averaged over heads, float32 [B, T].

    TinyBERT (arXiv 1909.10351, section 3.1) matches each head's scores instead. That needs the same number of heads in
    both models, and scores are not comparable if the models differ in soft cap or scale. Queries are processed in
    blocks, whose scores the backward pass recomputes.

    Args:
        student, teacher: layers whose queries and keys were captured.
        positions, segment_ids: [B, T].
        distance: which of `DISTANCES`.
    """

    def block_distance(block: tuple[jax.Array, ...]) -> jax.Array:
        student_query, teacher_query, *rest = block
        student_weights = mean_weights(student, student_query, *rest)
        teacher_weights = jax.lax.stop_gradient(mean_weights(teacher, teacher_query, *rest))
        return DISTANCES[distance](student_weights, teacher_weights)

    def mean_weights(
        layer: CapturedLayer, query: jax.Array, query_positions: jax.Array, query_segments: jax.Array
    ) -> jax.Array:
        assert layer.key is not None
        visible = visible_keys(query_positions, positions, query_segments, segment_ids, layer.window)
        return jnp.mean(attention_weights(query, layer.key, visible, layer.softcap), axis=(1, 2))

    T = positions.shape[1]
    queries = (student.query, teacher.query, positions, segment_ids)
    blocks = split_tokens(-(-T // _BLOCK_QUERIES), queries)
    return join_tokens(jax.lax.map(jax.checkpoint(block_distance, prevent_cse=False), blocks), T)
