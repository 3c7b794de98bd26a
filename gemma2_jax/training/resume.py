"""Checks whether a run can be resumed with a changed configuration.

A change is allowed if the steps already done would have been the same under it, up to rounding. Numbers that depend on
the step (learning rate, temperature, mix, which steps are on-policy) are compared by their values over those steps, so
a run can be made longer or shorter as long as its schedules agree.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from gemma2_jax.checkpoints.store import CONFIG_FILE, FOLDER, checkpoint_steps, latest_step
from gemma2_jax.config import UserError, as_override, build, differences, load_config, to_dict
from gemma2_jax.distill.rollouts import on_policy_steps
from gemma2_jax.messages import written
from gemma2_jax.methods.choose import method_class
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig, build_schedule, count_steps
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.optimizer import learning_rate_schedule
from gemma2_jax.training.start import with_prepared_vocabulary

# Keys for locations, execution and reporting. Data and tokenizer are compared by content instead.
MAY_CHANGE = {
    "name", "output", "hosts", "mesh", "layout", "distill.layout", "metrics", "checkpoint", "profile",
    "compilation_cache", "training.log_every", "training.eval_every", "training.eval_batches", "training.profile_steps",
    "data.source", "data.folder", "data.workers", "data.shard_characters", "data.skip_invalid", "tokenizer",
    "distill.model",
    "compute.remat", "compute.unroll_layers", "compute.attention", "objective.block_tokens", "training.accumulation",
}  # fmt: skip
_STEPS = "training.steps"


@dataclass(frozen=True)
class _Number:
    """A number that may change from step to step.

    Attributes:
        label: its name in messages.
        keys: configuration keys that determine it.
        schedule_key: the key that sets how it changes over a run.
        values: function from a configuration and a count to the values at the first `count` steps; None if the
            configuration does not have the number.
    """

    label: str
    keys: tuple[str, ...]
    schedule_key: str
    values: Callable[[RunConfig, int], np.ndarray | None]


def check_same_run(config: RunConfig) -> None:
    """Raises UserError if the configuration saved in the run folder gives another result than `config`.

    For a run without a checkpoint, only the first step is compared.
    """
    path = Path(config.output) / CONFIG_FILE
    if not path.exists():
        return
    saved, latest = load_config(RunConfig, path), latest_step(config.output) or 0
    config = with_prepared_vocabulary(config)
    steps = config.training.steps
    for key, one, other in _changed_keys(saved, config):
        if key != _STEPS:
            raise _changed_key_error(config, key, one, other)
    if steps < latest:
        raise UserError(
            f"{config.output} is already trained to step {latest}, but {_STEPS} is {steps}; write "
            f"{_STEPS}={latest} or more, or choose another output."
        )
    for number, step in _changed_numbers(saved, config, max(1, latest)):
        keys = _keys_of(number, saved, config)
        if keys and not _depends_on_length(number, saved, steps, max(1, latest)):
            key, one, other = keys[0]
            raise _changed_key_error(config, key, one, other)
        raise _changed_length_error(config, saved, number, step)


def changes(saved: RunConfig, requested: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted key and both values of every difference that makes the two runs end differently."""
    yield from _changed_keys(saved, requested)
    for number, _ in _changed_numbers(saved, requested, requested.training.steps):
        yield from _keys_of(number, saved, requested)[:1]


def older_schedule_note(config: RunConfig, step: int) -> str | None:
    """Returns a line for the log if the learning rates up to `step` deviate from the run's schedule, else None.

    The schedules of older versions were one step behind: no step had the final rate, and the first warm-up step had 0.
    """
    if not (Path(config.output) / JSON_LINES).exists():
        return None
    rows = [row for row in read_metrics(config.output) if row["split"] == "train" and row["step"] <= step]
    if not rows:
        return None
    logged, done = rows[-1]["learning_rate"], rows[-1]["step"]
    rate = float(learning_rate_schedule(config.optimizer, config.training.steps)(done - 1))
    if math.isclose(logged, rate, rel_tol=1e-4):
        return None
    return (
        f"{config.name} was started by an older version, whose schedule was one step behind: step {done} had the "
        f"learning rate {logged:.4g}, and would now have {rate:.4g}. Later steps follow the current schedule."
    )


