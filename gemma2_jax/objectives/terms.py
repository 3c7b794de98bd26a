"""The terms of a training objective: one function per term, on the logits of one or more tokens.

Logits are float32 [..., V] and already soft-capped; results are [...]. Sums over the vocabulary are
written so that they stay local on a vocabulary-sharded mesh until the last addition: no gathers.

T is the teacher's distribution and S the student's, both softened by the temperature tau. Every divergence is
scaled by tau^2: all of them are, to leading order, quadratic in the difference of logits / tau, so the factor tau^2
keeps the gradient's magnitude when tau changes (Hinton et al., arXiv 1503.02531). The terms on text alone
(cross-entropy, z-loss) have no temperature.

At a high temperature T and S are close, and sum P (log P - log Q) is a small difference of large numbers. Since P and Q
both sum to 1, it equals the sum of Q - P - P log(Q / P), whose terms are all at least 0. It is computed in this form,
with log(Q / P) as a difference of logits; the same holds for its gradients.

Padding rows of the vocabulary have the logit -1e30 in both models: differences of their log-probabilities are finite,
and their probability 0 removes them from every sum.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.softcap import NEVER, negative_log_prob
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.sharding.layout import constrain_in_head

Number = float | jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log P(target): logits [..., V], targets int32 [...]."""
    return negative_log_prob(logits, targets)


def z_loss(logits: jax.Array) -> jax.Array:
    """log(Z)^2, Z the sum of exp(logits): keeps logits from drifting (PaLM, arXiv 2204.02311, section 5)."""
    return jax.nn.logsumexp(logits, axis=-1) ** 2


def forward_kl(student: jax.Array, teacher: jax.Array, temperature: Number) -> jax.Array:
    """tau^2 KL(T || S). At tau = 1 this is Gemma 2's distillation loss (Gemma 2 report, section 3.2) minus the
    teacher's entropy, which does not depend on the student.
    """
    log_s, log_t, ratio = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_t, log_s, ratio)


def reverse_kl(student: jax.Array, teacher: jax.Array, temperature: Number) -> jax.Array:
    """tau^2 KL(S || T) (MiniLLM, arXiv 2306.08543)."""
    log_s, log_t, ratio = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_s, log_t, -ratio)


def jsd(student: jax.Array, teacher: jax.Array, temperature: Number, beta: float) -> jax.Array:
    """tau^2 (beta KL(T || M) + (1 - beta) KL(S || M)), M = beta T + (1 - beta) S, 0 < beta < 1: the generalised
    Jensen-Shannon divergence (GKD, arXiv 2306.13649). It tends to 0 at both ends: divided by beta to the forward
    KL as beta -> 0, divided by 1 - beta to the reverse KL as beta -> 1.
    """
    log_s, log_t, ratio = _softened(student, teacher, temperature)
    log_m, mixed = _mixture(beta, log_t, log_s, ratio)
    divergence = beta * _kl(log_t, log_m, mixed) + (1 - beta) * _kl(log_s, log_m, mixed - ratio)
    return temperature**2 * divergence


def skew_kl(student: jax.Array, teacher: jax.Array, temperature: Number, alpha: float) -> jax.Array:
    """tau^2 KL(T || alpha T + (1 - alpha) S), 0 <= alpha < 1 (DistiLLM, arXiv 2402.03898)."""
    log_s, log_t, ratio = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_t, *_mixture(alpha, log_t, log_s, ratio))


def skew_reverse_kl(student: jax.Array, teacher: jax.Array, temperature: Number, alpha: float) -> jax.Array:
    """tau^2 KL(S || alpha S + (1 - alpha) T), 0 <= alpha < 1 (DistiLLM)."""
    log_s, log_t, ratio = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_s, *_mixture(alpha, log_s, log_t, -ratio))


def sparse_forward_kl(student: jax.Array, teacher: SparseTargets, temperature: Number) -> jax.Array:
    """tau^2 KL(T || S) over the teacher's tokens, with all other tokens merged into one, the tail.

    With weights w_k of the tokens and w_0 of the tail, the divergence is

        sum_k w_k (log w_k - log S_k) + w_0 (log w_0 - log S_0) + 1 - sum_k w_k - w_0,  S_0 = 1 - sum_k S_k

    The last part, 1 - sum_k w_k - w_0, is 0 unless the weights sum to 1 only in expectation; it keeps every value at
    least 0. The weights must be those of T at tau: weights at one temperature cannot be converted to another. A token
    of weight 0 counts as part of the tail. S_0 is summed over the tail's tokens, since 1 - sum_k S_k would lose a small
    value to rounding. If no token is left for the tail, w_0 is only rounding, and is ignored.

    With N drawn tokens, sum_k w_k log w_k is minus the entropy of the draws, which is at most log N and below T's
    entropy. The value therefore exceeds KL(T || S) by the difference, even if S equals T. The excess is the same for
    every S, so the gradient is not affected. But values are comparable only at the same N and T, and not with those of
    whole distributions.
    """
    log_s, _ = _log_softmax(student / temperature)
    # A dense array over the vocabulary, sharded like the logits: its product with them needs no gather, and the
    # gradient no scatter.
    dense = _scatter(jnp.zeros(student.shape, jnp.float32), teacher.ids, jnp.exp(teacher.log_weights))
    dense = constrain_in_head(dense, "BTV") if dense.ndim == 3 else dense
    is_named = dense > 0
    log_w = jnp.log(jnp.where(is_named, dense, 1.0))
    named = jnp.sum(jnp.where(is_named, _divergence(log_w, log_s, log_s - log_w), 0.0), axis=-1)
    never = NEVER / temperature  # the value of padding rows
    log_others = jax.nn.logsumexp(jnp.where(is_named, never, log_s), axis=-1)
    has_others = log_others > never / 2
    log_others = jnp.where(has_others, log_others, 0.0)
    log_tail = jnp.log(jnp.where(teacher.tail > 0, teacher.tail, 1.0))
    tail = _divergence(log_tail, log_others, log_others - log_tail)
    others = jnp.where(teacher.tail > 0, tail, jnp.exp(log_others))
    return temperature**2 * (named + jnp.where(has_others, others, 0.0))


