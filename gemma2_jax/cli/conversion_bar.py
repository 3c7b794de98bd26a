"""The progress of a conversion on standard error: a bar on a terminal, one line per stage in a log."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def conversion_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function that takes the stage, the number of weights done, and their total."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description:<9}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} weights"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    tasks = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=total)
            if not console.is_terminal:
                print(f"gemma2: {stage} …", file=sys.stderr, flush=True)
        bar.update(tasks[stage], completed=done)

    with bar:
        yield show
