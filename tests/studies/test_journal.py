"""The journal of a sweep: what a killed worker leaves, and who may join."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.studies.journal import JOURNAL, Journal

SWEEP = {"method": "grid", "space": {"seed": [0, 1]}, "trials": None}


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path / "sweep")


def nothing(progress):
    """The check of a sweep all of whose results count."""
    return []


def refused(progress):
    """The check of a worker that is not the first."""
    raise AssertionError


def test_entries_are_read_back(journal):
    with journal.joined(SWEEP, nothing):
        journal.append({"run": "a", "step": 10, "value": 2.0, "seconds": 1.5})
        journal.append({"run": "a", "step": 20, "value": 1.0, "seconds": 2.0})
        journal.append({"run": "b", "failed": "too hot"})
        journal.add_point(0, {"rate": "0.1"})
        journal.add_point(0, {"rate": "0.2"})  # of a worker that drew at the same time
    found = journal.read()
    assert found.values == {"a": {10: 2.0, 20: 1.0}}
    assert found.seconds == {"a": 3.5}
    assert found.failed == {"b": "too hot"}
    assert found.points == {0: {"rate": "0.1"}}


def test_failures_are_tried_again_by_the_next_sweep_and_not_by_a_worker_that_joins(journal):
    with journal.joined(SWEEP, nothing):
        journal.append({"run": "b", "failed": "too hot"})
        with Journal(journal._folder).joined(SWEEP, refused):
            assert journal.read().failed
    with journal.joined(SWEEP, nothing):
        assert not journal.read().failed


def test_no_worker_joins_while_the_first_one_checks_the_runs(journal):
    """What it checks, such as a checkpoint, may be half written by another worker."""
    others = ThreadPoolExecutor(1)
    joining = []

    def join():
        with Journal(journal._folder).joined(SWEEP, refused):
            return journal.read().values

    def check(progress):
        joining.append(others.submit(join))
        with pytest.raises(TimeoutError):
            joining[0].result(timeout=0.2)
        return ["a"]

    with journal.joined(SWEEP, nothing):
        journal.append({"run": "a", "step": 10, "value": 2.0, "seconds": 1.0})
    with journal.joined(SWEEP, check):
        assert joining[0].result(timeout=60) == {}  # the results of "a" are void
    others.shutdown()


def test_a_line_that_a_killed_worker_cut_off_is_replaced(journal):
    with journal.joined(SWEEP, nothing):
        journal.append({"run": "a", "step": 10, "value": 2.0, "seconds": 1.0})
        path = journal._folder / JOURNAL
        with path.open("a") as file:
            file.write('{"run": "b", "st')
        assert journal.read().values == {"a": {10: 2.0}}
        journal.append({"run": "c", "step": 10, "value": 3.0, "seconds": 1.0})
    assert journal.read().values == {"a": {10: 2.0}, "c": {10: 3.0}}
    path.write_text("nonsense\n")
    with pytest.raises(
        UserError, match=r"journal.jsonl is damaged: 'nonsense' is no entry of a sweep's journal; restore"
    ):
        journal.read()


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"method": "random"}, "whose method is grid, but method is now random; give another output="),
        ({"trials": 4}, "whose trials is null, but trials is now 4"),
        ({"space": {"seed": [0, 2]}}, "whose space.seed is [0, 1], but space.seed is now [0, 2]"),
        ({"space": {"rate": [1]}}, "whose space.rate is null, but space.rate is now [1]"),
    ],
)
def test_the_journal_of_another_sweep_is_refused(journal, other, sentence):
    with journal.joined(SWEEP, nothing):
        pass
    with pytest.raises(UserError) as caught, journal.joined({**SWEEP, **other}, nothing):
        pass
    assert str(caught.value).startswith(f"{journal._folder}/{JOURNAL} is the journal of another sweep, ")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "3",
        "[1]",
        '{"point": {}}',
        '{"run": "a", "step": 10, "value": "x", "seconds": 1}',
        '{"run": "a", "step": 10, "value": NaN, "seconds": 1}',
        '{"run": [], "failed": "x"}',
        '{"begins": [1]}',
        '{"missing": {}}',
        "[" * 100_000,
    ],
)
def test_a_line_that_no_worker_writes_is_refused(journal, line):
    with journal.joined(SWEEP, nothing):
        with (journal._folder / JOURNAL).open("a") as file:
            file.write(f"{line}\n")
        with pytest.raises(UserError, match=r"journal.jsonl is damaged: .* is no entry of a sweep's journal"):
            journal.read()


def test_a_grid_may_grow(journal):
    for seeds in ([0, 1], [0, 1, 2]):
        with journal.joined({**SWEEP, "space": {"seed": seeds}}, nothing, may_change=["space"]):
            assert journal.read().failed == {}
    other = {**SWEEP, "space": {"rate": [1]}}
    with (
        pytest.raises(
            UserError, match=r"another sweep, whose space\.rate is null, but space\.rate is now \[1\]"
        ),
        journal.joined(other, nothing, may_change=["space"]),
    ):
        pass


def test_a_claim_ends_with_its_process(journal):
    """Without anything that the process could do about it."""
    with journal.joined(SWEEP, nothing), journal.claim("b") as own:
        assert own
        with journal.claim("b") as again:
            assert not again
    claims = journal._folder / ".claims"
    holding = (
        f"import fcntl, time; f = open({str(claims / 'a')!r}, 'a'); fcntl.flock(f, 2); print(1, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", f"{holding}; time.sleep(600)"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    with journal.claim("a") as own:
        assert not own
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with journal.claim("a") as own:
        assert own
