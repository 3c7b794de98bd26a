"""Reads the points of a scaling fit from run folders: parameters, tokens, validation loss, and the teacher's loss."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma2_jax.checkpoints.store import CONFIG_FILE
from gemma2_jax.config import UserError, load_config, read_json, read_yaml
from gemma2_jax.distill.cache.manifest import read_cache
from gemma2_jax.messages import quoted
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.run import RunConfig
from gemma2_jax.training.metrics import JSON_LINES, read_metrics
from gemma2_jax.training.start import DATA_FILE


@dataclass(frozen=True)
class Teacher:
    """The teacher of a run.

    Attributes:
        path: its folder.
        loss: its validation cross-entropy in nats.
        parameters: its number of parameters, counted as those of the runs; None if unknown.
        tokens: number of tokens that it was trained on; None if unknown.
    """

    path: str
    loss: float
    parameters: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class ScalingRun:
    """A finished run.

    Attributes:
        folder: its folder.
        parameters: number of parameters, with or without the embedding.
        tokens: number of tokens seen, padding included.
        loss: validation cross-entropy of the last step in nats.
        targets: number of tokens that the loss is an average over.
        teacher: None if the run was trained on text alone.
    """

    folder: str
    parameters: int
    tokens: int
    loss: float
    targets: int
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Collected:
    """Runs for a fit.

    Attributes:
        runs: the runs.
        left_out: the reason for each run folder that is not among them.
    """

    runs: tuple[ScalingRun, ...]
    left_out: dict[str, str]


def collect_runs(
    paths: Sequence[str | Path], embedding: bool = True, teacher_loss: float | None = None
) -> Collected:
    """Reads the finished runs at and below `paths`: run folders, sweeps, studies.

    A run that is not finished, or that did not start from random weights, is left out.

    Args:
        embedding: whether the embedding counts among the parameters.
        teacher_loss: validation cross-entropy of teachers that are not run folders.

    Raises:
        UserError: a path holds no run, the runs have different data or tokenizers, or a teacher's loss is unknown.
    """
    folders = [folder for path in paths for folder in _run_folders(Path(path))]
    unique = list({folder.resolve(): folder for folder in folders}.values())
    runs, left_out = [], {}
    for folder in unique:
        config = _config(folder)
        reason = _unsuitable(folder, config)
        if reason is not None:
            left_out[str(folder)] = reason
            continue
        row = _last(folder, "validation")
        runs.append(
            ScalingRun(
                str(folder),
                _parameters(config, embedding),
                _tokens(folder, config),
                row["cross_entropy"],
                int(row["targets"]),
                _teacher(folder, config, embedding, teacher_loss),
            )
        )
    if not runs:
        reasons = "".join(f"\n  {folder}: {reason}." for folder, reason in left_out.items())
        raise UserError(f"no run can be used for a fit:{reasons}")
    _check_same_data([run.folder for run in runs])
    return Collected(tuple(runs), left_out)


def _run_folders(path: Path) -> Iterator[Path]:
    """Yields the run folders at or below `path`."""
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give run folders, or folders of sweeps or studies.")
    if _is_run(path):
        yield path
        return
    found = sorted(file.parent for file in path.rglob(JSON_LINES) if _is_run(file.parent))
    if not found:
        raise UserError(
            f"{path} holds no run: there is no folder with {CONFIG_FILE} and {JSON_LINES} in it or below it; give run "
            "folders, or folders of sweeps or studies."
        )
    yield from found


def _is_run(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and (folder / JSON_LINES).is_file()


def _config(folder: Path) -> RunConfig:
    if set(read_yaml(folder / CONFIG_FILE)) == {"model"}:
        raise UserError(f"{folder} holds a converted model, not a run.")
    return load_config(RunConfig, folder / CONFIG_FILE)


def _unsuitable(folder: Path, config: RunConfig) -> str | None:
    """Why a run is no point of a scaling law; None if it is one."""
    if config.initialise.source is not None:
        return f"it started from the weights of {config.initialise.source}"
    row, steps = _last(folder, "validation"), config.training.steps
    if row is None or row["step"] != steps:
        done = max((each["step"] for each in read_metrics(folder)), default=0)
        return f"it is not finished (step {done} of {steps})"
    loss = row.get("cross_entropy")
    if loss is None:
        return "its validation has no cross-entropy"
    if not (math.isfinite(loss) and loss > 0):
        return f"its validation cross-entropy is {loss}"
    if not math.isfinite(row.get("targets", math.nan)):
        return "its validation has no number of targets"
    return None


def _last(folder: Path, split: str) -> Any:
    """The last row of metrics of a split; None if there is none."""
    rows = [row for row in read_metrics(folder) if row["split"] == split]
    return rows[-1] if rows else None


def _parameters(config: RunConfig, embedding: bool) -> int:
    counts = count_parameters(config.model)
    return counts.total if embedding else counts.non_embedding


def _tokens(folder: Path, config: RunConfig) -> int:
    row = _last(folder, "train")
    seen = None if row is None or row["step"] != config.training.steps else row.get("tokens_seen")
    if seen is not None and math.isfinite(seen):
        return int(seen)
    return config.training.steps * config.data.batch_size * config.data.seq_len


def _teacher(folder: Path, config: RunConfig, embedding: bool, teacher_loss: float | None) -> Teacher | None:
    if not config.distill.has_teacher:
        return None
    path = config.distill.teacher
    if path is None:
        assert config.distill.cache is not None
        path = read_cache(config.distill.cache).teacher_path
    # A study that was moved still has its teacher beside its students.
    for place in (Path(path), folder.parent / Path(path).name):
        if _is_run(place) and place.resolve() != folder.resolve():
            row, trained = _last(place, "validation"), _config(place)
            if row is None or not math.isfinite(row.get("cross_entropy", math.nan)):
                raise UserError(f"{place}, the teacher of {folder}, has no validation cross-entropy yet.")
            _check_same_data([str(folder), str(place)])
            return Teacher(
                str(place), row["cross_entropy"], _parameters(trained, embedding), _tokens(place, trained)
            )
    if teacher_loss is None:
        raise UserError(
            f"the teacher of {folder} is {path}, which is not a run folder, so its validation cross-entropy is "
            "unknown; give it with --teacher-loss, as in --teacher-loss 2.31."
        )
    sizes = config.distill.model
    if sizes is None:
        return Teacher(path, teacher_loss)
    counts = count_parameters(sizes)
    return Teacher(path, teacher_loss, counts.total if embedding else counts.non_embedding)


def _check_same_data(folders: Sequence[str]) -> None:
    """Raises UserError if two runs have different documents or tokenizers, since their losses cannot be compared."""
    first, rest = folders[0], folders[1:]
    known = _identity(first)
    for folder in rest:
        for key, value in _identity(folder).items():
            if known.get(key) != value:
                what = "with another tokenizer" if key == "tokenizer" else "on other documents"
                raise UserError(
                    f"{folder} was trained {what} than {first} ({DATA_FILE}), so their losses cannot be compared; give "
                    "runs of the same data."
                )


def _identity(folder: str) -> dict[str, Any]:
    file = Path(folder) / DATA_FILE
    if not file.is_file():
        raise UserError(
            f"{file} is missing, which identifies the data that the run was trained on; copy it there from where the "
            "run was trained, or leave that run out."
        )
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file} holds {quoted(found)}; copy it there again from where the run was trained.")
    return found
