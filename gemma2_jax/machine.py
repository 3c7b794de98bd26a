"""The machine that a process runs on: installed packages, memory and cores, and a description for reports."""

import importlib.util
import os
import platform
import resource
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def describe_machine(devices: Sequence[Any]) -> str:
    """Returns one line: processor, cores, memory, JAX's `devices`, Python and JAX versions, operating system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{_processor()}, {cores()} cores, {memory:.0f} GiB; "
        f"{len(devices)} x {devices[0].device_kind}; "
        f"Python {platform.python_version()}, JAX {version('jax')}, {platform.system()}"
    )


def is_installed(module: str) -> bool:
    """Returns whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed either
        return False
    except ValueError:  # it is loaded and has no `__spec__`
        return True


def peak_memory_gib() -> float:
    """Returns the peak memory in GiB of this process or of a finished child process, whichever is larger."""
    # Linux reports kibibytes, macOS bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    processes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in processes) * unit / 2**30


def cores() -> int:
    """The number of cores that this process may use, in a container often fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
