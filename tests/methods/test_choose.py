"""The method that a configuration selects, and the frozen weights that its step uses."""

from dataclasses import replace
from typing import Any

import jax
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.distillation import Distillation
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.method import frozen_in_step
from gemma2_jax.methods.on_policy import OnPolicyDistillation
from gemma2_jax.model.counts import training_flops_per_token
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import build_mesh

KL = ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48)


def student(run: RunConfig, **distill: Any) -> RunConfig:
    """Configuration with a teacher whose checkpoint does not exist."""
    sizes = replace(run.model, d_model=48)
    settings = DistillConfig(**{"teacher": "nowhere", "dtype": "float32", "model": sizes, **distill})
    return replace(run, objective=KL, distill=settings)


CACHED = {"cache": "nowhere", "encoding": EncodingConfig("top_k", 8)}


@pytest.mark.parametrize(
    ("distill", "kind"),
    [
        ({}, Distillation),
        (CACHED, Distillation),
        ({**CACHED, "teacher": None, "model": None}, Distillation),
        ({"on_policy": OnPolicyConfig(0.5, 8)}, OnPolicyDistillation),
    ],
    ids=["online", "cached", "cached-without-teacher", "on-policy"],
)
def test_distillation(toy_run: RunConfig, distill: dict[str, Any], kind: type) -> None:
    method = build_method(student(toy_run, **distill))
    assert type(method) is kind
    assert set(method.specs) == {"params"}


def test_text_alone(toy_run: RunConfig) -> None:
    method = build_method(toy_run)
    assert type(method) is LanguageModelling
    assert method.describe({}) == []
    assert method.frozen_models == {}
    assert method.record({}) is None


def test_a_teacher_of_unknown_sizes_is_refused(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        build_method(student(toy_run, model=None))


def test_on_policy_steps_alone_collect(toy_run: RunConfig) -> None:
    for fraction in (0.0, 1.0):
        method = build_method(student(toy_run, on_policy=OnPolicyConfig(fraction, 8)))
        assert {method.collects(step) for step in range(toy_run.training.steps)} == {fraction == 1.0}
        row = method.row(0, {"cross_entropy": 2.0, "kl": 1.0})
        expected = {"sampled_cross_entropy": 2.0} if fraction else {"cross_entropy": 2.0}
        assert row == {"kl": 1.0, "on_policy": bool(fraction), **expected}
    assert not build_method(student(toy_run)).collects(0)


@pytest.mark.parametrize("cached", [False, True])
def test_with_a_cache_only_validations_use_the_teacher(toy_run: RunConfig, cached: bool) -> None:
    run = student(toy_run, **(CACHED if cached else {}))
    method, mesh = build_method(run), build_mesh(run.mesh, jax.devices()[:1])
    frozen = method.abstract_frozen(mesh)
    assert set(frozen) == {"base", "teacher"}
    assert set(frozen_in_step(method, frozen)) == ({"base"} if cached else {"base", "teacher"})
    (teacher,) = method.frozen_models.values()
    assert (teacher.config, teacher.dtype) == (run.distill.model, "float32")
    assert set(frozen_in_step(method, method.frozen_models)) == (set() if cached else {"teacher"})
    assert method.flops_per_token == training_flops_per_token(
        run.model, run.data.seq_len, None if cached else run.distill.model
    )
    assert set(method.abstract_batch(mesh).extra) == ({"teacher_targets"} if cached else set())
