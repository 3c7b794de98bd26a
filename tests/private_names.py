"""A library's private names, which it may change in any release: whether they still are what the package takes."""

import inspect
from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest


def private(library: str, place: str, breaks: str, parameters: Sequence[str] | None = None) -> Any:
    """The object at `place` (`package.module:Class.name`). Fails the test, saying what breaks, if it is another.

    Args:
        library: as it is installed.
        breaks: what no longer works for users without it.
        parameters: with which the package calls it, those that it must take; None for what is not called.
    """
    known = f"{place} of {library} {version(library)}"
    module, path = place.split(":")
    try:
        found: Any = reduce(getattr, path.split("."), import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{known} is gone ({error}): {breaks}.", pytrace=False)
    if parameters is not None:
        taken = inspect.signature(found).parameters
        missing = [name for name in parameters if name not in taken]
        required = [
            name
            for name, each in taken.items()
            if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
        if missing or set(required) - set(parameters):
            pytest.fail(f"{known} takes {list(taken)}, not {list(parameters)}: {breaks}.", pytrace=False)
    return found
