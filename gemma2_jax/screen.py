"""Status on standard error during long operations."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextmanager
def activity(what: str, show: bool = True) -> Iterator[None]:
    """Shows `what` while the block runs: with a clock on a terminal, removed at the end; as one line in a log.

    Args:
        show: false in all processes of a job except the first.
    """
    console = Console(stderr=True)
    if not show or not console.is_terminal:
        if show:
            print(f"gemma2: {what} …", file=sys.stderr, flush=True)
        yield
        return
    columns = SpinnerColumn("line"), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield
