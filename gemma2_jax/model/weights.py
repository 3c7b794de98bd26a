"""Specs: descriptions of the weights of a model, or of anything else that is trained.

The spec of a weight (`Weight`) is its dimensions as letters (see `gemma2_jax`), their sizes, and the letters of its
fan-in. Specs form a nested dict. Abstract arrays, initial values, counts, shardings, optimizer settings and checkpoint
targets all derive from the specs that they are given: those of a model (`weight_specs`), of a part of it, or of
additional weights, such as projections.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.quantised import Format, abstract_quantised
from gemma2_jax.sharding.layout import constrain_weight, weight_sharding

Params = dict[str, Any]  # a nested dict of arrays, or of trees that `linear` takes in place of arrays
Specs = dict[str, Any]  # a nested dict of Weight, laid out like the parameters that it describes


@dataclass(frozen=True)
class Weight:
    """One weight.

    Weights are drawn from a normal distribution of variance 1 / (size of fan_in). A weight without fan_in is a norm's
    scale: stored as w, applied as (1 + w), initially zero.

    Attributes:
        dims: a letter for each axis.
        shape: the size of each axis.
        fan_in: the letters of the axes that a product with the weight sums over.
    """

    dims: str
    shape: tuple[int, ...]
    fan_in: str = ""

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        return dict(zip(self.dims, self.shape, strict=True))


def weight_specs(config: ModelConfig) -> Specs:
    """The specs of all weights of a Gemma 2. Those of blocks have a leading axis P, a slice for each pair of layers."""
    sizes = dim_sizes(config)

    def weight(dims: str, fan_in: str = "") -> Weight:
        return Weight(dims, tuple(sizes[d] for d in dims), fan_in)

    def block() -> Specs:
        return {
            "pre_attention_norm": {"scale": weight("PD")},
            "attention": {
                "query": weight("PDNH", fan_in="D"),
                "key": weight("PDKH", fan_in="D"),
                "value": weight("PDKH", fan_in="D"),
                "output": weight("PNHD", fan_in="NH"),
            },
            "post_attention_norm": {"scale": weight("PD")},
            "pre_mlp_norm": {"scale": weight("PD")},
            "mlp": {
                "gate": weight("PDF", fan_in="D"),
                "up": weight("PDF", fan_in="D"),
                "down": weight("PFD", fan_in="F"),
            },
            "post_mlp_norm": {"scale": weight("PD")},
        }

    return {
        # Also the LM head. Embedded tokens are multiplied by sqrt(D), so fan_in D gives both them and the logits
        # variance 1.
        "embedder": {"embedding": weight("VD", fan_in="D")},
        "pairs": {"local_block": block(), "global_block": block()},
        "final_norm": {"scale": weight("D")},
    }


def dim_sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter of a model's weights, which activations share."""
    return {
        "V": config.vocab_size,
        "D": config.d_model,
        "N": config.num_heads,
        "K": config.num_kv_heads,
        "H": config.head_dim,
        "F": config.d_ff,
        "P": config.num_pairs,
    }


def map_specs(function: Callable[..., Any], specs: Any, *trees: Any) -> Any:
    """A tree laid out like `specs`, of `function(path, spec, *leaves)`; paths look like `pairs/local_block/mlp/gate`.

    Args:
        specs: any nested dict of Weight; a single Weight has the path "".
        trees: trees laid out like `specs`. A leaf is whatever they hold in place of a Weight, an array or another
            pytree.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, *leaves: function("/".join(entry.key for entry in path), *leaves), specs, *trees
    )


def specs_by_path(specs: Specs) -> dict[str, Weight]:
    """The specs by path, without nesting."""
    found: dict[str, Weight] = {}
    map_specs(found.__setitem__, specs)
    return found


def abstract_params(specs: Any, dtype: Any = jnp.float32, mesh: Mesh | None = None) -> Any:
    """The parameters' shapes, dtypes and, on a mesh, shardings, as `jax.ShapeDtypeStruct`s; nothing is allocated.

    Args:
        dtype: dtype of all parameters, or a nested dict of dtypes, laid out like `specs`. In place of a dtype, a
            `Format` gives a `QuantisedWeight`.

    Raises:
        UserError: the mesh does not divide a dimension that is split along it.
    """

    def describe(path: str, spec: Weight, dtype: Any) -> Any:
        if isinstance(dtype, Format):
            return abstract_quantised(spec.dims, spec.shape, dtype, mesh, path)
        sharding = None if mesh is None else weight_sharding(mesh, path, spec.dims, spec.shape)
        return jax.ShapeDtypeStruct(spec.shape, dtype, sharding=sharding)

    return map_specs(
        describe, specs, dtype if isinstance(dtype, dict) else map_specs(lambda *_: dtype, specs)
    )


def frozen_dtypes(specs: Any, dtype: Any, format_: Format | None = None, whole: bool = False) -> Any:
    """Dtypes of frozen weights, laid out like `specs`: that of their products, but float32 for the norms' scales.

    Training results are the same as with float32, since `linear` converts weights to that dtype anyway.

    Args:
        format_: format of the layers' matrices in place of a dtype; one that it cannot hold gets `Format.holding`.
        whole: whether the embedding has that format, too; otherwise it keeps its dtype.
    """

    def choose(_: str, spec: Weight) -> Any:
        if not spec.fan_in:
            return jnp.dtype(jnp.float32)
        if format_ is None or not (whole or spec.dims.startswith("P")):
            return jnp.dtype(dtype)
        return format_.holding(spec.dims, spec.shape)

    return map_specs(choose, specs)


def fallbacks(specs: Any, format_: Format) -> list[str]:
    """The names of the weights that a format cannot hold, which are in another (`Format.holding`); for messages."""
    found = {
        path.split("/", 2)[-1] if path.startswith("pairs/") else path: None
        for path, spec in specs_by_path(specs).items()
        if spec.fan_in and format_.holding(spec.dims, spec.shape) != format_
    }
    return list(found)


def init_params(specs: Any, key: jax.Array, prefix: str = "") -> Any:
    """Initial float32 parameters; a weight's values depend on the key and its path, not on other weights.

    Args:
        prefix: prefix of every path; the whole path of a single Weight.
    """

    def init(path: str, spec: Weight) -> jax.Array:
        if not spec.fan_in:
            return jnp.zeros(spec.shape, jnp.float32)
        fan_in = math.prod(spec.sizes[d] for d in spec.fan_in)
        whole = "/".join(part for part in (prefix, path) if part)
        return jax.random.normal(key_of_path(key, whole), spec.shape, jnp.float32) * fan_in**-0.5

    return map_specs(init, specs)


def constrain_params(params: Any, specs: Any) -> Any:
    """Constrains parameters or gradients to the layout of weights at rest: with fsdp, each device has its own part."""
    return map_specs(lambda _, spec, leaf: constrain_weight(leaf, spec.dims), specs, params)


def key_of_path(key: jax.Array, path: str) -> jax.Array:
    """A random key for one weight, the same in every process (Python's own `hash` is salted)."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def insert(tree: dict[str, Any], path: str, value: Any) -> None:
    """Puts a value at a path of a nested dict."""
    *above, name = path.split("/")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[name] = value


def value_at(tree: Any, path: str) -> Any:
    """The value at a path of a nested dict."""
    return reduce(lambda inner, name: inner[name], path.split("/"), tree)
