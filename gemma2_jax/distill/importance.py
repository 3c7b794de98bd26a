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
from gemma2_jax.model.attention import Attention
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.layers import product, weight_for_use
from gemma2_jax.model.transformer import Block, Gemma2, Pair, over_pairs
from gemma2_jax.sharding.layout import constrain


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
    x = teacher.embedder.encode(batch.tokens, jnp.float32)

    def body(x: jax.Array, pair: Pair) -> tuple[jax.Array, dict[str, BlockImportance]]:
        x, local = _read(pair.local_block, x, batch, real)
        x, global_ = _read(pair.global_block, x, batch, real)
        return x, {"local_block": local, "global_block": global_}

    x, blocks = over_pairs(body, x, teacher.pairs, ComputeConfig())
    return Importance(blocks, _sum(real, teacher.final_norm(x))), jnp.sum(real)


def _read(block: Block, x: jax.Array, batch: Batch, real: jax.Array) -> tuple[jax.Array, BlockImportance]:
    """`Block` once more, with a look at what is inside of it."""
    attention_input = block.pre_attention_norm(x)
    heads = _heads(block.attention, attention_input, batch)
    output = weight_for_use(block.attention.output, "NHD", x.dtype)
    x = x + block.post_attention_norm(product("BTNH,NHD->BTD", heads, output))

    mlp_input = block.pre_mlp_norm(x)
    gate = product("BTD,DF->BTF", mlp_input, weight_for_use(block.mlp.gate, "DF", x.dtype))
    up = product("BTD,DF->BTF", mlp_input, weight_for_use(block.mlp.up, "DF", x.dtype))
    neurons = constrain(jax.nn.gelu(gate, approximate=True) * up, "BTF")
    down = weight_for_use(block.mlp.down, "FD", x.dtype)
    x = constrain(x + block.post_mlp_norm(product("BTF,FD->BTD", neurons, down)), "BTD")

    # The length of heads @ output without its D numbers for each head: through output's inner products [H, H].
    inner = jnp.einsum("NHD,NJD->NHJ", output, output)
    squares = jnp.einsum("BTNH,NHJ,BTNJ->BTN", heads, inner, heads)
    return x, BlockImportance(
        channels=_sum(real, attention_input) + _sum(real, mlp_input),
        neurons=_sum(real, neurons) * jnp.linalg.norm(down, axis=-1),
        heads=_sum(real, jnp.sqrt(jnp.maximum(squares, 0.0))),
    )


def _heads(attention: Attention, x: jax.Array, batch: Batch) -> jax.Array:
    """What the heads [B, T, N, H] have read, before the output matrix: an identity in its place lets them through."""
    N, H = attention.config.num_heads, attention.config.head_dim
    weights = {name: getattr(attention, name)[...] for name in ("query", "key", "value")}
    weights["output"] = jnp.eye(N * H).reshape(N, H, N * H)
    bare = Attention(weights, attention.config, attention.window)
    side_by_side, _ = bare(x, batch.positions, batch.segment_ids)
    return constrain(side_by_side.reshape(*x.shape[:2], N, H), "BTNH")


def _sum(real: jax.Array, x: jax.Array) -> jax.Array:
    """The absolute values of x [B, T, ...], summed over the tokens that are none of padding."""
    return jnp.einsum("BT,BTX->X", real, jnp.abs(x))
