"""Gemma 2: an embedding, a scan over (local, global) pairs of blocks, and the same embedding as LM head.

`Gemma2` and its parts are Flax NNX modules that hold nothing but weights and constants, so a model is a pytree, which
`jax.jit`, `jax.grad`, `jax.lax.scan` and optax take directly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from gemma2_jax.kernels.lm_head import LMHead
from gemma2_jax.kernels.tuning import stays_in_loop
from gemma2_jax.model.attention import Attention
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.layers import MLP, Embedder, RMSNorm
from gemma2_jax.model.linear import WEIGHT_PRODUCT, dense
from gemma2_jax.model.quantised import is_quantised
from gemma2_jax.model.stack import parts_of
from gemma2_jax.model.weights import Params, init_params, map_specs, weight_specs
from gemma2_jax.sharding.layout import constrain

Taps = dict[str, jax.Array]  # activations inside a block by name, see `Collector`

_BLOCK_INPUT = "block_input"  # name of the residual stream before a block in remat policies
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
    """Attention and MLP, each with a norm before and after it, each added to the residual stream."""

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig, window: int | None):
        self.pre_attention_norm = RMSNorm(weights["pre_attention_norm"], config)
        self.attention = Attention(weights["attention"], config, window)
        self.post_attention_norm = RMSNorm(weights["post_attention_norm"], config)
        self.pre_mlp_norm = RMSNorm(weights["pre_mlp_norm"], config)
        self.mlp = MLP(weights["mlp"])
        self.post_mlp_norm = RMSNorm(weights["post_mlp_norm"], config)

    def __call__(
        self, x: jax.Array, attend: Callable[[Attention, jax.Array], tuple[jax.Array, Any]]
    ) -> tuple[jax.Array, Taps, Any]:
        """[B, T, D] to [B, T, D]; also returns the block's taps and the second result of `attend`."""
        x = checkpoint_name(x, _BLOCK_INPUT)
        with jax.named_scope("attention"):
            attention_input = self.pre_attention_norm(x)
            mixed, extra = attend(self.attention, attention_input)
            x = constrain(x + self.post_attention_norm(mixed), "BTD")
        with jax.named_scope("mlp"):
            mlp_input = self.pre_mlp_norm(x)
            neurons = self.mlp.neurons(mlp_input)
            x = constrain(x + self.post_mlp_norm(self.mlp.mix(neurons)), "BTD")
        taps = {
            "attention_input": attention_input,
            "mlp_input": mlp_input,
            "mlp_hidden": neurons,
            "hidden": x,
        }
        return x, taps, extra


class Pair(nnx.Module):
    """A local block and the global block after it; in a stack of pairs, each weight has a leading axis P.

    With `global_every` above 1, most of the second blocks are local, too. In a stack, `over_pairs` then takes out one
    pair at a time and gives its second block the window.
    """

    def __init__(self, weights: Mapping[str, Any], config: ModelConfig, number: int | None = None):
        """`number` is that of a single pair; None for a stack."""
        self.local_block = Block(weights["local_block"], config, config.sliding_window)
        window = None if number is None else config.windows[2 * number + 1]
        self.global_block = Block(weights["global_block"], config, window)

    @property
    def config(self) -> ModelConfig:
        return self.local_block.attention.config

    def taken(self, index: int, number: int) -> "Pair":
        """The pair at an index of a stack, which is that of a `number` in the model."""
        pair: Pair = jax.tree.map(lambda weight: weight[index], self)
        pair.global_block.attention.window = self.config.windows[2 * number + 1]
        return pair


