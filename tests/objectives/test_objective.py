"""The weighted sum of terms, its schedules, and which settings are refused."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError, build
from gemma2_jax.objectives import terms
from gemma2_jax.objectives.objective import (
    DIVERGENCES,
    ObjectiveConfig,
    build_coefficients,
    evaluation_loss,
    token_loss,
)
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.schedule import ScheduleConfig

STUDENT, TEACHER = jax.random.normal(jax.random.key(0), (2, 6, 30)) * 4
TARGETS = jax.random.randint(jax.random.key(1), (6,), 0, 30)
SPARSE = SparseTargets(jnp.arange(12).reshape(6, 2), jnp.full((6, 2), jnp.log(0.4)), jnp.full(6, 0.2))


def objective(**values: Any) -> ObjectiveConfig:
    defaults: dict[str, Any] = dict(cross_entropy=0.0, forward_kl=0.0, temperature=1.0, block_tokens=8)
    return ObjectiveConfig(**(defaults | values))


def compute(config: ObjectiveConfig, teacher: Any, step: int = 0, steps: int = 10) -> Any:
    return token_loss(config)(*named(teacher), build_coefficients(config, steps)(step))


def named(teacher: Any) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Logits and per-token arrays; the teacher is its logits, sparse targets or None."""
    if isinstance(teacher, SparseTargets):
        return {"model": STUDENT}, {"targets": TARGETS, "teacher_targets": teacher}
    logits = {"model": STUDENT} if teacher is None else {"model": STUDENT, "teacher": teacher}
    return logits, {"targets": TARGETS}


def test_mixture() -> None:
    total, metrics = compute(objective(cross_entropy=0.25, forward_kl=0.75, temperature=2.0), TEACHER)
    cross_entropy = terms.cross_entropy(STUDENT, TARGETS)
    kl = terms.forward_kl(STUDENT, TEACHER, 2.0)
    np.testing.assert_allclose(total, 0.25 * cross_entropy + 0.75 * kl, rtol=1e-6)
    np.testing.assert_array_equal(metrics["cross_entropy"], cross_entropy)
    np.testing.assert_array_equal(metrics["kl"], kl)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_term_has_a_metric_of_its_own(name: str) -> None:
    total, metrics = compute(objective(**{name: 0.5}, z_loss=1e-3), TEACHER)
    own = "kl" if name == "forward_kl" else name
    assert set(metrics) == {"cross_entropy", own, "z_loss"}
    np.testing.assert_allclose(total, 0.5 * metrics[own] + 1e-3 * metrics["z_loss"], rtol=1e-6)


def test_without_a_teacher_there_is_no_kl() -> None:
    total, metrics = compute(objective(cross_entropy=1.0), None)
    assert set(metrics) == {"cross_entropy"}
    np.testing.assert_array_equal(total, metrics["cross_entropy"])


def test_mix_weighs_divergences_against_the_text_and_leaves_the_z_loss() -> None:
    weights = dict(cross_entropy=2.0, forward_kl=1.0, jsd=3.0, z_loss=0.1)
    mixed = build_coefficients(objective(**weights, mix=0.25), 10)(0)
    expected = dict(cross_entropy=1.5, forward_kl=0.25, jsd=0.75, z_loss=0.1, mix=0.25)
    assert {name: float(mixed[name]) for name in expected} == pytest.approx(expected)


def test_scheduled_coefficients() -> None:
    config = objective(
        cross_entropy=1.0,
        forward_kl=1.0,
        temperature=ScheduleConfig("linear", peak=4.0, end=1.0),
        mix=ScheduleConfig("wsd", start=0.0, peak=1.0, end=0.0, warmup_steps=2, decay_steps=4),
    )
    at = jax.jit(build_coefficients(config, 10))
    found = [at(step) for step in range(10)]
    assert [float(now["temperature"]) for now in found] == pytest.approx([4 - 3 * i / 9 for i in range(10)])
    mix = [0, 0.5, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]
    assert [float(now["mix"]) for now in found] == pytest.approx(mix)
    assert [float(now["forward_kl"]) for now in found] == pytest.approx(mix)
    assert [float(now["cross_entropy"]) for now in found] == pytest.approx([1 - value for value in mix])
    assert set(config.schedules) == {"temperature", "mix"}
    total, metrics = compute(config, TEACHER, step=6)
    np.testing.assert_allclose(metrics["kl"], terms.forward_kl(STUDENT, TEACHER, 2.0), rtol=1e-5)
    np.testing.assert_allclose(total, 0.75 * metrics["kl"] + 0.25 * metrics["cross_entropy"], rtol=1e-5)


