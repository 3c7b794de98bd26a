"""How a process ends after a stop signal: soon, with exit code 128 + N, and never by a crash.

    with handled():                   # the command line
        with resuming(sentence):      # what the last message adds about resuming
            with cleanup(remove):     # a `finally` that also runs if a thread ends the process
                ...
            with deferred(seconds):   # a loop that checks `requested()` between its steps
                ...

The first SIGINT, SIGTERM or SIGHUP raises `Stopped` in the main thread; inside `deferred` it is only recorded. A thread
ends the process where that is not enough: C++ code (XLA's compiler, SentencePiece) does not return, a library has
swallowed the exception, or the time for a last step is over. A second signal ends the process at once.
"""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SAME_STOP = (
    0.25  # seconds within which several signals count as one: `timeout` and a closing terminal send two
)
_REACTION = 1.0  # seconds within which Python code notices a signal
_UNWIND = 30.0  # seconds to close files, and to wait for a training run that was launched here
_POLL = 0.05  # seconds


class Stopped(KeyboardInterrupt):
    """A signal has arrived that ends the process.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Handling:
    """The state of one `handled()`, written by the main thread and by the thread that watches it.

    Attributes:
        number: number of the first signal; None before it.
        grace: seconds from a signal until a deferred stop is enforced; None outside `deferred`.
        notify: shows the user a line when a stop is deferred.
        raised: when `Stopped` was raised, in seconds of the monotonic clock.
        lost: whether it was raised where Python cannot propagate it, as in a destructor.
        taken: whether the watching thread is ending the process, so that the main thread must do nothing more.
        urgent: whether stops are no longer deferred.
    """

    def __init__(self, numbers: list[signal.Signals]) -> None:
        self.numbers = numbers
        self.number: int | None = None
        self.grace: float | None = None
        self.notify: Callable[[str], None] = lambda line: None
        self.raised: float | None = None
        self.lost = self.taken = self.urgent = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signals")

    def __enter__(self) -> "_Handling":
        self._usual = {number: signal.signal(number, self._handle) for number in self.numbers}
        # Python's handlers run only when the main thread does; C writes these bytes at once.
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._unraisable
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        sys.unraisablehook = self._hook
        signal.set_wakeup_fd(self._wakeup)
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._writer.close()  # which ends the thread
        self._thread.join()
        self._reader.close()

    def stop(self) -> NoReturn:
        """Raises `Stopped` in the main thread."""
        assert self.number is not None
        self.raised = time.monotonic()
        while self.taken:
            time.sleep(1.0)  # until the process is gone
        raise Stopped(self.number)

    def _handle(self, number: int, frame: Any) -> None:
        if self.number is None:
            self.number = number
        if self.raised is None and (self.grace is None or self.urgent):
            self.stop()

    def _unraisable(self, unraisable: Any) -> None:
        if unraisable.exc_type is Stopped:
            self.lost = True
        else:
            self._hook(unraisable)

    def _watch(self) -> None:
        first = self._next(None)
        if first == 0:
            return
        begun = time.monotonic()
        if self.number is None:
            self.number = first
        if self.grace is not None and not self.urgent:
            with suppress(Exception):  # the terminal is gone
                self.notify(
                    f"stopping after this step, within {self.grace:g} s (checkpoint.grace_seconds); "
                    "a second signal stops at once"
                )
        while True:
            number = self._next(_POLL)
            if number == 0:
                return
            if number is not None and not self.urgent and time.monotonic() - begun > _SAME_STOP:
                _show_cursor()
                os._exit(128 + number)
            if time.monotonic() > self._deadline(begun):
                self.taken = True
                if time.monotonic() > self._deadline(begun):  # the main thread has not just woken up
                    self._end()
                self.taken = False

    def _deadline(self, begun: float) -> float:
        if self.urgent:
            return math.inf  # the caller of `stop_deferring` ends the process
        if self.lost:
            return begun
        if self.raised is not None:
            return self.raised + _UNWIND
        return begun + (_REACTION if self.grace is None else self.grace)

    def _next(self, seconds: float | None) -> int | None:
        """The next signal; None if none arrives within `seconds`, 0 once the socket is closed."""
        self._reader.settimeout(seconds)
        while True:
            try:
                received = self._reader.recv(1)
            except TimeoutError:
                return None
            if not received or received[0] in self.numbers:
                return received[0] if received else 0

    def _end(self) -> NoReturn:
        """Ends the process instead of the main thread, which does not react."""
        assert self.number is not None
        text = message(None)
        for clean in reversed(_cleanups):
            with suppress(Exception):
                clean()
        _show_cursor()
        for leave in _exit_hooks:
            leave(128 + self.number, text)
        leave_at_once(128 + self.number, text)


_handling: _Handling | None = None
_sentences: list[Callable[[], str]] = []
_cleanups: list[Callable[[], None]] = []
_exit_hooks: list[Callable[[int, str], None]] = []


@contextmanager
def handled() -> Iterator[None]:
    """Handles the stop signals, except those that are ignored (nohup) or already have a handler.

    Outside the main thread it does nothing.
    """
    global _handling
    numbers = []
    if threading.current_thread() is threading.main_thread() and _handling is None:
        free = (signal.SIG_DFL, signal.default_int_handler)
        numbers = [number for number in _SIGNALS if signal.getsignal(number) in free]
    if not numbers:
        yield
        return
    try:
        with _Handling(numbers) as _handling:
            yield
    finally:
        _handling = None


def requested() -> bool:
    """Whether a stop signal has arrived."""
    return number() is not None


def number() -> int | None:
    """The number of the stop signal that has arrived; None if there is none."""
    return None if _handling is None else _handling.number


def check() -> None:
    """Raises `Stopped` if a stop signal has arrived, for callers that caught an exception which it may have caused."""
    if _handling is not None and _handling.number is not None:
        _handling.stop()


@contextmanager
def deferred(seconds: float, notify: Callable[[str], None]) -> Iterator[None]:
    """Only records a signal, for a loop that checks `requested()`; raises `Stopped` at the end if there was one.

    Args:
        seconds: time after a signal until the process ends anyway.
        notify: shows the user a line when a signal arrives.
    """
    check()
    if _handling is None:
        yield
        return
    handling = _handling
    handling.grace, handling.notify = seconds, notify
    try:
        yield
        check()
    finally:
        if requested() and handling.raised is None:
            handling.raised = time.monotonic()
        handling.grace = None


@contextmanager
def handled_elsewhere(number: signal.Signals) -> Iterator[None]:
    """Leaves a signal to the handler that the caller sets for it: inside, it stops nothing."""
    numbers = [] if _handling is None else _handling.numbers
    if number not in numbers:
        yield
        return
    numbers.remove(number)
    try:
        yield
    finally:
        numbers.append(number)


@contextmanager
def resuming(sentence: Callable[[], str]) -> Iterator[None]:
    """Sets what `message` adds about resuming after a stop inside the block; the innermost `resuming` counts.

    Args:
        sentence: returns the sentence without a full stop; empty for none.
    """
    _sentences.append(sentence)
    try:
        yield
    except BaseException as error:
        if not hasattr(error, "resuming") and (requested() or isinstance(error, KeyboardInterrupt)):
            error.resuming = _sentence()  # type: ignore[attr-defined]
        raise
    finally:
        _sentences.pop()


def message(error: BaseException | None) -> str:
    """The last line that a stopped process prints.

    Args:
        error: the exception by which the stop left every `resuming`; None if it has not left them, and the innermost
            counts.
    """
    sentence = _sentence() if error is None else getattr(error, "resuming", "")
    return f"\ngemma2: stopped{'; ' if sentence else ''}{sentence}."


@contextmanager
def cleanup(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` at the end of the block or of the process (except after SIGKILL or a second signal)."""
    _cleanups.append(callback)
    try:
        yield
    finally:
        _cleanups.remove(callback)
        callback()


def stop_deferring() -> None:
    """Defers no stop from now on, since another process that this one would wait for has ended."""
    if _handling is not None:
        _handling.urgent = True


def request(number: int) -> None:
    """Records a stop as if the signal had come to this process; it came to another process of the same job."""
    if _handling is not None and _handling.number is None:
        _handling.number = number


def set_exit_hook(leave: Callable[[int, str], None]) -> None:
    """Makes `leave` end the process when a thread must, for a process that others wait for.

    Args:
        leave: called with an exit code and a message, from any thread.
    """
    _exit_hooks[:] = [leave]


def leave_at_once(code: int, text: str | None = None) -> NoReturn:
    """Ends the process without Python's own shutdown, which crashes while XLA's threads are running."""
    if text is not None:
        with suppress(OSError):
            print(text, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _sentence() -> str:
    with suppress(Exception):  # the files that it describes may be incomplete
        return _sentences[-1]() if _sentences else ""
    return ""


def _show_cursor() -> None:
    """Shows the cursor again, which a progress bar hides until it is closed."""
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h")
