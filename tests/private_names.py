"""Checks that private names of a library, which it may change in any release, are still what the package expects."""

import inspect
from collections.abc import Sequence
from functools import reduce
from importlib import import_module
from importlib.metadata import version
from typing import Any

import pytest


def private(library: str, place: str, breaks: str, parameters: Sequence[str] | None = None) -> Any:
    """Returns the object at `place` (`package.module:Class.name`). If it has changed, fails with a message.

    Args:
        library: name of the installed distribution.
        breaks: what no longer works for users without the object, for the message.
        parameters: parameters that the package passes to it; None for an object that is not called.
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
