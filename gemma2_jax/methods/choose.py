"""The method that a configuration asks for."""

from gemma2_jax.methods.distillation import Distillation
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.on_policy import OnPolicyDistillation
from gemma2_jax.model.adaptation import FULL, Adaptation
from gemma2_jax.run import RunConfig


def build_method(config: RunConfig, adaptation: Adaptation = FULL) -> LanguageModelling:
    """Language modelling without a teacher, else distillation, from the data or also from the student's own samples.

    Raises:
        UserError: the teacher's sizes are not known, or do not go with the student's.
    """
    if config.distill.on_policy is not None:
        return OnPolicyDistillation(config, adaptation)
    if config.distill.has_teacher:
        return Distillation(config, adaptation)
    return LanguageModelling(config, adaptation)
