"""Every weight of Gemma 2, described once.

A weight is its dimensions as letters (see `gemma2_jax`) and the letters its initialiser averages over.
Shapes, logical axes, initial values, parameter counts and shardings are all derived from this table,
and a model's parameters are everywhere a nested dict laid out like it.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.sharding.layout import weight_sharding


@dataclass(frozen=True)
class Weight:
    """One weight: `dims` names its axes by letter; `fan_in` the axes a product with it sums over.

    Weights are drawn from a normal distribution of variance 1 / (size of fan_in); a weight without
    fan_in is a norm's scale, stored as w and applied as (1 + w), and starts at zero.
    """

    dims: str
    fan_in: str = ""


_BLOCK: Mapping[str, Any] = {
    "pre_attention_norm": {"scale": Weight("D")},
    "attention": {
        "query": Weight("DNH", fan_in="D"),
        "key": Weight("DKH", fan_in="D"),
        "value": Weight("DKH", fan_in="D"),
        "output": Weight("NHD", fan_in="NH"),
    },
    "post_attention_norm": {"scale": Weight("D")},
    "pre_mlp_norm": {"scale": Weight("D")},
    "mlp": {
        "gate": Weight("DF", fan_in="D"),
        "up": Weight("DF", fan_in="D"),
        "down": Weight("FD", fan_in="F"),
    },
    "post_mlp_norm": {"scale": Weight("D")},
}


def _stacked(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The same weights with one leading axis P, a slice for each pair of layers."""
    return jax.tree.map(lambda weight: Weight("P" + weight.dims, weight.fan_in), dict(tree))


# The embedding is also the LM head: its input side is multiplied by sqrt(D), so that fan_in D gives
# activations of variance 1 on entry and logits of variance 1 at the exit.
WEIGHTS: Mapping[str, Any] = {
    "embedder": {"embedding": Weight("VD", fan_in="D")},
    "pairs": {"local_block": _stacked(_BLOCK), "global_block": _stacked(_BLOCK)},
    "final_norm": {"scale": Weight("D")},
}


def dim_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter of the weights' dimensions."""
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.d_ff,
        "P": config.num_pairs,
    }


def map_weights(function: Callable[[str, Weight], Any]) -> dict[str, Any]:
    """A tree laid out like the parameters, of `function(path, weight)`; paths read `pairs/local_block/mlp/gate`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, weight: function("/".join(entry.key for entry in path), weight), dict(WEIGHTS)
    )


def weights_by_path() -> dict[str, Weight]:
    """The table without its nesting; those of a pair have a leading P in their dims."""
    found: dict[str, Weight] = {}
    map_weights(found.__setitem__)
    return found


def abstract_params(
    config: ModelConfig, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> dict[str, Any]:
    """The parameters' shapes, dtype and, on a mesh, shardings, as `jax.ShapeDtypeStruct`s, without memory.

    Raises:
        UserError: the mesh does not divide a dimension that lies along it.
    """
    sizes = dim_sizes(config)

    def describe(path: str, weight: Weight) -> jax.ShapeDtypeStruct:
        shape = [sizes[d] for d in weight.dims]
        sharding = None if mesh is None else weight_sharding(mesh, path, weight.dims, sizes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return map_weights(describe)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initial float32 parameters; a weight's values depend on the key and its path, not on its neighbours."""
    sizes = dim_sizes(config)

    return map_weights(lambda path, weight: init_weight(key, path, weight, sizes))


def init_weight(key: jax.Array, path: str, weight: Weight, sizes: Mapping[str, int]) -> jax.Array:
    """The initial float32 values of one weight, whose letters have these sizes."""
    shape = tuple(sizes[d] for d in weight.dims)
    if not weight.fan_in:
        return jnp.zeros(shape, jnp.float32)
    fan_in = 1
    for d in weight.fan_in:
        fan_in *= sizes[d]
    path_key = jax.random.fold_in(key, _stable_hash(path))
    return jax.random.normal(path_key, shape, jnp.float32) * fan_in**-0.5


def _stable_hash(path: str) -> int:
    """A 31-bit hash that is the same in every process (Python's own `hash` is salted)."""
    return zlib.crc32(path.encode()) & 0x7FFFFFFF
