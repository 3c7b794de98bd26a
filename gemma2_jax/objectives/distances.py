"""How far a student's hidden states and attention are from a teacher's, token by token.

Both distances are relative, so that a weight means the same for every layer, whatever the size of its states
and however many keys a query sees. The teacher gets no gradient.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.attention import attention_weights, visible_keys
from gemma2_jax.kernels.blocks import join_tokens, split_tokens
from gemma2_jax.model.capture import CapturedLayer
from gemma2_jax.model.linear import linear_in_float32
from gemma2_jax.sharding.layout import constrain

DistanceName = Literal["mse", "cosine"]

# Queries whose distributions are there at a time; of all of them, those would be [B, N, T, S].
_BLOCK_QUERIES = 128

# Keeps a state that is all zeros, and whose weight may well be 0, from giving NaN; lost in any other.
_TINY = 1e-12


def relative_squared_error(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """|s - t|^2 / |t|^2 over the last axis: the mean squared error over the teacher's mean square."""
    error = jnp.sum(jnp.square(student - teacher), axis=-1)
    return error / (jnp.sum(jnp.square(teacher), axis=-1) + _TINY)


def cosine_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 - cos(s, t) over the last axis: half the squared distance of the two brought to length 1, which keeps its
    digits where they are nearly parallel."""
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
    """Between hidden states (TinyBERT, arXiv 1909.10351, section 3.1), float32 [B, T].

    Args:
        student, teacher: layers whose hidden states were captured, [B, T, D] and [B, T, E].
        projection: [D, E], takes the student's states to the teacher's width; None where it is the same.
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
    """Between each query's distributions over the keys, averaged over heads, float32 [B, T].

    TinyBERT (arXiv 1909.10351, section 3.1) matches each head's scores, which needs as many heads on both sides and
    ties scores that soft caps and scales of their own make incomparable. Queries are taken in blocks, whose scores the
    backward pass computes again.

    Args:
        student, teacher: layers whose queries and keys were captured.
        positions, segment_ids: [B, T].
    """

    def of_block(block: tuple[jax.Array, ...]) -> jax.Array:
        student_query, teacher_query, *of_queries = block
        own = mean_weights(student, student_query, *of_queries)
        its = jax.lax.stop_gradient(mean_weights(teacher, teacher_query, *of_queries))
        return DISTANCES[distance](own, its)

    def mean_weights(
        layer: CapturedLayer, query: jax.Array, query_positions: jax.Array, query_segments: jax.Array
    ) -> jax.Array:
        assert layer.key is not None
        visible = visible_keys(query_positions, positions, query_segments, segment_ids, layer.window)
        return jnp.mean(attention_weights(query, layer.key, visible, layer.softcap), axis=(1, 2))

    T = positions.shape[1]
    queries = (student.query, teacher.query, positions, segment_ids)
    blocks = split_tokens(-(-T // _BLOCK_QUERIES), queries)
    return join_tokens(jax.lax.map(jax.checkpoint(of_block, prevent_cse=False), blocks), T)
