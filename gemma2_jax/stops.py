"""How a process ends when a signal asks it to: soon, with exit code 128 + N, and never by a crash.

    with handled():                   # the command line
        with resuming(sentence):      # what the last message promises
            with cleanup(remove):     # a `finally` that also holds where a thread ends the process
                ...
            with deferred(seconds):   # a loop that asks `requested()` between its steps
                ...

The first SIGINT, SIGTERM or SIGHUP raises `Stopped` in the main thread; within `deferred` it is only noted. A thread
ends the process where that does not suffice: C++ code (XLA's compiler, SentencePiece) does not return, a library has
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
_ONE = 0.25  # seconds within which several signals count as one: `timeout` and a closing terminal send two
_REACTION = 1.0  # seconds in which Python code notices a signal
_UNWIND = 30.0  # seconds to close files in, and to wait for a training that was launched here
_BETWEEN_LOOKS = 0.05  # seconds


class Stopped(KeyboardInterrupt):
    """A signal asks the process to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Handling:
    """The state of one `handled()`: written by the main thread and by the thread that watches it.

    Attributes:
        number: of the first signal; None before it.
        last: when a deferred stop must be over, in seconds of the monotonic clock; None outside `deferred`.
        raised: when `Stopped` was raised, by the same clock.
        lost: it was raised where Python cannot pass it on, as in a destructor.
        taken: the watching thread ends the process, so the main thread must do nothing more.
        urgent: a stop is not deferred any more.
    """

    def __init__(self, numbers: list[signal.Signals]) -> None:
        self.numbers = numbers
        self.number: int | None = None
        self.grace: float | None = None
        self.say: Callable[[str], None] = lambda line: None
        self.raised: float | None = None
        self.lost = self.taken = self.urgent = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="signals")

    def __enter__(self) -> "_Handling":
        self._usual = {number: signal.signal(number, self._handle) for number in self.numbers}
        # Python's handlers wait for the main thread; the bytes that C writes here do not.
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
                self.say(
                    f"stopping after this step, within {self.grace:g} s (checkpoint.grace_seconds); "
                    "a second signal stops at once"
                )
        while True:
            number = self._next(_BETWEEN_LOOKS)
            if number == 0:
                return
            if number is not None and not self.urgent and time.monotonic() - begun > _ONE:
                _show_cursor()
                os._exit(128 + number)
            if time.monotonic() > self._deadline(begun):
                self.taken = True
                if time.monotonic() > self._deadline(begun):  # the main thread has not woken up just now
                    self._end()
                self.taken = False

    def _deadline(self, begun: float) -> float:
        if self.urgent:
            return math.inf  # who has asked for hurry sees to it
        if self.lost:
            return begun
        if self.raised is not None:
            return self.raised + _UNWIND
        return begun + (_REACTION if self.grace is None else self.grace)

    def _next(self, seconds: float | None) -> int | None:
        """The next signal; None if there is none for so long, 0 at the end."""
        self._reader.settimeout(seconds)
        while True:
            try:
                received = self._reader.recv(1)
            except TimeoutError:
                return None
            if not received or received[0] in self.numbers:
                return received[0] if received else 0

    def _end(self) -> NoReturn:
        """Ends the process in the place of the main thread, which does not react."""
        assert self.number is not None
        told = message(None)
        for clean in reversed(_cleanups):
            with suppress(Exception):
                clean()
        _show_cursor()
        for leave in _leave:
            leave(128 + self.number, told)
        leave_at_once(128 + self.number, told)


_handling: _Handling | None = None
_sentences: list[Callable[[], str]] = []
_cleanups: list[Callable[[], None]] = []
_leave: list[Callable[[int, str], None]] = []


@contextmanager
def handled() -> Iterator[None]:
    """Takes the signals, but for those that are ignored (nohup) or somebody else's, and outside the main thread."""
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
    """Whether a signal has asked the process to end."""
    return number() is not None


def number() -> int | None:
    """The signal that has asked the process to end, if one has."""
    return None if _handling is None else _handling.number


def check() -> None:
    """Raises `Stopped` if a signal has asked for it: for who has caught an exception that may have come of that."""
    if _handling is not None and _handling.number is not None:
        _handling.stop()


@contextmanager
def deferred(seconds: float, say: Callable[[str], None]) -> Iterator[None]:
    """Within, a signal is only noted, for a loop that asks `requested()`; raises `Stopped` at the end if there was one.

    Args:
        seconds: after a signal, after which the process ends nevertheless.
        say: shows the user a line when there is a signal.
    """
    check()
    if _handling is None:
        yield
        return
    handling = _handling
    handling.grace, handling.say = seconds, say
    try:
        yield
        check()
    finally:
        if requested() and handling.raised is None:
            handling.raised = time.monotonic()
        handling.grace = None


@contextmanager
def handled_elsewhere(number: signal.Signals) -> Iterator[None]:
    """Within, a signal belongs to the handler that the caller sets for it, and stops nothing."""
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
    """What `message` promises of a stop within, unless there is another `resuming` further inside.

    Args:
        sentence: gives it, without a full stop; empty if there is nothing to promise.
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
    """The last line of a process that was stopped.

    Args:
        error: by which the stop has left every `resuming`; None if it has not, and the innermost holds.
    """
    sentence = _sentence() if error is None else getattr(error, "resuming", "")
    return f"\ngemma2: stopped{'; ' if sentence else ''}{sentence}."


@contextmanager
def cleanup(callback: Callable[[], None]) -> Iterator[None]:
    """Calls `callback` at the end, however the block or the process ends (but for SIGKILL and a second signal)."""
    _cleanups.append(callback)
    try:
        yield
    finally:
        _cleanups.remove(callback)
        callback()


def hurry() -> None:
    """From now on no stop is deferred, since another process that this one would have to wait for is gone."""
    if _handling is not None:
        _handling.urgent = True


def request(number: int) -> None:
    """Notes a stop as if the signal had come to this process: it came to another one, with which this one stops."""
    if _handling is not None and _handling.number is None:
        _handling.number = number


def leave_by(leave: Callable[[int, str], None]) -> None:
    """For a process that others wait for: `leave` ends it with an exit code and a message, from any thread."""
    _leave[:] = [leave]


def leave_at_once(code: int, told: str | None = None) -> NoReturn:
    """Ends the process, without Python's own end, which crashes while XLA's threads are at work."""
    if told is not None:
        with suppress(OSError):
            print(told, file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _sentence() -> str:
    with suppress(Exception):  # what it is read from may be half there
        return _sentences[-1]() if _sentences else ""
    return ""


def _show_cursor() -> None:
    """A progress bar hides it until it is closed."""
    with suppress(OSError, ValueError):
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), b"\x1b[?25h")
