"""Parts of messages: values as users write them, and errors of libraries in one line."""

from typing import Any

import pytest

from gemma2_jax.messages import one_line, quoted, written


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (False, "false"),
        (1e-05, "1e-05"),
        ((1, 2), "[1, 2]"),
        ({"layers": ((0, 1),), "hidden": None}, '{"layers": [[0, 1]], "hidden": null}'),
        ("runs/é", "runs/é"),
    ],
)
def test_values_are_written_as_after_a_key(value: Any, text: str) -> None:
    assert written(value) == text
    assert quoted(value) == (f'"{text}"' if isinstance(value, str) else text)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("the first\n  and the second line."), "the first and the second line"),
        (KeyError(), "KeyError"),
        (RuntimeError("\n"), "RuntimeError"),
        (ValueError("x" * 900), "x" * 500),
    ],
)
def test_an_error_is_one_line_that_is_never_empty(error: Exception, line: str) -> None:
    assert one_line(error) == line
