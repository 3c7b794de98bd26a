"""Encodes a teacher's logits as a few entries per token.

There are four ways to store a distribution P over V tokens:

- `sampled`: N ids drawn with replacement, each with weight 1/N: an unbiased estimate of P, so that the gradient
  of the forward KL, which is linear in P, is unbiased too (Random Sampling KD, arXiv 2503.16870; Gemma 3 keeps
  256 draws, arXiv 2503.19786). If ids are drawn from a flatter proposal q ~ P^(1/proposal_temperature), a draw has
  weight p/q / N. These weights sum to 1 only in expectation; they are not normalised, since dividing them by their
  sum would bias them. They are unbiased up to the rounding of their logarithms, half a step of `records.LogGrid`.
- `top_k`: the k largest probabilities, and the sum of the others as the tail.
- `top_p`: the fewest of those k that reach probability p together, and the tail.
- `full`: all of P, for small vocabularies.

Draws invert the cumulative distribution on two levels: first they select one of about sqrt(V) runs of ids, then an id
in that run. Cumulative sums in float32 over all of V would lose tokens of probability below 6e-8, of which a large
vocabulary has many. On two levels they are sums of 31-bit integers, which are exact; the distribution that is sampled
differs from the float32 softmax by less than 2e-6 in total variation.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.kernels.blocks import join_tokens, split_tokens, token_blocks
from gemma2_jax.messages import written
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.layout import constrain

LARGEST_FULL = 65_536  # largest vocabulary that `full` accepts: 256 KiB per token as float32
_ONE = 2.0**31  # probability 1, as an integer; a float, since a Python integer would have to fit int32


@dataclass(frozen=True)
class EncodingConfig:
    """How the cache encodes the teacher's distributions.

    Attributes:
        kind: which part of each distribution is stored: `sampled` random draws from it, an unbiased estimate; `top_k`
            the largest probabilities, and the sum of the others; `top_p` the fewest of those that reach p together,
            and the sum of the others; `full` all of it, for small vocabularies.
        entries: number of draws N of `sampled`, or k of `top_k` and `top_p`; null for `full`.
        p: total probability that `top_p` stores, unless k ids do not reach it; null for the other kinds.
        proposal_temperature: temperature of the distribution that `sampled` draws from; values above 1 draw unlikely
            tokens more often, with less weight.
        temperature: temperature of the stored distribution; a student must train with the same objective.temperature.
        weight_bits: bits of a stored logarithm. Draws with proposal_temperature 1 are counted and have no logarithms.
            See `records.LogGrid` for the error.
        seed: random seed of the draws.
    """

    kind: Literal["sampled", "top_k", "top_p", "full"] = "sampled"
    entries: int | None = 50
    p: float | None = None
    proposal_temperature: float = 1.0
    temperature: float = 1.0
    weight_bits: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.kind == "full") != (self.entries is None):
            accepted = "null" if self.kind == "full" else "at least 1"
            raise UserError(
                f"distill.encoding.entries is {written(self.entries)}; it must be {accepted} for kind {self.kind}."
            )
        if self.entries is not None and not 1 <= self.entries < 1 << 16:
            raise UserError(
                f"distill.encoding.entries is {self.entries}; it must be at least 1 and below 65536."
            )
        if (self.kind == "top_p") != (self.p is not None):
            accepted = "above 0 and at most 1" if self.kind == "top_p" else "null"
            raise UserError(
                f"distill.encoding.p is {written(self.p)}; it must be {accepted} for kind {self.kind}."
            )
        if self.p is not None and not 0 < self.p <= 1:
            raise UserError(f"distill.encoding.p is {self.p}; it must be above 0 and at most 1.")
        if not self.proposal_temperature >= 1 or not math.isfinite(self.proposal_temperature):
            raise UserError(
                f"distill.encoding.proposal_temperature is {self.proposal_temperature}; it must be at least 1, since "
                "a sharper proposal gives unlikely tokens weights of unbounded variance."
            )
        if self.proposal_temperature != 1 and self.kind != "sampled":
            raise UserError(
                f"distill.encoding.proposal_temperature is {self.proposal_temperature}, but only kind sampled uses it; "
                f"it must be 1 for kind {self.kind}."
            )
        if not 0 < self.temperature < math.inf:
            raise UserError(f"distill.encoding.temperature is {self.temperature}; it must be above 0.")
        if not 8 <= self.weight_bits <= 16:
            raise UserError(f"distill.encoding.weight_bits is {self.weight_bits}; it must be from 8 to 16.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"distill.encoding.seed is {self.seed}; it must be at least 0 and below 2**32.")

    @property
    def counted(self) -> bool:
        """Whether weights are stored as numbers of draws instead of logarithms."""
        return self.kind == "sampled" and self.proposal_temperature == 1

    @property
    def has_tail(self) -> bool:
        """Whether the probability outside the entries is stored."""
        return self.kind in ("top_k", "top_p")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """The entries of tokens [...] as computed on the devices, sorted by id.

    Attributes:
        ids: int32 [..., N]; a drawn id appears as often as it was drawn; V in unused entries; -1 where the teacher's
            logits are NaN.
        logs: float32 [..., N], log p of each id, or log p/q with a proposal; None for draws from P itself.
        log_tail: float32 [...], log of the probability outside the entries, lower than any token's if no token is
            outside; None without a tail.
    """

    ids: Any
    logs: Any
    log_tail: Any


def check_encoding(config: EncodingConfig, model: ModelConfig) -> None:
    """Raises UserError if a teacher's vocabulary is too small or too large for the encoding."""
    tokens = model.num_tokens
    if config.kind == "full" and tokens > LARGEST_FULL:
        raise UserError(
            f"distill.encoding.kind is full, but the teacher has {tokens} tokens, and full supports at most "
            f"{LARGEST_FULL}; choose sampled, top_k or top_p."
        )
    if config.kind in ("top_k", "top_p") and config.entries is not None and config.entries > tokens:
        raise UserError(
            f"distill.encoding.entries is {config.entries}; it must be at most {tokens}, the number of the teacher's "
            "tokens."
        )


