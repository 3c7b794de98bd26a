"""Gemma 2: a scan over (local, global) pairs of blocks between the two sides of a tied embedding.

`Gemma2` and its parts are Flax NNX modules that hold nothing but weights and constants, so a model is a
pytree: `jax.jit`, `jax.grad`, `jax.lax.scan` and optax take it as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax.kernels.blocks import stays_in_loop
from gemma2_jax.model.attention import Attention
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.layers import MLP, WEIGHT_PRODUCT, Embedder, RMSNorm
from gemma2_jax.model.weights import init_params, map_weights
from gemma2_jax.sharding.layout import constrain

_BLOCK_INPUT = "block_input"  # what remat policies know the residual stream before a block by
_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(WEIGHT_PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[_BLOCK_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


class Block(nnx.Module):
    """Attention and MLP, each normed before and after, each added to the residual stream."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig, window: int | None):
        self.pre_attention_norm = RMSNorm(weights["pre_attention_norm"], config)
        self.attention = Attention(weights["attention"], config, window)
        self.post_attention_norm = RMSNorm(weights["post_attention_norm"], config)
        self.pre_mlp_norm = RMSNorm(weights["pre_mlp_norm"], config)
        self.mlp = MLP(weights["mlp"])
        self.post_mlp_norm = RMSNorm(weights["post_mlp_norm"], config)

    def __call__(self, x: jax.Array, attend: Callable[[Attention, jax.Array], tuple[jax.Array, Any]]) -> Any:
        """[B, T, D] to [B, T, D]; what `attend` gives beside its output is passed on."""
        x = checkpoint_name(x, _BLOCK_INPUT)
        with jax.named_scope("attention"):
            mixed, extra = attend(self.attention, self.pre_attention_norm(x))
            x = constrain(x + self.post_attention_norm(mixed), "BTD")
        with jax.named_scope("mlp"):
            x = constrain(x + self.post_mlp_norm(self.mlp(self.pre_mlp_norm(x))), "BTD")
        return x, extra


class Pair(nnx.Module):
    """A local block and the global block after it; stacked, each weight has a leading axis P."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig):
        self.local_block = Block(weights["local_block"], config, config.sliding_window)
        self.global_block = Block(weights["global_block"], config, None)


class Gemma2(nnx.Module):
    """A Gemma 2 (arXiv 2408.00118).

    Args:
        config: its sizes.
        params: its weights, laid out like `weights.WEIGHTS`; see `Gemma2.init` for new ones.
    """

    def __init__(self, config: ModelConfig, params: Mapping[str, Any]):
        self.config = config
        self.embedder = Embedder(params["embedder"], config)
        self.pairs = Pair(params["pairs"], config)
        self.final_norm = RMSNorm(params["final_norm"], config)

    @classmethod
    def init(cls, config: ModelConfig, key: jax.Array) -> "Gemma2":
        """A model with random float32 weights."""
        return cls(config, init_params(config, key))

    def params(self) -> dict[str, Any]:
        """The weights as the nested dict that `Gemma2(config, params)` takes."""
        whole: Any = self
        return map_weights(lambda path, _: reduce(getattr, path.split("/"), whole).get_value())

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        compute: ComputeConfig = ComputeConfig(),
    ) -> jax.Array:
        """Soft-capped float32 logits [B, T, V]. For losses over long batches take `hidden` instead.

        Args:
            tokens: int [B, T].
            positions: [B, T], 0 .. T-1 by default.
            segment_ids: [B, T]; a token sees only its own segment. One segment a row by default.
        """
        return self.embedder.decode(self.hidden(tokens, positions, segment_ids, compute))

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        compute: ComputeConfig = ComputeConfig(),
    ) -> jax.Array:
        """Final hidden states [B, T, D], normed, in compute's dtype; arguments as in `__call__`."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if segment_ids is None:
            segment_ids = jnp.ones_like(tokens)
        with jax.named_scope("embed"):
            x = self.embedder.encode(tokens, compute.dtype)
        x, _ = read(self.pairs, x, positions, segment_ids, compute, keep_key_values=False)
        with jax.named_scope("final_norm"):
            return self.final_norm(x)


def read(
    pairs: Pair | Sequence[Pair],
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    compute: ComputeConfig,
    keep_key_values: bool,
) -> tuple[jax.Array, Any]:
    """Embedded tokens through all pairs: [B, T, D]; and, if kept, each kind's (keys, values) [P, B, T, K, H]."""

    def attend(layer: Attention, x: jax.Array) -> tuple[jax.Array, Any]:
        mixed, (_, key, value) = layer(x, positions, segment_ids, compute.attention)
        return mixed, (key, value) if keep_key_values else None

    def read_pair(x: jax.Array, pair: Pair) -> tuple[jax.Array, Any]:
        x, local = pair.local_block(x, attend)
        x, global_ = pair.global_block(x, attend)
        return x, (local, global_)

    read_pair_again = rematerialised(read_pair, compute)

    def body(carry: Any, pair: Pair) -> tuple[Any, Any]:
        x, index = carry
        x, kept = read_pair_again(x, pair, index)
        return (x, index + 1), kept

    (x, _), kept = over_pairs(body, (x, 0), pairs, compute)
    return x, kept


def rematerialised(
    read_pair: Callable[[jax.Array, Pair], tuple[jax.Array, Any]], compute: ComputeConfig
) -> Callable[[jax.Array, Pair, jax.Array | int], tuple[jax.Array, Any]]:
    """`read_pair` of which the backward pass keeps what `compute.remat` says; it takes the pair's number as well."""

    def read_cast(x: jax.Array, pair: Pair, index: jax.Array | int) -> tuple[jax.Array, Any]:
        # Weights are cast where they are used. The compiler would cast those of all layers before the loop, and keep
        # that copy for as long.
        if compute.dtype != "float32":
            pair = jax.tree.map(lambda weight: stays_in_loop(weight, jnp.asarray(index)), pair)
        return read_pair(x, pair)

    if compute.remat == "none":
        return read_cast
    return jax.checkpoint(read_cast, policy=_REMAT_POLICIES[compute.remat], prevent_cse=compute.unroll_layers)


def over_pairs(
    body: Callable[[Any, Pair], tuple[Any, Any]],
    carry: Any,
    pairs: Pair | Sequence[Pair],
    compute: ComputeConfig,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `body` over pairs of layers, whether they are stacked or apart."""
    if isinstance(pairs, Pair):
        return jax.lax.scan(body, carry, pairs, unroll=compute.unroll_layers)
    outputs = []
    for pair in pairs:
        carry, output = body(carry, pair)
        outputs.append(output)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)
