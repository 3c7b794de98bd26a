"""States of runs in progress."""

import os
from pathlib import Path

import pytest

from gemma2_jax.files import is_locked, locked
from gemma2_jax.reports.run_progress import progress_of
from tests.reports.conftest import WriteRun

LAST = 1_000_000.0  # when the last row was written, in seconds since the epoch


@pytest.fixture
def folder(write_run: WriteRun) -> Path:
    """A run that is at step 20 of 40, with 2 s a step and a row every 10 steps."""
    path = write_run("run", steps=20)
    os.utime(path / "metrics.jsonl", (LAST, LAST))
    return path


def test_a_run_in_progress(folder: Path) -> None:
    with locked(folder, wait=False):
        found = progress_of(folder, LAST + 5)
    assert (found.state, found.step, found.steps) == ("running", 20, 40)
    assert [found.loss, found.validation] == pytest.approx([4.0, 4.0])
    assert (found.tokens_per_second, found.left, found.silence) == (64.0, 40.0, 5.0)


@pytest.mark.parametrize(
    ("held", "silence", "state"),
    [
        (True, 299.0, "running"),
        (True, 301.0, "stalled"),
        (False, 39.0, "running"),  # perhaps on another host
        (False, 41.0, "stopped"),
    ],
)
def test_a_silent_run(folder: Path, held: bool, silence: float, state: str) -> None:
    if held:
        with locked(folder, wait=False):
            assert progress_of(folder, LAST + silence).state == state
    else:
        assert progress_of(folder, LAST + silence).state == state


def test_a_slow_run_stalls_later(folder: Path) -> None:
    rows = (folder / "metrics.jsonl").read_text().replace('"seconds": 20.0', '"seconds": 100.0')
    (folder / "metrics.jsonl").write_text(rows)
    os.utime(folder / "metrics.jsonl", (LAST, LAST))
    with locked(folder, wait=False):
        assert progress_of(folder, LAST + 499).state == "running"
        assert progress_of(folder, LAST + 501).state == "stalled"


def test_runs_that_have_ended_or_not_begun(write_run: WriteRun, folder: Path) -> None:
    assert progress_of(write_run("done")).state == "finished"
    (folder / "error.txt").write_text("ValueError: no")
    assert progress_of(folder, LAST + 100).state == "failed"
    begun = write_run("begun")
    (begun / "metrics.jsonl").unlink()
    assert progress_of(begun).state == "stopped"
    with locked(begun, wait=False):
        found = progress_of(begun)
    assert (found.state, found.step, found.left) == ("starting", 0, None)


def test_damaged_files_end_nothing(folder: Path) -> None:
    (folder / "config.yaml").write_text("a: [")
    (folder / "metrics.jsonl").write_text("{broken\n")
    assert progress_of(folder).steps is None


def test_the_lock_of_a_folder_shows(tmp_path: Path) -> None:
    assert not is_locked(tmp_path)
    with locked(tmp_path / "held", wait=False):
        assert is_locked(tmp_path / "held")
        assert not is_locked(tmp_path)
    assert not is_locked(tmp_path / "held")