def entropy(logits: jax.Array) -> jax.Array:
    """-sum P log P in nats."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def agreement(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 where both have the same most likely token, else 0."""
    return (jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1)).astype(jnp.float32)


def acceptance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """sum_v min(S_v, T_v) = 1 - total variation: the probability that speculative decoding with the student as draft
    accepts its token (Leviathan et al., arXiv 2211.17192, corollary 3.6).
    """
    return jnp.sum(jnp.minimum(jax.nn.softmax(student, axis=-1), jax.nn.softmax(teacher, axis=-1)), axis=-1)


def _softened(
    student: jax.Array, teacher: jax.Array, temperature: Number
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log S, log T and log(S / T). The last is computed from the logits, which is more precise than the difference of
    the first two; it carries no gradient."""
    log_s, log_z_s = _log_softmax(student / temperature)
    log_t, log_z_t = _log_softmax(teacher / temperature)
    ratio = (student - teacher) / temperature - (log_z_s - log_z_t)
    return log_s, log_t, jax.lax.stop_gradient(ratio)


@jax.custom_jvp
def _log_softmax(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log P, and the log-sum-exp of the logits [..., 1], which carries no gradient."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - largest
    log_sum = jnp.log(jnp.sum(jnp.exp(shifted), axis=-1, keepdims=True))
    return shifted - log_sum, largest + log_sum


@_log_softmax.defjvp
def _log_softmax_jvp(primals: Any, tangents: Any) -> Any:
    log_p, log_z = _log_softmax(*primals)
    (tangent,) = tangents
    mean = jnp.sum(jnp.exp(log_p) * tangent, axis=-1, keepdims=True)
    return (log_p, log_z), (tangent - mean, jnp.zeros_like(log_z))


def _kl(log_p: jax.Array, log_q: jax.Array, ratio: jax.Array) -> jax.Array:
    """KL(P || Q); ratio: log(Q / P)."""
    return jnp.sum(_divergence(log_p, log_q, ratio), axis=-1)


@jax.custom_jvp
def _divergence(log_p: jax.Array, log_q: jax.Array, ratio: jax.Array) -> jax.Array:
    """Q - P - P log(Q / P), at least 0, elementwise; ratio: log(Q / P), which carries no gradient."""
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    return jnp.where(_is_small(ratio), p * _exp_beyond_linear(ratio), q - p - p * ratio)


@_divergence.defjvp
def _divergence_jvp(primals: Any, tangents: Any) -> Any:
    log_p, log_q, ratio = primals
    d_log_p, d_log_q, _ = tangents
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    difference = jnp.where(_is_small(ratio), p * (ratio + _exp_beyond_linear(ratio)), q - p)
    return _divergence(*primals), difference * d_log_q - p * ratio * d_log_p


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _mixture(
    share: float, log_p: jax.Array, log_q: jax.Array, ratio: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """log M and log(M / P) of M = share P + (1 - share) Q; ratio: log(Q / P), as in `_divergence`."""
    if share == 0:
        return log_q, ratio
    # log(share + (1 - share) e^ratio), expanded around 1 where the ratio is small, else around the larger summand.
    first, second = math.log(share), math.log1p(-share) + ratio
    beyond = jnp.where(
        _is_small(ratio),
        (1 - share) * (ratio + _exp_beyond_linear(ratio)),
        jnp.exp(-jnp.abs(first - second)),
    )
    mixed = jnp.log1p(beyond) + jnp.where(_is_small(ratio), 0.0, jnp.maximum(first, second))
    return log_p + mixed, mixed


@_mixture.defjvp
def _mixture_jvp(share: float, primals: Any, tangents: Any) -> Any:
    log_m, mixed = _mixture(share, *primals)
    _, _, ratio = primals
    d_log_p, d_log_q, _ = tangents
    # The fractions of M that come from P and from Q.
    d_log_m = share * jnp.exp(-mixed) * d_log_p + (1 - share) * jnp.exp(ratio - mixed) * d_log_q
    return (log_m, mixed), (d_log_m, jnp.zeros_like(mixed))


def _is_small(ratio: jax.Array) -> jax.Array:
    return jnp.abs(ratio) < 0.5


def _exp_beyond_linear(x: jax.Array) -> jax.Array:
    """e^x - 1 - x for |x| < 0.5 in float32 precision, by its series, since the formula itself would cancel."""
    sum_ = jnp.full_like(x, 1 / math.factorial(8))
    for power in range(7, 1, -1):
        sum_ = sum_ * x + 1 / math.factorial(power)
    return x * x * sum_


@partial(jnp.vectorize, signature="(v),(k),(k)->(v)")
def _scatter(rows: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """Adds weights [..., K] to rows [..., V] at ids [..., K]."""
    return rows.at[ids].add(weights)
