"""Peak FLOPs of a device and time spent in steps, for tokens per second and model FLOPs utilisation (MFU)."""

import time

import jax
import jax.numpy as jnp

from gemma2_jax.chips import chip_of_kind


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOPs per second of one device: from its data sheet, measured on CPU, None if unknown."""
    if device.platform == "cpu":
        # All CPU devices of a process share its cores, and so their peak.
        return measure_matmul_flops() / jax.local_device_count()
    chip = chip_of_kind(device.device_kind)
    return None if chip is None else chip.peak_flops


def measure_matmul_flops(size: int = 1024, repetitions: int = 5) -> float:
    """FLOPs per second of a float32 matrix product on the default device: the best of `repetitions`."""
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(lambda x: x @ x)
    multiply(x).block_until_ready()
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best


class Stopwatch:
    """Measures the time spent in training steps. It is stopped outside of steps, so that evaluation does not count.

    Args:
        elapsed: initial time in seconds.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        self._elapsed = elapsed
        self._started: float | None = None

    def start(self) -> None:
        """Starts it unless it is running: steps are dispatched ahead, so many of them may start before one stop."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self._elapsed += time.perf_counter() - self._started
            self._started = None

    def take(self) -> float:
        """Returns the seconds that it has run since the last `take`. It must be stopped."""
        elapsed, self._elapsed = self._elapsed, 0.0
        return elapsed