def encode_batch(
    config: EncodingConfig,
    teacher: Gemma2,
    compute: ComputeConfig,
    block_tokens: int,
    batch: Batch,
    rows: jax.Array,
) -> Entries:
    """Encodes the teacher's distributions for the targets of a batch; for `jax.jit`, on any mesh.

    Args:
        teacher: the teacher; its weights may be sharded over the mesh, including the vocabulary.
        block_tokens: number of tokens whose logits each device computes at a time.
        batch: batch of [B, T].
        rows: uint32 [B], index of each row in the data; it and the position determine a token's draws.

    Returns:
        Entries of [B, T].
    """
    hidden = teacher.hidden(batch.tokens, batch.positions, batch.segment_ids, replace(compute, remat="none"))
    B, T, _ = hidden.shape
    places = jnp.broadcast_to(jnp.arange(T), (B, T))

    def block(part: tuple[jax.Array, jax.Array]) -> Entries:
        logits = constrain(teacher.embedder.decode(constrain(part[0], "BTD")), "BTV")
        return encode(config, logits, teacher.config.num_tokens, rows[:, None], part[1])

    split = split_tokens(token_blocks(B, T, block_tokens), (hidden, places))
    return jax.tree.map(lambda values: join_tokens(values, T), jax.lax.map(block, split))


def encode(
    config: EncodingConfig, logits: jax.Array, num_tokens: int, rows: jax.Array, places: jax.Array
) -> Entries:
    """Encodes tokens from their logits.

    Args:
        logits: float32 [..., V], soft-capped; those of padding rows are far below all others.
        num_tokens: number of tokens; the rest of V is padding.
        rows, places: row in the data (uint32) and position in the row (int32) of each token; broadcast to [...].

    Returns:
        Entries of [...].
    """
    entries = _encode(config, logits / config.temperature, num_tokens, rows, places)
    # Every kind would encode NaN as ordinary entries.
    broken = jnp.isnan(jnp.max(logits, axis=-1, keepdims=True))
    return replace(entries, ids=jnp.where(broken, -1, entries.ids))


