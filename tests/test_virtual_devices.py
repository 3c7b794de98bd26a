"""XLA gets more threads than virtual CPU devices, since collectives that take all of them can wait for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2_jax.virtual_devices import enlarge_thread_pool

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"XLA_FLAGS": f"--xla_backend_optimization_level=0 {EIGHT}"}, "64"),
        ({"JAX_NUM_CPU_DEVICES": "4"}, "32"),
        ({"JAX_NUM_CPU_DEVICES": "-1"}, None),
        ({"XLA_FLAGS": EIGHT, "NPROC": "20"}, "20"),  # the user's own choice
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, None),
        ({}, None),
    ],
)
def test_threads_by_devices(environment: dict[str, str], threads: str | None) -> None:
    enlarge_thread_pool(environment)
    assert environment.get("NPROC") == threads


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads in Linux's /proc")
def test_xla_has_so_many_threads() -> None:
    """Fails if JAX no longer takes the number from NPROC, or if a process does not set it when it imports us."""
    script = (
        "import gemma2_jax, jax, pathlib; jax.numpy.ones(3).sum().block_until_ready()\n"
        "names = [file.read_text().strip() for file in pathlib.Path('/proc/self/task').glob('*/comm')]\n"
        "print(names.count('tf_XLAEigen'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "NPROC"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**environment, "XLA_FLAGS": EIGHT, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert int(ran.stdout) == 64
