"""From logits to the next token: temperature, then top-k, then top-p, as in Hugging Face transformers."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.softcap import NEVER

# What a temperature is brought to before logits are divided by it: at the lower end any two that differ are told
# apart, at the upper end none are, and neither is more than float32 can hold.
_COLDEST, _WARMEST = 1e-30, 1e30


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is chosen; hashable, so that a jitted function can take it as static.

    Attributes:
        temperature, top_k, top_p: as in `SamplingConfig`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """The next token of each row, int32 [B]; V, which is none, where one of the row's logits is NaN.

        Args:
            logits: float32 [B, V]; keys: random keys [B], each row's own.
        """
        if self.temperature == 0:
            return _argmax(logits)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        scaled = self.distribution(logits)
        # From the largest on, or the noise would be lost to rounding at a low temperature.
        return _argmax(scaled - jnp.max(scaled, axis=-1, keepdims=True) + noise)

    def distribution(self, logits: jax.Array) -> jax.Array:
        """[B, V]: logits after temperature (above 0), top-k and top-p; -inf for what is cut, and for padding.

        Equals are kept or cut together, so that the result does not hang on their order.
        """
        scaled = logits / min(max(self.temperature, _COLDEST), _WARMEST)
        # Divided by a high temperature, what stands for no logit would be one like all others.
        logits = jnp.where(logits <= NEVER / 2, -jnp.inf, scaled)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            limit = self.top_k
            logits = _keep_best(logits, lambda better: jnp.sum(better, axis=-1, keepdims=True) < limit)
        if self.top_p is not None and self.top_p < 1:
            logits = _keep_best(logits, _within(jax.nn.softmax(logits, axis=-1), self.top_p))
        return logits


def _within(p: jax.Array, top_p: float) -> Callable[[jax.Array], jax.Array]:
    """Whether those who are better have less than `top_p` of the probability, or all others more than the rest.

    The sum is that of the smaller side, whose rounding is the smaller too: float32 sums of 256,000 probabilities reach
    1 long before the last.
    """

    def keeps(better: jax.Array) -> jax.Array:
        if top_p <= 0.5:
            return jnp.sum(jnp.where(better, p, 0.0), axis=-1, keepdims=True) < top_p
        return jnp.sum(jnp.where(better, 0.0, p), axis=-1, keepdims=True) > 1 - top_p

    return keeps


def _keep_best(logits: jax.Array, keeps: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keep each logit whose betters, bool [B, V], satisfy `keeps`, bool [B, 1]; the others become -inf, but for NaN.

    The least logit to keep is found by bisection: 32 sums over V, where sorting V takes a CPU 20 times as long.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # as whole numbers, in the same order

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean rounded down, without overflow
        kept = keeps(order > middle)
        return jnp.where(kept, low, middle + 1), jnp.where(kept, middle, high)

    column = jnp.zeros_like(order[:, :1])
    bounds = (column + jnp.iinfo(jnp.int32).min, column + jnp.iinfo(jnp.int32).max)
    least, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where((order < least) & ~jnp.isnan(logits), -jnp.inf, logits)


def _argmax(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis as two plain reductions, which a CPU runs several times faster; V where one is
    NaN."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits == best, ids, logits.shape[-1]), axis=-1).astype(jnp.int32)
