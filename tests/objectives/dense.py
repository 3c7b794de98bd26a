"""The objective written down again: from whole distributions, by formula, in float64."""

from dataclasses import asdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gemma2_jax.kernels.lm_head import LMHead
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.schedule import ScheduleConfig


def value_and_gradients(
    config: ObjectiveConfig, student: LMHead, teacher: Any, targets: jax.Array, mask: jax.Array
) -> tuple[float, np.ndarray, np.ndarray]:
    """The masked sum, and its gradients with respect to the student's hidden states and embedding."""
    arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), (student.hidden, student.embedding, mask))
    ids = np.asarray(targets)
    if isinstance(teacher, LMHead):
        other: Any = np.asarray(teacher.hidden, np.float64), np.asarray(teacher.embedding, np.float64)
    elif isinstance(teacher, SparseTargets):
        weights = np.exp(np.asarray(teacher.log_weights, np.float64))
        other = np.asarray(teacher.ids), weights, np.asarray(teacher.tail, np.float64)
    with jax.enable_x64(True):
        hidden, embedding, shares = (jnp.asarray(x) for x in arrays)

        def total(hidden: jax.Array, embedding: jax.Array) -> jax.Array:
            logits = _logits(hidden, embedding, student)
            coefficients = {name: value for name, value in asdict(config).items() if value}
            values = {"cross_entropy": _cross_entropy(logits, ids), "z_loss": _log_z(logits) ** 2}
            if isinstance(teacher, LMHead):
                values |= _divergences(
                    config, logits, _logits(jnp.asarray(other[0]), jnp.asarray(other[1]), teacher)
                )
            elif isinstance(teacher, SparseTargets):
                tau = config.temperature
                assert not isinstance(tau, ScheduleConfig)
                values["forward_kl"] = tau**2 * _sparse(logits / tau, *map(jnp.asarray, other))
            parts = [
                jnp.sum(coefficients[name] * value * shares)
                for name, value in values.items()
                if name in coefficients
            ]
            return jnp.sum(jnp.stack(parts))

        value, gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(hidden, embedding)
        assert value.dtype == jnp.float64
        return float(value), np.asarray(gradients[0]), np.asarray(gradients[1])


def _logits(hidden: jax.Array, embedding: jax.Array, head: LMHead) -> jax.Array:
    tokens = embedding.shape[0] - head.vocab_padding
    return head.softcap * jnp.tanh(hidden @ embedding[:tokens].T / head.softcap)


def _softmax(logits: jax.Array) -> jax.Array:
    return jnp.exp(logits) / jnp.sum(jnp.exp(logits), -1, keepdims=True)  # e^30 is no trouble in float64


def _log_z(logits: jax.Array) -> jax.Array:
    return jnp.log(jnp.sum(jnp.exp(logits), -1))


def _cross_entropy(logits: jax.Array, targets: np.ndarray) -> jax.Array:
    return -jnp.log(jnp.take_along_axis(_softmax(logits), jnp.asarray(targets)[..., None], -1)[..., 0])


def _kl(p: jax.Array, q: jax.Array) -> jax.Array:
    return jnp.sum(p * jnp.log(p / q), -1)


def _divergences(config: ObjectiveConfig, student: jax.Array, teacher: jax.Array) -> dict[str, jax.Array]:
    tau, alpha, beta = config.temperature, config.skew_alpha, config.jsd_beta
    assert not isinstance(tau, ScheduleConfig)
    S, T = _softmax(student / tau), _softmax(teacher / tau)
    M = beta * T + (1 - beta) * S
    values = {
        "forward_kl": _kl(T, S),
        "reverse_kl": _kl(S, T),
        "jsd": beta * _kl(T, M) + (1 - beta) * _kl(S, M),
        "skew_kl": _kl(T, alpha * T + (1 - alpha) * S),
        "skew_reverse_kl": _kl(S, alpha * S + (1 - alpha) * T),
    }
    return {name: tau**2 * value for name, value in values.items()}


def _sparse(logits: jax.Array, ids: jax.Array, weights: jax.Array, tail: jax.Array) -> jax.Array:
    """Entries of weight 0 are none; the tail's bucket is all tokens but the entries."""
    S = _softmax(logits)
    named = jnp.any(jax.nn.one_hot(ids, S.shape[-1]) * (weights > 0)[..., None] > 0, axis=-2)
    others = jnp.sum(jnp.where(named, 0.0, S), -1)
    found = jnp.take_along_axis(S, ids, -1)
    used, some = weights > 0, tail > 0
    entries = jnp.where(used, weights * jnp.log(jnp.where(used, weights, 1.0) / found), 0.0)
    rest = jnp.where(some, tail * jnp.log(jnp.where(some, tail, 1.0) / jnp.where(some, others, 1.0)), 0.0)
    return jnp.sum(entries, -1) + rest
