"""How real processes end at a signal, with the main thread in every kind of place."""

import signal
import subprocess
import sys
import time

import pytest

from gemma2_jax import stops

BEGIN = """
import hashlib, sys, time
from functools import partial
from pathlib import Path
from gemma2_jax import stops
say = partial(print, flush=True)

def in_c(seconds=100):  # without Python's lock, and without a look at signals
    hashlib.pbkdf2_hmac("sha256", b"", b"", seconds * 10**6)

def run():
    with stops.handled():
        try:
            with stops.resuming(lambda: "it goes on"), stops.cleanup(partial(say, "cleaned")):
                body()
        except BaseException as error:
            stops.leave_at_once(128 + stops.number(), stops.message(error))

"""
GOES_ON = "\ngemma2: stopped; it goes on.\n"


def start(body: str) -> subprocess.Popen[str]:
    """Starts a process that runs `body` within `handled()`; returns once it prints `ready`."""
    indented = body.strip().replace("\n", "\n    ")
    process = subprocess.Popen(
        [sys.executable, "-c", f"{BEGIN}def body():\n    {indented}\n\nrun()\nsay('done')\n"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(process, "ready")
    return process


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n", process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_in_python(number: signal.Signals) -> None:
    process = start("say('ready'); time.sleep(100)")
    process.send_signal(number)
    process.send_signal(number)  # `timeout` sends two at once, which are one
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + number, "cleaned\n", GOES_ON)


def test_in_c() -> None:
    process = start("say('ready'); in_c()")
    time.sleep(0.2)  # most likely it is there by now; it ends in the same way if not
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + signal.SIGTERM, "cleaned\n", GOES_ON)


def test_in_a_destructor() -> None:
    """In a destructor, Python has no caller to raise an exception to."""
    process = start(
        """
class Slow:
    def __del__(self):
        say("ready")
        time.sleep(100)
Slow()
in_c()
"""
    )
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + signal.SIGINT, "cleaned\n", GOES_ON)


def test_swallowed() -> None:
    process = start(
        """
stops._UNWIND = 1.0
try:
    say("ready")
    time.sleep(100)
except BaseException:
    say("swallowed")
in_c()
"""
    )
    process.send_signal(signal.SIGTERM)
    wait_for(process, "swallowed")
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + signal.SIGTERM, "cleaned\n", GOES_ON)


def test_deferred() -> None:
    process = start(
        """
with stops.deferred(100, say):
    say("ready")
    while not stops.requested():
        time.sleep(0.01)
    time.sleep(0.1)
    say("step done")
    say("saved")
"""
    )
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    expected = (
        "stopping after this step, within 100 s (checkpoint.grace_seconds); a second signal stops at once"
    )
    assert sorted(output.splitlines()) == sorted([expected, "step done", "saved", "cleaned"])
    assert (process.returncode, errors) == (128 + signal.SIGTERM, GOES_ON)


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_step_that_takes_too_long(seconds: float) -> None:
    process = start(f"with stops.deferred({seconds}, lambda line: None):\n    say('ready')\n    in_c()")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + signal.SIGTERM, "cleaned\n", GOES_ON)


@pytest.mark.parametrize("place", ["in_c()", "time.sleep(100)"])
def test_a_second_signal_ends_at_once(place: str) -> None:
    process = start(
        f"""
with stops.deferred(100, say):
    say("ready")
    {place}
"""
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline().startswith("stopping after this step")
    while process.poll() is None:  # the first may count as one with those that come right after it
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (128 + signal.SIGINT, "", "")


def test_before_a_loop_that_would_defer_it() -> None:
    """A loop does not begin if an earlier exception was swallowed."""
    with stops.handled():
        with pytest.raises(stops.Stopped):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(stops.Stopped), stops.deferred(100, print):
            pytest.fail("the loop has begun")


def test_the_innermost_promise_holds() -> None:
    outer, inner = stops.resuming(lambda: "outer"), stops.resuming(lambda: "inner")
    with stops.handled(), pytest.raises(stops.Stopped) as caught, outer, inner:
        signal.raise_signal(signal.SIGTERM)
    assert stops.message(caught.value) == "\ngemma2: stopped; inner."


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stops.handled():
            signal.raise_signal(signal.SIGHUP)
            assert not stops.requested()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_without_the_command_line() -> None:
    """In a notebook, Python handles Ctrl-C."""
    with pytest.raises(KeyboardInterrupt), stops.deferred(100, print):
        signal.raise_signal(signal.SIGINT)
    assert not stops.requested()


def test_cleanup_of_a_block_that_ends_by_itself() -> None:
    called: list[int] = []
    with stops.cleanup(lambda: called.append(1)):
        assert called == []
    assert called == [1]


def test_a_signal_that_is_handled_elsewhere_stops_nothing() -> None:
    process = start(
        """
import signal
with stops.handled_elsewhere(signal.SIGINT):
    signal.signal(signal.SIGINT, lambda *_: say("mine"))
    say("ready")
    time.sleep(2 * stops._REACTION + 1)
    say("requested" if stops.requested() else "not requested")
"""
    )
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (0, "mine\nnot requested\ncleaned\ndone\n", "")
