"""Runs `gemma2` and announces when it reaches a function: `python stopping.py MODULE:NAME:N VERB …`.

When that function is called for the Nth time, it prints `here` to standard error, waits for a signal unless WAIT=0,
and continues.
"""

import importlib
import os
import sys
import time
from typing import Any

from gemma2_jax.cli.main import main


def announce(place: str) -> None:
    """Patches the function at `place` to print `here` when it is called for the Nth time."""
    module, name, calls = place.split(":")
    *owner, attribute = name.split(".")
    holder: Any = importlib.import_module(module)
    for part in owner:
        holder = getattr(holder, part)
    function = getattr(holder, attribute)

    left = int(calls)

    def here(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.write(2, b"here\n")
            if os.environ.get("WAIT") != "0":
                wait()
        return function(*arguments, **options)

    setattr(holder, attribute, here)


def wait() -> None:
    """Until a signal is noted; one that raises an exception ends it, too."""
    stops = sys.modules.get("gemma2_jax.stops")
    until = time.monotonic() + 60
    while time.monotonic() < until and not (stops and stops.requested()):
        time.sleep(0.05)


if __name__ == "__main__":  # and not in a process that tokenises
    announce(sys.argv.pop(1))
    sys.exit(main())
