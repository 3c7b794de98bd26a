"""From logits to the next token: temperature, then top-k, then top-p, as in Hugging Face transformers."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.softcap import NEVER

# Temperatures are limited to this range before logits are divided by them. At the lower end, any two different logits
# stay apart; at the upper end, all become equal; and float32 can hold the results of both.
_LOWEST, _HIGHEST = 1e-30, 1e30


@dataclass(frozen=True)
class TokenChoice:
    """How the next token is chosen; hashable, so that a jitted function can take it as a static argument.

    Attributes:
        temperature, top_k, top_p: as in `SamplingConfig`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __call__(self, logits: jax.Array, keys: jax.Array) -> jax.Array:
        """The next token of each row, int32 [B]; V, which is not a token, where one of the row's logits is NaN.

        Args:
            logits: float32 [B, V]; keys: random keys [B], one per row.
        """
        if self.temperature == 0:
            return largest(logits)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
        scaled = self.distribution(logits)
        # Relative to the largest logit, or else rounding loses the noise at a low temperature.
        return largest(scaled - jnp.max(scaled, axis=-1, keepdims=True) + noise)

    def distribution(self, logits: jax.Array) -> jax.Array:
        """Logits [..., V] after temperature (above 0), top-k and top-p; -inf for tokens that are cut, and for padding.

        Equal logits are kept or cut together, so that the result does not depend on their order.
        """
        scaled = logits / min(max(self.temperature, _LOWEST), _HIGHEST)
        # Divided by a high temperature, the value of masked padding would be a logit like any other.
        logits = jnp.where(logits <= NEVER / 2, -jnp.inf, scaled)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            limit = self.top_k
            logits = _keep_best(logits, lambda better: jnp.sum(better, axis=-1, keepdims=True) < limit)
        if self.top_p is not None and self.top_p < 1:
            logits = _keep_best(logits, _within(jax.nn.softmax(logits, axis=-1), self.top_p))
        return logits


def _within(p: jax.Array, top_p: float) -> Callable[[jax.Array], jax.Array]:
    """A function that decides which tokens to keep, given the tokens that are better than each.

    It keeps a token if the better ones have less than `top_p` of the probability. It sums the better ones or all
    others, whichever sum is smaller, since that has the smaller rounding error: float32 sums of 256,000 probabilities
    reach 1 long before the last.
    """

    def keeps(better: jax.Array) -> jax.Array:
        if top_p <= 0.5:
            return jnp.sum(jnp.where(better, p, 0.0), axis=-1, keepdims=True) < top_p
        return jnp.sum(jnp.where(better, 0.0, p), axis=-1, keepdims=True) > 1 - top_p

    return keeps


def _keep_best(logits: jax.Array, keeps: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Keeps each logit whose better logits, bool [..., V], satisfy `keeps`, bool [..., 1]; others become -inf, not NaN.

    The least logit to keep is found by bisection: 32 sums over V. Sorting V takes a CPU 20 times as long.
    """
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    order = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # the logits as integers, in the same order

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean rounded down, without overflow
        kept = keeps(order > middle)
        return jnp.where(kept, low, middle + 1), jnp.where(kept, middle, high)

    column = jnp.zeros_like(order[..., :1])
    bounds = (column + jnp.iinfo(jnp.int32).min, column + jnp.iinfo(jnp.int32).max)
    least, _ = jax.lax.fori_loop(0, 32, halve, bounds)
    return jnp.where((order < least) & ~jnp.isnan(logits), -jnp.inf, logits)


def largest(logits: jax.Array) -> jax.Array:
    """`jnp.argmax` over the last axis V, as two reductions that a CPU runs several times faster; V where one is NaN."""
    best = jnp.max(logits, axis=-1, keepdims=True)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(logits == best, ids, logits.shape[-1]), axis=-1).astype(jnp.int32)
