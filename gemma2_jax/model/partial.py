"""Training of some weights of a model, chosen by name and by layer, while the others are frozen.

The name of a weight is its path within a layer (`attention/query`, `mlp/gate`, `pre_mlp_norm/scale`), or within the
model if it is outside of the layers (`embedder/embedding`, `final_norm/scale`).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError, suggest
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.lora import BLOCKS, chosen_layers
from gemma2_jax.model.stack import SplitStack
from gemma2_jax.model.weights import Params, insert, specs_by_path, value_at, weight_specs


class Partial:
    """Trains a part of a model's weights (`Adaptation`).

    Of a stack of layers' weights, the trained part holds the slices that are trained, and the frozen part the others.

    Args:
        model: sizes of the model.
        weights: patterns of names, in which `*` stands for any text.
        layers: numbers of the layers in which weights are trained, from 0, and then no weight outside of the layers;
            None for all layers.

    Raises:
        UserError: the model has no such layer, a pattern matches no weight, or nothing is frozen.
    """

    def __init__(
        self, model: ModelConfig, weights: Sequence[str], layers: Sequence[int] | None = None
    ) -> None:
        chosen = chosen_layers(model, layers)
        self._num_pairs, self._paths = model.num_pairs, list(specs_by_path(weight_specs(model)))
        names = {path: _name(path) for path in self._paths}
        available = {name for path, name in names.items() if layers is None or _is_stacked(path)}
        for pattern in weights:
            if not any(fnmatchcase(name, pattern) for name in available):
                raise UserError(
                    f"adaptation.weights has {pattern}, which matches no weight"
                    f"{'' if layers is None else ' of a layer'}, {suggest(pattern, available)}."
                )
        # The trained pairs of each weight that has any; for a weight outside of the layers, an empty list.
        self._trained: dict[str, list[int]] = {}
        for path, name in names.items():
            pairs = [layer // 2 for layer in chosen if _block(path) == layer % 2]
            is_among = name in available and any(fnmatchcase(name, pattern) for pattern in weights)
            if is_among and (pairs or not _is_stacked(path)):
                self._trained[path] = pairs
        if not self.specs(weight_specs(model))[1]:
            raise UserError(
                "adaptation.kind is partial, but every weight is trained; write adaptation=full, or choose fewer, "
                "as in adaptation.weights=[mlp/*] or adaptation.layers=[0,1]."
            )

    def specs(self, model: Any) -> tuple[Any, Any]:
        return self._divided(model, lambda spec, pairs: replace(spec, shape=(len(pairs), *spec.shape[1:])))

    def split(self, params: Params, key: jax.Array) -> tuple[Params, Params]:
        return self._divided(params, lambda stack, pairs: stack[jnp.array(pairs)])

    def join(self, trained: Params, frozen: Params) -> Params:
        """The whole model; its layers are split where trained layers begin or end, see `SplitStack`."""
        params: Params = {}
        for path in self._paths:
            if _is_stacked(path):
                parts = [self._part(path, pairs, trained, frozen) for pairs in self._spans()]
                insert(params, path, parts[0] if len(parts) == 1 else SplitStack(tuple(parts)))
            else:
                insert(params, path, value_at(trained if path in self._trained else frozen, path))
        return params

    def pairs_of(self, path: str) -> list[int]:
        """The pairs in the trained part of a weight of layers."""
        return self._trained.get(path, [])

    def _divided(self, tree: Any, take: Callable[[Any, list[int]], Any]) -> tuple[Any, Any]:
        """The trained and the frozen part of a tree laid out like a model; `take` returns some pairs of a stack."""
        trained: dict[str, Any] = {}
        frozen: dict[str, Any] = {}
        for path in self._paths:
            leaf = value_at(tree, path)
            if not _is_stacked(path):
                insert(trained if path in self._trained else frozen, path, leaf)
                continue
            for part, pairs in ((trained, self.pairs_of(path)), (frozen, self._frozen_pairs(path))):
                if pairs:
                    insert(part, path, leaf if len(pairs) == self._num_pairs else take(leaf, pairs))
        return trained, frozen

    def _spans(self) -> list[range]:
        """The longest sequences of pairs within which each weight is either trained or frozen."""
        begins = [
            pair
            for pair in range(self._num_pairs)
            if pair == 0 or any((pair in pairs) != (pair - 1 in pairs) for pairs in self._stacked_pairs())
        ]
        return [range(one, other) for one, other in pairwise([*begins, self._num_pairs])]

    def _part(self, path: str, pairs: range, trained: Params, frozen: Params) -> Any:
        """The slice [p, …] of a stack of weights for one of the `_spans`."""
        is_trained = pairs[0] in self.pairs_of(path)
        first = (self.pairs_of(path) if is_trained else self._frozen_pairs(path)).index(pairs[0])
        return value_at(trained if is_trained else frozen, path)[first : first + len(pairs)]

    def _frozen_pairs(self, path: str) -> list[int]:
        return [pair for pair in range(self._num_pairs) if pair not in self.pairs_of(path)]

    def _stacked_pairs(self) -> list[list[int]]:
        return [pairs for path, pairs in self._trained.items() if _is_stacked(path)]


def _is_stacked(path: str) -> bool:
    return path.startswith("pairs/")


def _block(path: str) -> int | None:
    """0 for a weight of the pairs' local blocks, 1 of the global ones, None outside of the layers."""
    return BLOCKS.index(path.split("/")[1]) if _is_stacked(path) else None


def _name(path: str) -> str:
    return path.split("/", 2)[2] if _is_stacked(path) else path
