"""Shows runs in progress in the terminal."""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from gemma2_jax.config import UserError
from gemma2_jax.reports.folders import find_runs
from gemma2_jax.reports.run_progress import (
    FAILED,
    FINISHED,
    RUNNING,
    STALLED,
    STARTING,
    STOPPED,
    RunProgress,
    progress_of,
)
from gemma2_jax.training.metrics import format_number
from gemma2_jax.training.progress import duration

_EVERY = 2.0  # seconds between two looks
_STYLES = {
    RUNNING: "green",
    STARTING: "cyan",
    STALLED: "yellow",
    STOPPED: "dim",
    FAILED: "red",
    FINISHED: "dim",
}
_HEAD = 4  # lines around the rows
_WIDE = 200  # columns of a pipe, which has no width


def watch_runs(folders: Sequence[str], once: bool) -> None:
    """Shows a table of the runs at or below the folders until the process is stopped.

    Args:
        once: whether to print the table once and return, which is done too if the output is no terminal.

    Raises:
        UserError: a folder does not exist, or the table is printed once and there is no run.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is not a folder; accepted: run folders, and folders above them.")
    console = Console()
    if once or not console.is_terminal:
        found = look(folders)
        if not found:
            raise UserError(f"there is no run in {', '.join(folders)}, nor in the folders below.")
        if not console.is_terminal:
            console.width = _WIDE
        console.print(table(found, len(found)))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            live.update(table(look(folders), console.height - _HEAD), refresh=True)
            time.sleep(_EVERY)


def look(folders: Sequence[str]) -> list[RunProgress]:
    """Returns how far each run is: those in progress first, then the others, the last one changed first."""
    runs = dict.fromkeys(run for folder in folders for run in find_runs(Path(folder)))
    found = [progress_of(run) for run in runs]
    active = (RUNNING, STARTING, STALLED)
    return sorted(
        found,
        key=lambda each: (each.state not in active, 0.0 if each.state in active else each.silence or 0.0),
    )


def table(found: Sequence[RunProgress], most: int) -> Table:
    """Returns a table with a row for each run, at most `most` of them."""
    shown = found[: max(most, 1)]
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    above = os.path.commonpath([os.path.abspath(each.folder.parent) for each in shown]) if shown else ""
    grid.add_column("run", overflow="fold")
    grid.add_column("state")
    for name in ("step", "loss", "validation", "tokens/s", "time left"):
        grid.add_column(name, justify="right", no_wrap=True)
    for each in shown:
        grid.add_row(*_cells(each, above))
    if len(shown) < len(found):
        grid.add_row(Text(f"and {len(found) - len(shown)} more", "dim"))
    if not found:
        grid.add_row(Text("no runs yet", "dim"))
    return grid


def _cells(run: RunProgress, above: str) -> list[Text]:
    state = run.state
    if state == STALLED and run.silence is not None:
        state = f"{state}, no row for {duration(run.silence)}"
    ended = run.state in (FINISHED, STOPPED, FAILED)
    cells = [
        f"{run.step:,}/{run.steps:,}" if run.steps else f"{run.step:,}",
        format_number(run.loss, 4),
        format_number(run.validation, 4),
        "–" if run.tokens_per_second is None or ended else f"{run.tokens_per_second:,.0f}",
        "–" if run.left is None or ended else duration(run.left),
    ]
    name = os.path.relpath(os.path.abspath(run.folder), above)
    return [Text(name), Text(state, _STYLES[run.state]), *map(Text, cells)]
