"""Reads JSON files that other tools write beside their weights."""

import json
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError, read_json


def read_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError if the file is missing or holds something else."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object.")
    return data


def shown(value: Any) -> str:
    """Returns a value as JSON text, truncated to 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
