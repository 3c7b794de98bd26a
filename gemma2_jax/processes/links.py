"""The connections between process 0 and the others while a job runs: which processes run, are gone, or are silent.

Each side sends a byte now and then. A connection that closes without a farewell means that its process is gone. One
that stays silent means that its process no longer runs although its host keeps the connection: the process is
suspended, or the host hangs. JAX would notice either later, and abort with a stack trace.
"""

import selectors
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

SILENCE = 120.0  # seconds; longer than anything that blocks the threads of a process
JAX_SILENCE = 600  # seconds after which JAX itself aborts a job, without our message
_BEAT, _FAREWELL = b"h", b"."
_BETWEEN_BEATS = 1.0  # seconds
_TOGETHER = 0.2  # seconds in which all processes of a host that goes down are gone


@dataclass(frozen=True)
class Lost:
    """Processes that no longer take part.

    Attributes:
        numbers: numbers of the processes, in rising order.
        gone: whether their connections have closed; otherwise they are silent.
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
    """Connections by the number of the process at their other end.

    Process 0 has one to each of the others, and these have one to it.
    """

    def __init__(self, connections: Mapping[int, socket.socket]) -> None:
        self._connections = dict(connections)
        self._silent = dict.fromkeys(self._connections, 0.0)  # seconds
        self._leaving = threading.Event()
        for connection in self._connections.values():
            connection.setblocking(False)
        threading.Thread(target=self._beat, daemon=True, name="heartbeat").start()

    def send_farewell(self) -> None:
        """Sends a farewell to the other ends: this process ends normally."""
        self._leaving.set()
        self._send(_FAREWELL)

    def lost(self) -> Iterator[Lost]:
        """Waits and yields lost processes, until no process is left that could be lost."""
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, number)
            while self._silent:
                self._wait(selector)
                ended = self._receive(selector)
                if ended:
                    time.sleep(_TOGETHER)
                    yield Lost(sorted(ended + self._receive(selector)), gone=True)
                silent = [number for number, seconds in self._silent.items() if seconds > SILENCE]
                for number in silent:
                    self._drop(selector, number)
                if silent:
                    yield Lost(sorted(silent), gone=False)

    def _wait(self, selector: selectors.BaseSelector) -> None:
        """Returns when there is something to receive, or after a while."""
        begun = time.monotonic()
        selector.select(_BETWEEN_BEATS)
        # Time in which this process itself was suspended, as a whole job can be, does not count as silence of others.
        passed = min(time.monotonic() - begun, 2 * _BETWEEN_BEATS)
        for number in self._silent:
            self._silent[number] += passed

    def _receive(self, selector: selectors.BaseSelector) -> list[int]:
        """Receives what has arrived; returns the processes whose connections have closed without a farewell."""
        ended = []
        for key, _ in selector.select(0):
            try:
                received = self._connections[key.data].recv(4096)
            except OSError:
                received = b""
            self._silent[key.data] = 0.0
            if not received or _FAREWELL in received:
                self._drop(selector, key.data)
            if not received:
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
            with suppress(OSError):  # gone, or silent for so long that the send buffer is full
                connection.send(byte)
