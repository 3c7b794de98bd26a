"""Where a run's metrics go: JSON lines always, TensorBoard by default, Weights & Biases if asked."""

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
    """Writers beside the JSON lines.

    Attributes:
        tensorboard: write event files into RUN/tensorboard.
        wandb_project: also log to this Weights & Biases project; null for none. Needs the extra `wandb`.
    """

    tensorboard: bool
    wandb_project: str | None


def check_wandb(config: MetricsConfig) -> None:
    """Raises UserError if metrics are to go to Weights & Biases, whose package is not installed."""
    if config.wandb_project is not None and not is_installed("wandb"):
        raise UserError(
            "metrics.wandb_project is set but wandb is not installed; install the extra gemma2_jax[wandb]."
        )


class Writer(Protocol):
    """Takes one row of metrics of one split."""

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLinesWriter:
    """RUN/metrics.jsonl, one object a line; rows of a run that was cut off are dropped, if they will come again.

    Args:
        last_step: that the run goes on behind.
        evaluated: whether its validation row stays, too.
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
    """Event files in RUN/tensorboard, tags `train/loss` and so on."""

    def __init__(self, run_folder: Path, last_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_folder / "tensorboard"), purge_step=last_step + 1)

    def write(self, step: int, split: str, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run, resumed under the id in RUN/wandb.id; one of several where runs are trained together.

    It takes no step twice: rows after a checkpoint that a cut-off run had sent already are equal to their repeats.
    """

    def __init__(self, run_folder: Path, project: str, config: Mapping[str, Any]):
        import wandb

        file = run_folder / "wandb.id"  # drawn once, since two runs may lie under the same path elsewhere
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
    """The writers that the configuration asks for, each continuing after `last_step`, as `JsonLinesWriter`.

    Raises:
        UserError: a writer's package is not installed.
    """
    check_wandb(config)
    writers: list[Writer] = []
    if config.wandb_project is not None:  # first, since it is the one that can fail
        writers.append(WandbWriter(run_folder, config.wandb_project, run_config))
    if config.tensorboard:
        writers.append(TensorBoardWriter(run_folder, last_step))
    writers.append(JsonLinesWriter(run_folder, last_step, evaluated))
    return writers


def read_metrics(run_folder: str | Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl; a last line that was cut off is left out.

    Names have one meaning, in files of older versions too: see `_renamed`.
    """
    path = Path(run_folder) / JSON_LINES
    if not path.exists():
        raise UserError(f"{path} does not exist; {run_folder} has not been trained yet.")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            rows.append(_renamed(_row(line, f"{path}, line {number},")))
    return rows


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"step", "split"} <= row.keys():
        raise UserError(f"{where} is broken: it is no row of metrics; delete that line.")
    return row


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row with the names of today.

    Older versions wrote `tokens` for the positions seen in training and for the targets of an evaluation, and the
    cross-entropy of an evaluation as its `loss` too.
    """
    row = dict(row)
    if "tokens" in row:
        row["tokens_seen" if row["split"] == "train" else "targets"] = row.pop("tokens")
    if row["split"] == "validation":
        row.pop("loss", None)
    return row


def perplexity(cross_entropy: float) -> float:
    """exp of the mean cross-entropy in nats; infinite rather than an overflow error."""
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf


def format_number(value: float | None, places: int) -> str:
    """A number with so many decimal places, or as a power of ten where it is too large to read; – for None."""
    if value is None:
        return "–"
    return f"{value:,.{places}f}" if abs(value) < 1e6 else f"{value:.2e}"
