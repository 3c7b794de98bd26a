"""Stacks of layers' weights in several parts, which the loop over layers runs one after another."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=[])
@dataclass(frozen=True)
class SplitStack:
    """A stack of weights [P, …] as consecutive parts [p, …], in place of an array.

    If one weight of the layers is split, all are, at the same layers. The loop over each part is then differentiated by
    itself: layers below the first trained one have no backward pass and save no activations.
    """

    parts: tuple[Any, ...]


def parts_of(tree: Any) -> list[Any]:
    """A tree of stacks as the trees of their consecutive parts; the tree itself if nothing is split."""
    splits = [leaf for leaf in jax.tree.leaves(tree, is_leaf=_is_split) if _is_split(leaf)]
    if not splits:
        return [tree]
    return [
        jax.tree.map(lambda leaf, part=part: leaf.parts[part], tree, is_leaf=_is_split)
        for part in range(len(splits[0].parts))
    ]


def as_one(stack: Any) -> Any:
    """A stack as one array [P, …], if it is split."""
    return jnp.concatenate(stack.parts) if _is_split(stack) else stack


def _is_split(leaf: Any) -> bool:
    return isinstance(leaf, SplitStack)
