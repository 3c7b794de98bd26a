"""The data iterator's state in a checkpoint: one file per process."""

import json
from functools import reduce
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError


def iterator_state(folder: Path) -> Any:
    """Returns the merged iterator states of all processes. (Orbax would require the same number of processes.)"""
    try:
        states = [
            json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("process_*.json"))
        ]
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be read as the state of the data: {error}.") from None
    if not states:
        raise UserError(f"{folder} lacks process_0.json, the state of the data.")
    return reduce(_merged, states)


def _merged(state: Any, other: Any) -> Any:
    if not (isinstance(state, dict) and isinstance(other, dict)):
        return state  # values that several processes have are equal
    return {**other, **{key: _merged(value, other.get(key)) for key, value in state.items()}}
