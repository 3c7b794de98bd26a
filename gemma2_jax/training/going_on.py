"""What may differ between the configuration that a run began with and the one that goes on with it.

Everything under which the steps that are done would have been the same, but for rounding. Numbers that depend on the
step (learning rate, temperature, mix, which steps are on-policy) are compared by their values over those steps: so a
run can be made longer or shorter where its schedules agree.
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
from gemma2_jax.distill.teacher_record import read_teacher_record
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig, build_schedule, count_steps
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.optimizer import learning_rate_schedule
from gemma2_jax.training.start import as_prepared

# Where things lie, how they are executed, and what is looked at. That the data, the tokenizer and the teacher are the
# same is checked by content.
_MAY_CHANGE = {
    "name", "output", "hosts", "mesh", "layout", "distill.layout", "metrics", "checkpoint", "profile",
    "compilation_cache", "training.log_every", "training.eval_every", "training.eval_batches", "training.profile_steps",
    "data.source", "data.folder", "data.workers", "data.shard_characters", "data.skip_invalid", "tokenizer",
    "distill.model",
    "compute.remat", "compute.unroll_layers", "compute.attention", "objective.block_tokens", "training.accumulation",
}  # fmt: skip
_STEPS = "training.steps"


@dataclass(frozen=True)
class _Number:
    """A number that may be another at each step.

    Attributes:
        what: it is called; keys: that decide it; kind: of them the one that says how it moves over a run.
        values: of a configuration, at its first steps, of which there are so many; None where there is no such number.
    """

    what: str
    keys: tuple[str, ...]
    kind: str
    values: Callable[[RunConfig, int], np.ndarray | None]


def check_same_run(config: RunConfig) -> None:
    """Raises UserError if the run folder was begun with a configuration that gives another result.

    Of a run that has no checkpoint yet, the first step is compared.
    """
    path = Path(config.output) / CONFIG_FILE
    if not path.exists():
        return
    begun, latest = load_config(RunConfig, path), latest_step(config.output) or 0
    config = as_prepared(config)
    steps = config.training.steps
    for key, one, other in _changed_keys(begun, config):
        if key != _STEPS:
            raise _refusal(config, key, one, other)
    if steps < latest:
        raise UserError(
            f"{config.output} is trained to step {latest} already, and {_STEPS}={steps} is asked for; write "
            f"{_STEPS}={latest} or more, or choose another output."
        )
    for number, step in _changed_numbers(begun, config, max(1, latest)):
        keys = _keys_of(number, begun, config)
        if keys and not _moves_with_length(number, begun, steps, max(1, latest)):
            key, one, other = keys[0]
            raise _refusal(config, key, one, other)
        raise _length_matters(config, begun, number, step)


def changes(begun: RunConfig, asked: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The dotted key and both values of all that makes `asked` end as another run than `begun`."""
    yield from _changed_keys(begun, asked)
    for number, _ in _changed_numbers(begun, asked, asked.training.steps):
        yield from _keys_of(number, begun, asked)[:1]


def older_schedule(config: RunConfig, step: int) -> str | None:
    """A line to say where the run's learning rates up to `step` are not those of its schedule, else None.

    Older versions were one step behind: no step had the final rate, and the first of a warm-up had 0.
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
        f"{config.name} was begun by an older version, whose schedule was a step behind: step {done} had the learning "
        f"rate {logged:.4g}, and would now have {rate:.4g}. Later steps follow the current schedule."
    )


def _changed_keys(begun: RunConfig, asked: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The dotted key and both values of what differs, but for what may, and numbers that depend on the step."""
    free = {*_MAY_CHANGE, *(key for number in _NUMBERS for key in number.keys)}
    record = read_teacher_record(asked.output)
    if record is not None and record.is_comparable:
        free.add("distill.teacher")
        if record.encoding is not None and asked.distill.cache is not None:
            free |= {"distill.cache", "distill.encoding", "distill.dtype"}
    if begun.distill.teacher is None and asked.distill.teacher is None:
        free.add("distill.dtype")  # of no effect
    if "importance" not in (begun.initialise.width, asked.initialise.width):
        free.add("initialise.batches")
    for key, one, other in differences(_in_steps(begun), _in_steps(asked)):
        if not _is_among(key, free):
            yield key, one, other


