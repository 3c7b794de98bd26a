"""The journal of a sweep: one file, to which all of its workers append what they have done.

    SWEEP/journal.jsonl   what the sweep is, then one line for each drawn trial, measured step and failure
         /.journal        the lock of that file
         /.claims/NAME    the lock of one run, held while a worker trains it
         /.lock           held by all workers together

The locks are `flock`'s, which the kernel releases when a process ends, however it ends. So nothing has to be cleaned up
after a killed worker: what it was training is free again, and resumes from its newest checkpoint. On several hosts, the
folder needs a file system with locks across hosts, such as NFS version 4.
"""

import fcntl
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from gemma2_jax.config import UserError, differences, usable
from gemma2_jax.files import LOCK
from gemma2_jax.messages import written
from gemma2_jax.training.metrics import is_count, is_number

JOURNAL = "journal.jsonl"
_SHOWN = 200  # characters of a damaged line


@dataclass
class SweepProgress:
    """What a journal holds.

    Attributes:
        points: drawn points, by their trials' numbers.
        values: metric by run and step.
        failed: reasons of failures since the first of the present workers began, by run.
        seconds: seconds of training, by run.
    """

    points: dict[int, dict[str, str]] = field(default_factory=dict)
    values: dict[str, dict[int, float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Adds an entry of the journal, which `_is_entry` accepts."""
        if "point" in entry:
            self.points[entry["trial"]] = entry["point"]
        elif "value" in entry:
            self.values.setdefault(entry["run"], {})[entry["step"]] = entry["value"]
            self.seconds[entry["run"]] = self.seconds.get(entry["run"], 0.0) + entry["seconds"]
        elif "failed" in entry:
            self.failed[entry["run"]] = entry["failed"]
        elif "begins" in entry:
            self.failed.clear()
        elif "missing" in entry:
            self.values.pop(entry["missing"], None)


class Journal:
    """The journal in a sweep's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._path = folder, folder / JOURNAL

    @contextmanager
    def joined(
        self,
        identity: Mapping[str, Any],
        check: Callable[[SweepProgress], Iterable[str]],
        may_change: Collection[str] = (),
    ) -> Iterator[None]:
        """Makes this process a worker of the sweep.

        Args:
            identity: what decides which trials the sweep has, as plain values.
            check: returns the names of runs whose results are void. The only worker so far calls it, and others wait
                for it: what it looks at must not be written meanwhile.
            may_change: keys of `identity` that may differ from the journal's.

        Raises:
            UserError: the journal belongs to another sweep, or a study runs in the folder; or as `check`.
        """
        with usable("output", self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            file = (self._folder / LOCK).open("a")
        with file:
            with self._exclusive() as journal:
                first = _lock(file, fcntl.LOCK_EX)
                if not first and not _lock(file, fcntl.LOCK_SH):
                    raise UserError(
                        f"{self._folder} is in use by another command; wait for it, or give another output=."
                    )
                self._check(journal, json.loads(json.dumps(identity)), may_change)
                if first:
                    for name in check(self.read()):
                        _append(journal, {"missing": name})
                    _append(journal, {"begins": identity})
                    _lock(file, fcntl.LOCK_SH)
            yield

    @contextmanager
    def claim(self, name: str, wait: bool = False) -> Iterator[bool]:
        """Holds the claim to a run; yields whether this process got it.

        Args:
            wait: whether to wait for the process that holds it.
        """
        claims = self._folder / ".claims"
        claims.mkdir(exist_ok=True)
        with (claims / name.replace("/", "-")).open("a") as file:
            yield _lock(file, fcntl.LOCK_EX, wait)

    def read(self) -> SweepProgress:
        progress = SweepProgress()
        if self._path.exists():
            with self._path.open("rb") as file:
                for entry in _entries(file):
                    progress.add(entry)
        return progress

    def append(self, entry: Mapping[str, Any]) -> None:
        with self._exclusive() as journal:
            _append(journal, entry)

    def add_point(self, number: int, point: Mapping[str, str]) -> None:
        """Appends the point of a trial, unless another worker has done so."""
        with self._exclusive() as journal:
            if not any(entry.get("trial") == number for entry in _entries(journal)):
                _append(journal, {"trial": number, "point": point})

    @contextmanager
    def _exclusive(self) -> Iterator[IO[bytes]]:
        """Opens the journal, for one process at a time."""
        with (self._folder / ".journal").open("a") as lock:
            _lock(lock, fcntl.LOCK_EX, wait=True)
            with self._path.open("a+b") as journal:
                yield journal

    def _check(self, journal: IO[bytes], identity: Mapping[str, Any], may_change: Collection[str]) -> None:
        saved = next((entry["begins"] for entry in _entries(journal) if "begins" in entry), identity)
        for key, one, other in differences(saved, identity):
            # A grid over the same keys may have other values; one over other keys is another sweep.
            same_keys = not key.startswith("space.") or None not in (one, other)
            if key.split(".")[0] in may_change and same_keys:
                continue
            raise UserError(
                f"{self._path} is the journal of another sweep, whose {key} is {written(one)}, but {key} is now "
                f"{written(other)}; give another output=, or delete {self._folder} to begin again."
            )


def _lock(file: IO[Any], kind: int, wait: bool = False) -> bool:
    """Locks a file; returns False if another process holds its lock."""
    try:
        fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be locked ({error.strerror}); give output= on a file system with locks, such as NFS "
            "version 4."
        ) from None
    return True


def _entries(journal: IO[bytes]) -> Iterator[dict[str, Any]]:
    """The complete lines of a journal; a worker that was killed may have left a part of one at the end."""
    journal.seek(0)
    for line in journal:
        if line.endswith(b"\n"):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if not _is_entry(entry):
                shown = line.decode(errors="replace").strip()[:_SHOWN]
                raise UserError(
                    f"{journal.name} is damaged: {shown!r} is no entry of a sweep's journal; restore it, or delete it "
                    "to compare the runs again."
                )
            yield entry


def _is_entry(entry: Any) -> bool:
    """Whether a line of a journal is what a worker writes."""
    if not isinstance(entry, dict):
        return False
    if "point" in entry:
        point = entry["point"]
        texts = isinstance(point, dict) and all(isinstance(value, str) for value in point.values())
        return texts and is_count(entry.get("trial"))
    if "value" in entry:
        numbers = [entry["value"], entry.get("seconds")]
        named = isinstance(entry.get("run"), str) and is_count(entry.get("step"))
        return named and all(is_number(number) and math.isfinite(number) for number in numbers)
    if "failed" in entry:
        return isinstance(entry["failed"], str) and isinstance(entry.get("run"), str)
    return isinstance(entry.get("begins"), dict) or isinstance(entry.get("missing"), str)


def _append(journal: IO[bytes], entry: Mapping[str, Any]) -> None:
    journal.seek(0)
    content = journal.read()
    journal.truncate(content.rfind(b"\n") + 1)
    journal.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
    journal.flush()
    os.fsync(journal.fileno())
