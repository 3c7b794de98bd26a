"""Arrays [B, T, ...] block of tokens by block, for what would need too much memory all at once."""

from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.sharding.layout import batch_shares


def token_blocks(B: int, T: int, block_tokens: int) -> int:
    """How many blocks of [B, T] tokens give each device, on the mesh in context, at most `block_tokens` at a time.

    A block has a token of each row at least.
    """
    return -(-T // max(1, block_tokens * batch_shares() // B))


def split_tokens(blocks: int, tree: Any) -> Any:
    """Each [B, T, ...] to [blocks, B, T / blocks, ...], padded with zeros: tokens of weight 0."""

    def split(x: jax.Array) -> jax.Array:
        B, T, *rest = x.shape
        per_block = -(-T // blocks)
        padded = jnp.pad(x, [(0, 0), (0, blocks * per_block - T)] + [(0, 0)] * len(rest))
        return jnp.moveaxis(padded.reshape(B, blocks, per_block, *rest), 1, 0)

    return jax.tree.map(split, tree)


def join_tokens(x: jax.Array, T: int) -> jax.Array:
    """What `split_tokens` split, without its padding: [blocks, B, T / blocks, ...] to [B, T, ...]."""
    blocks, B, per_block, *rest = x.shape
    return jnp.moveaxis(x, 0, 1).reshape(B, blocks * per_block, *rest)[:, :T]