class Gemma2(nnx.Module):
    """A Gemma 2 (arXiv 2408.00118).

    Args:
        config: sizes of the model.
        params: weights, laid out like `weight_specs(config)`; `Gemma2.init` makes new ones.
    """

    def __init__(self, config: ModelConfig, params: Params):
        self.config = config
        self.embedder = Embedder(params["embedder"], config)
        self.pairs = Pair(params["pairs"], config)
        self.final_norm = RMSNorm(params["final_norm"], config)

    @classmethod
    def init(cls, config: ModelConfig, key: jax.Array) -> "Gemma2":
        """A model with random float32 weights."""
        return cls(config, init_params(weight_specs(config), key))

    def params(self) -> Params:
        """The weights as the nested dict that `Gemma2(config, params)` takes."""
        whole: Any = self

        def value(path: str, _: Any) -> Any:
            return reduce(getattr, path.split("/"), whole).get_value()

        found: Params = map_specs(value, weight_specs(self.config))
        return found

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
            segment_ids: [B, T]; a token attends only to its own segment. One segment per row by default.
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
        return self.collect(None, tokens, positions, segment_ids, compute)[0]

    def collect(
        self,
        collector: "Collector | None",
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        compute: ComputeConfig = ComputeConfig(),
    ) -> tuple[jax.Array, Any]:
        """`hidden`, and the result of a collector over the layers; arguments as in `run_layers`."""
        positions, segment_ids = default_positions(tokens, positions, segment_ids)
        with jax.named_scope("embed"):
            x = self.embedder.encode(tokens, compute.dtype)
        x, collected = run_layers(self.pairs, x, positions, segment_ids, compute, collector)
        with jax.named_scope("final_norm"):
            return self.final_norm(x), collected

    def head(self, hidden: jax.Array) -> LMHead:
        """The LM head on final hidden states [B, T, D]. A quantised embedding is dequantised as a whole."""
        config, embedding = self.config, dense(self.embedder.embedding.get_value(), hidden.dtype)
        return LMHead(hidden, embedding, config.final_logit_softcap, config.vocab_padding)


