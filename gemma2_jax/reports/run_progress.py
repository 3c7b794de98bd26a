"""How far runs are, from the files in their folders."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import UserError, read_yaml
from gemma2_jax.files import is_locked
from gemma2_jax.reports.folders import failure
from gemma2_jax.reports.reported_runs import count_setting
from gemma2_jax.training.metrics import JSON_LINES, scan_metrics

_SILENCE = (
    300.0  # seconds without a row from which a run may have stalled: compiling and evaluating take minutes
)
_ROWS = 5  # and as many times the usual time between rows

RUNNING, STARTING, STALLED, STOPPED, FAILED, FINISHED = (
    "running", "starting", "stalled", "stopped", "failed", "finished",
)  # fmt: skip


@dataclass(frozen=True)
class RunProgress:
    """How far a run is.

    Attributes:
        folder: the run folder.
        state: running, starting (no row yet), stalled (a process holds the lock, and no row came for long), stopped
            (no process holds it), failed or finished.
        step: step of the last row.
        steps: number of steps; None if it is unknown.
        loss: loss of the last training row.
        validation: cross-entropy of the last validation in nats.
        tokens_per_second: speed at the last training row.
        left: estimated seconds of the steps that are left; None if they are unknown.
        silence: seconds since the last change of the metrics; None without metrics.
    """

    folder: Path
    state: str
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    validation: float | None = None
    tokens_per_second: float | None = None
    left: float | None = None
    silence: float | None = None


def progress_of(folder: Path, now: float | None = None) -> RunProgress:
    """Returns how far the run in a folder is.

    Args:
        now: seconds since the epoch, by default of the clock.
    """
    config = _config(folder)
    rows, changed = _rows(folder)
    training = [row for row in rows if row["split"] == "train"]
    validations = [row for row in rows if row["split"] == "validation"]
    steps = count_setting(config, "training.steps")
    step = max((row["step"] for row in rows), default=0)
    each = _seconds_per_step(training, config)
    silence = None if changed is None else max(0.0, (time.time() if now is None else now) - changed)
    is_done = steps is not None and bool(validations) and validations[-1]["step"] >= steps
    usual = 0.0 if each is None else each * (count_setting(config, "training.log_every") or 1)
    return RunProgress(
        folder,
        FINISHED if is_done else _state(folder, silence, usual),
        step,
        steps,
        training[-1].get("loss") if training else None,
        validations[-1].get("cross_entropy") if validations else None,
        training[-1].get("tokens_per_second") if training else None,
        None if each is None or steps is None else _finite(each * max(0, steps - step)),
        silence,
    )


def _state(folder: Path, silence: float | None, usual: float) -> str:
    """The state of an unfinished run.

    Args:
        silence: seconds since the last row; None if there is none.
        usual: seconds between two rows.
    """
    if is_locked(folder):
        if silence is None:
            return STARTING
        return STALLED if silence > max(_SILENCE, _ROWS * usual) else RUNNING
    if failure(folder) is not None:
        return FAILED
    # On some file systems the locks of other hosts do not show, but new rows do.
    return RUNNING if silence is not None and silence < 2 * usual else STOPPED


def _seconds_per_step(training: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> float | None:
    if not training:
        return None
    row = training[-1]
    before = training[-2]["step"] if len(training) > 1 else 0
    if "seconds" in row and row["step"] > before and len(training) > 1:
        return _finite(row["seconds"] / (row["step"] - before))
    rows, length = (count_setting(config, f"data.{key}") for key in ("batch_size", "seq_len"))
    speed = row.get("tokens_per_second")
    return None if rows is None or length is None or not speed else _finite(rows * length / speed)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _config(folder: Path) -> Mapping[str, Any]:
    path = folder / CONFIG_FILE
    try:
        return _read_config(path, path.stat().st_mtime_ns)
    except (OSError, UserError):  # it is being written, or is damaged
        return {}


def _rows(folder: Path) -> tuple[Sequence[Mapping[str, Any]], float | None]:
    """Returns the intact rows and the time of their last change; None without rows."""
    path = folder / JSON_LINES
    try:
        found = path.stat()
        rows = _read_rows(folder, found.st_mtime_ns, found.st_size)
    except (OSError, UserError):
        return (), None
    return rows, found.st_mtime if rows else None


# Files are read again only after a change.


@lru_cache(maxsize=4096)
def _read_config(path: Path, changed: int) -> Mapping[str, Any]:
    return read_yaml(path)


@lru_cache(maxsize=4096)
def _read_rows(folder: Path, changed: int, size: int) -> tuple[Mapping[str, Any], ...]:
    """Returns the last two training rows and the last validation row, which is all that is shown."""
    rows, _ = scan_metrics(folder)
    training = [row for row in rows if row["split"] == "train"][-2:]
    validations = [row for row in rows if row["split"] == "validation"][-1:]
    return (*training, *validations)
