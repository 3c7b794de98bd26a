"""The training objective: a weighted sum of named terms."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from gemma2_jax.config import UserError
from gemma2_jax.kernels.lm_head import Logits, TokenLoss
from gemma2_jax.objectives import terms
from gemma2_jax.schedule import ScheduleConfig, build_schedule, values_of

Number = float | ScheduleConfig
Coefficients = Mapping[str, jax.Array]  # float32 scalars that may change from step to step

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl")  # from a teacher
# Limits of the temperature: in float32, the masked logit -1e30 is divided by it, and losses are multiplied by its
# square.
_COLDEST, _WARMEST = 1e-3, 1e3
TERMS = ("cross_entropy", *DIVERGENCES, "z_loss")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The weight of each term, and how the terms are computed.

    Gemma 2's pretraining is `cross_entropy: 1`; its distillation is `forward_kl: 1` alone. With T the teacher's
    distribution and S the student's, each divergence is scaled by temperature squared.

    Attributes:
        cross_entropy: weight of the cross-entropy with the data's next token.
        forward_kl: weight of KL(T || S). With a `sampled` cache, its value is too large, since the entropy of the draws
            is below that of T; it is not comparable with another number of draws or an online teacher.
        temperature: divides the logits of T and S in every divergence; a number or a schedule, 1 without a divergence.
        block_tokens: number of tokens whose logits each device computes at a time; smaller values need less memory.
        reverse_kl: weight of KL(S || T).
        jsd: weight of beta KL(T || M) + (1 - beta) KL(S || M), M = beta T + (1 - beta) S.
        skew_kl: weight of KL(T || alpha T + (1 - alpha) S).
        skew_reverse_kl: weight of KL(S || alpha S + (1 - alpha) T).
        z_loss: weight of the squared logarithm of the sum of the model's exp(logits).
        mix: lambda, a number or a schedule from 0 to 1: the weights of divergences are multiplied by lambda, that of
            cross_entropy by 1 - lambda; null to leave the weights as they are.
        jsd_beta: beta of jsd, above 0 and below 1.
        skew_alpha: alpha of skew_kl and skew_reverse_kl, at least 0 and below 1.
    """

    cross_entropy: float
    forward_kl: float
    temperature: Number
    block_tokens: int
    reverse_kl: float = 0.0
    jsd: float = 0.0
    skew_kl: float = 0.0
    skew_reverse_kl: float = 0.0
    z_loss: float = 0.0
    mix: Number | None = None
    jsd_beta: float = 0.5
    skew_alpha: float = 0.1

    def __post_init__(self) -> None:
        for name in TERMS:
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(
                    f"objective.{name} is {getattr(self, name)}; a term's weight must be a finite number of at least 0."
                )
        if self.cross_entropy == 0 and not self.needs_teacher:
            raise UserError(
                f"objective has weight 0 for cross_entropy and for every divergence ({', '.join(DIVERGENCES)}); at "
                "least one must be above 0."
            )
        for value in values_of(self.temperature):
            if not _COLDEST <= value <= _WARMEST:
                raise UserError(
                    f"objective.temperature is {value}; it must be from {_COLDEST} to {_WARMEST:g}."
                )
        if self.temperature != 1 and not self.needs_teacher:
            raise UserError(
                f"objective.temperature is {_shown(self.temperature)}, but no divergence that would use it has a "
                f"weight; set it to 1, or give one of {', '.join(DIVERGENCES)} a weight above 0."
            )
        if self.mix is not None:
            for value in values_of(self.mix):
                if not 0 <= value <= 1:
                    raise UserError(f"objective.mix is {value}; it must be from 0 to 1.")
            if self.cross_entropy == 0 or not self.needs_teacher:
                raise UserError(
                    f"objective.mix is {_shown(self.mix)}, but it weighs cross_entropy against divergences, and one of "
                    "the two has no weight; set it to null, or give both a weight above 0."
                )
        if not 0 < self.jsd_beta < 1:
            raise UserError(f"objective.jsd_beta is {self.jsd_beta}; it must be above 0 and below 1.")
        if not 0 <= self.skew_alpha < 1:
            raise UserError(f"objective.skew_alpha is {self.skew_alpha}; it must be at least 0 and below 1.")
        for name, users in {"jsd_beta": ("jsd",), "skew_alpha": ("skew_kl", "skew_reverse_kl")}.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and not set(users) & set(self.divergences):
                raise UserError(
                    f"objective.{name} is {value}, but no term that would use it has a weight; set it to {default}, or "
                    f"give objective.{' or objective.'.join(users)} a weight above 0."
                )
        if self.block_tokens < 1:
            raise UserError(f"objective.block_tokens is {self.block_tokens}; it must be at least 1.")

    @property
    def divergences(self) -> tuple[str, ...]:
        """The names of the divergences that have a weight."""
        return tuple(name for name in DIVERGENCES if getattr(self, name) > 0)

    @property
    def needs_teacher(self) -> bool:
        return bool(self.divergences)

    @property
    def schedules(self) -> dict[str, ScheduleConfig]:
        """The schedules of the numbers that change over the run, by their key."""
        numbers = {"temperature": self.temperature, "mix": self.mix}
        return {name: number for name, number in numbers.items() if isinstance(number, ScheduleConfig)}


