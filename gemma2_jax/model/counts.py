"""Parameter counts and FLOPs of a model, from its sizes alone."""

import math
from dataclasses import dataclass

from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.weights import Specs, specs_by_path, weight_specs


@dataclass(frozen=True)
class ParameterCounts:
    """Parameter counts as in the Gemma 2 report's table 2; the tied embedding counts once."""

    embedding: int
    non_embedding: int

    @property
    def total(self) -> int:
        return self.embedding + self.non_embedding


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """The parameter counts of a model of these sizes, from its specs; nothing is allocated."""
    specs = weight_specs(config)
    total = count_weights(specs)
    embedding = math.prod(specs["embedder"]["embedding"].shape)
    return ParameterCounts(embedding, total - embedding)


def count_weights(specs: Specs) -> int:
    """The number of weights in a tree of specs."""
    return sum(math.prod(spec.shape) for spec in specs_by_path(specs).values())


def forward_flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """FLOPs of one forward pass per token of a full sequence of `seq_len`; a multiply-add counts as two.

    Every weight is used once per token (2 FLOPs), the embedding as the LM head. Attention scores and the weighted sum
    of values take 4*N*H FLOPs for each visible (query, key) pair: (T+1)/2 of them on average in a global layer, at most
    the window in a local one. (Kaplan et al., arXiv 2001.08361, section 2.1, but only visible pairs of causal and
    windowed attention count. Norms and softmax are left out, as usual.)
    """
    weights = count_parameters(config).total
    window = min(config.sliding_window or seq_len, seq_len)
    global_keys = (seq_len + 1) / 2
    local_keys = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    num_global = config.num_pairs // config.global_every
    pairs_of_scores = num_global * global_keys + (config.num_layers - num_global) * local_keys
    return 2.0 * weights + 4.0 * config.num_heads * config.head_dim * pairs_of_scores


def bytes_per_token(config: ModelConfig, weight_bytes: int, context: int, width: int, scale: int = 0) -> int:
    """Bytes that a decoder reads to add one token to one row: all weights, and keys and values of the tokens before.

    Args:
        weight_bytes: bytes of all weights. Of the embedding, which is read as the LM head, the row that embeds the
            token is not counted again.
        context: number of tokens before.
        width: bytes of a number in the key/value cache; scale: bytes of the scale of a head's key or value.
    """
    slots = sum(min(context, window or context) for window in config.windows)
    return weight_bytes + 2 * slots * config.num_kv_heads * (config.head_dim * width + scale)


def training_flops_per_token(
    config: ModelConfig,
    seq_len: int,
    teacher: ModelConfig | None = None,
    frozen: int = 0,
    added: int = 0,
) -> float:
    """Model FLOPs of one training step per token: the backward pass costs twice the forward pass.

    A frozen weight needs no gradient, which saves half of its backward pass; that layers below all trained ones have no
    backward pass at all is not counted. An added weight costs as much as one of
    the model. A teacher adds one forward pass. Recomputation (remat) is not counted: model-FLOP utilisation divides by
    this number (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B).

    Args:
        frozen: number of the model's weights that are not trained.
        added: number of trained weights beside the model's, such as those of an adapter.
    """
    flops = 3.0 * forward_flops_per_token(config, seq_len) - 2.0 * frozen + 6.0 * added
    if teacher is not None:
        flops += forward_flops_per_token(teacher, seq_len)
    return flops
