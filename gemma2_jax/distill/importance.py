"""How much each channel, neuron and head of a teacher does on data: what a narrower student keeps."""

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
    """Of one kind of block, stacked over the pairs: averages over tokens, float32.

    Attributes:
        channels: [P, D], the absolute value behind the two norms that read the residual stream, summed.
        neurons: [P, F], the length of what the neuron adds to the MLP's output [D].
        heads: [P, N], the length of what the head adds to the attention's output [D].
    """

    channels: Any
    neurons: Any
    heads: Any


@partial(jax.tree_util.register_dataclass, data_fields=["blocks", "final"], meta_fields=[])
@dataclass(frozen=True)
class Importance:
    """Of a whole model.

    Attributes:
        blocks: by the names `local_block` and `global_block`.
        final: [D], the absolute value behind the final norm.
    """

    blocks: dict[str, BlockImportance]
    final: Any


def measure(teacher: Gemma2, batches: Iterable[Batch], mesh: Mesh) -> Importance:
    """The importance of everything in the teacher, by its activations on some batches, as NumPy arrays.

    After Minitron (Muralidharan et al., arXiv 2407.14679, section 2.2), with two differences. Each token counts
    the same, since a packed row is no unit of text. And heads and neurons are measured behind their part of the
    matrix that leads out: the heads of a group share their values, so that in front of it one that adds nothing
    would not stand out.

    Args:
        batches: laid out on the mesh; tokens of padding do not count.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(_sums, out_shardings=everywhere)
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
    """Sums over the tokens of a batch, and how many there are."""
    real = (batch.segment_ids > 0).astype(jnp.float32)
    final, blocks = teacher.collect(_OfBlocks(real), batch.tokens, batch.positions, batch.segment_ids)
    return Importance(blocks, _sum(real, final)), jnp.sum(real)


@dataclass(frozen=True)
class _OfBlocks(Collector):
    """The importance in each block, stacked over the pairs; `real`: [B, T], 0 on padding."""

    real: jax.Array

    def of_block(self, block: Block, taps: Taps) -> BlockImportance:
        heads, neurons = taps["heads"], taps["mlp_hidden"]
        output = for_use(block.attention.output.get_value(), "NHD", heads.dtype)
        down = for_use(block.mlp.down.get_value(), "FD", neurons.dtype)
        # The length of heads @ output without its D numbers for each head: through output's inner products [H, H].
        inner = jnp.einsum("NHD,NJD->NHJ", output, output)
        squares = jnp.einsum("BTNH,NHJ,BTNJ->BTN", heads, inner, heads)
        return BlockImportance(
            channels=_sum(self.real, taps["attention_input"]) + _sum(self.real, taps["mlp_input"]),
            neurons=_sum(self.real, neurons) * jnp.linalg.norm(down, axis=-1),
            heads=_sum(self.real, jnp.sqrt(jnp.maximum(squares, 0.0))),
        )


def _sum(real: jax.Array, x: jax.Array) -> jax.Array:
    """The absolute values of x [B, T, ...], summed over the tokens that are none of padding."""
    return jnp.einsum("BT,BTX->X", real, jnp.abs(x))
