"""How a run shows itself while it trains: a bar on a terminal, a line now and then in a log file."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainingProgress:
    """A bar with step, loss, tokens/s and time left, on standard error. A context manager."""

    def __init__(self, name: str, steps: int, show: bool):
        self._console = Console(stderr=True, quiet=not show)
        self._steps = steps
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (show and self._console.is_terminal),
        )
        self._task = self._bar.add_task(name, total=steps, status="compiling")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def report(self, name: str, step: int, split: str, row: Mapping[str, float]) -> None:
        """Show a run's row of metrics: in the bar, and as a line where there is no bar or for an evaluation."""
        if split == "train":
            status = f"loss {row['loss']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"
            self._bar.update(self._task, completed=step, status=status)
        else:
            status = (
                f"validation cross-entropy {row['cross_entropy']:.4f}  perplexity {row['perplexity']:.2f}"
            )
            if "agreement" in row:
                status += f"  agreement with the teacher {row['agreement']:.1%}"
        if split != "train" or not self._console.is_terminal:
            self.say(f"{name}  step {step}/{self._steps}  {status}")

    def say(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True)
