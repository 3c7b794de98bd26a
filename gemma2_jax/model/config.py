"""The sizes of a Gemma 2 (`ModelConfig`), and how its forward pass is executed (`ComputeConfig`)."""

from dataclasses import dataclass, field
from typing import Literal

from gemma2_jax.config import UserError
from gemma2_jax.kernels.self_attention import AttentionConfig

Remat = Literal["none", "dots", "full", "offload"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of one model (Gemma 2 report, arXiv 2408.00118, table 1).

    `d_ff` is the width of each of the gate, up and down matrices; the report quotes gate + up together, which is twice
    this. Layers alternate strictly between local and global, and layer 0 is local, unless `global_every` makes fewer
    layers global.

    Attributes:
        vocab_size: V, the rows of the embedding.
        num_layers: L, an even number: layers come in pairs of a local and a global one.
        d_model: D, the width of the residual stream.
        num_heads: N, query heads of a layer.
        num_kv_heads: K, key/value heads of a layer, a divisor of the number of query heads.
        head_dim: H, the width of a head.
        d_ff: F, the width of a feed-forward layer.
        sliding_window: number of tokens that a query of a local layer attends to: its own and those directly before it;
            null makes every layer global.
        query_pre_attn_scalar: queries are multiplied by its -1/2 power (head_dim for 2B and 9B, 144 for 27B).
        attn_logit_softcap: c in c * tanh(x / c), which bounds attention scores.
        final_logit_softcap: the same for logits.
        rope_base: base of the rotary position embedding, whose longest wavelength is almost 2 pi times this.
        norm_eps: number added to the mean square in each RMSNorm.
        vocab_padding: number of rows at the end of the embedding that belong to no token: they give no logit, loss or
            sample. Gemma 2's weights as DeepMind published them, and the report's parameter counts, have 256,128 rows
            for 256,000 tokens.
        global_every: n, a divisor of the number of pairs: only every n-th pair has a global layer, in the others both
            layers are local. There are 2n - 1 local layers for each global one: 1 in Gemma 2, 5 (n = 3) in Gemma 3.
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
    global_every: int = 1  # Older checkpoints lack this key.

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
        if self.sliding_window is None and self.global_every != 1:
            raise UserError(
                f"model.global_every is {self.global_every}, but model.sliding_window is null, so every layer is "
                "global; set model.global_every=1, or a window."
            )
        if self.global_every < 1 or self.num_pairs % self.global_every:
            raise UserError(
                f"model.global_every is {self.global_every}; it must be a divisor of the number of pairs of layers "
                f"({self.num_pairs}), so that the last layer is global."
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
        """The number of tokens: rows of the embedding, less its padding."""
        return self.vocab_size - self.vocab_padding

    @property
    def num_pairs(self) -> int:
        """P, the (local, global) pairs of layers that the forward pass scans over."""
        return self.num_layers // 2

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, [L]; None for a global one."""
        local = (self.sliding_window,) * (2 * self.global_every - 1)
        return (*local, None) * (self.num_pairs // self.global_every)

    @property
    def query_scale(self) -> float:
        """The factor that queries are multiplied by."""
        return self.query_pre_attn_scalar**-0.5


@dataclass(frozen=True)
class ComputeConfig:
    """How forward and backward passes are executed; results differ only by rounding.

    Attributes:
        dtype: dtype of activations, and of weights in matrix products. Parameters, norms, softmax and losses are always
            float32.
        remat: what is kept of a pair of layers for the backward pass: `none` keeps every activation, `dots` keeps the
            results of weight products and recomputes the rest, `full` keeps only the pair's input, and `offload` keeps
            the input of each layer in host memory and fetches it when needed.
        unroll_layers: whether to compile the pairs one after another instead of as a loop. Faster on CPU, where a loop
            copies each layer's weights out of the stack; slower to compile.
        attention: settings of the attention kernel.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    unroll_layers: bool = False
    attention: AttentionConfig = field(default_factory=AttentionConfig)  # Older runs lack this key.
