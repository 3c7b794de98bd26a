"""Several students as one method: each of its trees has a branch per student."""

from dataclasses import replace

import jax
import pytest

from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.students import Students
from gemma2_jax.model.weights import abstract_params
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig
from gemma2_jax.sharding.mesh import build_mesh


@pytest.fixture
def students(toy_run: RunConfig) -> Students:
    """One that matches layers of its teacher, one whose temperature changes, and one without a teacher."""
    sizes = replace(toy_run.model, d_model=48)
    distill = DistillConfig("nowhere", "float32", model=sizes)
    warming = ScheduleConfig("linear", peak=3.0, end=1.0)
    matched = replace(distill, match=MatchConfig(((0, 1),), hidden=1.0))
    configs = {
        "matched": replace(toy_run, distill=matched),
        "scheduled": replace(toy_run, objective=ObjectiveConfig(0.0, 1.0, warming, 48), distill=distill),
        "text": toy_run,
    }
    return Students({name: build_method(config) for name, config in configs.items()})


def test_metrics_are_by_student(students: Students, toy_run: RunConfig) -> None:
    mesh = build_mesh(toy_run.mesh, jax.devices()[:1])
    trainable = {
        name: {tree: abstract_params(specs, mesh=mesh) for tree, specs in own.items()}
        for name, own in students.specs.items()
    }
    frozen, batch = students.abstract_frozen(mesh), students.abstract_batch(mesh)
    total, sums = jax.eval_shape(students.loss, trainable, frozen, batch, jax.ShapeDtypeStruct((), "int32"))
    assert total.shape == ()
    assert {name: set(found) for name, found in sums.items()} == {
        "matched": {"loss", "cross_entropy", "match_hidden", "targets"},
        "scheduled": {"loss", "cross_entropy", "kl", "targets"},
        "text": {"loss", "cross_entropy", "targets"},
    }
    compared = jax.eval_shape(students.evaluate, trainable, frozen, batch)
    with_teacher = {name for name, found in compared.items() if "kl" in found}
    assert with_teacher == {"matched", "scheduled"}
    rates = jax.eval_shape(students.rates, jax.ShapeDtypeStruct((), "int32"))
    assert {name: set(found) for name, found in rates.items()} == {
        "matched": set(),
        "scheduled": {"temperature"},
        "text": set(),
    }


def test_what_is_trained_and_frozen_is_by_student(students: Students, toy_run: RunConfig) -> None:
    assert {name: set(own) for name, own in students.specs.items()} == {
        "matched": {"params", "matching"},
        "scheduled": {"params"},
        "text": {"params"},
    }
    frozen = students.abstract_frozen(build_mesh(toy_run.mesh, jax.devices()[:1]))
    assert set(frozen) == {"base", "teacher"}
    assert frozen["base"] == {"matched": {}, "scheduled": {}, "text": {}}
    assert {name: model.config.d_model for name, model in students.frozen_models.items()} == {"teacher": 48}
    assert not students.collects(0)
