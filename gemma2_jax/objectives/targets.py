"""A teacher's distributions as training targets."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "log_weights", "tail"], meta_fields=[])
@dataclass(frozen=True)
class SparseTargets:
    """A few tokens of a teacher's distribution at each position, and the weight of all others. A pytree.

    Attributes:
        ids: int32 [B, T, K], the tokens of one position all different.
        log_weights: float32 [B, T, K], logarithms of their weights; `softcap.NEVER`, or anything else that is finite
            and whose exp is 0, in a place without a token.
        tail: float32 [B, T], the weight of all other tokens together; 0 where the ids are all there are.
    """

    ids: Any
    log_weights: Any
    tail: Any
