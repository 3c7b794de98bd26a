"""A run's metrics: written as JSON lines always, and to trackers as configured; and read again."""

import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.machine import is_installed
from gemma2_jax.training.trackers.tensorboard import TensorBoard
from gemma2_jax.training.trackers.tracker import Guarded, TrackedRun, Tracker
from gemma2_jax.training.trackers.trackio import Trackio
from gemma2_jax.training.trackers.wandb import Wandb

JSON_LINES = "metrics.jsonl"


@dataclass(frozen=True)
class MetricsConfig:
    """Trackers that get the metrics in addition to the JSON lines; several may be used at once.

    A tracker that fails, for example without a network, does not end the run.

    Attributes:
        tensorboard: write event files into RUN/tensorboard.
        wandb_project: also log to this Weights & Biases project; null for none. Needs the extra `wandb`.
        trackio_project: also log to this trackio project; null for none. Needs the extra `trackio`.
        group: name that the trackers group the run by; a sweep or study sets it to its folder. null: no group.
        tags: labels of the run at Weights & Biases.
    """

    tensorboard: bool
    wandb_project: str | None
    # Older runs lack these keys.
    trackio_project: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()


def check_trackers(config: MetricsConfig) -> None:
    """Raises UserError if a tracker's package is not installed."""
    for package, project in (("wandb", config.wandb_project), ("trackio", config.trackio_project)):
        if project is not None and not is_installed(package):
            raise UserError(
                f"metrics.{package}_project is set but {package} is not installed; install the extra: "
                f"pip install 'gemma2_jax[{package}]'."
            )


class JsonLinesWriter:
    """Writes RUN/metrics.jsonl, one JSON object per line.

    On opening, drops the rows of an interrupted run that the resumed run will write again.

    Args:
        last_step: step that the run resumes from.
        evaluated: whether to keep the validation row of that step.
    """

    def __init__(self, run_folder: Path, last_step: int, evaluated: bool = True):
        path = run_folder / JSON_LINES
        if path.exists():
            last = (last_step, "validation" if evaluated else "train")
            kept = [row for row in read_metrics(run_folder) if (row["step"], row["split"]) <= last]
            write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, "split": split, **row}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def open_writers(
    config: MetricsConfig,
    run: TrackedRun,
    evaluated: bool = True,
    show: Callable[[str], None] = print,
) -> list[Tracker]:
    """Opens the JSON lines and the configured trackers, each of which appends after `run.last_step`.

    Args:
        evaluated: as in `JsonLinesWriter`.
        show: shows the line about a tracker that fails.

    Raises:
        UserError: a tracker's package is not installed.
    """
    check_trackers(config)
    trackers: dict[str, Callable[[], Tracker]] = {}
    if config.tensorboard:
        trackers["TensorBoard"] = partial(TensorBoard, run)
    if config.wandb_project is not None:
        trackers["wandb"] = partial(Wandb, run, config.wandb_project)
    if config.trackio_project is not None:
        trackers["trackio"] = partial(Trackio, run, config.trackio_project)
    guarded = [Guarded(name, open_tracker, show) for name, open_tracker in trackers.items()]
    return [*guarded, JsonLinesWriter(run.folder, run.last_step, evaluated)]


def read_metrics(run_folder: str | Path) -> list[dict[str, Any]]:
    """Reads the rows of a run's metrics.jsonl, without a truncated last line.

    Names in files of older versions are converted to the current ones, see `_renamed`.

    Raises:
        UserError: the file does not exist, or a line of it is damaged.
    """
    rows, damaged = scan_metrics(run_folder)
    if damaged:
        raise UserError(f"{damaged[0]}; delete that line.")
    return rows


def scan_metrics(run_folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads the rows that are intact as `read_metrics` does; also returns a clause for each damaged line.

    Raises:
        UserError: the file does not exist.
    """
    path = Path(run_folder) / JSON_LINES
    if not path.exists():
        raise UserError(f"{path} does not exist; {run_folder} has not been trained yet.")
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        row = _row(line)
        if row is None:
            damaged.append(f"{path}, line {number}, is not a row of metrics")
        else:
            rows.append(_renamed(row))
    return rows, damaged


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not isinstance(row.get("split"), str):
        return None
    numbers = {name: value for name, value in row.items() if name != "split"}
    return row if is_count(row.get("step")) and all(map(is_number, numbers.values())) else None


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """Converts a row to the current names.

    Older versions wrote `tokens` for both the positions seen in training and the targets of an evaluation, and repeated
    the cross-entropy of an evaluation as `loss`.
    """
    row = dict(row)
    if "tokens" in row:
        row["tokens_seen" if row["split"] == "train" else "targets"] = row.pop("tokens")
    if row["split"] == "validation":
        row.pop("loss", None)
    return row


def is_count(value: Any) -> bool:
    """Whether a value from a file is a whole number of steps, tokens or bytes that 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value from a file is a number, perhaps NaN or infinite, that a float holds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def perplexity(cross_entropy: float) -> float:
    """exp of the mean cross-entropy in nats; infinity instead of an overflow error."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


def format_number(value: float | None, places: int) -> str:
    """Formats a number with `places` decimals, or in scientific notation from 1e6 on; – for None."""
    if value is None:
        return "–"
    return f"{value:,.{places}f}" if abs(value) < 1e6 else f"{value:.2e}"
