"""Kernels on the device against the references in float32, for the part `kernels` of `gpu.py`."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from shared import median_seconds

from gemma2_jax.kernels.blockwise_attention import blockwise_attention
from gemma2_jax.kernels.cached_attention import cached_attention
from gemma2_jax.kernels.lm_head import LMHead, dense_sums, lm_head_sums
from gemma2_jax.kernels.looped_attention import looped_attention
from gemma2_jax.kernels.reference_attention import attention, visible_keys
from gemma2_jax.kernels.tokamax_attention import tokamax_attention
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.objectives.objective import ObjectiveConfig, build_coefficients, token_loss

# Of the relative errors, norm of the difference / norm of the reference. float32 sums of up to 10^5 products differ by
# their order; bfloat16 rounds to 8 bits, 0.4 %, several times one after another.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
Figures = dict[str, Any]
Attention = Callable[..., jax.Array]  # of query, key, value, positions, segment ids, window, soft cap


def comparisons(
    model: ModelConfig, length: int, window: int, repetitions: int
) -> Iterator[tuple[str, Callable[[], Figures]]]:
    """Yields the name of each comparison and a function that computes its figures.

    Args:
        model: gives heads, widths, vocabulary and soft caps; length: tokens of a row; window: of local attention.
    """
    for seen in (None, window):
        for kernel, dtype in attention_kernels():
            name = f"{kernel.__name__.removesuffix('_attention')} attention, "
            name += f"{'global' if seen is None else f'window {seen}'}, {dtype}"
            yield name, partial(compare_attention, kernel, model, length, seen, dtype, repetitions)
    for dtype in LIMITS:
        yield (
            f"attention to a cache, {dtype}",
            partial(compare_cached_attention, model, length, dtype, repetitions),
        )
    yield "LM head, cross-entropy and KL, float32", partial(compare_head, model, length // 4, repetitions)


def attention_kernels() -> Iterator[tuple[Attention, str]]:
    def looped(query: Any, key: Any, value: Any, _: Any, segments: Any, window: Any, cap: float) -> jax.Array:
        indices = jnp.arange(query.shape[1])
        return looped_attention(window, cap, query, key, value, segments, segments, indices)

    for dtype in LIMITS:
        yield blockwise_attention, dtype
        yield looped, dtype
    yield tokamax_attention, "bfloat16"


def compare_attention(
    kernel: Attention, model: ModelConfig, length: int, window: int | None, dtype: str, repetitions: int
) -> Figures:
    """Compares a kernel with the reference in float32, on the same numbers: those that `dtype` can hold."""
    B, T, H = 2, length, model.head_dim
    shapes = [(B, T, heads, H) for heads in (model.num_heads, model.num_kv_heads, model.num_kv_heads)]
    query, key, value, cotangent = random_arrays([*shapes, shapes[0]], dtype)
    given = (query * H**-0.5, key, value)
    first = T // 3  # tokens of the first of two documents
    tokens = jnp.arange(T)
    positions = jnp.broadcast_to(jnp.where(tokens < first, tokens, tokens - first), (B, T))
    segments = jnp.broadcast_to(jnp.where(tokens < first, 1, 2), (B, T))

    def plain(query: Any, key: Any, value: Any, *_: Any) -> jax.Array:
        visible = visible_keys(positions, positions, segments, segments, window)
        return attention(query, key, value, visible, model.attn_logit_softcap)

    def results(function: Attention) -> Callable[..., Any]:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = function(*arrays, positions, segments, window, model.attn_logit_softcap)
            return jnp.sum(cotangent.astype(jnp.float32) * output), output

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    with jax.default_matmul_precision("highest"):
        expected = results(plain)(*(x.astype(jnp.float32) for x in given))
    return compared(partial(results(kernel), *given), expected, dtype, repetitions)


def compare_cached_attention(model: ModelConfig, length: int, dtype: str, repetitions: int) -> Figures:
    B, S, K, H = 2, length, model.num_kv_heads, model.head_dim
    given = random_arrays([(B, model.num_heads, H), (B, K, S, H), (B, K, S, H)], dtype)
    visible = jnp.broadcast_to(jnp.arange(S) < S - 5, (B, S))
    query, key, value = (x.astype(jnp.float32) for x in given)
    with jax.default_matmul_precision("highest"):
        arrays = (query[:, None], key.swapaxes(1, 2), value.swapaxes(1, 2))
        expected = attention(*arrays, visible[:, None], model.attn_logit_softcap)[:, 0]

    @jax.jit
    def call(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[tuple[()], jax.Array]:
        return (), cached_attention(query, key, value, visible, model.attn_logit_softcap)

    return compared(partial(call, *given), ((), expected), dtype, repetitions)


def compare_head(model: ModelConfig, length: int, repetitions: int) -> Figures:
    """Compares block-wise losses over the vocabulary with those of all logits at once."""
    config = ObjectiveConfig(cross_entropy=0.5, forward_kl=0.5, temperature=1.0, block_tokens=64)
    B, T, V, D = 2, length, model.vocab_size, model.d_model
    arrays = [x * D**-0.25 for x in random_arrays([(B, T, D), (V, D), (B, T, D), (V, D)], "float32")]
    targets = jax.random.randint(jax.random.key(1), (B, T), 0, model.num_tokens)
    coefficients = build_coefficients(config, steps=1)(0)

    def results(sums: Callable[..., Any], *settings: Any) -> Callable[..., Any]:
        def loss(*arrays: Any) -> tuple[jax.Array, jax.Array]:
            student, teacher = (
                LMHead(hidden, embedding, model.final_logit_softcap, model.vocab_padding, trained)
                for hidden, embedding, trained in ((*arrays[:2], True), (*arrays[2:], False))
            )
            heads = {"model": student, "teacher": teacher}
            weighted = token_loss(config), heads, {"targets": targets}, jnp.ones((B, T))
            total: jax.Array = sums(*weighted, *settings, coefficients)[0]
            return total, total

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    with jax.default_matmul_precision("highest"):
        expected = results(dense_sums)(*arrays)
    return compared(
        partial(results(lm_head_sums, config.block_tokens), *arrays), expected, "float32", repetitions
    )


def compared(call: Callable[[], Any], expected: Any, dtype: str, repetitions: int) -> Figures:
    """Relative errors and time of a call that returns gradients, perhaps none, and values."""
    # On GPUs, float32 products have 10 bits by default (TF32).
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        gradients, values = call()
        seconds = median_seconds(lambda: jax.block_until_ready(call()), repetitions)
    errors = [relative_error(*pair) for pair in zip(gradients, expected[0], strict=True)]
    return {
        "values": relative_error(values, expected[1]),
        "gradients": max(errors, default=None),
        "limit": LIMITS[dtype],
        "seconds": seconds,
    }


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    difference = found.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(expected.ravel()))


def random_arrays(shapes: list[tuple[int, ...]], dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
