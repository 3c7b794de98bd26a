"""`Batch`, the only data type that passes from the data pipeline to training."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.data.config import DataConfig
from gemma2_jax.sharding.layout import batch_sharding

Rows = Any  # NumPy arrays on the host, jax.Arrays on devices, jax.ShapeDtypeStructs for abstract batches


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Rows of packed documents; a pytree.

    A row is a sequence of documents, each a segment. A document that does not fit into the rest of a row continues in
    a later row as a new segment. At each position the model predicts `targets`, which belong to the same document.

    Attributes:
        tokens: int32 [B, T].
        targets: int32 [B, T], the token that follows each of `tokens` in its document.
        positions: int32 [B, T], counted from 0 in every segment.
        segment_ids: int32 [B, T], counted from 1 in every row; 0 is padding.
        loss_mask: float32 [B, T], the weight of each target in the loss; 0 on padding.
        extra: further per-token data that a method needs, by name: a pytree of arrays [B, T, ...].
    """

    tokens: Rows
    targets: Rows
    positions: Rows
    segment_ids: Rows
    loss_mask: Rows
    extra: dict[str, Any] = field(default_factory=dict)


def abstract_batch(data: DataConfig, mesh: Mesh) -> Batch:
    """Returns the shapes, dtypes and shardings of a batch."""
    ids = abstract_rows(data, mesh, jnp.int32)
    return Batch(ids, ids, ids, ids, abstract_rows(data, mesh, jnp.float32))


def abstract_rows(data: DataConfig, mesh: Mesh, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    """Returns one abstract array [B, T, ...] of a batch; `more` are the sizes of the axes after T."""
    shape = (data.batch_size, data.seq_len, *more)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
