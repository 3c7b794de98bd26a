"""The connections between process 0 and the others while a job runs: who is alive, who is gone, who is silent.

Each side sends a byte now and then. A connection that ends without a farewell tells of a process that is gone, one that
stays silent of a process that runs no more although its host keeps the connection: suspended, or its host hangs. JAX
would notice either later, and abort with a stack trace.
"""

import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

SILENCE = 120.0  # seconds; longer than anything that keeps the threads of a process from running
JAX_SILENCE = 600  # after which JAX aborts a job itself, which would be without a word of ours
_BEAT, _FAREWELL = b"h", b"."
_BETWEEN_BEATS = 1.0  # seconds
_TOGETHER = 0.2  # seconds in which processes of one host that goes down are gone


@dataclass(frozen=True)
class Lost:
    """Processes that no longer take part.

    Attributes:
        numbers: of the processes, in rising order.
        gone: whether their connections have ended; else they are silent.
    """

    numbers: list[int]
    gone: bool

    def __str__(self) -> str:
        several = len(self.numbers) > 1
        who = f"process{'es' if several else ''} {', '.join(map(str, self.numbers))}"
        if self.gone:
            return f"{who} {'are' if several else 'is'} gone: killed, or the host is down."
        return (
            f"{who} {'have' if several else 'has'} not answered for {SILENCE:.0f} s: suspended (SIGSTOP), or the host "
            "hangs."
        )


class LiveLinks:
    """Connections by the number of the process at their other side: process 0 has one to each, the others one to it."""

    def __init__(self, connections: Mapping[int, socket.socket]) -> None:
        self._connections = dict(connections)
        self._silent = dict.fromkeys(self._connections, 0.0)  # seconds
        self._leaving = threading.Event()
        for connection in self._connections.values():
            connection.setblocking(False)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def say_farewell(self) -> None:
        """Tells the other sides that this process ends as it should."""
        self._leaving.set()
        self._send(_FAREWELL)

    def lost(self) -> Iterator[Lost]:
        """Waits, and yields processes that are lost, until all have gone in one way or another."""
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, number)
            while self._silent:
                self._wait(selector)
                ended = self._hear(selector)
                if ended:
                    time.sleep(_TOGETHER)
                    yield Lost(sorted(ended + self._hear(selector)), gone=True)
                silent = [number for number, seconds in self._silent.items() if seconds > SILENCE]
                for number in silent:
                    self._drop(selector, number)
                if silent:
                    yield Lost(sorted(silent), gone=False)

    def _wait(self, selector: selectors.BaseSelector) -> None:
        """Returns when there is something to hear, or after a while."""
        begun = time.monotonic()
        selector.select(_BETWEEN_BEATS)
        # Time in which this process was suspended itself, as a whole job can be, counts for no other's silence.
        passed = min(time.monotonic() - begun, 2 * _BETWEEN_BEATS)
        for number in self._silent:
            self._silent[number] += passed

    def _hear(self, selector: selectors.BaseSelector) -> list[int]:
        """Takes what has come; returns the processes whose connections have ended without a farewell."""
        ended = []
        for key, _ in selector.select(0):
            try:
                heard = self._connections[key.data].recv(4096)
            except OSError:
                heard = b""
            self._silent[key.data] = 0.0
            if not heard or _FAREWELL in heard:
                self._drop(selector, key.data)
            if not heard:
                ended.append(key.data)
        return ended

    def _drop(self, selector: selectors.BaseSelector, number: int) -> None:
        selector.unregister(self._connections[number])
        del self._silent[number]

    def _beat(self) -> None:
        while not self._leaving.wait(_BETWEEN_BEATS):
            self._send(_BEAT)

    def _send(self, byte: bytes) -> None:
        for connection in self._connections.values():
            with suppress(OSError):  # gone, or so long silent that nothing more can be sent
                connection.send(byte)