def token_loss(config: ObjectiveConfig) -> TokenLoss:
    """Returns the objective of each token as a function for `lm_head_sums`.

    The function takes the logits of `model`, and of `teacher` if it is online; per token, `targets`, and
    `teacher_targets` (`SparseTargets`) if they replace the teacher; and the coefficients of `build_coefficients`.

    Its metrics are `cross_entropy` and every term that has a weight, unweighted; `forward_kl` is named `kl`.
    """

    def loss(
        logits: Logits, per_token: Mapping[str, Any], coefficients: Coefficients
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        model, targets = logits["model"], per_token["targets"]
        found = {"cross_entropy": terms.cross_entropy(model, targets)}
        if "teacher_targets" in per_token:
            sparse = per_token["teacher_targets"]
            found["forward_kl"] = terms.sparse_forward_kl(model, sparse, coefficients["temperature"])
        elif "teacher" in logits:
            found |= _divergences(config, model, logits["teacher"], coefficients["temperature"])
        if config.z_loss > 0:
            found["z_loss"] = terms.z_loss(model)
        total = jnp.zeros(targets.shape, jnp.float32)
        for name, value in found.items():
            if getattr(config, name) > 0:
                total += coefficients[name] * value
        return total, {"kl" if name == "forward_kl" else name: value for name, value in found.items()}

    return loss


def build_coefficients(config: ObjectiveConfig, steps: int) -> Callable[[jax.Array | int], Coefficients]:
    """Returns a function from a step of a run of `steps` to the term weights, the temperature, and `mix` if it is set.

    The values are arrays, so that a compiled step can use values that change.
    """
    schedules = {name: build_schedule(schedule, steps) for name, schedule in config.schedules.items()}

    def coefficients(step: jax.Array | int) -> Coefficients:
        now = {name: schedule(step) for name, schedule in schedules.items()}
        mix = now.get("mix", config.mix)
        found = {"temperature": now.get("temperature", config.temperature)}
        for name in TERMS:
            weight = getattr(config, name)
            if mix is not None and name != "z_loss":
                weight *= mix if name in DIVERGENCES else 1 - mix
            found[name] = weight
        if mix is not None:
            found["mix"] = mix
        return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

    return coefficients


def evaluation_loss(
    logits: Logits, per_token: Mapping[str, Any], coefficients: Any
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The evaluation metrics of each token, at temperature 1: `cross_entropy` and `entropy`, and with a teacher `kl`
    (forward), `agreement`, `acceptance` and `teacher_entropy`.

    Arguments are as in `token_loss`, except that `teacher_targets` are not allowed.
    """
    model, targets = logits["model"], per_token["targets"]
    metrics = {"cross_entropy": terms.cross_entropy(model, targets), "entropy": terms.entropy(model)}
    if "teacher_targets" in per_token:
        raise ValueError("evaluation needs the teacher's whole distribution, not sparse targets")
    if "teacher" in logits:
        teacher = logits["teacher"]
        metrics["kl"] = terms.forward_kl(model, teacher, temperature=1.0)
        metrics["agreement"] = terms.agreement(model, teacher)
        metrics["acceptance"] = terms.acceptance(model, teacher)
        metrics["teacher_entropy"] = terms.entropy(teacher)
    return metrics["cross_entropy"], metrics


def _divergences(
    config: ObjectiveConfig, student: jax.Array, teacher: jax.Array, temperature: jax.Array
) -> dict[str, jax.Array]:
    """The divergences that have a weight, computed from the whole distributions."""
    functions: Mapping[str, Callable[[], jax.Array]] = {
        "forward_kl": lambda: terms.forward_kl(student, teacher, temperature),
        "reverse_kl": lambda: terms.reverse_kl(student, teacher, temperature),
        "jsd": lambda: terms.jsd(student, teacher, temperature, config.jsd_beta),
        "skew_kl": lambda: terms.skew_kl(student, teacher, temperature, config.skew_alpha),
        "skew_reverse_kl": lambda: terms.skew_reverse_kl(student, teacher, temperature, config.skew_alpha),
    }
    return {name: functions[name]() for name in config.divergences}


def _shown(number: Number) -> str:
    return f"a {number.kind} schedule" if isinstance(number, ScheduleConfig) else str(number)
