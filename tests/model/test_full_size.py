"""The true 2B shape in bfloat16 against Hugging Face transformers; about 7 GB of disk, and some minutes.

    pytest -m slow tests/model/test_full_size.py -s

Both sides round to bfloat16 at every step, so they differ, and by how much they may is theirs to say: ours may
be no farther from float32's logits of the same weights than half as much again as theirs.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MEMORY = 16e9  # bytes that no process may go beyond

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
        reason="needs the extra `reference`: pip install -e '.[reference]'",
    ),
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not pytest's own, which stays after the test."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def run(side: str, folder: Path) -> float:
    """Runs one side in a process of its own, on a plain machine's one device; returns its peak memory in bytes."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.model.full_size", side, str(folder)]
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    peak = usage.ru_maxrss * 1024
    print(f"{side}: {time.perf_counter() - start:.0f} s, at most {peak / 1e9:.1f} GB of memory")
    return peak


def test_within_bfloat16_error(folder):
    peaks = [run(side, folder) for side in ("write", "theirs", "ours")]
    assert len(list((folder / "model").glob("*.safetensors"))) > 1
    exact, theirs, ours = (
        np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("exact", "theirs", "ours")
    )
    assert exact.shape == theirs.shape == ours.shape == (512, 256_000)
    spread = rms(exact)
    error = {name: rms(logits - exact) for name, logits in {"theirs": theirs, "ours": ours}.items()}
    best = np.argmax(exact, axis=-1)
    agreement = {
        name: np.mean(np.argmax(logits, axis=-1) == best)
        for name, logits in {"theirs": theirs, "ours": ours}.items()
    }
    print(f"logits of RMS {spread:.3f}; RMS errors {error}; agreement on the best token {agreement}")
    assert 0.5 < spread < 5
    assert error["ours"] <= 1.5 * error["theirs"]
    assert error["theirs"] < 0.05 * spread  # or the bound above says nothing
    assert agreement["ours"] >= agreement["theirs"] - 0.02
    assert max(peaks) < MEMORY


def rms(logits: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(logits), dtype=np.float64)))
