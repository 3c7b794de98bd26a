"""The part `kernels` of `gpu.py`: values and gradients on the device against the references, in float32."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments.benchmarks.gpu_common import LIMITS, OURS, Figures, Report, Size, run_config, timed
from gemma2_jax.kernels.blockwise_attention import blockwise_attention
from gemma2_jax.kernels.cached_attention import cached_attention
from gemma2_jax.kernels.lm_head import LMHead, dense_sums, lm_head_sums
from gemma2_jax.kernels.looped_attention import looped_attention
from gemma2_jax.kernels.reference_attention import attention, visible_keys
from gemma2_jax.kernels.tokamax_attention import tokamax_attention
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.objectives.objective import ObjectiveConfig, build_coefficients, token_loss


def kernels(size: Size, report: Report) -> None:
    model = run_config(size).model
    for window in (None, size.window):
        for name, dtype, kernel in attention_kernels(window, model.attn_logit_softcap):
            kind = "global" if window is None else f"window {window}"
            report.attempt(
                f"{name} attention, {kind}, {dtype}",
                OURS,
                partial(attention_errors, kernel, model, size, window, dtype),
            )
    for dtype in LIMITS:
        report.attempt(f"attention to a cache, {dtype}", OURS, partial(cache_errors, model, size, dtype))
    report.attempt("LM head, cross-entropy and KL, float32", OURS, partial(head_errors, model, size))


def attention_kernels(window: int | None, cap: float) -> Iterator[tuple[str, str, Callable[..., jax.Array]]]:
    """Yields name, dtype and function of query, key, value, positions and segment ids."""

    def blockwise(*arrays: jax.Array) -> jax.Array:
        return blockwise_attention(*arrays, window, cap)

    def looped(*arrays: jax.Array) -> jax.Array:
        query, key, value, _, segments = arrays
        indices = jnp.arange(query.shape[1])
        return looped_attention(window, cap, query, key, value, segments, segments, indices)

    def tokamax(*arrays: jax.Array) -> jax.Array:
        return tokamax_attention(*arrays, window, cap)

    for dtype in LIMITS:
        yield "blockwise", dtype, blockwise
        yield "looped", dtype, looped
    yield "tokamax", "bfloat16", tokamax


def attention_errors(
    kernel: Callable[..., jax.Array], model: ModelConfig, size: Size, window: int | None, dtype: str
) -> list[Figures]:
    """Compares a kernel with the reference in float32, on the same numbers: those that `dtype` can hold."""
    B, T = 2, size.kernel_length
    shapes = [(B, T, heads, model.head_dim) for heads in (model.num_heads, *2 * (model.num_kv_heads,))]
    query, key, value, cotangent = random_arrays([*shapes, shapes[0]], dtype)
    first = T // 3  # tokens of the first of two documents
    tokens = jnp.arange(T)
    positions = jnp.broadcast_to(jnp.where(tokens < first, tokens, tokens - first), (B, T))
    segments = jnp.broadcast_to(jnp.where(tokens < first, 1, 2), (B, T))
    given = (query * model.head_dim**-0.5, key, value)

    def plain(query: jax.Array, key: jax.Array, value: jax.Array, *_: jax.Array) -> jax.Array:
        visible = visible_keys(positions, positions, segments, segments, window)
        return attention(query, key, value, visible, model.attn_logit_softcap)

    def results(function: Callable[..., jax.Array]) -> Callable[..., Any]:
        def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            output = function(*arrays, positions, segments)
            return jnp.sum(cotangent.astype(jnp.float32) * output), output

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))

    exact = [x.astype(jnp.float32) for x in given]
    with jax.default_matmul_precision("highest"):
        gradients, output = results(plain)(*exact)
    return compared(partial(results(kernel), *given), (output, *gradients), dtype, size)


def cache_errors(model: ModelConfig, size: Size, dtype: str) -> list[Figures]:
    B, S, K, H = 2, size.kernel_length, model.num_kv_heads, model.head_dim
    query, key, value = given = random_arrays([(B, model.num_heads, H), (B, K, S, H), (B, K, S, H)], dtype)
    visible = jnp.broadcast_to(jnp.arange(S) < S - 5, (B, S))
    cap = model.attn_logit_softcap
    query, key, value = (x.astype(jnp.float32) for x in given)
    with jax.default_matmul_precision("highest"):
        arrays = (query[:, None], key.swapaxes(1, 2), value.swapaxes(1, 2))
        expected = attention(*arrays, visible[:, None], cap)[:, 0]
    call = jax.jit(lambda *arrays: ((), cached_attention(*arrays, visible, cap)))
    return compared(partial(call, *given), (expected,), dtype, size)


def head_errors(model: ModelConfig, size: Size) -> list[Figures]:
    """Compares block-wise losses over the vocabulary with those of all logits at once, and their gradients."""
    config = ObjectiveConfig(cross_entropy=0.5, forward_kl=0.5, temperature=1.0, block_tokens=64)
    B, T, V, D = 2, size.kernel_length // 4, model.vocab_size, model.d_model
    shapes = [(B, T, D), (V, D), (B, T, D), (V, D)]
    arrays = [x * x.shape[-1] ** -0.25 for x in random_arrays(shapes, "float32")]
    targets = jax.random.randint(jax.random.key(1), (B, T), 0, model.num_tokens)

    def results(sums: Callable[..., Any]) -> Callable[..., Any]:
        def loss(hidden: Any, embedding: Any, *teacher: Any) -> tuple[jax.Array, jax.Array]:
            constants = model.final_logit_softcap, model.vocab_padding
            student = LMHead(hidden, embedding, *constants)
            heads = {"model": student, "teacher": LMHead(*teacher, *constants, trained=False)}
            coefficients = build_coefficients(config, steps=1)(0)
            mask = jnp.ones((B, T))
            total: jax.Array = sums(token_loss(config), heads, {"targets": targets}, mask)(coefficients)
            return total, total

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))

    def dense(*arguments: Any) -> Callable[[Any], jax.Array]:
        return lambda coefficients: dense_sums(*arguments, coefficients)[0]

    def blocks(*arguments: Any) -> Callable[[Any], jax.Array]:
        return lambda coefficients: lm_head_sums(*arguments, config.block_tokens, coefficients)[0]

    with jax.default_matmul_precision("highest"):
        gradients, total = results(dense)(*arrays)
    return compared(partial(results(blocks), *arrays), (total, *gradients), "float32", size)


def compared(call: Callable[[], Any], expected: tuple[Any, ...], dtype: str, size: Size) -> list[Figures]:
    """Relative errors and time of a call that returns gradients (none: ()) and values; expected: values, gradients."""
    # On GPUs, float32 products have 10 bits by default (TF32).
    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        gradients, values = call()
        seconds, compile_seconds = timed(call, size.steps)
    errors = [relative_error(*pair) for pair in zip((values, *gradients), expected, strict=True)]
    row = {"values": errors[0], "gradients": max(errors[1:], default=None), "limit": LIMITS[dtype]}
    return [row | {"seconds": seconds, "compile_seconds": compile_seconds}]


def relative_error(found: jax.Array, expected: jax.Array) -> float:
    difference = found.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference.ravel()) / jnp.linalg.norm(expected.ravel()))


def random_arrays(shapes: list[tuple[int, ...]], dtype: str) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
