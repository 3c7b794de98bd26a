"""Progress of an evaluation on standard error: one live line on a terminal, occasional lines in a log file."""

import time
from collections.abc import Iterable, Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from gemma2_jax.data.batch import Batch
from gemma2_jax.training.progress import duration

_BETWEEN_LINES = 30.0  # seconds between two lines of a log


class EvaluationProgress:
    """Context manager that shows what is evaluated, the share that is done, the speed and the time left.

    Args:
        parts: number of parts of equal weight: each model on each domain.
        show: false in all processes of a job except the first.
    """

    def __init__(self, parts: int, show: bool) -> None:
        self._console = Console(stderr=True, quiet=not show)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self._bar = Progress(
            *columns, console=self._console, disable=not (show and self._console.is_terminal), transient=True
        )
        self._task = self._bar.add_task("", total=parts, status="")
        self._parts, self._finished, self._fraction = parts, 0, 0.0
        self._clock: tuple[float, float] | None = (
            None  # time and parts done when the first program was compiled
        )
        self._tokens = 0
        self._line_at = time.monotonic()

    def __enter__(self) -> "EvaluationProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def doing(self, what: str) -> None:
        """Shows an activity, such as loading weights."""
        self._bar.update(self._task, description=what)
        if self._bar.disable:
            self._print_line(f"gemma2: {what} …")

    def read(self, fraction: float) -> None:
        """Notes the fraction of the current part that has been read."""
        self._fraction = min(fraction, 1.0)

    def reached(self, what: str, done: int, total: int) -> None:
        """Shows how many of a part's pieces of work are done, for parts that are not batches of text."""
        self.read(done / total)
        status = f"{done}/{total} {what}"
        self._bar.update(self._task, completed=self._done, status=status)
        if self._bar.disable and time.monotonic() - self._line_at > _BETWEEN_LINES:
            self._print_line(f"{self._done / self._parts:.0%}  {status}")
            self._line_at = time.monotonic()

    def finish_part(self) -> None:
        self._finished, self._fraction = self._finished + 1, 0.0

    def counted(self, batches: Iterable[Batch], shares: int) -> Iterator[Batch]:
        """Yields the batches of a part unchanged; each is computed before the next is taken.

        Args:
            shares: number of parts of each batch, of which this process has one.
        """
        for batch in batches:
            self._show()
            yield batch
            if self._clock is None:  # the first batch includes the compilation
                self._clock = time.monotonic(), self._done
            else:
                self._tokens += int((batch.segment_ids > 0).sum()) * shares

    @property
    def _done(self) -> float:
        return self._finished + self._fraction

    def _show(self) -> None:
        self._bar.update(self._task, completed=self._done, status=self._status())
        if self._bar.disable and time.monotonic() - self._line_at > _BETWEEN_LINES:
            self._print_line(f"{self._done / self._parts:.0%}  {self._status()}")
            self._line_at = time.monotonic()

    def _status(self) -> str:
        if self._clock is None:
            return "compiling"
        seconds, done = time.monotonic() - self._clock[0], self._done - self._clock[1]
        speed = f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s"
        if done <= 0:
            return f"{speed}  time left unknown"
        return f"{speed}  {duration(seconds / done * (self._parts - self._done))} left"

    def _print_line(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)
