"""Incompatible combinations of sections."""

from dataclasses import replace
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig


def test_a_term_that_needs_a_teacher(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match=r"objective\.forward_kl is above 0, which needs a teacher"):
        replace(toy_run, objective=ObjectiveConfig(0.5, 0.5, 1.0, 8))


def test_another_divergence_needs_one_too(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match=r"objective\.jsd is above 0, which needs a teacher"):
        replace(toy_run, objective=ObjectiveConfig(0.5, 0.0, 1.0, 8, jsd=0.5))


@pytest.mark.parametrize("name", ["temperature", "mix"])
def test_a_schedule_longer_than_the_run(toy_run: RunConfig, name: str) -> None:
    schedule = ScheduleConfig("wsd", peak=1.0, start=0.5, end=0.5, warmup_steps=4, decay_steps=5)
    numbers: dict[str, Any] = {"temperature": 1.0, "mix": None, name: schedule}
    distill = replace(toy_run.distill, teacher="runs/teacher")
    with pytest.raises(
        UserError, match=rf"objective\.{name}\.warmup_steps \(4\) and decay_steps \(5\) take 9 steps"
    ):
        replace(toy_run, objective=ObjectiveConfig(0.5, 0.5, block_tokens=8, **numbers), distill=distill)


@pytest.mark.parametrize(
    ("objective", "teacher", "fraction", "prompt_tokens", "sentence"),
    [
        (
            ObjectiveConfig(1.0, 0.0, 1.0, 8),
            None,
            0.5,
            8,
            r"distill\.teacher is null; on-policy distillation needs a teacher",
        ),
        (
            ObjectiveConfig(1.0, 0.0, 1.0, 8),
            "runs/teacher",
            0.5,
            8,
            "no divergence of the objective has a weight",
        ),
        (
            ObjectiveConfig(0.1, 0.9, 1.0, 8),
            "runs/teacher",
            0.5,
            8,
            r"objective\.cross_entropy is 0.1; it must be 0",
        ),
        (
            ObjectiveConfig(0.0, 1.0, 1.0, 8),
            "runs/teacher",
            0.5,
            32,
            r"prompt_tokens is 32; it must be below data\.seq_len \(32\)",
        ),
        (
            ObjectiveConfig(0.0, 1.0, 1.0, 8),
            "runs/teacher",
            ScheduleConfig("linear", peak=1.0, start=0.0, end=0.0, warmup_steps=9),
            8,
            r"distill\.on_policy\.fraction\.warmup_steps \(9\) and decay_steps \(0\) take 9 steps",
        ),
    ],
)
def test_what_on_policy_needs(
    toy_run: RunConfig,
    objective: ObjectiveConfig,
    teacher: str | None,
    fraction: Any,
    prompt_tokens: int,
    sentence: str,
) -> None:
    distill = DistillConfig(teacher, "float32", on_policy=OnPolicyConfig(fraction, prompt_tokens))
    with pytest.raises(UserError, match=sentence):
        replace(toy_run, objective=objective, distill=distill)


def test_on_policy_with_all_that_it_needs(toy_run: RunConfig) -> None:
    distill = DistillConfig("runs/teacher", "float32", on_policy=OnPolicyConfig(0.5, 31))
    objective = ObjectiveConfig(0.0, 0.0, 1.0, 8, jsd=1.0, z_loss=1e-4)
    assert replace(toy_run, objective=objective, distill=distill).distill.on_policy == distill.on_policy


def test_a_teacher_that_no_term_needs(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match="the teacher would have no effect"):
        replace(toy_run, distill=replace(toy_run.distill, teacher="runs/teacher"))


def test_accumulation_must_divide_the_batch(toy_run: RunConfig) -> None:
    with pytest.raises(
        UserError, match=r"training.accumulation is 3, which does not divide data.batch_size \(4\)"
    ):
        replace(toy_run, training=replace(toy_run.training, accumulation=3))


def test_a_warm_up_longer_than_the_run(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match=r"take 9 steps, more than training.steps \(8\)"):
        replace(toy_run, optimizer=replace(toy_run.optimizer, warmup_steps=9))
    with pytest.raises(UserError, match="take 10 steps"):
        replace(toy_run, optimizer=replace(toy_run.optimizer, schedule="wsd", decay_steps=8))


@pytest.mark.parametrize("name", ["checkpoint.every", "training.eval_every"])
def test_checkpoints_fall_on_logged_steps(toy_run: RunConfig, name: str) -> None:
    training = replace(toy_run.training, log_every=2, eval_every=3 if name == "training.eval_every" else 4)
    checkpoint = replace(toy_run.checkpoint, every=3 if name == "checkpoint.every" else 4)
    with pytest.raises(UserError, match=f"{name} is 3; it must be a multiple of training.log_every"):
        replace(toy_run, training=training, checkpoint=checkpoint)


def test_steps_must_be_positive(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match=r"training\.steps is 0"):
        replace(toy_run.training, steps=0)


def with_cache(run: RunConfig, **objective: Any) -> RunConfig:
    values: dict[str, Any] = {"cross_entropy": 0.0, "forward_kl": 1.0, "temperature": 1.0, "block_tokens": 8}
    distill = replace(run.distill, cache="runs/cache")
    return replace(run, objective=ObjectiveConfig(**values | objective), distill=distill)


def test_a_cache_stands_in_for_the_teacher(toy_run: RunConfig) -> None:
    assert with_cache(toy_run).distill.teacher is None
    with pytest.raises(UserError, match=r"distill\.cache is set, but no divergence"):
        with_cache(toy_run, cross_entropy=1.0, forward_kl=0.0)


@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "skew_kl", "skew_reverse_kl"])
def test_what_a_cache_cannot_give(toy_run: RunConfig, name: str) -> None:
    with pytest.raises(
        UserError, match=f"enough for forward_kl alone, but the objective has forward_kl, {name};"
    ):
        with_cache(toy_run, **{name: 0.5})


def test_a_cache_has_one_temperature(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match=r"objective\.temperature is a schedule"):
        with_cache(toy_run, temperature=ScheduleConfig("linear", peak=2.0, end=1.0))


def test_a_cache_that_the_run_could_not_train_from(toy_run: RunConfig) -> None:
    warm = with_cache(toy_run, temperature=2.0)
    for temperature in (1.0, 2.5):
        encoding = EncodingConfig(temperature=temperature)
        with pytest.raises(
            UserError,
            match=rf"distill\.encoding\.temperature is {temperature}, and objective\.temperature is 2\.0",
        ):
            replace(warm, distill=replace(warm.distill, encoding=encoding))
    replace(warm, distill=replace(warm.distill, encoding=EncodingConfig(temperature=2.0)))


def test_an_encoding_without_a_cache() -> None:
    with pytest.raises(UserError, match=r"distill\.encoding is set, but distill\.cache is null"):
        DistillConfig(None, "float32", encoding=EncodingConfig())


def test_a_cache_excludes_on_policy_samples(toy_run: RunConfig) -> None:
    distill = DistillConfig("runs/teacher", "float32", "runs/cache", on_policy=OnPolicyConfig(0.5, 8))
    with pytest.raises(UserError, match=r"distill\.on_policy and distill\.cache are both set"):
        replace(toy_run, objective=ObjectiveConfig(0.0, 1.0, 1.0, 8), distill=distill)


@pytest.mark.parametrize("key", ["name", "output"])
def test_a_run_needs_a_name_and_a_folder(toy_run, key):
    with pytest.raises(UserError, match=f"^{key} is empty; it must be text, as in {key}=mine"):
        replace(toy_run, **{key: " "})
