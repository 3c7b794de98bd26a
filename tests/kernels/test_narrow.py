"""Products of 16-bit numbers that are summed in float32: in a loop, where one block is all there is, and transposed."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.kernels.blockwise_attention import blockwise_attention
from gemma2_jax.kernels.cached_attention import cached_attention
from gemma2_jax.kernels.lm_head import LMHead, dense_sums, lm_head_sums
from gemma2_jax.kernels.looped_attention import looped_attention
from gemma2_jax.kernels.reference_attention import attention, visible_keys
from gemma2_jax.model.capture import CapturedLayer
from gemma2_jax.objectives import terms
from gemma2_jax.objectives.distances import hidden_distance
from tests.parameters import mostly_thorough

THOROUGH = pytest.mark.thorough
DTYPES = pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=THOROUGH)])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def close(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        exact = np.asarray(other, np.float64)
        np.testing.assert_allclose(np.asarray(one, np.float64), exact, atol=0.05 * np.abs(exact).max())


def loss_inputs(B: int, T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Hidden states, embedding, and the teacher's hidden states."""
    return normal(0, B, T, 24), normal(1, 61, 24), normal(2, B, T, 24)


def total_loss(
    hidden: jax.Array, embedding: jax.Array, taught: jax.Array, loss: Callable[..., Any]
) -> jax.Array:
    def token_loss(logits: Any, targets: jax.Array, _: Any) -> Any:
        kl = terms.forward_kl(logits["model"], logits["teacher"], 1.0)
        return terms.cross_entropy(logits["model"], targets) + kl, {}

    targets, mask = jnp.zeros(hidden.shape[:2], jnp.int32), jnp.ones(hidden.shape[:2])
    heads = {
        "model": LMHead(hidden, embedding, 30.0),
        "teacher": LMHead(taught.astype(hidden.dtype), embedding, 30.0, trained=False),
    }
    summed: jax.Array = loss(token_loss, heads, targets, mask)[0]
    return summed


@cache
def wide_loss(B: int, T: int) -> tuple[jax.Array, Any]:
    """The value in float32, and its gradients."""
    return jax.jit(jax.value_and_grad(partial(total_loss, loss=dense_sums), (0, 1)))(*loss_inputs(B, T))


@DTYPES
@mostly_thorough(
    ("B", "T", "block_tokens", "narrow_embedding"),
    [(2, 11, 512, False), (1, 1, 512, True), (8, 32, 512, False), (2, 11, 4, False), (8, 32, 4, True)],
)
def test_the_loss(dtype: Any, B: int, T: int, block_tokens: int, narrow_embedding: bool) -> None:
    hidden, embedding, taught = loss_inputs(B, T)
    narrow = hidden.astype(dtype), embedding.astype(dtype) if narrow_embedding else embedding, taught
    blockwise = partial(total_loss, loss=partial(lm_head_sums, block_tokens=block_tokens))
    expected = wide_loss(B, T)
    close(jax.jit(blockwise)(*narrow), expected[0])
    close(jax.jit(jax.value_and_grad(blockwise, (0, 1)))(*narrow), expected)


def reference(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> jax.Array:
    segments = jnp.ones_like(positions)
    visible = visible_keys(positions, positions, segments, segments, 8)
    return attention(query, key, value, visible, 50.0)


def blockwise(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> jax.Array:
    return blockwise_attention(query, key, value, positions, jnp.ones_like(positions), 8, 50.0)


def looped(query: jax.Array, key: jax.Array, value: jax.Array, positions: jax.Array) -> jax.Array:
    segments = jnp.ones_like(positions)
    return looped_attention(8, 50.0, query, key, value, segments, segments, positions[0])


def attention_inputs(B: int, T: int, N: int, K: int, scale: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    return scale * normal(0, B, T, N, 16), normal(1, B, T, K, 16), normal(2, B, T, K, 16)


def attention_gradients(kernel: Callable[..., jax.Array]) -> Callable[..., Any]:
    def total(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        positions = jnp.broadcast_to(jnp.arange(query.shape[1]), query.shape[:2])
        return jnp.sum(kernel(query, key, value, positions).astype(jnp.float32) ** 2)

    return jax.jit(jax.grad(total, (0, 1, 2)))


@cache
def wide_attention(B: int, T: int, N: int, K: int, scale: float) -> Any:
    """The gradients of the reference in float32."""
    return attention_gradients(reference)(*attention_inputs(B, T, N, K, scale))


@DTYPES
@mostly_thorough(
    ("kernel", "B", "T", "N", "K"),
    [
        *((kernel, 2, 11, 4, 2) for kernel in (reference, blockwise, looped)),
        *((kernel, 1, 140, 2, 1) for kernel in (blockwise, looped)),
        (blockwise, 2, 32, 4, 1),
        (looped, 1, 9, 1, 1),
    ],
)
def test_attention(dtype: Any, kernel: Callable[..., jax.Array], B: int, T: int, N: int, K: int) -> None:
    # exp of the scores of the first is beyond float16; bfloat16 has the room, and fewer digits.
    scale = 1.0 if dtype == jnp.float16 else 0.5
    narrow = [x.astype(dtype) for x in attention_inputs(B, T, N, K, scale)]
    close(attention_gradients(kernel)(*narrow), wide_attention(B, T, N, K, scale))


@DTYPES
@pytest.mark.parametrize(("B", "N", "K"), [(2, 4, 2), (1, 1, 1), (3, 4, 1)])
def test_attention_to_a_cache(dtype: Any, B: int, N: int, K: int) -> None:
    query, key, value = normal(0, B, N, 16), normal(1, B, K, 24, 16), normal(2, B, K, 24, 16)

    @jax.jit
    def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return cached_attention(query, key, value, jnp.ones((B, 24), bool), 50.0)

    close(attend(*(x.astype(dtype) for x in (query, key, value))), attend(query, key, value))


@DTYPES
@pytest.mark.parametrize(("B", "T"), [(2, 11), (1, 1)])
def test_distances_through_a_projection(dtype: Any, B: int, T: int) -> None:
    states, target, projection = normal(0, B, T, 12), normal(1, B, T, 20), normal(2, 12, 20)

    def total(states: jax.Array, projection: jax.Array) -> jax.Array:
        student, teacher = (
            CapturedLayer(hidden=hidden, query=None, key=None, window=None, softcap=50.0)
            for hidden in (states, target.astype(states.dtype))
        )
        return jnp.sum(hidden_distance(student, teacher, projection, "mse"))

    gradient = jax.jit(jax.grad(total, (0, 1)))
    close(gradient(states.astype(dtype), projection), gradient(states, projection))