def default_positions(
    tokens: jax.Array, positions: jax.Array | None, segment_ids: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Positions and segments [B, T] of tokens [B, T], by default 0 .. T-1 and one segment per row."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segment_ids is None:
        segment_ids = jnp.ones_like(tokens)
    return positions, segment_ids


class Collector:
    """Collects results from the taps of a forward pass; this base class collects nothing.

    Taps are activations inside a block, by name. Those that no collector uses are not kept.

        attention_input [B, T, D]   output of the norm before attention
        query, heads [B, T, N, H]   scaled and rotated queries; each head's output, before the output matrix
        key, value [B, T, K, H]     keys are rotated
        mlp_input [B, T, D]         output of the norm before the MLP
        mlp_hidden [B, T, F]        the MLP's neurons
        hidden [B, T, D]            the residual stream after the block
    """

    def of_block(self, block: Block, taps: Taps) -> Any:
        """A pytree to keep from one block's taps. The backward pass recomputes it together with the block."""
        return None

    def begin(self, x: jax.Array) -> Any:
        """The carry before the first pair, given the embedded tokens [B, T, D]."""
        return None

    def add(self, carry: Any, index: jax.Array, kept: dict[str, Any]) -> tuple[Any, Any]:
        """The carry after pair `index`, and the values to stack over the pairs.

        Args:
            kept: results of `of_block` for `local_block` and `global_block`.
        """
        return carry, kept

    def end(self, carry: Any, stacked: Any) -> Any:
        """The collected result, from the last carry and the stacked values [P, ...] of `add`."""
        return stacked


def run_layers(
    pairs: Pair | Sequence[Pair],
    x: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    compute: ComputeConfig,
    collector: Collector | None = None,
) -> tuple[jax.Array, Any]:
    """Runs embedded tokens [B, T, D] through all pairs of blocks; returns [B, T, D] and the collector's result.

    Args:
        positions, segment_ids: [B, T].
        collector: None collects nothing.
    """
    collector = Collector() if collector is None else collector

    def attend(layer: Attention, x: jax.Array) -> tuple[jax.Array, Taps]:
        return layer(x, positions, segment_ids, compute.attention)

    def run_pair(x: jax.Array, pair: Pair) -> tuple[jax.Array, dict[str, Any]]:
        kept = {}
        for name, block in (("local_block", pair.local_block), ("global_block", pair.global_block)):
            x, taps, heads = block(x, attend)
            kept[name] = collector.of_block(block, taps | heads)
        return x, kept

    rematerialised = _rematerialised(run_pair, pairs, compute)

    def body(carry: Any, pair: Pair) -> tuple[Any, Any]:
        x, index, collecting = carry
        x, kept = rematerialised(x, pair, index)
        collecting, output = collector.add(collecting, index, kept)
        return (x, index + 1, collecting), output

    (x, _, collecting), stacked = over_pairs(body, (x, 0, collector.begin(x)), pairs, compute)
    return x, collector.end(collecting, stacked)


def _rematerialised(
    run_pair: Callable[[jax.Array, Pair], tuple[jax.Array, Any]],
    pairs: Pair | Sequence[Pair],
    compute: ComputeConfig,
) -> Callable[[jax.Array, Pair, jax.Array | int], tuple[jax.Array, Any]]:
    """`run_pair` with the rematerialisation that `compute.remat` selects; it also takes the pair's index."""

    def run_cast(x: jax.Array, pair: Pair, index: jax.Array | int) -> tuple[jax.Array, Any]:
        # Weights are cast where they are used. Otherwise the compiler casts those of all layers before the loop, and
        # keeps that copy all the time.
        def in_loop(weight: Any) -> Any:
            if is_quantised(weight) or compute.dtype == "float32":
                return weight
            return stays_in_loop(weight, jnp.asarray(index))

        pair = jax.tree.map(in_loop, in_iteration(pair, index), is_leaf=is_quantised)
        return run_pair(x, pair)

    if compute.remat == "none":
        return run_cast
    # A loop of single pairs keeps the compiler from reusing forward values in place of recomputing them.
    looped = not compute.unroll_layers and isinstance(pairs, Pair) and pairs.config.global_every == 1
    return jax.checkpoint(run_cast, policy=_REMAT_POLICIES[compute.remat], prevent_cse=not looped)


def in_iteration(pair: Pair, number: jax.Array | int) -> Pair:
    """The pair with its quantised weights bound to an iteration of a loop, see `QuantisedWeight.iteration`."""

    def bind(weight: Any) -> Any:
        return replace(weight, iteration=number) if is_quantised(weight) else weight

    bound: Pair = jax.tree.map(bind, pair, is_leaf=is_quantised)
    return bound


def over_pairs(
    body: Callable[[Any, Pair], tuple[Any, Any]],
    carry: Any,
    pairs: Pair | Sequence[Pair],
    compute: ComputeConfig,
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `body` over pairs of layers, which are stacked (see `SplitStack`) or in a list."""
    outputs = []
    if isinstance(pairs, Pair):
        first = 0
        for part in parts_of(pairs):
            carry, output = _scan(body, carry, part, first, compute)
            outputs.append(output)
            first += _length(part)
        return carry, outputs[0] if len(outputs) == 1 else jax.tree.map(
            lambda *each: jnp.concatenate(each), *outputs
        )
    for pair in pairs:
        carry, output = body(carry, pair)
        outputs.append(output)
    return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)


def _scan(
    body: Callable[[Any, Pair], tuple[Any, Any]], carry: Any, pairs: Pair, first: int, compute: ComputeConfig
) -> tuple[Any, Any]:
    """`jax.lax.scan` of `body` over a stack of pairs, whose first one is number `first` in the model.

    Windows are constants of the compiled program. So with `global_every` above 1, an iteration runs that many pairs, or
    all pairs of a part that is not made of such groups.
    """
    every, length = pairs.config.global_every, _length(pairs)
    if every == 1:
        return jax.lax.scan(body, carry, pairs, unroll=compute.unroll_layers)
    size = length if first % every or length % every else every

    def run_group(carry: Any, group: Pair) -> tuple[Any, Any]:
        outputs = []
        for index in range(size):
            carry, output = body(carry, group.taken(index, first + index))
            outputs.append(output)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)

    groups = jax.tree.map(lambda weight: weight.reshape(length // size, size, *weight.shape[1:]), pairs)
    carry, outputs = jax.lax.scan(run_group, carry, groups, unroll=compute.unroll_layers)
    return carry, jax.tree.map(lambda each: each.reshape(length, *each.shape[2:]), outputs)


def _length(pairs: Pair) -> int:
    """The number of pairs in a stack."""
    length: int = jax.tree.leaves(pairs)[0].shape[0]
    return length
