"""The two functions of a LiteRT-LM file, `prefill` and `decode`, with weights and cache as explicit arguments.

The engine runs a prompt in pieces of fixed lengths, then one token at a time. It holds the cache of each layer: keys
and values [1, K, S, H], where S is the context, and the token at position p has slot p. Both functions run our own
blocks, so that soft caps, windows, norms and positions are those of the model.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.formats.layouts import HUGGINGFACE, Entry, expand
from gemma2_jax.model.attention import Attention
from gemma2_jax.model.cache import LayerCaches
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.layers import Embedder, RMSNorm
from gemma2_jax.model.linear import OutputFirstWeight
from gemma2_jax.model.transformer import Pair
from gemma2_jax.model.weights import Params, insert, specs_by_path, weight_specs

Arrays = dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """The forward pass of a model, as the engine calls it.

    Attributes:
        config: of the model, without padding in its vocabulary.
        context: S, the positions that the cache holds.
    """

    config: ModelConfig
    context: int

    @property
    def weights(self) -> dict[str, Entry]:
        """The weights by name, which are those of Hugging Face's layout: matrices are [out, in]."""
        return expand(HUGGINGFACE, weight_specs(self.config))

    @property
    def caches(self) -> list[str]:
        """The names of the caches, as the engine expects them."""
        return [f"kv_cache_{kind}_{layer}" for kind in "kv" for layer in range(self.config.num_layers)]

    def run(self, inputs: Arrays, weights: Arrays, has_logits: bool) -> Arrays:
        """Runs T more tokens.

        Args:
            inputs: `tokens` int32 [1, T]; `input_pos` int32 [T], of which only the first counts, since the engine fills
                the others with 0 behind a prompt's last token; and the caches [1, K, S, H].
            weights: float32 arrays by name.
            has_logits: whether to return `logits` float32 [1, T, V].

        Returns:
            The caches with the new tokens, and the logits. Slots behind those of a prompt's last token hold keys and
            values of padding. They are replaced before a token attends to them.
        """
        model = self._params(weights)
        tokens = inputs["tokens"]
        T = tokens.shape[1]
        positions = (inputs["input_pos"][0] + jnp.arange(T, dtype=jnp.int32))[None]
        embedder = Embedder(model["embedder"], self.config)
        x = embedder.encode(tokens[0], jnp.float32)[None]  # the format's lookup takes a row of tokens
        outputs: Arrays = {}
        layer = 0
        for number, params in enumerate(model["pairs"]):
            pair = Pair(params, self.config, number)
            for block in (pair.local_block, pair.global_block):
                names = [f"kv_cache_{kind}_{layer}" for kind in "kv"]
                cache = _LayerCache.of(*(inputs[name] for name in names))

                def attend(attention: Attention, x: jax.Array, cache: Any = cache) -> Any:
                    return attention.extend_cache(x, positions, None, cache, 0)

                x, _, cache = block(x, attend)
                outputs.update(zip(names, (cache.keys, cache.values), strict=True))
                layer += 1
        if has_logits:
            outputs["logits"] = embedder.decode(RMSNorm(model["final_norm"], self.config)(x))
        return outputs

    def _params(self, weights: Arrays) -> Params:
        """The parameters of the modules; those of the layers in a list of pairs."""
        specs = specs_by_path(weight_specs(self.config))
        params: Params = {"pairs": [{} for _ in range(self.config.num_pairs)]}
        for name, entry in self.weights.items():
            (place,) = entry.places
            spec, array = specs[place.path], weights[name]
            if place.pair is None:
                insert(params, place.path, array)
                continue
            if spec.fan_in:
                out = tuple(spec.sizes[d] for d in spec.dims[1:] if d not in spec.fan_in)
                array = OutputFirstWeight(array, out)
            insert(params["pairs"][place.pair], place.path.removeprefix("pairs/"), array)
        return params


@dataclass(frozen=True)
class _LayerCache(LayerCaches):
    """The cache of one layer, which holds every position.

    Attributes:
        keys, values: [1, K, S, H], without the axis P.
    """

    @classmethod
    def of(cls, keys: jax.Array, values: jax.Array) -> "_LayerCache":
        """The cache of keys and values [1, K, S, H]."""
        return cls(keys, values, jnp.arange(keys.shape[2], dtype=jnp.int32)[None])

    def of_layer(self, pair: Any) -> tuple[Any, Any]:
        return self.keys, self.values

    def write(
        self,
        pair: Any,
        positions: jax.Array,
        key: Any,  # [1, T, K, H]
        value: Any,
        used: jax.Array | None = None,
    ) -> "_LayerCache":
        start = positions[0, 0]
        return self.of(*(_updated(*each, start) for each in ((self.keys, key), (self.values, value))))


def _updated(cache: Any, new: Any, start: jax.Array) -> jax.Array:
    """The cache [1, K, S, H] with new entries [1, T, K, H] from slot `start` on; those behind slot S are dropped."""
    S, T = cache.shape[2], new.shape[1]
    # Without room for T entries behind the last slot, those of a padded prompt near it would be moved to earlier slots.
    room = jnp.pad(cache, ((0, 0), (0, 0), (0, T - 1), (0, 0)))
    zero = jnp.int32(0)
    return jax.lax.dynamic_update_slice(room, new.swapaxes(1, 2), (zero, zero, start, zero))[:, :, :S]
