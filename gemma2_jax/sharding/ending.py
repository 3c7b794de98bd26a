"""How a job of several processes ends when one of them fails: all end, and process 0 says why, in a sentence.

The first that fails leaves its reason with JAX's coordinator. A thread in each of the others waits for that, since
their main threads may be waiting for a result that never comes.
"""

import _thread
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

_REASON = "gemma2_jax/ended"  # the key of the reason with the coordinator
_DONE = "done"  # in its place, when there is none
_GRACE = 0.5  # seconds in which a process that fails by itself, as all may at once, does so
_UNWIND = 10.0  # seconds to close files in
_POLL_MS = 600_000


class _Watch:
    """The connection to the other processes, and whether this one is on its way out, perhaps on account of another."""

    def __init__(self, client: Any, process: int) -> None:
        self.client, self.process = client, process
        self.leaving = threading.Event()
        self.interrupted = False
        self.thread = threading.Thread(target=_wait, args=(self,), daemon=True, name="other processes")


_watch: _Watch | None = None


def watch(client: Any, process: int) -> None:
    """From now on, this process ends when another one has failed."""
    global _watch
    _watch = _Watch(client, process)
    _watch.thread.start()


def is_watched() -> bool:
    """Whether this process has others that wait for it."""
    return _watch is not None and not _watch.leaving.is_set()


def leave(code: int, told: str | None) -> None:
    """Ends this process's part in its job; returns if it is alone, or has done its work.

    Args:
        code: the exit code; where it is not 0, all processes end with theirs.
        told: why, for process 0 to print.
    """
    if _watch is None or _watch.leaving.is_set():
        return
    if code == 0:
        _finish(_watch)
        return
    _watch.leaving.set()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end(_watch, 1 if _watch.interrupted else code, told)


def _finish(watch: _Watch) -> None:
    """Waits until all are done: process 0 takes the coordinator with it."""
    watch.client.wait_at_barrier("gemma2_jax/done", 24 * 3600 * 1000)
    watch.leaving.set()
    # A thread that still waits in C++ when Python ends would abort the process.
    if watch.process == 0:
        watch.client.key_value_set(_REASON, _DONE)
    watch.thread.join(_UNWIND)


def _end(watch: _Watch, code: int, told: str | None) -> None:
    try:
        if (text := _publish(watch, told)) and watch.process == 0:
            print(text, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Process 0 last, since the others' connection ends with it.
        with suppress(Exception):  # some are gone already
            watch.client.wait_at_barrier("gemma2_jax/ending", int(2 * _UNWIND * 1000))
        if watch.process == 0:
            time.sleep(_GRACE)
    finally:
        os._exit(code)


def _publish(watch: _Watch, told: str | None) -> str | None:
    """Leaves the reason, unless another process was first; returns that of the first, for process 0 to print."""
    first = f"{watch.process}\n{told or ''}"
    try:
        watch.client.key_value_set(_REASON, first)
    except Exception:  # there is one already, or no coordinator any more
        with suppress(Exception):
            first = watch.client.blocking_key_value_get(_REASON, 10_000)
    number, _, text = first.partition("\n")
    if number == "0" or text == told:  # what all refuse is not another's fault because it was faster
        return text
    return text.replace("gemma2: ", f"gemma2: process {number}: ", 1)


def _wait(watch: _Watch) -> None:
    while not watch.leaving.is_set():
        try:
            if watch.client.blocking_key_value_get(_REASON, _POLL_MS) == _DONE:
                return
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # the connection is closed: the end, in one way or another
        if not watch.leaving.wait(_GRACE):
            watch.interrupted = True
            _thread.interrupt_main()
        if not watch.leaving.wait(_UNWIND):
            watch.leaving.set()
            _end(watch, 1, None)
        return