def _changed_keys(saved: RunConfig, requested: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted key and both values of every difference, except keys that may change and keys of `_NUMBERS`."""
    free = {*MAY_CHANGE, *(key for number in _NUMBERS for key in number.keys)}
    record_file = method_class(requested).record_file
    if record_file is not None:
        free |= record_file.free_keys(requested)
    if saved.distill.teacher is None and requested.distill.teacher is None:
        free.add("distill.dtype")  # has no effect
    if saved.adaptation.has_base and requested.adaptation.has_base:
        free.add("initialise.source")  # the base model is compared by its weights
    if "importance" not in (saved.initialise.width, requested.initialise.width):
        free.add("initialise.batches")
    for key, one, other in differences(_in_steps(saved), _in_steps(requested)):
        if not _is_among(key, free):
            yield key, one, other


def _changed_numbers(saved: RunConfig, requested: RunConfig, done: int) -> Iterator[tuple[_Number, int]]:
    """Yields each number that differs within the first `done` steps, and how many steps agree."""
    same_length = saved.training.steps == requested.training.steps
    for number in _NUMBERS:
        if same_length and not _keys_of(number, saved, requested):
            continue
        one, other = number.values(saved, done), number.values(requested, done)
        if one is None and other is None:
            continue
        if one is None or other is None:
            yield number, 0
        elif not np.array_equal(one, other):
            yield number, int(np.argmax(one != other))


def _keys_of(number: _Number, saved: RunConfig, requested: RunConfig) -> list[tuple[str, Any, Any]]:
    """The changed keys that determine `number`, with both values."""
    found = differences(_in_steps(saved), _in_steps(requested))
    return [(key, one, other) for key, one, other in found if _is_among(key, number.keys)]


def _is_among(key: str, names: set[str] | tuple[str, ...]) -> bool:
    """Whether a key is one of `names`, or below one of them."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def _depends_on_length(number: _Number, saved: RunConfig, steps: int, done: int) -> bool:
    """Whether the saved settings, with training.steps = `steps`, change the number within the first `done` steps."""
    settings = _in_steps(saved)
    settings["training"]["steps"] = steps
    try:
        other = number.values(build(RunConfig, settings, CONFIG_FILE), done)
    except UserError:  # the warm-up or decay is longer than `steps`
        return True
    one = number.values(saved, done)
    return one is not None and other is not None and not np.array_equal(one, other)


def _in_steps(config: RunConfig) -> dict[str, Any]:
    """The settings with each warm-up and decay converted to a number of steps: 0.1 equals 50 in a run of 500."""

    def counted(settings: dict[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            name: counted(value, f"{where}.{name}") if isinstance(value, dict) else value
            for name, value in settings.items()
        }
        names = ("warmup_steps", "decay_steps")
        if set(names) <= set(found):
            warmup, decay = (found[name] for name in names)
            found |= zip(names, count_steps(where, warmup, decay, config.training.steps), strict=True)
        return found

    return counted(to_dict(config), "")


def _changed_key_error(config: RunConfig, key: str, one: Any, other: Any) -> UserError:
    """The error for a key whose value has changed; the user may not have typed it, since defaults can change too."""
    typed = as_override(key, one)
    remedy = "" if typed is None else f"write {typed} to resume it, "
    return UserError(
        f"{config.output} holds a run with {key}={written(one)}, but {key} is now {written(other)}; {remedy}"
        "choose another output, or delete that folder to train again."
    )


def _changed_length_error(config: RunConfig, saved: RunConfig, number: _Number, step: int) -> UserError:
    """The error for a new length that changes a schedule after `step`, which the run has passed."""
    earlier = [kept for kept in checkpoint_steps(config.output) if kept <= step]
    back = f"delete the checkpoints after {earlier[0]} in {Path(config.output) / FOLDER}, " if earlier else ""
    return UserError(
        f"{config.output} holds a run with {_STEPS}={saved.training.steps}, but {_STEPS} is now "
        f"{config.training.steps}, with which {_setting(config, number.schedule_key)} gives another {number.label} "
        f"from step {step + 1} on, a step that the run has passed; write "
        f"{_STEPS}={saved.training.steps}, {back}or choose another output and start it from these weights "
        f"(initialise.source={config.output}). A run can be made longer with optimizer=constant, or with optimizer=wsd "
        "before its decay."
    )


def _setting(config: RunConfig, key: str) -> str:
    """A key and its value, as KEY=VALUE; for a schedule, its kind."""
    value: Any = to_dict(config)
    for name in key.split("."):
        value = value[name]
    return f"{key}.kind={value['kind']}" if isinstance(value, dict) else f"{key}={value}"


def _learning_rate(config: RunConfig, count: int) -> np.ndarray:
    return _first(learning_rate_schedule(config.optimizer, config.training.steps), count)


def _objective(name: str, config: RunConfig, count: int) -> np.ndarray | None:
    number = getattr(config.objective, name)
    if isinstance(number, ScheduleConfig):
        return _first(build_schedule(number, config.training.steps), count)
    return None if number is None else np.full(count, number, np.float32)


def _on_policy(config: RunConfig, count: int) -> np.ndarray:
    """1 for on-policy steps, 0 for the others, float [count]."""
    on_policy = config.distill.on_policy
    if on_policy is None:
        return np.zeros(count)
    drawn = on_policy_steps(on_policy, config.seed, config.training.steps)[:count]
    return np.where(np.pad(drawn, (0, count - len(drawn))), 1.0, 0.0)


def _sampling(name: str, config: RunConfig, count: int) -> np.ndarray:
    """The sampling setting `name` at on-policy steps, 0 at the others, float [count]."""
    on_policy = config.distill.on_policy
    return _on_policy(config, count) * (0.0 if on_policy is None else getattr(on_policy, name))


def _first(schedule: Callable[[Any], Any], count: int) -> np.ndarray:
    return np.broadcast_to(np.asarray(schedule(jnp.arange(count)), np.float32), (count,))


_LEARNING_RATE = tuple(
    f"optimizer.{name}"
    for name in ("learning_rate", "schedule", "warmup_steps", "decay_steps", "final_fraction")
)
_FRACTION = "distill.on_policy"
_NUMBERS = (
    _Number("learning rate", _LEARNING_RATE, "optimizer.schedule", _learning_rate),
    *(
        _Number(name, (f"objective.{name}",), f"objective.{name}", partial(_objective, name))
        for name in ("temperature", "mix")
    ),
    _Number("choice of on-policy steps", (_FRACTION,), f"{_FRACTION}.fraction", _on_policy),
    *(
        _Number(f"{name} of on-policy steps", (_FRACTION,), f"{_FRACTION}.{name}", partial(_sampling, name))
        for name in ("prompt_tokens", "temperature")
    ),
)
