"""Soft-capped, grouped-query attention on TPUs, by JAX's splash kernel."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import NamedSharding, PartitionSpec

from gemma2_jax.kernels.sharded_attention import on_each_device
from gemma2_jax.sharding.layout import layout_in_use, sequence_shares

LANES = 128  # of a TPU's vector unit; blocks are multiples of it


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    window: int | None,
    softcap: float,
    block_queries: int,
    block_keys: int,
    interpret: bool,
) -> jax.Array:
    """Attention of a sequence to itself; no block of scores leaves the chip, and hidden blocks are never computed.

    Differentiable in query, key and value. Within a segment, positions must go up by one from token to token, because
    the mask goes by indices in the sequence. All queries of a key/value head read its keys in place, without copies.

    Args:
        query: [B, T, N, H]; key, value: [B, T, K, H]; segment_ids: [B, T].
        block_queries, block_keys: multiples of `LANES`. Shorter sequences get shorter blocks; others are padded to
            whole blocks.
        interpret: whether to run the kernel step by step, on any platform, for tests.

    Returns:
        [B, T, N, H].
    """
    T, shares = query.shape[1], sequence_shares()
    block_queries = min(block_queries, _up_to(T, LANES * shares) // shares)
    block_keys = min(block_keys, _up_to(T, LANES))
    # Padding comes after every token, so no token attends to it.
    padded = _up_to(T, math.lcm(block_queries * shares, block_keys))
    query, key, value, segment_ids = (
        jnp.pad(x, [(0, 0), (0, padded - T)] + [(0, 0)] * (x.ndim - 2))
        for x in (query, key, value, segment_ids)
    )
    kernel = _kernel(padded, window, softcap, block_queries, block_keys, shares, interpret)
    output = on_each_device(_attend, kernel, _kernel_spec(kernel), query, key, value, segment_ids)
    return output[:, :T]


def _attend(
    kernel: Any,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
) -> jax.Array:
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    segments = splash.SegmentIds(query_segments, key_segments)
    output: jax.Array = jax.vmap(kernel)(query, key, value, segments)
    return output.swapaxes(1, 2)


def _kernel(
    T: int,
    window: int | None,
    softcap: float,
    block_queries: int,
    block_keys: int,
    shares: int,
    interpret: bool,
) -> Any:
    """The kernel with its tables for the mask, which list the blocks to visit; JAX caches those of recent masks.

    One head's mask serves for all heads.
    """
    mask = splash.CausalMask((T, T)) if window is None else splash.LocalMask((T, T), (window - 1, 0), 0)
    blocks = splash.BlockSizes(
        block_q=block_queries,
        block_kv=block_keys,
        block_q_dkv=block_queries,
        block_kv_dkv=block_keys,
        block_q_dq=block_queries,
        block_kv_dq=block_keys,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask]),
        block_sizes=blocks,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=shares,
        interpret=interpret,
    )


def _kernel_spec(kernel: Any) -> Any:
    """Partition specs of the kernel's tables: each device gets the blocks of its own queries."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    (queries,) = layout_in_use().spec("T")
    return kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(None, queries)))


def _up_to(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
