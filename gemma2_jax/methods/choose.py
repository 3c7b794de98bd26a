"""Selects the training method for a configuration."""

from gemma2_jax.methods.distillation import Distillation
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.on_policy import OnPolicyDistillation
from gemma2_jax.model.adaptation import Adaptation
from gemma2_jax.run import RunConfig


def build_method(config: RunConfig, adaptation: Adaptation | None = None) -> LanguageModelling:
    """Returns language modelling without a teacher, else distillation, on-policy if `distill.on_policy` is set.

    Args:
        adaptation: the one that the configuration selects by default.

    Raises:
        UserError: the teacher's sizes are unknown or do not match the student's.
    """
    if config.distill.on_policy is not None:
        return OnPolicyDistillation(config, adaptation)
    if config.distill.has_teacher:
        return Distillation(config, adaptation)
    return LanguageModelling(config, adaptation)
