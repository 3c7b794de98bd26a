"""Token names in the files that a Hugging Face folder has besides tokenizer.model."""

from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError
from gemma2_jax.formats.json_file import read_object


def named_tokens(folder: Path) -> dict[int, str]:
    """Returns token names by id from all files that list some; missing and damaged files are ignored.

    tokenizer.json lists the whole vocabulary and the added tokens, the other files only the added tokens.
    """
    whole = _read(folder / "tokenizer.json")
    pieces = whole.get("model")
    listed = [
        _by_name(pieces.get("vocab") if isinstance(pieces, dict) else None),
        _by_name(_read(folder / "added_tokens.json")),
        _by_number(_read(folder / "tokenizer_config.json").get("added_tokens_decoder")),
        _in_list(whole.get("added_tokens")),
    ]
    return {number: name for names in listed for number, name in names.items()}


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError:
        return {}


def _by_name(data: Any) -> dict[int, str]:
    """Returns the names in `{"<name>": 400}`."""
    items = data.items() if isinstance(data, dict) else ()
    return {number: name for name, number in items if type(number) is int}


def _by_number(data: Any) -> dict[int, str]:
    """Returns the names in `{"400": {"content": "<name>"}}`."""
    items = data.items() if isinstance(data, dict) else ()
    return {
        int(number): str(value["content"])
        for number, value in items
        if number.isdecimal() and isinstance(value, dict) and "content" in value
    }


def _in_list(data: Any) -> dict[int, str]:
    """Returns the names in `[{"id": 400, "content": "<name>"}]`."""
    items = data if isinstance(data, list) else ()
    return {
        value["id"]: str(value.get("content"))
        for value in items
        if isinstance(value, dict) and type(value.get("id")) is int
    }
