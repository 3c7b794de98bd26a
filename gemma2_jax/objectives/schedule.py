"""Numbers of the objective that change over a run."""

from dataclasses import dataclass
from typing import Literal

import optax

from gemma2_jax.config import UserError


@dataclass(frozen=True)
class ScheduleConfig:
    """A number over the steps of a run: from `start` linearly to `peak`, and on from there.

    Attributes:
        kind: what follows the warm-up. `constant` stays; `linear` and `cosine` move to `end` over the rest of the
            run; `wsd` (warmup-stable-decay) stays, and moves linearly to `end` in the last `decay_steps`.
        peak: the value after the warm-up.
        start: the value at step 0; null without a warm-up.
        end: the value when the run is done; null with `constant`.
        warmup_steps: of the way from start to peak.
        decay_steps: of `wsd`, which needs at least 1; 0 with the others.
    """

    kind: Literal["constant", "linear", "cosine", "wsd"]
    peak: float
    start: float | None = None
    end: float | None = None
    warmup_steps: int = 0
    decay_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "decay_steps"):
            if getattr(self, name) < 0:
                raise UserError(f"a schedule's {name} is {getattr(self, name)}; it must not be negative.")
        needed = {
            "start": (self.warmup_steps > 0, "with warmup_steps above 0"),
            "end": (self.kind != "constant", "with the kinds linear, cosine and wsd"),
        }
        for name, (need, where) in needed.items():
            value = getattr(self, name)
            if need != (value is not None):
                given = "null" if value is None else value
                raise UserError(
                    f"a schedule's {name} is {given}; it must be a number {where}, and null otherwise."
                )
        if (self.kind == "wsd") != (self.decay_steps > 0):
            raise UserError(
                f"a schedule's decay_steps is {self.decay_steps}; it must be at least 1 with the kind wsd, and 0 "
                "otherwise."
            )

    @property
    def values(self) -> tuple[float, ...]:
        """The values between which it moves."""
        return tuple(value for value in (self.start, self.peak, self.end) if value is not None)


def values_of(number: float | ScheduleConfig) -> tuple[float, ...]:
    """The values between which a number of the objective moves, be it scheduled or not."""
    return number.values if isinstance(number, ScheduleConfig) else (number,)


def build_schedule(config: ScheduleConfig, steps: int) -> optax.Schedule:
    """The value at each step of a run of `steps`, which may be traced."""
    peak, rest = config.peak, max(1, steps - config.warmup_steps)
    after = optax.constant_schedule(peak)
    end = peak if config.end is None else config.end
    if config.kind == "linear":
        after = optax.linear_schedule(peak, end, rest)
    elif config.kind == "cosine":
        fall = optax.cosine_decay_schedule(1.0, rest)  # of its own it only falls to a fraction of the peak
        after = lambda step: end + (peak - end) * fall(step)  # noqa: E731
    elif config.kind == "wsd":
        decay = optax.linear_schedule(peak, end, config.decay_steps)
        after = optax.join_schedules([after, decay], [rest - config.decay_steps])
    if config.start is None:
        return after
    warmup = optax.linear_schedule(config.start, peak, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])
