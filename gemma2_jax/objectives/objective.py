"""The training objective: a weighted sum of named terms."""

from dataclasses import dataclass

import jax

from gemma2_jax.config import UserError
from gemma2_jax.kernels.lm_head import TokenLoss
from gemma2_jax.objectives import terms


@dataclass(frozen=True)
class ObjectiveConfig:
    """The weight of each term, and how the terms are computed.

    Gemma 2's pretraining is `cross_entropy: 1`; its distillation is `forward_kl: 1` alone.

    Attributes:
        cross_entropy: weight of the cross-entropy with the data's next token.
        forward_kl: weight of KL(teacher || student), times temperature squared; needs a teacher.
        temperature: softens both distributions of forward_kl; 1 without it.
        block_tokens: tokens that each device computes logits of at a time; less needs less memory.
    """

    cross_entropy: float
    forward_kl: float
    temperature: float
    block_tokens: int

    def __post_init__(self) -> None:
        for name in ("cross_entropy", "forward_kl"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"objective.{name} is {getattr(self, name)}; a term's weight must not be negative."
                )
        if self.cross_entropy == 0 and self.forward_kl == 0:
            raise UserError(
                "objective has weight 0 for both cross_entropy and forward_kl; at least one must be above 0."
            )
        if not self.temperature > 0:
            raise UserError(f"objective.temperature is {self.temperature}; it must be above 0.")
        if self.temperature != 1 and self.forward_kl == 0:
            raise UserError(
                f"objective.temperature is {self.temperature}, which nothing uses while objective.forward_kl is 0; "
                "it must be 1, or forward_kl above 0."
            )
        if self.block_tokens < 1:
            raise UserError(f"objective.block_tokens is {self.block_tokens}; it must be at least 1.")

    @property
    def needs_teacher(self) -> bool:
        return self.forward_kl > 0


def token_loss(config: ObjectiveConfig) -> TokenLoss:
    """The objective of each token, with `cross_entropy` and, with a teacher, `kl` as metrics."""

    def loss(
        student: jax.Array, teacher: jax.Array | None, targets: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        metrics = {"cross_entropy": terms.cross_entropy(student, targets)}
        total = config.cross_entropy * metrics["cross_entropy"]
        if teacher is not None:
            metrics["kl"] = terms.forward_kl(student, teacher, config.temperature)
            total += config.forward_kl * metrics["kl"]
        return total, metrics

    return loss


def evaluation_loss(
    student: jax.Array, teacher: jax.Array | None, targets: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What models are compared by: cross-entropy and, against a teacher, KL at temperature 1 and agreement."""
    metrics = {"cross_entropy": terms.cross_entropy(student, targets)}
    if teacher is not None:
        metrics["kl"] = terms.forward_kl(student, teacher, temperature=1.0)
        metrics["agreement"] = terms.agreement(student, teacher)
    return metrics["cross_entropy"], metrics
