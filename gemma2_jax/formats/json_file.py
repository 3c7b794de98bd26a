"""JSON files that other tools write beside their weights."""

import json
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises UserError if there is no such file or it holds something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a BOM in front
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object.")
    return data


def shown(value: Any) -> str:
    """A value as its file has it, cut after 60 characters."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]}…"
