"""Which paths checkpoints may have."""

from pathlib import Path

from gemma2_jax.config import UserError

_PATTERNS = ("[", "\\")  # Orbax finds some of its files with a glob that includes the whole path


def check_path(folder: str | Path) -> None:
    """Raises UserError if Orbax could not find the files that it writes into `folder`."""
    for sign in _PATTERNS:
        if sign in str(Path(folder).absolute()):
            raise UserError(
                f"The path {folder} contains {sign}, which Orbax interprets as part of a pattern; choose a run folder "
                "without it."
            )
