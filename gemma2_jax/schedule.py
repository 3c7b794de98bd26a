"""Numbers that change over a run: one form of schedule, for the learning rate and for the objective."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from gemma2_jax.config import UserError
from gemma2_jax.messages import written

Kind = Literal["constant", "linear", "cosine", "wsd"]
StepCount = int | float  # a number of steps, or a fraction below 1 of the run


@dataclass(frozen=True)
class ScheduleConfig:
    """A number that changes over the steps of a run: linearly from `start` to `peak`, then according to `kind`.

    Attributes:
        kind: what follows the warm-up. `constant` stays at `peak`; `linear` and `cosine` move to `end` over the rest of
            the run; `wsd` (warmup-stable-decay) stays at `peak`, then moves linearly to `end` in the last
            `decay_steps`.
        peak: value after the warm-up.
        start: value at the first step, step 0; null without a warm-up.
        end: value at the last step; null with `constant`.
        warmup_steps: number of steps from start to peak, so that step `warmup_steps` is at the peak: a whole number, or
            a fraction below 1 of training.steps (0.05 for a twentieth of the run), see `count_steps`.
        decay_steps: number of decay steps of `wsd`, at least 1, as a number or a fraction like `warmup_steps`; the
            first of them is already below the peak, the last is at `end`. 0 with the other kinds.
    """

    kind: Kind
    peak: float
    start: float | None = None
    end: float | None = None
    warmup_steps: StepCount = 0
    decay_steps: StepCount = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "decay_steps"):
            check_step_count(f"a schedule's {name}", getattr(self, name))
        needed = {
            "start": (self.warmup_steps > 0, "with warmup_steps above 0"),
            "end": (self.kind != "constant", "with the kinds linear, cosine and wsd"),
        }
        for name, (need, where) in needed.items():
            value = getattr(self, name)
            if need != (value is not None):
                raise UserError(
                    f"a schedule's {name} is {written(value)}; it must be a number {where}, and null otherwise."
                )
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise UserError(
                f"a schedule's decay_steps is {self.decay_steps}; it must be at least 1 (or a fraction above 0) with "
                "the kind wsd, and 0 otherwise."
            )

    @property
    def values(self) -> tuple[float, ...]:
        """The values between which the schedule moves."""
        return tuple(value for value in (self.start, self.peak, self.end) if value is not None)


def values_of(number: float | ScheduleConfig) -> tuple[float, ...]:
    """The values between which a number of the objective moves; a single value if it is not scheduled."""
    return number.values if isinstance(number, ScheduleConfig) else (number,)


def check_step_count(name: str, count: StepCount) -> None:
    """Raises UserError if `count`, the value of the key `name`, is neither a number of steps nor a fraction."""
    if count < 0:
        raise UserError(f"{name} is {count}; it must not be negative.")
    if isinstance(count, float) and count >= 1:
        raise UserError(
            f"{name} is {count}; it must be a whole number of steps, or a fraction below 1 of training.steps."
        )


def count_steps(where: str, warmup: StepCount, decay: StepCount, steps: int) -> tuple[int, int]:
    """The warm-up and decay of a run of `steps` steps, as whole numbers of steps.

    A fraction is rounded, to at least 1 step if it is above 0. If rounding makes two fractions one step longer than the
    run, the warm-up is shortened.

    Args:
        where: the section with the two settings (optimizer, objective.mix).

    Raises:
        UserError: warm-up and decay together are longer than the run.
    """
    warmup_steps, decay_steps = (
        count if isinstance(count, int) else max(1, round(count * steps)) if count > 0 else 0
        for count in (warmup, decay)
    )
    if isinstance(warmup, float) and isinstance(decay, float) and warmup + decay <= 1:
        warmup_steps = min(warmup_steps, steps - decay_steps)
    if warmup_steps + decay_steps > steps:
        raise UserError(
            f"{where}.warmup_steps ({warmup}) and decay_steps ({decay}) take {warmup_steps + decay_steps} steps, more "
            f"than training.steps ({steps}); lower them, or give fractions of the run (0.1 for a tenth)."
        )
    return warmup_steps, decay_steps


def build_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """The value at each step (may be traced) of a run of `steps` steps. Raises UserError as `count_steps` does."""
    warmup, decay = count_steps("schedule", config.warmup_steps, config.decay_steps, steps)
    start = config.peak if config.start is None else config.start
    return curve(config.kind, start, config.peak, config.end, warmup, decay, steps)


def curve(
    kind: Kind, start: float, peak: float, end: float | None, rise: int, decay: int, steps: int
) -> optax.Schedule:
    """The shape of every schedule: float32, over the steps 0 to `steps` - 1, with exactly `end` at the last step.

    Args:
        start: value at step 0, unless `rise` is 0.
        rise: the step that reaches `peak`.
        decay: for `wsd`: number of last steps, on the way from peak to end.
    """
    last = steps - 1
    turn = last - decay if kind == "wsd" else rise  # the last step at the peak

    def at(step: jax.Array | int) -> jax.Array:
        done = jnp.asarray(step, jnp.float32)
        value = jnp.full(done.shape, peak, jnp.float32)
        if end is not None:
            part = jnp.clip((done - turn) / max(1, last - turn), 0.0, 1.0)
            if kind == "cosine":
                part = (1 - jnp.cos(jnp.pi * part)) / 2
            value = peak + (end - peak) * part
        value = jnp.where(done < rise, start + (peak - start) * done / max(1, rise), value)
        return value if end is None else jnp.where(done >= last, end, value)

    return at
