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


def _thorough(value: Any, is_single: bool) -> Any:
    values = (value,) if is_single else value
    return pytest.param(*values, marks=pytest.mark.thorough)
