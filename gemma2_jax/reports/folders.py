"""Finds run folders: a folder that is one, or those below it."""

import re
from collections.abc import Iterator
from pathlib import Path

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import UserError, read_yaml
from gemma2_jax.studies.worker import ERROR_FILE
from gemma2_jax.training.metrics import JSON_LINES

_DEEPEST = 6  # levels below a given folder, as in runs/sweeps/NAME/KEYS/RUN


def find_runs(folder: Path) -> list[Path]:
    """Returns the run folders at or below `folder`, numbers in their names in order. Runs have no runs inside."""
    return list(_find(folder, _DEEPEST))


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of `gemma2 train`, perhaps one that has just started."""
    if (folder / JSON_LINES).is_file():
        return True
    try:
        return (folder / CONFIG_FILE).is_file() and "training" in read_yaml(folder / CONFIG_FILE)
    except UserError:
        return False


def failure(folder: Path) -> str | None:
    """Returns why a run of a sweep failed, in one line; None if it has not failed."""
    path = folder / ERROR_FILE
    if not path.is_file():
        return None
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else f"{path} is empty"


def _find(folder: Path, levels: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    if levels == 0:
        return
    try:
        below = sorted((path for path in folder.iterdir() if _may_hold_runs(path)), key=_natural)
    except OSError:  # another user's folder
        return
    for path in below:
        yield from _find(path, levels - 1)


def _may_hold_runs(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not path.name.startswith(".")


def _natural(path: Path) -> list[tuple[int, float, str]]:
    """A key for sorting that compares the numbers in a name as numbers."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)", path.name)
    return [(0, float(part), "") if place % 2 else (1, 0.0, part) for place, part in enumerate(parts)]
