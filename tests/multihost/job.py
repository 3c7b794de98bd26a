"""Real processes on this machine's CPU that form one job."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GEMMA2 = ["-m", "gemma2_jax.cli.main"]
_SECONDS = 240  # after which something hangs


@dataclass(frozen=True)
class Ended:
    """A process that has ended. `errors` leaves out log lines of the library below JAX's CPU collectives."""

    code: int
    output: str
    errors: str


def environment(devices: int) -> dict[str, str]:
    """Of a process with `devices` CPU devices; the compile cache is that of all tests (tests/conftest.py)."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0",
    }


def run_job(
    commands: Sequence[Sequence[str]],
    devices: int = 1,
    folders: Sequence[Path] | None = None,
    frozen: int | None = None,
) -> list[Ended]:
    """Runs `python COMMAND` for each process, with the address of the others, and waits for all.

    Args:
        folders: that they are started in, one for each.
        frozen: one that does not end by itself.
    """
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, *command, *hosts(port, len(commands), number)],
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=None if folders is None else folders[number],
        )
        for number, command in enumerate(commands)
    ]
    try:
        outputs = {
            number: process.communicate(timeout=_SECONDS)
            for number, process in enumerate(running)
            if number != frozen
        }
        if frozen is not None:
            running[frozen].kill()
            outputs[frozen] = running[frozen].communicate()
    finally:
        for process in running:
            process.kill()
    return [Ended(process.returncode, *map(_own, outputs[number])) for number, process in enumerate(running)]


def hosts(port: int, count: int, number: int) -> list[str]:
    return [
        f"hosts.coordinator=127.0.0.1:{port}",
        f"hosts.num_processes={count}",
        f"hosts.process_id={number}",
        "hosts.timeout=60",
    ]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def _own(text: str) -> str:
    return "".join(line + "\n" for line in text.splitlines() if not line.startswith("[Gloo]"))
