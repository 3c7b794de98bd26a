"""What a training objective can be made of: one function a term, on the logits of one or more tokens.

Logits are float32 [..., V] and already soft-capped; results are [...]. Sums over the vocabulary are
written so that they stay local on a vocabulary-sharded mesh until the last addition: no gathers.
"""

import jax
import jax.numpy as jnp


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log P(target): logits [..., V], targets int32 [...]."""
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)


def forward_kl(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """tau^2 * KL(P_T || P_S), both softened by the temperature tau (Hinton et al., arXiv 1503.02531).

    tau^2 keeps the gradient's size when tau changes. At tau = 1 this is Gemma 2's distillation loss less
    the teacher's entropy, which the student has no part in (Gemma 2 report, section 3.2).
    """
    log_student = jax.nn.log_softmax(student / temperature, axis=-1)
    log_teacher = jax.nn.log_softmax(teacher / temperature, axis=-1)
    return temperature**2 * jnp.sum(jnp.exp(log_teacher) * (log_teacher - log_student), axis=-1)


def agreement(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """1 where both find the same token most likely, else 0."""
    return (jnp.argmax(student, axis=-1) == jnp.argmax(teacher, axis=-1)).astype(jnp.float32)
