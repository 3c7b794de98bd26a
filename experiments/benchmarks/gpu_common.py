"""What the parts of `gpu.py` share: sizes, rows, clocks."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from gemma2_jax.chips import chip_of_kind
from gemma2_jax.cli.compose import compose
from gemma2_jax.messages import one_line
from gemma2_jax.run import RunConfig

OURS, THEIRS = "gemma2_jax", "transformers"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """What is measured.

    Attributes:
        student, teacher: names of models. The student is what `train` trains and `decode` runs.
        length: tokens of a training step, in one sequence.
        prompt, new_tokens: tokens of prefill, and of decoding after it.
        kernel_length, window: tokens of each row in `kernels`, and the window of local attention.
        steps: timed repetitions.
    """

    student: str
    teacher: str
    overrides: tuple[str, ...]
    length: int
    prompt: int
    new_tokens: int
    kernel_length: int
    window: int
    steps: int


SIZES = {
    "2b": Size("gemma2_2b", "gemma2_9b", (), 8192, 1024, 64, 1024, 256, 5),
    "toy": Size("toy", "toy", ("tokenizer.vocab_size=512",), 32, 16, 4, 160, 100, 1),
}

# Relative errors, norm of the difference / norm of the reference. float32 sums of up to 10^5 products differ by their
# order; bfloat16 rounds to 8 bits, 0.4 %, several times one after another.
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}


class Report:
    """Writes rows to the file of the part."""

    def __init__(self, path: str, machine: Figures) -> None:
        self._path = path
        self._write({"machine": machine})

    def attempt(self, name: str, engine: str, measure: Callable[[], list[Figures]]) -> None:
        """Writes the rows of a measurement, which may have names of their own; or, if it fails, the reason."""
        try:
            for figures in measure():
                self._write({"name": name, "engine": engine, **figures})
        except Exception as error:  # whatever it is, the other measurements are worth having
            self._write(
                {"name": f"{name}, {engine}", "failure": f"{type(error).__name__}: {one_line(error)}"}
            )

    def _write(self, row: Figures) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps(row) + "\n")


def seconds_of(call: Callable[[], Any], wait: Callable[[Any], Any] = jax.block_until_ready) -> float:
    start = time.perf_counter()
    wait(call())
    return time.perf_counter() - start


def timed(
    call: Callable[[], Any], repetitions: int, wait: Callable[[Any], Any] = jax.block_until_ready
) -> tuple[float, float]:
    """Returns the median seconds of a call, and how much longer the first, untimed one took."""
    first = seconds_of(call, wait)
    median = statistics.median(seconds_of(call, wait) for _ in range(repetitions))
    return median, first - median


def speed(
    tokens: int, seconds: float, share: float | None, peak: int | None, compile_seconds: float | None
) -> Figures:
    return {
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "share": share,
        "peak_bytes": peak,
        "planned_bytes": None,
        "compile_seconds": compile_seconds,
    }


def share_of_flops(flops: float, seconds: float, kind: str) -> float | None:
    """Share of the peak FLOPs of a device of this kind; None if its peak is unknown."""
    chip = chip_of_kind(kind)
    return None if chip is None else flops / seconds / chip.peak_flops


def peak_bytes() -> int | None:
    """Most bytes that JAX has allocated on the device; None on a CPU, which does not count them."""
    found = jax.devices()[0].memory_stats()
    return None if found is None else found["peak_bytes_in_use"]


def run_config(size: Size, *overrides: str) -> RunConfig:
    settings = ("compute=bfloat16", "data=files", "data.source=none", "training=long", "mesh=data")
    data = (f"data.seq_len={size.length}", "data.batch_size=1")
    return compose([f"model={size.student}", *size.overrides, *settings, *data, *overrides])
