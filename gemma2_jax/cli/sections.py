"""Key=value for verbs that use only some sections of a run's configuration."""

from collections.abc import Sequence

from gemma2_jax.cli.compose import compose, pairs
from gemma2_jax.config import UserError
from gemma2_jax.run import RunConfig


def compose_sections(
    overrides: Sequence[str],
    config_dir: str | None,
    purpose: str,
    sections: Sequence[str],
    others: Sequence[str] = (),
) -> RunConfig:
    """`compose` for overrides of some sections, and of single keys of others.

    Args:
        purpose: what is done with them, for the message, such as "an evaluation".

    Raises:
        UserError: another key is given, or as `compose`.
    """
    for key, value in pairs(overrides):
        if key.split(".")[0] not in sections and key not in others:
            accepted = ", ".join(sections) + (f", and {', '.join(others)}" if others else "")
            raise UserError(f"{key}={value} has no effect on {purpose}; accepted: keys of {accepted}.")
    return compose(overrides, config_dir)
