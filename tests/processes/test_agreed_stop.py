"""All processes stop at the same question, whichever of them a signal comes to."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from gemma2_jax import stops
from gemma2_jax.processes.agreed_stop import AgreedStop

COUNT = 3
own = threading.local()  # of a thread that stands for a process: its number and its signal


@pytest.fixture(autouse=True)
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier, values = threading.Barrier(COUNT), [0] * COUNT

    def all_gathered(value: np.int32) -> np.ndarray:
        values[own.process] = int(value)
        barrier.wait(60)
        found = np.array(values, np.int32)
        barrier.wait(60)
        return found

    monkeypatch.setattr(jax, "process_count", lambda: COUNT)
    monkeypatch.setattr(multihost_utils, "process_allgather", all_gathered)
    monkeypatch.setattr(stops, "number", lambda: own.signal)
    monkeypatch.setattr(stops, "request", lambda number: setattr(own, "signal", own.signal or number))


def run(process: int, comes_at: int) -> tuple[int, int | None]:
    """The question at which a process stops, and the signal that it stops by; one comes before question `comes_at`."""
    own.process, own.signal = process, None
    stop = AgreedStop()
    for question in range(1, 10):
        if question == comes_at:
            own.signal = 15
        if stop.is_due():
            return question, own.signal
    return 10, None


@pytest.mark.parametrize(
    ("come_at", "expected"),
    [((2, 99, 99), (2, 15)), ((99, 5, 3), (3, 15)), ((1, 1, 1), (1, 15)), ((99, 99, 99), (10, None))],
)
def test_all_stop_at_the_same_question(come_at: tuple[int, ...], expected: tuple[int, int | None]) -> None:
    with ThreadPoolExecutor(COUNT) as pool:
        assert list(pool.map(run, range(COUNT), come_at)) == [expected] * COUNT
