"""AdamW, or Muon on the matrices, with warm-up, a learning rate schedule, clipping, and no weight decay on norms."""

from dataclasses import dataclass
from typing import Literal

import optax
import optax.contrib

from gemma2_jax.config import UserError
from gemma2_jax.model.weights import Specs, Weight, map_specs
from gemma2_jax.schedule import StepCount, check_step_count, count_steps, curve

_RMS_OF_ADAMW = (
    0.2  # root mean square of AdamW's updates divided by the learning rate (Liu et al., arXiv 2502.16982)
)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) or Muon, and the learning rate schedule.

    Attributes:
        learning_rate: peak learning rate.
        schedule: shape after the warm-up: `cosine` decays until the end of the run; `wsd` (warmup-stable-decay) stays
            at the peak and decays linearly in the last `decay_steps`; `constant` stays at the peak.
        warmup_steps: steps of linear warm-up from 0 at the start of the run; the last of them has the peak. Either a
            whole number of steps, or a fraction below 1 of training.steps (0.05 for a twentieth of the run), rounded
            to at least 1 step.
        decay_steps: length of the decay of `wsd`, at least 1, as a number or a fraction like `warmup_steps`; its first
            step is already below the peak. 0 with the other schedules.
        final_fraction: learning rate of the run's last step as a fraction of the peak; 1 with `constant`.
        beta1, beta2: decay rates of the moving averages of the gradient and of its square.
        eps: constant added to the root of the second moment in the update's denominator.
        weight_decay: weight decay, multiplied by the learning rate; applies to all weights except the norms' scales.
        clip_norm: maximum global norm; larger gradients are scaled down to it.
        kind: `adamw`, or `muon`: Muon (Jordan et al., 2024) for the matrices of the layers, AdamW for embedding and
            norms. Muon's updates are scaled to the root mean square of AdamW's (Liu et al., arXiv 2502.16982, section
            2.2), so that both share learning rate and weight decay.
        momentum: decay rate of Muon's moving average of the gradient; null with `adamw`.
    """

    learning_rate: float
    schedule: Literal["cosine", "wsd", "constant"]
    warmup_steps: StepCount
    decay_steps: StepCount
    final_fraction: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    kind: Literal["adamw", "muon"] = "adamw"
    momentum: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"optimizer.{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("warmup_steps", "decay_steps"):
            check_step_count(f"optimizer.{name}", getattr(self, name))
        if self.weight_decay < 0:
            raise UserError(f"optimizer.weight_decay is {self.weight_decay}; it must not be negative.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"optimizer.{name} is {getattr(self, name)}; it must be at least 0 and below 1."
                )
        if self.kind == "adamw" and self.momentum is not None:
            raise UserError(
                f"optimizer.momentum is {self.momentum}, which optimizer.kind adamw does not use; set it to null, or "
                "write optimizer=muon."
            )
        if self.kind == "muon" and (self.momentum is None or not 0 <= self.momentum < 1):
            raise UserError(
                f"optimizer.momentum is {'null' if self.momentum is None else self.momentum}; it must be at least 0 "
                "and below 1 with optimizer.kind muon."
            )
        if not 0 <= self.final_fraction <= 1:
            raise UserError(f"optimizer.final_fraction is {self.final_fraction}; it must be from 0 to 1.")
        if self.schedule == "wsd" and self.decay_steps == 0:
            raise UserError(
                "optimizer.decay_steps is 0; with optimizer.schedule wsd it must be at least 1, or a fraction of the "
                "run (0.2)."
            )
        if self.schedule != "wsd" and self.decay_steps > 0:
            raise UserError(
                f"optimizer.decay_steps is {self.decay_steps}, which optimizer.schedule {self.schedule} does not use; "
                "set it to 0, or optimizer.schedule to wsd."
            )
        if self.schedule == "constant" and self.final_fraction != 1:
            raise UserError(
                f"optimizer.final_fraction is {self.final_fraction}, which optimizer.schedule constant does not use; "
                "set it to 1, or optimizer.schedule to cosine or wsd."
            )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate at each step of a run of `steps`, float32: step i of a warm-up of w has peak * (i + 1) / w.

    Raises:
        UserError: as `count_steps`.
    """
    warmup, decay = count_steps("optimizer", config.warmup_steps, config.decay_steps, steps)
    peak = config.learning_rate
    start, rise = peak / max(1, warmup), max(0, warmup - 1)
    return curve(config.schedule, start, peak, peak * config.final_fraction, rise, decay, steps)


def build_optimizer(config: OptimizerConfig, steps: int, specs: Specs) -> optax.GradientTransformation:
    """Builds the optimizer for a run of `steps`; its moments have the parameters' dtype, float32.

    Args:
        specs: specs of the parameters; those without fan_in (the norms' scales) get no weight decay.
    """
    rule = _adamw(config, steps, specs)
    if config.kind == "muon":
        kinds = map_specs(lambda _, spec: "muon" if _matrix_axes(spec) else "adamw", specs)
        rule = optax.partition({"muon": _muon(config, steps, specs), "adamw": rule}, kinds)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _adamw(config: OptimizerConfig, steps: int, specs: Specs) -> optax.GradientTransformation:
    return optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=map_specs(lambda _, spec: bool(spec.fan_in), specs),
    )


def _muon(config: OptimizerConfig, steps: int, specs: Specs) -> optax.GradientTransformation:
    return optax.contrib.muon(
        learning_rate_schedule(config, steps),
        beta=config.momentum,
        weight_decay=config.weight_decay,
        consistent_rms=_RMS_OF_ADAMW,
        muon_weight_dimension_numbers=map_specs(lambda _, spec: _matrix_axes(spec), specs),
    )


def _matrix_axes(spec: Weight) -> optax.contrib.MuonDimensionNumbers | None:
    """The axes that form a matrix's rows and its columns; None for a norm and for the embedding.

    The axis P is neither: it holds a matrix for each pair of layers.
    """
    if not spec.fan_in or "V" in spec.dims:
        return None
    axes = list(enumerate(spec.dims))
    rows = tuple(axis for axis, letter in axes if letter in spec.fan_in)
    columns = tuple(axis for axis, letter in axes if letter not in spec.fan_in + "P")
    return optax.contrib.MuonDimensionNumbers(rows, columns) if columns else None
