"""Tokens per second and model-FLOP utilisation, timed up to the moment the devices have finished."""

import time

import jax
import jax.numpy as jnp

from gemma2_jax.chips import chip_of_kind


def peak_flops(device: jax.Device) -> float | None:
    """Peak FLOPs per second of one device: the data sheet's, a measurement on CPU, None if unknown."""
    if device.platform == "cpu":
        # All CPU devices of a process share its cores, so each has its share of what they reach together.
        return measure_matmul_flops() / jax.local_device_count()
    chip = chip_of_kind(device.device_kind)
    return None if chip is None else chip.peak_flops


def measure_matmul_flops(size: int = 1024, repetitions: int = 5) -> float:
    """FLOPs per second of a float32 matrix product on this process's default device: the best of a few."""
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
    """Time spent in training steps: started and stopped around them, so that evaluation does not count.

    Args:
        elapsed: seconds to begin with.
    """

    def __init__(self, elapsed: float = 0.0) -> None:
        self._elapsed = elapsed
        self._started: float | None = None

    def start(self) -> None:
        """Starts it, or leaves it running: steps are dispatched ahead, so many of them pass before a stop."""
        if self._started is None:
            self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self._elapsed += time.perf_counter() - self._started
            self._started = None

    def take(self) -> float:
        """Seconds since the last `take`, less the time it stood; it must be stopped."""
        elapsed, self._elapsed = self._elapsed, 0.0
        return elapsed
