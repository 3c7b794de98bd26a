"""How a job of several processes ends when one of them fails: all end, and process 0 says why, in a sentence.

The first that fails leaves its reason with JAX's coordinator. A thread in each of the others waits for that, since
their main threads may be waiting for a result that never comes. One that is killed or suspended leaves none: process 0
notices it by its connection (`links`), long before JAX does, and leaves the reason for it. Where that is process 0,
there is no coordinator to leave a reason with, and the others end by themselves.
"""

import _thread
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from gemma2_jax import stops
from gemma2_jax.processes.links import LiveLinks

_REASON = "gemma2_jax/ended"  # the key of the reason with the coordinator
_DONE = "done"  # in its place, when there is none
_GRACE = 0.5  # seconds in which a process that fails by itself, as all may at once, does so
_UNWIND = 10.0  # seconds to close files in
_NOTICE = 2.0  # seconds in which process 0 tells of one that is gone, surely
_POLL_MS = 600_000


@dataclass(frozen=True)
class _Reason:
    """Why the job ends.

    Attributes:
        process: the one that failed first, or tells of those that are gone.
        code: with which all exit.
        told: a sentence, perhaps empty.
        gone: processes that cannot be waited for, killed or suspended.
    """

    process: int
    code: int
    told: str
    gone: Sequence[int] = ()


class _Watch:
    """The connections to the other processes, and whether this one is on its way out, perhaps on account of another.

    Attributes:
        another_ended: another one has left its reason.
        interrupted: so that this one was told to stop.
    """

    def __init__(self, client: Any, process: int, count: int, links: Mapping[int, socket.socket]) -> None:
        self.client, self.process, self.count, self.links = client, process, count, LiveLinks(links)
        self.leaving = threading.Event()
        self.another_ended = threading.Event()
        self.interrupted = False
        self.thread = threading.Thread(target=_wait, args=(self,), daemon=True, name="other processes")


_watch: _Watch | None = None


def watch(client: Any, process: int, count: int, links: Mapping[int, socket.socket]) -> None:
    """From now on, this process ends when another one has failed or is gone.

    Args:
        client: the connection to JAX's coordinator.
        process: this one's number.
        count: how many there are.
        links: connections that end with the process at their other side: all others' in process 0, its in the others.
    """
    global _watch
    _watch = _Watch(client, process, count, links)
    _watch.thread.start()
    stops.set_exit_hook(leave)
    threading.Thread(target=_mind, args=(_watch,), daemon=True, name="links to other processes").start()


def is_watched() -> bool:
    """Whether this process has others that wait for it."""
    return _watch is not None and not _watch.leaving.is_set()


def follows_another() -> bool:
    """Whether what this process has failed by came of another's end; it may take a moment to know."""
    return _watch is not None and _watch.another_ended.wait(_NOTICE)


def leave(code: int, told: str | None) -> None:
    """Ends this process's part in its job; returns if it is alone, or has done its work.

    Args:
        code: the exit code; where it is not 0, all processes end, with that of the first.
        told: why, for process 0 to print.
    """
    if _watch is None or _watch.leaving.is_set():
        return
    if code == 0:
        _finish(_watch)
        return
    _watch.leaving.set()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end(_watch, _Reason(_watch.process, code, "" if told is None or _watch.interrupted else told))


def _finish(watch: _Watch) -> None:
    """Waits until all are done: process 0 takes the coordinator with it."""
    watch.client.wait_at_barrier("gemma2_jax/done", 24 * 3600 * 1000)
    watch.leaving.set()
    watch.links.say_farewell()
    # A thread that still waits in C++ when Python ends would abort the process.
    if watch.process == 0:
        watch.client.key_value_set(_REASON, _DONE)
    watch.thread.join(_UNWIND)


def _end(watch: _Watch, own: _Reason) -> None:
    code = own.code
    try:
        first = _publish(watch, own)
        code = first.code
        if watch.process == 0 and first.told:
            print(_sentence(first, own), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Process 0 last, since the others' connection ends with it.
        left = [number for number in range(watch.count) if number not in first.gone]
        with suppress(Exception):  # some are gone already
            watch.client.wait_at_barrier("gemma2_jax/ending", int(2 * _UNWIND * 1000), left)
        watch.links.say_farewell()
        if watch.process == 0:
            time.sleep(_GRACE)
    finally:
        os._exit(code)


def _publish(watch: _Watch, own: _Reason) -> _Reason:
    """Leaves the reason, unless another process was first; returns that of the first."""
    try:
        watch.client.key_value_set(_REASON, json.dumps(asdict(own)))
    except Exception:  # there is one already, or no coordinator any more
        with suppress(Exception):
            return _Reason(**json.loads(watch.client.blocking_key_value_get(_REASON, 10_000)))
    return own


def _sentence(first: _Reason, own: _Reason) -> str:
    """What process 0 prints; what all refuse is not another's fault because it was faster."""
    if first.process == 0 or first.told == own.told:
        return first.told
    return first.told.replace("gemma2: ", f"gemma2: process {first.process}: ", 1)


def _wait(watch: _Watch) -> None:
    """Follows the first that ends with a reason."""
    while not watch.leaving.is_set():
        try:
            if watch.client.blocking_key_value_get(_REASON, _POLL_MS) == _DONE:
                return
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # the connection is closed: the end, in one way or another
        watch.another_ended.set()
        if not watch.leaving.wait(_GRACE):
            watch.interrupted = True
            stops.stop_deferring()
            # In the background of a script SIGINT is ignored; the command line takes SIGTERM as it takes that.
            ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            _thread.interrupt_main(signal.SIGTERM if ignored else signal.SIGINT)
        if not watch.leaving.wait(_UNWIND):
            watch.leaving.set()
            _end(watch, _Reason(watch.process, 1, ""))
        return


def _mind(watch: _Watch) -> None:
    """Ends the job for processes that are lost: by a reason that all follow, but where there is no coordinator."""
    for lost in watch.links.lost():
        told = f"gemma2: {lost}"
        if watch.process == 0:
            _publish(watch, _Reason(0, 1, told, lost.numbers))  # which this process follows, as all do
        elif not watch.leaving.is_set():
            if watch.process == 1:  # one of them suffices
                print(told, file=sys.stderr, flush=True)
            os._exit(1)
