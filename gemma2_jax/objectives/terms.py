"""What a training objective can be made of: one function a term, on the logits of one or more tokens.

Logits are float32 [..., V] and already soft-capped; results are [...]. Sums over the vocabulary are
written so that they stay local on a vocabulary-sharded mesh until the last addition: no gathers.

T is the teacher's distribution and S the student's, both softened by the temperature tau. Every divergence is
scaled by tau^2: all of them are, to first order, quadratic in the difference of logits / tau, so that tau^2
keeps the gradient's size when tau changes (Hinton et al., arXiv 1503.02531). What is about the text alone
(cross-entropy, z-loss) has no temperature.

A row of padding has the logit -1e30 in both models: differences of its log-probabilities are finite, and its
probability, 0, takes them out.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from gemma2_jax.kernels.lm_head import SparseTargets
from gemma2_jax.kernels.softcap import NEVER
from gemma2_jax.sharding.layout import constrain_in_head

Number = float | jax.Array


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log P(target): logits [..., V], targets int32 [...]."""
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def z_loss(logits: jax.Array) -> jax.Array:
    """log(Z)^2, Z the sum of exp(logits): keeps logits from drifting (PaLM, arXiv 2204.02311, section 5)."""
    return jax.nn.logsumexp(logits, axis=-1) ** 2


def forward_kl(student: jax.Array, teacher: jax.Array, temperature: Number) -> jax.Array:
    """tau^2 KL(T || S). At tau = 1 this is Gemma 2's distillation loss less the teacher's entropy, which the
    student has no part in (Gemma 2 report, section 3.2).
    """
    log_s, log_t = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_t, log_s)


def reverse_kl(student: jax.Array, teacher: jax.Array, temperature: Number) -> jax.Array:
    """tau^2 KL(S || T) (MiniLLM, arXiv 2306.08543)."""
    log_s, log_t = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_s, log_t)


def jsd(student: jax.Array, teacher: jax.Array, temperature: Number, beta: float) -> jax.Array:
    """tau^2 (beta KL(T || M) + (1 - beta) KL(S || M)), M = beta T + (1 - beta) S, 0 < beta < 1: the generalised
    Jensen-Shannon divergence (GKD, arXiv 2306.13649). It tends to 0 at both ends: divided by beta to the forward
    KL as beta -> 0, divided by 1 - beta to the reverse KL as beta -> 1.
    """
    log_s, log_t = _softened(student, teacher, temperature)
    log_m = _log_mixture(log_t, log_s, beta)
    return temperature**2 * (beta * _kl(log_t, log_m) + (1 - beta) * _kl(log_s, log_m))


def skew_kl(student: jax.Array, teacher: jax.Array, temperature: Number, alpha: float) -> jax.Array:
    """tau^2 KL(T || alpha T + (1 - alpha) S), 0 <= alpha < 1 (DistiLLM, arXiv 2402.03898)."""
    log_s, log_t = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_t, _log_mixture(log_t, log_s, alpha))


def skew_reverse_kl(student: jax.Array, teacher: jax.Array, temperature: Number, alpha: float) -> jax.Array:
    """tau^2 KL(S || alpha S + (1 - alpha) T), 0 <= alpha < 1 (DistiLLM)."""
    log_s, log_t = _softened(student, teacher, temperature)
    return temperature**2 * _kl(log_s, _log_mixture(log_s, log_t, alpha))


def sparse_forward_kl(student: jax.Array, teacher: SparseTargets, temperature: Number) -> jax.Array:
    """tau^2 KL(T || S) over the teacher's tokens, with all others as one more: their weights w_k and the tail's w_0,

        sum_k w_k (log w_k - log S_k) + w_0 (log w_0 - log S_0),  S_0 = 1 - sum_k S_k

    The weights have to be those of T at tau: they cannot be had from those at another. A token of weight 0
    counts among the others. S_0 is summed over them: 1 - sum_k S_k would lose a small one to rounding. Where there
    are no others, a tail is rounding alone, and left out.

    Of N drawn tokens, sum_k w_k log w_k is that of the draws, whose entropy, log N at most, is below T's: the value
    lies above KL(T || S) by the difference, also where S is T. It is the same for every S, so that the gradient has no
    part in it; but values compare at the same N and T alone, and not with those of whole distributions.
    """
    student = student / temperature
    weights = jnp.exp(teacher.log_weights)
    used = weights > 0
    own = jnp.sum(jnp.where(used, weights * teacher.log_weights, 0.0), axis=-1)
    # As an array over the vocabulary, since it lies on a mesh as the logits do: its product with them needs no
    # gather, and the gradient no scatter.
    dense = _scatter(jnp.zeros(student.shape, jnp.float32), teacher.ids, weights)
    dense = constrain_in_head(dense, "BTV") if dense.ndim == 3 else dense
    log_z = jax.nn.logsumexp(student, axis=-1)
    named = jnp.sum(dense * student, axis=-1) - jnp.sum(weights, axis=-1) * log_z
    never = NEVER / temperature  # as rows of padding have it
    log_others = jax.nn.logsumexp(jnp.where(dense > 0, never, student), axis=-1) - log_z
    has_tail = (teacher.tail > 0) & (log_others > never / 2)
    log_tail = jnp.log(jnp.where(has_tail, teacher.tail, 1.0))
    tail = jnp.where(has_tail, teacher.tail * (log_tail - log_others), 0.0)
    return temperature**2 * (own - named + tail)


def entropy(logits: jax.Array) -> jax.Array:
    """-sum P log P in nats."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


def agreement(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 where both find the same token most likely, else 0."""
    return (jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1)).astype(jnp.float32)


def _softened(student: jax.Array, teacher: jax.Array, temperature: Number) -> tuple[jax.Array, jax.Array]:
    """log S and log T."""
    log_s = jax.nn.log_softmax(student / temperature, axis=-1)
    log_t = jax.nn.log_softmax(teacher / temperature, axis=-1)
    return log_s, log_t


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _log_mixture(log_p: jax.Array, log_q: jax.Array, share: float) -> jax.Array:
    """log(share P + (1 - share) Q)."""
    if share == 0:
        return log_q
    return jnp.logaddexp(log_p + math.log(share), log_q + math.log1p(-share))


@partial(jnp.vectorize, signature="(v),(k),(k)->(v)")
def _scatter(rows: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    """[..., V] and, at ids [..., K], weights [..., K]."""
    return rows.at[ids].add(weights)
