"""Where checkpoints may lie."""

from pathlib import Path

from gemma2_jax.config import UserError

_PATTERNS = ("[", "\\")  # Orbax looks for some of its files with the whole path as a pattern


def check_path(folder: str | Path) -> None:
    """Raises UserError if Orbax would not find again what it writes into `folder`."""
    for sign in _PATTERNS:
        if sign in str(Path(folder).absolute()):
            raise UserError(
                f"{folder} has {sign} in its path, which Orbax takes for a part of a pattern; choose a run folder "
                "without it."
            )
