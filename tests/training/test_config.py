"""Combinations of sections that make no sense together."""

from dataclasses import replace
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.objectives.schedule import ScheduleConfig
from gemma2_jax.training.config import RunConfig


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
    with pytest.raises(UserError, match=rf"objective\.{name}\.warmup_steps and decay_steps take 9 steps"):
        replace(toy_run, objective=ObjectiveConfig(0.5, 0.5, block_tokens=8, **numbers), distill=distill)


def test_a_teacher_that_no_term_needs(toy_run: RunConfig) -> None:
    with pytest.raises(UserError, match="it would teach nothing"):
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
