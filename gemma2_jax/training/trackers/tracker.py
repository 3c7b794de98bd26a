"""The protocol of experiment trackers, and what keeps a tracker's failure from ending a run."""

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemma2_jax.files import write_text
from gemma2_jax.messages import one_line

_LONGEST_CLOSE = 20.0  # seconds; shorter than what a stopped process has to close its files


@dataclass(frozen=True)
class TrackedRun:
    """The properties of a run that trackers show or need.

    Attributes:
        folder: the run folder.
        name: the run's name.
        config: the run's configuration as plain data.
        last_step: step that the run resumes from, 0 at its start.
        group: name that all runs of a sweep or study share; None for a run on its own.
        tags: labels to find the run by.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]
    last_step: int = 0
    group: str | None = None
    tags: tuple[str, ...] = ()


class Tracker(Protocol):
    """Receives rows of metrics, each for one step and split."""

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Guarded:
    """A tracker whose first error is shown as one line; it gets no more rows afterwards, and the run goes on.

    Args:
        name: the tracker's name in that line.
        open_tracker: opens the tracker.
        show: shows the line.
    """

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], show: Callable[[str], None]) -> None:
        self._name, self._show = name, show
        self._tracker: Tracker | None = None
        self._attempt(lambda: setattr(self, "_tracker", open_tracker()))

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        if (tracker := self._tracker) is not None:
            self._attempt(lambda: tracker.write(step, split, row))

    def close(self) -> None:
        """Closes the tracker, and waits a limited time for it: without a network, it may try again for hours."""
        if (tracker := self._tracker) is None:
            return
        self._tracker = None
        closing = threading.Thread(target=self._attempt, args=[tracker.close], daemon=True)
        closing.start()
        closing.join(_LONGEST_CLOSE)
        if closing.is_alive():
            self._show(
                f"{self._name} has not stored all metrics after {_LONGEST_CLOSE:g} s; metrics.jsonl has all of them"
            )

    def _attempt(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # each tracker raises errors of its own: of networks, disks, accounts
            self._tracker = None
            self._show(
                f"{self._name} gets no more metrics, since it failed: {one_line(error)}; the run goes on, and "
                "metrics.jsonl has all of them"
            )


def kept_id(run: TrackedRun, file_name: str) -> str:
    """The run's identity at a tracker, kept in the run folder so that a resumed run continues the same record.

    It is random, since runs on other machines may have the same name and path.
    """
    file = run.folder / file_name
    if not file.exists():
        write_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8").strip()


def named_by_split(split: str, row: Mapping[str, float]) -> dict[str, float]:
    """The row with names such as `train/loss`."""
    return {f"{split}/{name}": value for name, value in row.items()}
