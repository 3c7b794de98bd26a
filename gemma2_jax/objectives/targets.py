"""A teacher's sparse distributions as training targets."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax


@partial(jax.tree_util.register_dataclass, data_fields=["ids", "log_weights", "tail"], meta_fields=[])
@dataclass(frozen=True)
class SparseTargets:
    """A few tokens of a teacher's distribution at each position, and the total weight of all others. A pytree.

    Attributes:
        ids: int32 [B, T, K], token ids, distinct within a position.
        log_weights: float32 [B, T, K], logarithms of the tokens' weights; unused slots hold `softcap.NEVER` or any
            other finite number whose exp is 0.
        tail: float32 [B, T], total weight of all other tokens; 0 if the weights of `ids` are the whole distribution.
    """

    ids: Any
    log_weights: Any
    tail: Any
