"""Tuning for processors and compilers: the same mathematics, written so that a certain compiler makes less of it.

Each function or entry says which compiler it is for, and what happens without it. None of them changes a result, but
for the order of additions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class HeadPlan:
    """How the LM head goes through blocks of tokens.

    Attributes:
        sums_as: the letters of the array that sums up the embedding's gradient: VD or DV.
        casts_blockwise: whether the embedding is cast anew for each block, as a part of its product.
    """

    sums_as: str
    casts_blockwise: bool

    def as_embedding(self, gradient: jax.Array) -> jax.Array:
        """The sum [V, D] or [D, V], as this plan has it, as [V, D]."""
        return gradient if self.sums_as == "VD" else transposed_apart(gradient)


# XLA on CPU: as [V, D], the sum's product needs its largest operand, the gradient of the logits, transposed; as [D, V]
# it takes some 2/3 of the time.
# XLA on TPU: the cast is free while a product reads the embedding. All at once, the copy is larger than the logits of
# two blocks.
_HEAD_PLANS = {"cpu": HeadPlan("DV", False), "tpu": HeadPlan("VD", True)}
_OTHERWISE = HeadPlan("VD", False)


def by_head_plan(function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(plan, *arguments)` with the plan of the platform that the program is compiled for."""
    each = {platform: partial(function, plan) for platform, plan in _HEAD_PLANS.items()}
    return jax.lax.platform_dependent(*arguments, **each, default=partial(function, _OTHERWISE))


def stays_in_loop(x: jax.Array, number: jax.Array) -> jax.Array:
    """x, times a 1 that depends on `number`, so that what follows is computed in each turn of a loop.

    For all compilers: they would compute it once for all of x before the loop, and keep the result, which takes more
    memory than it saves time. (They do so over an optimization barrier.)

    Args:
        number: differs from turn to turn, and is never the least number of its dtype.
    """
    kind = jnp.iinfo if jnp.issubdtype(number.dtype, jnp.integer) else jnp.finfo
    one = jnp.where(number == kind(number.dtype).min, 2.0, 1.0).astype(x.dtype)
    return x * one


def transposed_apart(x: jax.Array) -> jax.Array:
    """x transposed, x being float32 products of narrower arrays, by an operation of its own.

    For XLA on CPU (JAX 0.10 and 0.12): where one block is all there is, nothing else stands between the product and the
    transposition, and it makes one product of them that it then cannot compute: "Unsupported element type for DotThunk:
    BF16 x BF16 = F32".
    """
    barred: jax.Array = jax.lax.optimization_barrier(x)
    return barred.T


def computed_once(x: jax.Array) -> jax.Array:
    """x [B, T, ...], taken by the indices of its second axis, which changes nothing.

    For XLA on CPU: it would else compute x again in each of the many loops that use it. For the sines of rotary
    positions that is 3 % of a training step of a small model.
    """
    return x[:, jnp.arange(x.shape[1])]
