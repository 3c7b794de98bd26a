"""Selects the training method for a configuration."""

from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.methods.distillation import Distillation
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.method import Method
from gemma2_jax.methods.on_policy import OnPolicyDistillation
from gemma2_jax.model.adaptation import Adaptation
from gemma2_jax.run import RunConfig


def method_class(config: RunConfig) -> type[LanguageModelling]:
    """Returns language modelling without a teacher, else distillation, on-policy if `distill.on_policy` is set."""
    if config.distill.on_policy is not None:
        return OnPolicyDistillation
    return Distillation if config.distill.has_teacher else LanguageModelling


def build_method(config: RunConfig, adaptation: Adaptation | None = None) -> LanguageModelling:
    """Returns the method that a configuration selects (`method_class`).

    Args:
        adaptation: the one that the configuration selects by default.

    Raises:
        UserError: the teacher's sizes are unknown or do not match the student's.
    """
    return method_class(config)(config, adaptation)


def own_name(config: RunConfig, method: Method | None) -> str | None:
    """Returns the name of a method that `config` does not select, by which run folders identify it; else None."""
    return None if method is None or type(method) is method_class(config) else type(method).__qualname__


def check_sizes(config: RunConfig) -> None:
    """Raises UserError if the sizes of the method's frozen models are in a checkpoint that is not on this machine."""
    teacher = config.distill.teacher
    if teacher is not None and config.distill.model is None and not Path(teacher).exists():
        raise UserError(
            f"distill.teacher is {teacher}, which does not exist on this machine; give the teacher's sizes in "
            "distill.model, as `- /model@distill.model: gemma2_9b` does in an experiment."
        )
