"""What a checkpoint holds besides its trees, in Orbax's file of metadata: config, method, and unreported metrics."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma2_jax.checkpoints.integrity import ANNOUNCED, METADATA
from gemma2_jax.config import UserError

_UNREPORTED, _METHOD = "unreported", "method"


@dataclass(frozen=True)
class Unreported:
    """Metrics that a run stopped between two rows of its metrics file has not reported yet.

    Attributes:
        rows: metrics of each step since the last row; the next row is their average.
        seconds: time that these steps took.
        evaluated: False if the evaluation due at the checkpoint's step was interrupted.
    """

    rows: Sequence[Mapping[str, float]] = ()
    seconds: float = 0.0
    evaluated: bool = True


def metadata_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the metadata of a checkpoint of parameters alone."""
    return {"config": dict(config), **ANNOUNCED}


def metadata_of_run(config: Mapping[str, Any], unreported: Unreported, method: str | None) -> dict[str, Any]:
    """Returns the metadata of a run's checkpoint; `method` as in `read_method`."""
    return {**metadata_of(config), _UNREPORTED: asdict(unreported), _METHOD: method}


def read_unreported(checkpoint: Path) -> Unreported:
    """Returns the `unreported` metrics that were saved with a checkpoint; empty for older checkpoints.

    Raises:
        UserError: the checkpoint's metadata cannot be read.
    """
    found: Unreported = _read(checkpoint, lambda about: Unreported(**about.get(_UNREPORTED, {})))
    return found


def read_method(checkpoint: Path, default: str | None) -> str | None:
    """Returns the name of the method that trained a run; None for the one that the run's configuration selects.

    Args:
        default: what is returned for older checkpoints, which hold no name.

    Raises:
        UserError: the checkpoint's metadata cannot be read.
    """
    found: str | None = _read(checkpoint, lambda about: about.get(_METHOD, default))
    return found


def _read(checkpoint: Path, read: Callable[[Any], Any]) -> Any:
    path = checkpoint / METADATA
    try:
        return read(json.loads(path.read_text(encoding="utf-8"))["custom_metadata"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} cannot be read; delete {checkpoint} to resume from the previous checkpoint."
        ) from None
