"""LoRA: two narrow matrices are trained beside each of some frozen weights (Hu et al., arXiv 2106.09685).

A weight W that x is multiplied with becomes W' = W + s A B, with A [in…, R], B [R, out…] and s = alpha / R, so that
in x out numbers get R * (in + out) trained ones. A is drawn as in PEFT and B is zero, so training starts from the base
model. (The paper and PEFT write the transpose, W + s B A.)

An adapter's arrays lie beside the weight's, in a tree of the same layout: `pairs/local_block/attention/query/a` and
`…/b`. Like weights they are stacked over pairs of layers; if only some layers are adapted, over those alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.linear import AdaptedWeight
from gemma2_jax.model.weights import (
    Params,
    Specs,
    Weight,
    insert,
    key_of_path,
    map_specs,
    specs_by_path,
    weight_specs,
)

# The weights that can be adapted, by the names of PEFT's targets without `_proj`; paths within a block.
TARGETS = {
    "q": "attention/query",
    "k": "attention/key",
    "v": "attention/value",
    "o": "attention/output",
    "gate": "mlp/gate",
    "up": "mlp/up",
    "down": "mlp/down",
}
BLOCKS = ("local_block", "global_block")  # of even and of odd layers


class Lora:
    """Trains an adapter beside the frozen weights of a model (`Adaptation`).

    Args:
        model: sizes of the model.
        rank: R.
        scale: s, the factor of A B.
        targets: adapted weights, keys of `TARGETS`.
        layers: numbers of the adapted layers, from 0; None for all.

    Raises:
        UserError: the model has no such layer, or an adapted weight is narrower than the rank.
    """

    def __init__(
        self,
        model: ModelConfig,
        rank: int,
        scale: float,
        targets: Sequence[str],
        layers: Sequence[int] | None = None,
    ) -> None:
        self._layers = chosen_layers(model, layers)
        weights = specs_by_path(weight_specs(model))
        for target in targets:
            _check_rank(target, weights[f"pairs/{BLOCKS[0]}/{TARGETS[target]}"], rank)
        self._num_pairs, self._scale = model.num_pairs, scale
        self.adapter: Specs = {}
        for kind, block in enumerate(BLOCKS):
            pairs = len(self._pairs(kind))
            for target in targets if pairs else ():
                path = f"pairs/{block}/{TARGETS[target]}"
                insert(self.adapter, path, adapter_specs(weights[path], rank, pairs))

    def specs(self, model: Any) -> tuple[Any, Any]:
        return self.adapter, model

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        def initial(path: str, spec: Weight) -> jax.Array:
            if path.endswith("/b"):
                return jnp.zeros(spec.shape, jnp.float32)
            # PEFT's default, `kaiming_uniform_(a=sqrt(5))`: uniform between -1 / sqrt(in) and 1 / sqrt(in).
            limit = math.prod(spec.sizes[d] for d in spec.fan_in) ** -0.5
            return jax.random.uniform(key_of_path(key, path), spec.shape, jnp.float32, -limit, limit)

        return map_specs(initial, self.adapter), params

    def join(self, trained: Params, frozen: Params) -> Params:
        """The frozen weights with their adapters; a layer without an adapter gets zeros."""

        def whole(path: str, _: Weight, leaf: jax.Array) -> jax.Array:
            pairs = self.pairs_of(path)
            if len(pairs) == self._num_pairs:
                return leaf
            return jnp.zeros((self._num_pairs, *leaf.shape[1:]), leaf.dtype).at[jnp.array(pairs)].set(leaf)

        return with_adapter(frozen, map_specs(whole, self.adapter, trained), self._scale)

    def pairs_of(self, path: str) -> list[int]:
        """The pairs whose weight at a path is adapted."""
        return self._pairs(BLOCKS.index(path.split("/")[1]))

    def _pairs(self, kind: int) -> list[int]:
        """The pairs whose local (0) or global (1) block is adapted."""
        return [layer // 2 for layer in self._layers if layer % 2 == kind]


def adapter_specs(weight: Weight, rank: int, pairs: int) -> Specs:
    """The specs of A and B beside a weight [P, in…, out…], for `pairs` of its pairs."""
    into, out = weight.fan_in, weight.dims[1 + len(weight.fan_in) :]
    sizes = {**weight.sizes, "P": pairs, "R": rank}

    def spec(dims: str, fan_in: str) -> Weight:
        return Weight(dims, tuple(sizes[d] for d in dims), fan_in)

    return {"a": spec(f"P{into}R", into), "b": spec(f"PR{out}", "R")}


def with_adapter(params: Params, adapter: Mapping[str, Any], scale: float) -> Params:
    """Parameters whose weights have the arrays `a` and `b` of an adapter beside them, where it has any."""
    if set(adapter) == {"a", "b"}:
        return AdaptedWeight(params, adapter["a"], adapter["b"], scale)  # type: ignore[return-value]
    inner = {name: with_adapter(params[name], tree, scale) for name, tree in adapter.items()}
    return {**params, **inner}


def with_dropout(params: Params, rate: float, key: jax.Array) -> Params:
    """Parameters for a training step in which adapters drop a part of their input, see `AdaptedWeight`.

    Args:
        key: key of the step; each weight of each layer gets a key of its own.
    """

    def add(path: Any, weight: Any) -> Any:
        if not isinstance(weight, AdaptedWeight):
            return weight
        own = key_of_path(key, jax.tree_util.keystr(path, simple=True, separator="/"))
        keys = jax.random.key_data(jax.random.split(own, weight.a.shape[0]))
        return replace(weight, dropout=rate, dropout_key=keys)

    dropping: Params = jax.tree_util.tree_map_with_path(
        add, params, is_leaf=lambda node: isinstance(node, AdaptedWeight)
    )
    return dropping


def chosen_layers(model: ModelConfig, layers: Sequence[int] | None) -> list[int]:
    """The numbers of the layers that `adaptation.layers` selects. Raises UserError if the model has no such layer."""
    for layer in layers or ():
        if layer >= model.num_layers:
            raise UserError(
                f"adaptation.layers has {layer}, but the model has {model.num_layers} layers, counted from 0."
            )
    return list(range(model.num_layers)) if layers is None else list(layers)


def _check_rank(target: str, weight: Weight, rank: int) -> None:
    """Raises UserError if the rank is above that of a matrix in x out."""
    sizes = [weight.sizes[d] for d in weight.dims.removeprefix("P")]
    k = len(weight.fan_in)
    rows, columns = math.prod(sizes[:k]), math.prod(sizes[k:])
    if rank > min(rows, columns):
        raise UserError(
            f"adaptation.rank is {rank}, but {target} is a matrix of {rows:,} x {columns:,}; choose a rank of at most "
            f"{min(rows, columns):,}, or leave {target} out of adaptation.targets."
        )
