"""The weighted sum of terms, and which weights are refused."""

import jax
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.objectives import terms
from gemma2_jax.objectives.objective import ObjectiveConfig, evaluation_loss, token_loss

STUDENT, TEACHER = jax.random.normal(jax.random.key(0), (2, 6, 30)) * 4
TARGETS = jax.random.randint(jax.random.key(1), (6,), 0, 30)


def test_mixture() -> None:
    config = ObjectiveConfig(cross_entropy=0.25, forward_kl=0.75, temperature=2.0, block_tokens=8)
    total, metrics = token_loss(config)(STUDENT, TEACHER, TARGETS)
    cross_entropy = terms.cross_entropy(STUDENT, TARGETS)
    kl = terms.forward_kl(STUDENT, TEACHER, 2.0)
    np.testing.assert_allclose(total, 0.25 * cross_entropy + 0.75 * kl, rtol=1e-6)
    np.testing.assert_array_equal(metrics["cross_entropy"], cross_entropy)
    np.testing.assert_array_equal(metrics["kl"], kl)


def test_without_a_teacher_there_is_no_kl() -> None:
    total, metrics = token_loss(ObjectiveConfig(1.0, 0.0, 1.0, 8))(STUDENT, None, TARGETS)
    assert set(metrics) == {"cross_entropy"}
    np.testing.assert_array_equal(total, metrics["cross_entropy"])


def test_evaluation_compares_at_temperature_one() -> None:
    loss, metrics = evaluation_loss(STUDENT, TEACHER, TARGETS)
    np.testing.assert_array_equal(loss, terms.cross_entropy(STUDENT, TARGETS))
    np.testing.assert_array_equal(metrics["kl"], terms.forward_kl(STUDENT, TEACHER, 1.0))
    assert set(metrics) == {"cross_entropy", "kl", "agreement"}


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((-1.0, 1.0, 1.0, 8), "objective.cross_entropy is -1.0"),
        ((0.0, 0.0, 1.0, 8), "weight 0 for both"),
        ((0.0, 1.0, 0.0, 8), "objective.temperature is 0.0"),
        (
            (1.0, 0.0, 2.0, 8),
            "objective.temperature is 2.0, which nothing uses while objective.forward_kl is 0",
        ),
        ((1.0, 0.0, 1.0, 0), "objective.block_tokens is 0"),
    ],
)
def test_refused(values: tuple[float, float, float, int], named: str) -> None:
    with pytest.raises(UserError, match=named):
        ObjectiveConfig(*values)
