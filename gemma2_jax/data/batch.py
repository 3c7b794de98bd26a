"""The one thing that flows from data to training."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.data.config import DataConfig
from gemma2_jax.sharding.layout import batch_sharding

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
        extra: what else a method needs of each token, by name: a pytree of arrays [B, T, ...].
    """

    tokens: Rows
    targets: Rows
    positions: Rows
    segment_ids: Rows
    loss_mask: Rows
    extra: dict[str, Any] = field(default_factory=dict)


def abstract_batch(data: DataConfig, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    ids = abstract_rows(data, mesh, jnp.int32)
    return Batch(ids, ids, ids, ids, abstract_rows(data, mesh, jnp.float32))


def abstract_rows(data: DataConfig, mesh: Mesh, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    """An array [B, T, ...] of a batch."""
    shape = (data.batch_size, data.seq_len, *more)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