def _changed_numbers(begun: RunConfig, asked: RunConfig, done: int) -> Iterator[tuple[_Number, int]]:
    """Which numbers are not the same in the first `done` steps, and how many steps agree."""
    same_length = begun.training.steps == asked.training.steps
    for number in _NUMBERS:
        if same_length and not _keys_of(number, begun, asked):
            continue
        one, other = number.values(begun, done), number.values(asked, done)
        if one is None and other is None:
            continue
        if one is None or other is None:
            yield number, 0
        elif not np.array_equal(one, other):
            yield number, int(np.argmax(one != other))


def _keys_of(number: _Number, begun: RunConfig, asked: RunConfig) -> list[tuple[str, Any, Any]]:
    found = differences(_in_steps(begun), _in_steps(asked))
    return [(key, one, other) for key, one, other in found if _is_among(key, number.keys)]


def _is_among(key: str, names: set[str] | tuple[str, ...]) -> bool:
    """Whether a key is one of these, or within one of them."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def _moves_with_length(number: _Number, begun: RunConfig, steps: int, done: int) -> bool:
    """Whether the settings that a run began with give another number in a run of `steps`."""
    settings = _in_steps(begun)
    settings["training"]["steps"] = steps
    try:
        other = number.values(build(RunConfig, settings, CONFIG_FILE), done)
    except UserError:  # they do not fit into so few steps
        return True
    one = number.values(begun, done)
    return one is not None and other is not None and not np.array_equal(one, other)


def _in_steps(config: RunConfig) -> dict[str, Any]:
    """The settings, each warm-up and decay as a number of steps: 0.1 and 50 are the same in a run of 500."""

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


def _refusal(config: RunConfig, key: str, one: Any, other: Any) -> UserError:
    """The refusal of a key with another value: perhaps its default was another when the run began."""
    typed = as_override(key, one)
    remedy = "" if typed is None else f"write {typed} to go on with it, "
    return UserError(
        f"{config.output} holds a run with {key}={_plain(one)}, and {_plain(other)} is asked for; {remedy}"
        "choose another output, or delete that folder to train again."
    )


def _length_matters(config: RunConfig, begun: RunConfig, number: _Number, step: int) -> UserError:
    """The refusal of a run whose schedule depends on its length, and agrees in the first `step` steps only."""
    earlier = [kept for kept in checkpoint_steps(config.output) if kept <= step]
    back = f"delete the checkpoints after {earlier[0]} in {Path(config.output) / FOLDER}, " if earlier else ""
    return UserError(
        f"{config.output} holds a run with {_STEPS}={begun.training.steps}, and {config.training.steps} is asked for, "
        f"with which {_setting(config, number.kind)} gives another {number.what} from step {step + 1} on, but the run "
        f"has passed that step; write {_STEPS}={begun.training.steps}, {back}or choose another output and start it "
        f"from these weights (initialise.source={config.output}). A run can be made longer with optimizer=constant, or "
        "with optimizer=wsd before its decay."
    )


def _setting(config: RunConfig, key: str) -> str:
    """The key and its value; of a schedule, its kind."""
    value: Any = to_dict(config)
    for name in key.split("."):
        value = value[name]
    return f"{key}.kind={value['kind']}" if isinstance(value, dict) else f"{key}={value}"


def _plain(value: Any) -> Any:
    return "null" if value is None else value


def _learning_rate(config: RunConfig, count: int) -> np.ndarray:
    return _first(learning_rate_schedule(config.optimizer, config.training.steps), count)


def _objective(name: str, config: RunConfig, count: int) -> np.ndarray | None:
    number = getattr(config.objective, name)
    if isinstance(number, ScheduleConfig):
        return _first(build_schedule(number, config.training.steps), count)
    return None if number is None else np.full(count, number, np.float32)


def _on_policy(config: RunConfig, count: int) -> np.ndarray:
    """Which steps are on-policy; and with which settings those are sampled, as far as there are any."""
    on_policy = config.distill.on_policy
    if on_policy is None:
        return np.zeros(count)
    drawn = on_policy_steps(on_policy, config.seed, config.training.steps)[:count]
    return np.where(np.pad(drawn, (0, count - len(drawn))), 1.0, 0.0)


def _sampling(name: str, config: RunConfig, count: int) -> np.ndarray:
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
    _Number("choice between data and own samples", (_FRACTION,), f"{_FRACTION}.fraction", _on_policy),
    *(
        _Number(f"{name} of own samples", (_FRACTION,), f"{_FRACTION}.{name}", partial(_sampling, name))
        for name in ("prompt_tokens", "temperature")
    ),
)
