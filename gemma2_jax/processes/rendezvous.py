"""The rendezvous of a job's processes before JAX connects them, so that a missing or wrong one gives a clear message.

JAX itself would abort the process with a stack trace. Process 0 accepts connections at the address of JAX's later
coordinator. Every other process sends it one line of JSON and receives one: an error message, or null once all have
connected. The connections stay open: when one closes later, its process has ended.
"""

import json
import socket
import sys
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack, suppress
from typing import Any

from gemma2_jax.config import UserError

_GREETING = "gemma2_jax"  # other connections are not from processes of ours
_LINE_SECONDS = 10  # time limit for a connection's one line
_BETWEEN_TRIES = 0.2  # seconds
_QUIET_SECONDS = 10  # after which process 0 prints which processes it waits for
_KEEPALIVE = {
    "TCP_KEEPIDLE": 30,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 3,
}  # a dead host closes no connections; this notices it within a minute

Links = dict[int, socket.socket]  # connections by process number


def meet(
    coordinator: str,
    num_processes: int,
    process_id: int,
    timeout: float,
    count_source: str = "hosts.num_processes",
) -> Links:
    """Waits until all processes have connected, and returns this process's links.

    Process 0 has a link to each of the others; these have one to process 0.

    Args:
        coordinator: HOST:PORT of process 0.
        timeout: seconds to wait for the others.
        count_source: the setting or launcher that gives the number of processes.

    Raises:
        UserError: not all connect in time, two have the same number, or they disagree on the number of processes.
    """
    host, port = split_address(coordinator)
    if process_id == 0:
        return _gather(port, num_processes, timeout, count_source)
    try:
        return {0: _report(host, port, num_processes, process_id, timeout)}
    except OSError as error:
        reason = error.strerror or str(error)
    raise UserError(
        f"process {process_id} of {num_processes} (set by {count_source}) cannot reach the coordinator, process 0 "
        f"at {host}:{port}, within {timeout:g} s (hosts.timeout): {reason}; to run a single process, set hosts=single."
    )


def split_address(coordinator: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT, an IPv6 host without its brackets."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"hosts.coordinator is {coordinator}; accepted: HOST:PORT, as in 10.0.0.1:8476.")
    return host.strip("[]"), int(port)


def _gather(port: int, num_processes: int, timeout: float, count_source: str) -> Links:
    """The rendezvous in process 0."""
    until = time.monotonic() + timeout
    notice = time.monotonic() + _QUIET_SECONDS
    arrived: Links = {}
    refused = None
    with _listening(port, num_processes) as server:
        while refused is None and len(arrived) < num_processes - 1:
            connection = _next(server, min(notice, until))
            # A process that died while others were missing may have been restarted.
            for number in [number for number, link in arrived.items() if _is_closed(link)]:
                arrived.pop(number).close()
            missing = [str(number) for number in range(1, num_processes) if number not in arrived]
            who = f"process {', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}"
            if connection is not None:
                refused = _enter(connection, num_processes, arrived)
            elif time.monotonic() >= until:
                refused = (
                    f"{len(missing)} of {num_processes} processes (set by {count_source}) did not connect within "
                    f"{timeout:g} s (hosts.timeout): {who}; to run a single process, set hosts=single."
                )
            else:
                notice = until
                print(
                    f"gemma2: waiting for {len(missing)} of {num_processes} processes (set by {count_source}): {who}.",
                    file=sys.stderr,
                )
    for link in arrived.values():
        _answer(link, refused)
    if refused is not None:
        raise UserError(refused)
    return arrived


def _next(server: socket.socket, until: float) -> socket.socket | None:
    """The next connection, or None if there is none until then."""
    server.settimeout(max(until - time.monotonic(), 0.01))
    try:
        return server.accept()[0]
    except TimeoutError:
        return None


def _enter(connection: socket.socket, num_processes: int, arrived: Links) -> str | None:
    """Adds a connection of one of our processes to `arrived`; returns an error message if it is not accepted."""
    line = _read(connection)
    if line.get("greeting") != _GREETING:
        connection.close()
        return None
    refused = _mistake(line, num_processes, arrived)
    if refused is None:
        arrived[line["process"]] = _kept_alive(connection)
    else:
        _answer(connection, refused)
    return refused


def _mistake(line: Mapping[str, int], num_processes: int, arrived: Collection[int]) -> str | None:
    number, expected = line["process"], line["processes"]
    if expected != num_processes:
        return (
            f"hosts.num_processes is {num_processes} in process 0 and {expected} in process {number}; "
            "it must be the same in all of them."
        )
    if number in arrived:
        return f"hosts.process_id is {number} in two processes; each needs a number of its own."
    return None


def _report(host: str, port: int, num_processes: int, process_id: int, timeout: float) -> socket.socket:
    """The rendezvous in the other processes.

    Raises:
        OSError: process 0 does not answer in time.
    """
    until = time.monotonic() + timeout
    greeting = {"greeting": _GREETING, "process": process_id, "processes": num_processes}
    while True:
        left = max(until - time.monotonic(), 0.01)
        try:
            connection = socket.create_connection((host, port), left)
            with ExitStack() as stack:
                stack.callback(connection.close)
                _write(connection, greeting)
                answer = _read(connection, left + _LINE_SECONDS)
                if "refused" not in answer:
                    raise OSError("the program there gives no valid answer")
                if answer["refused"] is not None:
                    raise UserError(answer["refused"])
                stack.pop_all()
                return _kept_alive(connection)
        except OSError:
            if time.monotonic() > until:
                raise
        time.sleep(_BETWEEN_TRIES)


def _listening(port: int, backlog: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} of hosts.coordinator: {error.strerror}; choose another port."
        ) from None


def _kept_alive(connection: socket.socket) -> socket.socket:
    """`connection`, set to close if the other side's host no longer answers."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):  # not on every platform
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return connection


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other side has closed it, as the system does for a process that ends."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _answer(connection: socket.socket, refused: str | None) -> None:
    connection.settimeout(_LINE_SECONDS)
    with suppress(OSError):  # it may be gone by now
        _write(connection, {"refused": refused})
    if refused is not None:
        connection.close()


def _write(connection: socket.socket, values: Mapping[str, object]) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")


def _read(connection: socket.socket, seconds: float = _LINE_SECONDS) -> dict[str, Any]:
    """One line of JSON, as a dict; empty for anything else."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as file:
            values = json.loads(file.readline(4096))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
