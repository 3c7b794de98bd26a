"""The one thing that flows from data to training."""

from dataclasses import dataclass
from typing import Any

import jax

Rows = Any  # NumPy arrays on the host, jax.Arrays on devices, jax.ShapeDtypeStructs before anything runs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed documents; a pytree.

    A row holds one document after another, each a segment; a document longer than what is left of a row goes
    on in a later one as a new segment. What a model predicts at a place is `targets` there, within the same
    document.

    Attributes:
        tokens: int32 [B, T].
        targets: int32 [B, T], the token that follows each of `tokens` in its document.
        positions: int32 [B, T], counted from 0 in every segment.
        segment_ids: int32 [B, T], from 1 in every row; 0 is padding.
        loss_mask: float32 [B, T], the weight of each target in the loss; 0 on padding.
    """

    tokens: Rows
    targets: Rows
    positions: Rows
    segment_ids: Rows
    loss_mask: Rows
