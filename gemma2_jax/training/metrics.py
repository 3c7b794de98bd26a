"""Writers for a run's metrics: JSON lines always, TensorBoard by default, Weights & Biases on request."""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.machine import is_installed

JSON_LINES = "metrics.jsonl"


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics writers in addition to the JSON lines.

    Attributes:
        tensorboard: write event files into RUN/tensorboard.
        wandb_project: also log to this Weights & Biases project; null for none. Needs the extra `wandb`.
    """

    tensorboard: bool
    wandb_project: str | None


def check_wandb(config: MetricsConfig) -> None:
    """Raises UserError if metrics.wandb_project is set but wandb is not installed."""
    if config.wandb_project is not None and not is_installed("wandb"):
        raise UserError(
            "metrics.wandb_project is set but wandb is not installed; install the extra gemma2_jax[wandb]."
        )


class Writer(Protocol):
    """Writes rows of metrics, each for one step and split."""

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


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


class TensorBoardWriter:
    """Writes event files into RUN/tensorboard, with tags such as `train/loss`."""

    def __init__(self, run_folder: Path, last_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Writes to a Weights & Biases run, resumed by the id in RUN/wandb.id. Runs trained together each have their own.

    wandb ignores a step that it already has. That is harmless: the rows that an interrupted run sent after its last
    checkpoint equal those that the resumed run sends again.
    """

    def __init__(self, run_folder: Path, project: str, config: Mapping[str, Any]):
        import wandb

        file = run_folder / "wandb.id"  # random, since runs on other machines may have the same path
        if not file.exists():
            write_text(file, secrets.token_hex(8))
        self._run = wandb.init(
            project=project,
            id=file.read_text(encoding="utf-8"),
            name=run_folder.name,
            dir=run_folder,
            resume="allow",
            reinit="create_new",  # by default, a second run of one process ends the first
            config=dict(config),
        )

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        self._run.log({f"{split}/{name}": value for name, value in row.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


def open_writers(
    config: MetricsConfig,
    run_folder: Path,
    last_step: int,
    run_config: Mapping[str, Any],
    evaluated: bool = True,
) -> list[Writer]:
    """Opens the configured writers, each of which appends after `last_step`; arguments as in `JsonLinesWriter`.

    Raises:
        UserError: a writer's package is not installed.
    """
    check_wandb(config)
    writers: list[Writer] = []
    if config.wandb_project is not None:  # first, since only this one can fail
        writers.append(WandbWriter(run_folder, config.wandb_project, run_config))
    if config.tensorboard:
        writers.append(TensorBoardWriter(run_folder, last_step))
    writers.append(JsonLinesWriter(run_folder, last_step, evaluated))
    return writers


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
    if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("split"), str):
        return row
    return None


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


def perplexity(cross_entropy: float) -> float:
    """exp of the mean cross-entropy in nats; infinity instead of an overflow error."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


def format_number(value: float | None, places: int) -> str:
    """Formats a number with `places` decimals, or in scientific notation from 1e6 on; – for None."""
    if value is None:
        return "–"
    return f"{value:,.{places}f}" if abs(value) < 1e6 else f"{value:.2e}"
