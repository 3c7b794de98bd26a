"""How a job of several processes ends when one of them fails: all end, and process 0 prints why in one sentence.

The first process that fails stores its reason with JAX's coordinator. A thread in each of the others waits for that,
since their main threads may be waiting for a result that never comes. A process that is killed or suspended stores
none: process 0 notices it by its connection (`links`), long before JAX does, and stores a reason for it. If that
process is process 0, there is no coordinator to store a reason with, and the others end by themselves.
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

_REASON = "gemma2_jax/ended"  # the reason's key in the coordinator's store
_DONE = "done"  # stored instead if the job ends normally
_GRACE = 0.5  # seconds in which a process can still fail by itself, as all may at once
_UNWIND = 10.0  # seconds to close files
_NOTICE = 2.0  # seconds in which process 0 is sure to report a lost process
_POLL_MS = 600_000


@dataclass(frozen=True)
class _Reason:
    """Why the job ends.

    Attributes:
        process: number of the process that failed first, or that reports lost ones.
        code: exit code of all processes.
        message: a sentence, perhaps empty.
        gone: processes that cannot be waited for, because they are killed or suspended.
    """

    process: int
    code: int
    message: str
    gone: Sequence[int] = ()


class _Watch:
    """The connections to the other processes, and whether this process is ending, perhaps because another one has.

    Attributes:
        another_ended: set when another process has stored its reason.
        interrupted: whether this process was interrupted because of that.
    """

    def __init__(self, client: Any, process: int, count: int, links: Mapping[int, socket.socket]) -> None:
        self.client, self.process, self.count, self.links = client, process, count, LiveLinks(links)
        self.leaving = threading.Event()
        self.another_ended = threading.Event()
        self.interrupted = False
        self.thread = threading.Thread(target=_wait, args=(self,), daemon=True, name="other processes")


_watch: _Watch | None = None


def watch(client: Any, process: int, count: int, links: Mapping[int, socket.socket]) -> None:
    """From now on, this process ends when another one has failed or is lost.

    Args:
        client: connection to JAX's coordinator.
        process: number of this process.
        count: number of processes.
        links: connections that close with the process at their other end: in process 0 to all others, in the others to
            process 0.
    """
    global _watch
    _watch = _Watch(client, process, count, links)
    _watch.thread.start()
    stops.set_exit_hook(leave)
    threading.Thread(
        target=_follow_links, args=(_watch,), daemon=True, name="links to other processes"
    ).start()


def is_watched() -> bool:
    """Whether other processes wait for this one."""
    return _watch is not None and not _watch.leaving.is_set()


def follows_another() -> bool:
    """Whether another process's end caused the failure of this one; waits a moment for that to be known."""
    return _watch is not None and _watch.another_ended.wait(_NOTICE)


def leave(code: int, message: str | None) -> None:
    """Ends this process's part in its job; returns if it is alone, or has finished its work.

    Args:
        code: the exit code; if it is not 0, all processes end, with the code of the first that failed.
        message: the reason, for process 0 to print.
    """
    if _watch is None or _watch.leaving.is_set():
        return
    if code == 0:
        _finish(_watch)
        return
    _watch.leaving.set()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end(_watch, _Reason(_watch.process, code, "" if message is None or _watch.interrupted else message))


def _finish(watch: _Watch) -> None:
    """Waits until all processes are done, since the coordinator ends with process 0."""
    watch.client.wait_at_barrier("gemma2_jax/done", 24 * 3600 * 1000)
    watch.leaving.set()
    watch.links.send_farewell()
    # A thread that still waits in C++ when Python exits would abort the process.
    if watch.process == 0:
        watch.client.key_value_set(_REASON, _DONE)
    watch.thread.join(_UNWIND)


def _end(watch: _Watch, own: _Reason) -> None:
    code = own.code
    try:
        first = _publish(watch, own)
        code = first.code
        if watch.process == 0 and first.message:
            print(_sentence(first, own), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        # Process 0 last, since the others' connection ends with it.
        left = [number for number in range(watch.count) if number not in first.gone]
        with suppress(Exception):  # some are gone already
            watch.client.wait_at_barrier("gemma2_jax/ending", int(2 * _UNWIND * 1000), left)
        watch.links.send_farewell()
        if watch.process == 0:
            time.sleep(_GRACE)
    finally:
        os._exit(code)


def _publish(watch: _Watch, own: _Reason) -> _Reason:
    """Stores the reason, unless another process was first; returns the reason of the first."""
    try:
        watch.client.key_value_set(_REASON, json.dumps(asdict(own)))
    except Exception:  # there is one already, or the coordinator is gone
        with suppress(Exception):
            return _Reason(**json.loads(watch.client.blocking_key_value_get(_REASON, 10_000)))
    return own


def _sentence(first: _Reason, own: _Reason) -> str:
    """What process 0 prints. A message that all processes share is not attributed to the fastest of them."""
    if first.process == 0 or first.message == own.message:
        return first.message
    return first.message.replace("gemma2: ", f"gemma2: process {first.process}: ", 1)


def _wait(watch: _Watch) -> None:
    """Ends this process after the first process that stores a reason."""
    while not watch.leaving.is_set():
        try:
            if watch.client.blocking_key_value_get(_REASON, _POLL_MS) == _DONE:
                return
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                continue
            return  # the connection is closed, so the job is ending
        watch.another_ended.set()
        if not watch.leaving.wait(_GRACE):
            watch.interrupted = True
            stops.stop_deferring()
            # A script's background processes ignore SIGINT; the command line handles SIGTERM in the same way.
            ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
            _thread.interrupt_main(signal.SIGTERM if ignored else signal.SIGINT)
        if not watch.leaving.wait(_UNWIND):
            watch.leaving.set()
            _end(watch, _Reason(watch.process, 1, ""))
        return


def _follow_links(watch: _Watch) -> None:
    """Ends the job when processes are lost: by a reason that all follow, or at once if there is no coordinator."""
    for lost in watch.links.lost():
        message = f"gemma2: {lost}"
        if watch.process == 0:
            _publish(watch, _Reason(0, 1, message, lost.numbers))  # which this process follows, as all do
        elif not watch.leaving.is_set():
            if watch.process == 1:  # one of them is enough
                print(message, file=sys.stderr, flush=True)
            os._exit(1)
