"""Tuning for particular compilers: the same mathematics, written so that compiled programs are faster or smaller.

Each function or entry names its compiler, and what happens without it. None changes a result, except by the order of
additions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class HeadPlan:
    """How the LM head processes blocks of tokens.

    Attributes:
        sum_dims: letters of the array that accumulates the embedding's gradient: VD or DV.
        casts_blockwise: whether the embedding is cast again for each block, as a part of the block's product.
    """

    sum_dims: str
    casts_blockwise: bool

    def as_embedding(self, gradient: jax.Array) -> jax.Array:
        """The accumulated gradient, [V, D] or [D, V] in this plan, as [V, D]."""
        return gradient if self.sum_dims == "VD" else separate_transpose(gradient)


# XLA on CPU: for [V, D], the accumulating product needs its largest operand, the gradient of the logits, transposed;
# for [D, V] it takes about 2/3 of the time.
# XLA on TPU: the cast is free while a product reads the embedding. A cast copy of the whole embedding is larger than
# the logits of two blocks.
_HEAD_PLANS = {"cpu": HeadPlan("DV", False), "tpu": HeadPlan("VD", True)}
_OTHER_PLATFORMS = HeadPlan("VD", False)


def by_head_plan(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function(plan, *arguments)` with the plan of the platform that the program is compiled for."""
    each = {platform: partial(function, plan) for platform, plan in _HEAD_PLANS.items()}
    return jax.lax.platform_dependent(*arguments, **each, default=partial(function, _OTHER_PLATFORMS))


def stays_in_loop(x: jax.Array, number: jax.Array) -> jax.Array:
    """x times a 1 that depends on `number`, so that what follows is recomputed in each iteration of a loop.

    For all compilers: otherwise they compute it once for all of x before the loop and keep the result, which takes more
    memory than it is worth in time. (An optimization barrier does not stop them.)

    Args:
        number: differs between iterations, and is never the least number of its dtype.
    """
    kind = jnp.iinfo if jnp.issubdtype(number.dtype, jnp.integer) else jnp.finfo
    one = jnp.where(number == kind(number.dtype).min, 2.0, 1.0).astype(x.dtype)
    return x * one


def separate_transpose(x: jax.Array) -> jax.Array:
    """Transposes x, float32 products of narrower arrays, in an operation of its own.

    For XLA on CPU (JAX 0.10 and 0.12): if there is only one block, nothing separates the product from the
    transposition, and XLA merges them into one product that it cannot compute: "Unsupported element type for DotThunk:
    BF16 x BF16 = F32".
    """
    barred: jax.Array = jax.lax.optimization_barrier(x)
    return barred.T


def computed_once(x: jax.Array) -> jax.Array:
    """x [B, T, ...], indexed by all indices of its second axis, which changes nothing.

    For XLA on CPU: otherwise it recomputes x in each of the many loops that use it. For the sines of rotary positions
    that costs 3 % of a training step of a small model.
    """
    return x[:, jnp.arange(x.shape[1])]
