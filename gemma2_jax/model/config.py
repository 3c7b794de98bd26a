"""What a Gemma 2 is made of (`ModelConfig`) and how its forward pass is executed (`ComputeConfig`)."""

from dataclasses import dataclass, field
from typing import Literal

from gemma2_jax.config import UserError
from gemma2_jax.kernels.self_attention import AttentionConfig

Remat = Literal["none", "dots", "full", "offload"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model (Gemma 2 report, arXiv 2408.00118, table 1).

    `d_ff` is the width of each of the gate, up and down matrices; the report quotes gate + up
    together, which is twice this. Layers alternate (local, global) strictly from layer 0.

    Attributes:
        vocab_size: V, the rows of the embedding.
        num_layers: L, an even number: half of them local, half global.
        d_model: D, the width of the residual stream.
        num_heads: N, query heads of a layer.
        num_kv_heads: K, key and value heads of a layer, which divide the query heads evenly.
        head_dim: H, the width of a head.
        d_ff: F, the width of a feed-forward layer.
        sliding_window: a query of a local layer sees itself and the `sliding_window - 1` tokens before
            it; None makes every layer global.
        query_pre_attn_scalar: queries are scaled by its -1/2 power (head_dim for 2B and 9B, 144 for 27B).
        attn_logit_softcap: c of c * tanh(x / c), which bounds the scores of attention.
        final_logit_softcap: the same for the logits.
        rope_base: the longest wavelength of the rotary position embedding is 2 pi times almost this.
        norm_eps: is added to the mean square in each RMSNorm.
        vocab_padding: the last so many rows of the embedding belong to no token: no logit, loss or sample
            comes of them. Gemma 2's weights as DeepMind published them, and the report's parameter counts,
            have 256,128 rows for 256,000 tokens.
    """

    vocab_size: int
    num_layers: int
    d_model: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    d_ff: int
    sliding_window: int | None
    query_pre_attn_scalar: float
    attn_logit_softcap: float = 50.0
    final_logit_softcap: float = 30.0
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    vocab_padding: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "head_dim", "d_ff"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        for name in (
            "query_pre_attn_scalar",
            "attn_logit_softcap",
            "final_logit_softcap",
            "rope_base",
            "norm_eps",
        ):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be above 0.")
        if not 0 <= self.vocab_padding < self.vocab_size:
            raise UserError(
                f"model.vocab_padding is {self.vocab_padding}; it must be at least 0 and below model.vocab_size "
                f"({self.vocab_size})."
            )
        if self.num_layers % 2:
            raise UserError(
                f"model.num_layers is {self.num_layers}; it must be even, since layers come in (local, global) pairs."
            )
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads is {self.num_heads}; it must be a multiple of model.num_kv_heads "
                f"({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise UserError(
                f"model.head_dim is {self.head_dim}; it must be even, since RoPE rotates its two halves."
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(
                f"model.sliding_window is {self.sliding_window}; it must be at least 1, or null for none."
            )

    @property
    def num_tokens(self) -> int:
        """The tokens that there are: rows of the embedding, less its padding."""
        return self.vocab_size - self.vocab_padding

    @property
    def num_pairs(self) -> int:
        """P, the (local, global) pairs of layers that the forward pass scans over."""
        return self.num_layers // 2

    @property
    def query_scale(self) -> float:
        return self.query_pre_attn_scalar**-0.5


@dataclass(frozen=True)
class ComputeConfig:
    """How a forward and backward pass is executed; none of it changes what is computed, but for rounding.

    Attributes:
        dtype: of activations and of the weights as they enter a matrix product. Parameters, norms,
            softmax and losses are float32 whatever it is.
        remat: what the backward pass keeps of a pair of layers: `none` keeps every activation, `dots`
            keeps the results of weight products and recomputes the rest, `full` keeps the pair's input only, and
            `offload` keeps the input of either layer in the host's memory, from which it comes back when it is needed.
        unroll_layers: compile the pairs one after another instead of as a loop. Faster on CPU, where a
            loop copies each layer's weights out of the stack; slower to compile.
        attention: which kernel computes it.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll_layers: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig)  # Older runs lack this key.
