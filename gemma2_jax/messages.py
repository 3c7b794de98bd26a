"""Parts of messages: values as users write them, and errors of libraries in one line."""

import json
from typing import Any

_LONGEST = 500  # characters of a library's error; compilers append pages to theirs


def written(value: Any) -> str:
    """Returns a value as it is written after `key=`: null, true, [1, 2]; text without quotes."""
    return value if isinstance(value, str) else quoted(value)


def quoted(value: Any) -> str:
    """Returns a value as `written` does, but text in quotes, so that "1" and 1 differ."""
    return json.dumps(value, ensure_ascii=False, default=str)


def one_line(error: BaseException) -> str:
    """Returns a library's error in one line without a full stop; the error's type if it has no text."""
    return " ".join(str(error).split())[:_LONGEST].rstrip(".") or type(error).__name__
