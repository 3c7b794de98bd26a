"""Values of parametrised tests."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_thorough(
    names: str | tuple[str, ...], values: Iterable[Any], ids: Any = None
) -> pytest.MarkDecorator:
    """Parametrises a test; its first case is among the fast tests, all others are thorough."""
    first, *others = values
    cases = [first, *(_thorough(value, isinstance(names, str)) for value in others)]
    return pytest.mark.parametrize(names, cases, ids=ids)


def partly_slow(
    names: str | tuple[str, ...], values: Iterable[Any], kept: Iterable[Any]
) -> pytest.MarkDecorator:
    """Parametrises a test; cases that are not among `kept` are slow."""
    is_single, left = isinstance(names, str), list(kept)
    cases = [value if value in left else _marked(value, is_single, pytest.mark.slow) for value in values]
    return pytest.mark.parametrize(names, cases)


def _thorough(value: Any, is_single: bool) -> Any:
    return _marked(value, is_single, pytest.mark.thorough)


def _marked(value: Any, is_single: bool, mark: pytest.MarkDecorator) -> Any:
    values = (value,) if is_single else value
    return pytest.param(*values, marks=mark)
