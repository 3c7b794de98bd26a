"""Splits arrays [B, T, ...] into blocks of tokens, for computations that need too much memory all at once."""

from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.sharding.layout import batch_shares, sequence_shares


def token_blocks(B: int, T: int, block_tokens: int) -> int:
    """The number of blocks of [B, T] tokens such that no device has more than `block_tokens` of a block at a time.

    Counted for the mesh in context. A block has at least one token of each row.
    """
    return -(-(T // sequence_shares()) // max(1, block_tokens * batch_shares() // B))


def split_tokens(blocks: int, tree: Any) -> Any:
    """Reshapes each [B, T, ...] to [blocks, B, T / blocks, ...], padded with zeros (tokens of weight 0).

    Where sequences are split over devices, each block takes an equal part of every device's tokens.
    """
    shares = sequence_shares()

    def split(x: jax.Array) -> jax.Array:
        B, T, *rest = x.shape
        per_block = -(-T // (shares * blocks))
        parts = x.reshape(B, shares, T // shares, *rest)
        missing = blocks * per_block - T // shares
        padded = jnp.pad(parts, [(0, 0), (0, 0), (0, missing)] + [(0, 0)] * len(rest))
        apart = jnp.moveaxis(padded.reshape(B, shares, blocks, per_block, *rest), 2, 0)
        return apart.reshape(blocks, B, shares * per_block, *rest)

    return jax.tree.map(split, tree)


def join_tokens(x: jax.Array, T: int) -> jax.Array:
    """Undoes `split_tokens`, without its padding: [blocks, B, T / blocks, ...] to [B, T, ...]."""
    blocks, B, _, *rest = x.shape
    shares = sequence_shares()
    apart = jnp.moveaxis(x.reshape(blocks, B, shares, -1, *rest), 0, 2)
    return apart.reshape(B, shares, -1, *rest)[:, :, : T // shares].reshape(B, T, *rest)