def _encode(
    config: EncodingConfig, logits: jax.Array, num_tokens: int, rows: jax.Array, places: jax.Array
) -> Entries:
    if config.kind == "sampled":
        return _sampled(config, logits, rows, places)
    log_p = jax.nn.log_softmax(logits, axis=-1)
    if config.kind == "full":
        ids = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (*log_p.shape[:-1], num_tokens))
        return Entries(ids, log_p[..., :num_tokens], None)
    assert config.entries is not None
    logs, ids = jax.lax.top_k(log_p, config.entries)
    p = jnp.exp(logs)
    reached = jnp.cumsum(p, axis=-1)
    kept = jnp.ones_like(ids, bool) if config.p is None else reached - p < config.p
    ids, logs = jnp.where(kept, ids, logits.shape[-1]), jnp.where(kept, logs, -jnp.inf)
    # Not 1 - sum(p), which is mere rounding where the entries hold nearly all of P.
    log_tail = jax.nn.logsumexp(_without(log_p, ids), axis=-1)
    ids, logs = jax.lax.sort((ids, logs), num_keys=1)
    return Entries(ids, logs, log_tail)


@partial(jnp.vectorize, signature="(v),(k)->(v)")
def _without(log_p: jax.Array, ids: jax.Array) -> jax.Array:
    """log_p [..., V] with -inf at ids [..., K]; ids equal to V are ignored."""
    return log_p.at[ids].set(-jnp.inf, mode="drop")


def _sampled(config: EncodingConfig, logits: jax.Array, rows: jax.Array, places: jax.Array) -> Entries:
    N = config.entries
    assert N is not None
    key = jax.random.key(config.seed)
    shape = logits.shape[:-1]
    rows, places = (jnp.broadcast_to(x, shape).reshape(-1) for x in (rows, places))

    def bits(row: jax.Array, place: jax.Array) -> jax.Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, row), place)
        return jax.random.bits(token_key, (2, N), jnp.uint32) >> 1

    draws = jax.vmap(bits)(rows, places).reshape(*shape, 2, N)
    proposal = logits / config.proposal_temperature
    ids = jnp.sort(draw(proposal, draws[..., 0, :], draws[..., 1, :]), axis=-1)
    if config.counted:
        return Entries(ids, None, None)
    log_p, log_q = (
        jnp.take_along_axis(x, ids, axis=-1) - jax.nn.logsumexp(x, axis=-1, keepdims=True)
        for x in (logits, proposal)
    )
    return Entries(ids, log_p - log_q, None)


@partial(jax.jit, inline=True)
def draw(logits: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Draws ids int32 [..., N] from softmax(logits [..., V]).

    Args:
        first, second: uniform random integers below 2^31, uint32 [..., N], for the two levels.
    """
    runs = run_weights(logits)
    run = _invert(cumulative(jnp.sum(runs, axis=-1)), first[..., None])
    inside = jnp.take_along_axis(runs, run[..., None], axis=-2)  # [..., N, width]
    return run * runs.shape[-1] + _invert(cumulative(inside), second[..., None])


def run_weights(logits: jax.Array) -> jax.Array:
    """exp of logits [..., V], up to a factor, as runs of ids [..., ceil(V / width), width], both near sqrt(V)."""
    V = logits.shape[-1]
    width = 1 << math.ceil(math.log2(V) / 2)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    padded = jnp.pad(weights, [(0, 0)] * (weights.ndim - 1) + [(0, -V % width)])
    return padded.reshape(*weights.shape[:-1], -1, width)


def cumulative(weights: jax.Array) -> jax.Array:
    """Cumulative distribution of weights [..., n] as integers uint32 [..., n], the last of which is exactly 2^31.

    Each share is rounded to a multiple of 2^-31; the rounding error of the total is added to the largest share.
    """
    shares = weights / jnp.sum(weights, axis=-1, keepdims=True)
    whole = jnp.round(shares * _ONE).astype(jnp.uint32)
    rest = jnp.uint32(int(_ONE)) - jnp.sum(whole, axis=-1, dtype=jnp.uint32)  # modulo 2^32, as the sum below
    largest = jnp.argmax(shares, axis=-1)
    at = jax.lax.broadcasted_iota(largest.dtype, shares.shape, shares.ndim - 1)
    return jnp.cumsum(whole + jnp.where(at == largest[..., None], rest[..., None], 0), -1, dtype=jnp.uint32)


def _invert(distribution: jax.Array, uniform: jax.Array) -> jax.Array:
    """The number of cumulative sums [..., n] that are at most a uniform integer [..., 1]: int32 [...]."""
    if distribution.ndim == uniform.ndim - 1:  # the same distribution for all draws
        distribution = distribution[..., None, :]
    return jnp.sum(distribution <= uniform, axis=-1, dtype=jnp.int32)