def test_of_sparse_targets_there_is_the_forward_kl_alone() -> None:
    total, metrics = compute(objective(cross_entropy=1.0, forward_kl=1.0, z_loss=1e-3), SPARSE)
    assert set(metrics) == {"cross_entropy", "kl", "z_loss"}
    np.testing.assert_array_equal(metrics["kl"], terms.sparse_forward_kl(STUDENT, SPARSE, 1.0))
    assert np.all(total > metrics["cross_entropy"])
    _, warm = compute(objective(forward_kl=1.0, temperature=2.0), SPARSE)
    np.testing.assert_array_equal(warm["kl"], terms.sparse_forward_kl(STUDENT, SPARSE, 2.0))


def test_evaluation_compares_at_temperature_one() -> None:
    loss, metrics = evaluation_loss(*named(TEACHER), {})
    np.testing.assert_array_equal(loss, terms.cross_entropy(STUDENT, TARGETS))
    np.testing.assert_array_equal(metrics["kl"], terms.forward_kl(STUDENT, TEACHER, 1.0))
    np.testing.assert_array_equal(metrics["teacher_entropy"], terms.entropy(TEACHER))
    np.testing.assert_array_equal(metrics["acceptance"], terms.acceptance(STUDENT, TEACHER))
    assert set(metrics) == {"cross_entropy", "kl", "agreement", "acceptance", "entropy", "teacher_entropy"}
    _, alone = evaluation_loss(*named(None), {})
    assert set(alone) == {"cross_entropy", "entropy"}
    with pytest.raises(ValueError, match="not sparse targets"):
        evaluation_loss(*named(SPARSE), {})


def test_a_configuration_from_before_there_were_other_terms() -> None:
    old = {"cross_entropy": 0.5, "forward_kl": 0.5, "temperature": 2.0, "block_tokens": 8}
    assert build(ObjectiveConfig, old, "config.yaml") == objective(
        cross_entropy=0.5, forward_kl=0.5, temperature=2.0
    )


def test_a_schedule_in_a_file() -> None:
    data = {"cross_entropy": 1, "forward_kl": 1, "block_tokens": 8, "temperature": 1}
    built = build(ObjectiveConfig, data | {"mix": {"kind": "linear", "peak": 1, "end": 0.5}}, "here")
    assert built.mix == ScheduleConfig("linear", peak=1.0, end=0.5)


RISING = ScheduleConfig("constant", start=-1.0, peak=1.0, warmup_steps=3)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"cross_entropy": -1.0}, "objective.cross_entropy is -1.0"),
        ({"cross_entropy": 1.0, "z_loss": -1.0}, "objective.z_loss is -1.0"),
        ({}, "weight 0 for cross_entropy and for every divergence"),
        ({"z_loss": 1.0}, "weight 0 for cross_entropy and for every divergence"),
        ({"forward_kl": 1.0, "temperature": 0.0}, "objective.temperature is 0.0"),
        ({"reverse_kl": math.nan, "cross_entropy": 1.0}, "objective.reverse_kl is nan"),
        ({"cross_entropy": math.inf}, "objective.cross_entropy is inf"),
        ({"forward_kl": 1.0, "temperature": math.inf}, "objective.temperature is inf"),
        (
            {"forward_kl": 1.0, "temperature": 1e-9},
            "objective.temperature is 1e-09; it must be from 0.001 to 1000",
        ),
        ({"forward_kl": 1.0, "temperature": RISING}, "objective.temperature is -1.0"),
        (
            {"cross_entropy": 1.0, "temperature": 2.0},
            "objective.temperature is 2.0, but no divergence that would use it",
        ),
        (
            {"cross_entropy": 1.0, "forward_kl": 1.0, "mix": 1.5},
            "objective.mix is 1.5; it must be from 0 to 1",
        ),
        ({"cross_entropy": 1.0, "forward_kl": 1.0, "mix": RISING}, "objective.mix is -1.0"),
        ({"forward_kl": 1.0, "mix": 0.5}, "objective.mix is 0.5, but it weighs cross_entropy against"),
        ({"cross_entropy": 1.0, "mix": 0.5}, "objective.mix is 0.5, but it weighs cross_entropy against"),
        ({"jsd": 1.0, "jsd_beta": 0.0}, "objective.jsd_beta is 0.0; it must be above 0 and below 1"),
        ({"jsd": 1.0, "jsd_beta": 1.0}, "objective.jsd_beta is 1.0"),
        ({"forward_kl": 1.0, "jsd_beta": 0.1}, "objective.jsd_beta is 0.1, but no term that would use it"),
        ({"skew_kl": 1.0, "skew_alpha": 1.0}, "objective.skew_alpha is 1.0; it must be at least 0"),
        ({"jsd": 1.0, "skew_alpha": 0.3}, "objective.skew_alpha is 0.3, but no term that would use it"),
        ({"cross_entropy": 1.0, "block_tokens": 0}, "objective.block_tokens is 0"),
    ],
)
def test_refused(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as error:
        objective(**values)
    assert str(error.value).endswith(".")
