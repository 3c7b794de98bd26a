"""The meeting of a job's processes before JAX connects them, so that who is missing or wrong is told in a sentence.

JAX's own way to say so is to abort the process with a stack trace. Process 0 listens where JAX's coordinator will be;
each of the others sends one line of JSON and is answered with one: what is wrong, or null when all are there.
"""

import json
import socket
import time
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from typing import Any

from gemma2_jax.config import UserError

_GREETING = "gemma2_jax"  # anything else that connects is no process of ours
_LINE_SECONDS = 10  # that a connection may take for its one line
_BETWEEN_TRIES = 0.2  # seconds


def meet(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns in all processes when all are there.

    Args:
        coordinator: HOST:PORT of process 0.
        timeout: seconds to wait for the others.

    Raises:
        UserError: not all came in time, two have one number, or they do not agree on how many there are.
    """
    host, port = split_address(coordinator)
    if process_id == 0:
        _gather(port, num_processes, timeout)
    else:
        _report(host, port, num_processes, process_id, timeout)


def split_address(coordinator: str) -> tuple[str, int]:
    """The host and the port of HOST:PORT, the host of IPv6 without its brackets."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"hosts.coordinator is {coordinator}; accepted: HOST:PORT, as in 10.0.0.1:8476.")
    return host.strip("[]"), int(port)


def _gather(port: int, num_processes: int, timeout: float) -> None:
    """Process 0's side."""
    until = time.monotonic() + timeout
    came: set[int] = set()
    connections: list[socket.socket] = []
    with ExitStack() as stack:
        server = stack.enter_context(_listening(port, num_processes))
        refused = None
        while len(came) < num_processes - 1 and refused is None:
            server.settimeout(max(until - time.monotonic(), 0.01))
            try:
                connection = stack.enter_context(server.accept()[0])
            except TimeoutError:
                missing = [str(number) for number in range(1, num_processes) if number not in came]
                refused = (
                    f"{len(missing)} of {num_processes} processes did not come within {timeout:g} s "
                    f"(hosts.timeout): process {', '.join(missing[:8])}{', …' if len(missing) > 8 else ''}."
                )
                break
            line = _read(connection)
            if line.get("greeting") == _GREETING:
                refused = _mistake(line, num_processes, came)
                came.add(line["process"])
                connections.append(connection)
        for connection in connections:
            _write(connection, {"refused": refused})
        if refused is not None:
            raise UserError(refused)


def _mistake(line: Mapping[str, int], num_processes: int, came: Collection[int]) -> str | None:
    number, expected = line["process"], line["processes"]
    if expected != num_processes:
        return (
            f"hosts.num_processes is {num_processes} in process 0 and {expected} in process {number}; "
            "it must be the same in all of them."
        )
    if number in came:
        return f"hosts.process_id is {number} in two processes; each needs a number of its own."
    return None


def _report(host: str, port: int, num_processes: int, process_id: int, timeout: float) -> None:
    """The side of the others."""
    until = time.monotonic() + timeout
    while True:
        left = until - time.monotonic()
        try:
            with socket.create_connection((host, port), max(left, 0.01)) as connection:
                _write(
                    connection,
                    {"greeting": _GREETING, "process": process_id, "processes": num_processes},
                )
                answer = _read(connection, max(left, 0.01) + _LINE_SECONDS)
            if "refused" in answer:
                break
            reason = "it does not answer as ours does"
        except OSError as error:
            reason = error.strerror or str(error)
        if time.monotonic() > until:
            raise UserError(
                f"process {process_id} cannot reach the coordinator, process 0 at {host}:{port}, within {timeout:g} s "
                f"(hosts.timeout): {reason}."
            )
        time.sleep(_BETWEEN_TRIES)
    if answer["refused"] is not None:
        raise UserError(answer["refused"])


def _listening(port: int, backlog: int) -> socket.socket:
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=backlog, dualstack_ipv6=dual)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} of hosts.coordinator: {error.strerror}; choose another port."
        ) from None


def _write(connection: socket.socket, values: Mapping[str, object]) -> None:
    connection.sendall(json.dumps(values).encode() + b"\n")


def _read(connection: socket.socket, seconds: float = _LINE_SECONDS) -> dict[str, Any]:
    """One line of JSON; empty for anything else."""
    connection.settimeout(seconds)
    try:
        with connection.makefile("rb") as file:
            values = json.loads(file.readline(4096))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
