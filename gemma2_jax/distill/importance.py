"""The importance of each channel, neuron and head of a teacher on data, which decides what a narrower student keeps."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gemma2_jax.data.batch import Batch
from gemma2_jax.model.linear import for_use
from gemma2_jax.model.transformer import Block, Collector, Gemma2, Taps


@partial(jax.tree_util.register_dataclass, data_fields=["channels", "neurons", "heads"], meta_fields=[])
@dataclass(frozen=True)
class BlockImportance:
    """The importance in one kind of block, stacked over the pairs: averages over tokens, float32.

    Attributes:
        channels: [P, D], absolute value after the pre-attention norm plus that after the pre-MLP norm.
        neurons: [P, F], norm of the neuron's contribution to the MLP's output [D].
        heads: [P, N], norm of the head's contribution to the attention's output [D].
    """

    channels: Any
    neurons: Any
    heads: Any


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "final"], meta_fields=[])
@dataclass(frozen=True)
class Importance:
    """The importance in a whole model.

    Attributes:
        blocks: importance in the blocks, under `local_block` and `global_block`.
        final: [D], absolute value after the final norm, averaged over tokens.
    """

    blocks: dict[str, BlockImportance]
    final: Any


def measure(teacher: Gemma2, batches: Iterable[Batch], mesh: Mesh) -> Importance:
    """Measures the importance of the teacher's channels, neurons and heads on some batches, as NumPy arrays.

    This follows Minitron (Muralidharan et al., arXiv 2407.14679, section 2.2), with two differences. Every token has
    the same weight, since a packed row is not a unit of text. And heads and neurons are measured after the output
    projection: the heads of a group share their values, so a head that contributes nothing to the output could not be
    recognised before it.

    Args:
        batches: batches on the mesh; padding tokens do not count.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(_sums, out_shardings=replicated)
    total: Importance | None = None
    tokens = 0.0
    with jax.set_mesh(mesh):
        for batch in batches:
            sums, count = step(teacher, batch)
            tokens += float(count)
            total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    if total is None:
        raise ValueError("there are no batches to measure importance on")
    averages: Importance = jax.tree.map(lambda sum_: np.asarray(sum_) / max(tokens, 1.0), total)
    return averages


def _sums(teacher: Gemma2, batch: Batch) -> tuple[Importance, jax.Array]:
    """Sums of the importance over the tokens of a batch, and the number of tokens."""
    real = (batch.segment_ids > 0).astype(jnp.float32)
    final, blocks = teacher.collect(
        _ImportanceCollector(real), batch.tokens, batch.positions, batch.segment_ids
    )
    return Importance(blocks, _sum(real, final)), jnp.sum(real)


@dataclass(frozen=True)
class _ImportanceCollector(Collector):
    """Collects the importance in each block, summed over tokens; `real`: [B, T], 1 on tokens and 0 on padding."""

    real: jax.Array

    def of_block(self, block: Block, taps: Taps) -> BlockImportance:
        heads, neurons = taps["heads"], taps["mlp_hidden"]
        output = for_use(block.attention.output.get_value(), "NHD", heads.dtype)
        down = for_use(block.mlp.down.get_value(), "FD", neurons.dtype)
        # The norm of heads @ output, from output's inner products [H, H], without storing D numbers for each head.
        inner = jnp.einsum("NHD,NJD->NHJ", output, output)
        squares = jnp.einsum("BTNH,NHJ,BTNJ->BTN", heads, inner, heads)
        return BlockImportance(
            channels=_sum(self.real, taps["attention_input"]) + _sum(self.real, taps["mlp_input"]),
            neurons=_sum(self.real, neurons) * jnp.linalg.norm(down, axis=-1),
            heads=_sum(self.real, jnp.sqrt(jnp.maximum(squares, 0.0))),
        )


def _sum(real: jax.Array, x: jax.Array) -> jax.Array:
    """The absolute values of x [B, T, X], summed over the tokens that are not padding: [X]."""
    return jnp.einsum("BT,BTX->X", real, jnp.abs(x))
