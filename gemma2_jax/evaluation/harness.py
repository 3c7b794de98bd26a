"""Runs tasks of the language-model evaluation harness (lm-eval, extra `eval`) on checkpoints, in this process."""

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from numbers import Real
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import gemma2_jax
from gemma2_jax.config import UserError
from gemma2_jax.evaluation.config import EvaluationConfig
from gemma2_jax.evaluation.evaluated_model import EvaluatedModel, open_models
from gemma2_jax.evaluation.evaluation_progress import EvaluationProgress
from gemma2_jax.evaluation.harness_tasks import Tasks, TaskSettings, needs_harness, quiet
from gemma2_jax.evaluation.record import EvaluatedCheckpoint, save_record
from gemma2_jax.evaluation.suites import SuiteTask
from gemma2_jax.messages import one_line
from gemma2_jax.sharding.layout import laid_out
from gemma2_jax.sharding.mesh import build_mesh

FORMAT = 1

_CONTEXT, _BATCH = 8192, 8
_BOOTSTRAPS = 100  # resamplings for the standard errors that have no formula
_PACKAGES = ("jax", "lm_eval", "datasets")  # whose versions may change results


@dataclass(frozen=True)
class Metric:
    """A metric of a task.

    Attributes:
        value: the metric over the task's documents; None if it is infinite or not a number.
        stderr: its standard error; None if the harness estimates none.
    """

    value: float | None
    stderr: float | None


@dataclass(frozen=True)
class TaskScores:
    """The scores of one task, or of a group.

    Attributes:
        metrics: by name; if the task filters the answers, the name has the filter in parentheses.
        version: of the task's definition.
        shots: examples in each prompt; None for a group.
        documents: number of documents; None for a group.
    """

    metrics: Mapping[str, Metric]
    version: str | None
    shots: int | None
    documents: int | None


@dataclass(frozen=True)
class TaskRow:
    """The results of one checkpoint, or of one adapter.

    Attributes:
        name: its name in tables.
        seconds: time of its tasks, with loading and compilation.
        tasks: scores by the name of the task or group.
        left_out: by the name of a task that did not run, why.
    """

    name: str
    checkpoint: EvaluatedCheckpoint
    seconds: float
    tasks: Mapping[str, TaskScores]
    left_out: Mapping[str, str]


@dataclass(frozen=True)
class TaskRecord:
    """An evaluation of one or several checkpoints on the same tasks; `gemma2 eval --tasks … --json` writes it.

    Attributes:
        format: version of this record.
        versions: of gemma2_jax, Python, and the packages that may change results.
        created: time of the end, in UTC, as in ISO 8601.
        devices: number and kind of the devices; mesh: sizes of the mesh axes above 1.
        dtype: dtype of weights and activations.
        chat: whether prompts were in Gemma 2's chat format.
        context: tokens that a model processes at a time.
        batch: texts computed at a time.
        limit: maximum number of documents per task; None for all.
        rows: results of each checkpoint.
    """

    format: int
    versions: Mapping[str, str]
    created: str
    devices: str
    mesh: Mapping[str, int]
    dtype: str
    chat: bool
    context: int
    batch: int
    limit: int | None
    rows: tuple[TaskRow, ...]

    def save(self, path: str | Path) -> None:
        """Writes the record as JSON, replacing an older file."""
        save_record(self, path)


# One document of a task: the row's name, the task, its document, prompts, answers and metrics, as plain data.
Sample = dict[str, Any]


def evaluate_tasks(
    checkpoints: str | Path | Sequence[str | Path],
    tasks: TaskSettings,
    config: EvaluationConfig = EvaluationConfig(),
    show: bool = False,
) -> tuple[TaskRecord, list[Sample]]:
    """Runs the harness's tasks on checkpoints of any kind, one after another.

    A task that cannot run is left out, with the reason, and the others go on.

    Args:
        checkpoints: one or several; each is a row of the results.
        config: adapters, averaged, tokenizer, compute, mesh, layout, batch (8), context (8192) and limit; its other
            settings are about text.
        show: whether to show progress on standard error.

    Returns:
        The record, with a row for each checkpoint, and the samples of all rows.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, a checkpoint cannot be read, or there are several
            processes.
    """
    if jax.process_count() > 1:
        raise UserError("evaluation.tasks needs a single process; run it on one host.")
    several = [checkpoints] if isinstance(checkpoints, str | Path) else checkpoints
    models = open_models([str(path) for path in several], config)
    with EvaluationProgress(1, show) as progress:
        progress.doing("reading tasks")
        found = Tasks(tasks)
    mesh = build_mesh(config.mesh)
    samples: list[Sample] = []
    with (
        jax.set_mesh(mesh),
        laid_out(config.layout),
        EvaluationProgress(len(models) * len(found.chosen), show) as progress,
    ):
        runner = _Runner(found, tasks, config, mesh, progress)
        rows = tuple(runner.row(model, samples) for model in models)
    return runner.record(rows), samples


class _Runner:
    """What the rows of one evaluation share."""

    def __init__(
        self,
        tasks: Tasks,
        settings: TaskSettings,
        config: EvaluationConfig,
        mesh: Mesh,
        progress: EvaluationProgress,
    ) -> None:
        self._tasks, self._settings, self._config, self._mesh = tasks, settings, config, mesh
        self._progress = progress
        self._context, self._batch = config.context or _CONTEXT, config.batch or _BATCH

    def row(self, opened: EvaluatedModel, samples: list[Sample]) -> TaskRow:
        """Runs all tasks on a checkpoint, and appends their samples."""
        with needs_harness():
            from gemma2_jax.evaluation.harness_model import HarnessModel
        began = time.monotonic()
        self._progress.doing(f"loading {opened.name}")
        compute = self._config.compute
        model = HarnessModel(
            opened.load(compute.dtype, self._mesh),
            opened.tokenizer,
            compute,
            self._batch,
            self._context,
            self._settings.chat,
            self._mesh,
            self._progress.reached,
        )
        scores: dict[str, TaskScores] = {}
        left_out: dict[str, str] = {}
        for task in self._tasks.chosen:
            self._progress.doing(f"running {task.name} on {opened.name}")
            found = self._run(task, model)
            if isinstance(found, str):
                left_out[task.name] = found
            else:
                scores |= _scores(found)
                samples += _samples(opened.name, found)
            self._progress.finish_part()
        return TaskRow(opened.name, opened.describe(), time.monotonic() - began, scores, left_out)

    def record(self, rows: tuple[TaskRow, ...]) -> TaskRecord:
        return TaskRecord(
            format=FORMAT,
            versions={
                "gemma2_jax": gemma2_jax.__version__,
                "python": platform.python_version(),
                **{name: version(name) for name in _PACKAGES},
            },
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            devices=f"{self._mesh.size} x {self._mesh.devices.flat[0].device_kind}",
            mesh={axis: size for axis, size in self._mesh.shape.items() if size > 1},
            dtype=self._config.compute.dtype,
            chat=self._settings.chat,
            context=self._context,
            batch=self._batch,
            limit=self._config.limit,
            rows=rows,
        )

    def _run(self, task: SuiteTask, model: Any) -> Mapping[str, Any] | str:
        """Returns the harness's results of a task, or why it cannot run."""
        from lm_eval import evaluator

        settings = self._settings
        if self._tasks.runs_code(task) and not settings.run_code:
            return f"{task.name} runs programs that the model writes; add --run-code to allow that."
        try:
            loaded = self._tasks.load(task)
        except Exception as error:  # each kind of data set has errors of its own
            return _unloaded(task.name, error)
        try:
            with quiet(settings.run_code):
                found: Mapping[str, Any] = evaluator.simple_evaluate(
                    model=model,
                    tasks=loaded,
                    num_fewshot=task.shots if settings.shots is None else settings.shots,
                    limit=self._config.limit,
                    task_manager=self._tasks.manager,
                    bootstrap_iters=_BOOTSTRAPS,
                    apply_chat_template=settings.chat,
                    confirm_run_unsafe_code=settings.run_code,
                )
        except (
            ValueError,
            ArithmeticError,
            AssertionError,
            LookupError,
            ImportError,
        ) as error:  # the harness's
            return f"{task.name} cannot be run: {one_line(error)}."
        return found


def _unloaded(name: str, error: Exception) -> str:
    if isinstance(error, ImportError) and error.name:
        return f"{name} needs the package {error.name}, which is not installed: pip install {error.name}."
    return (
        f"{name} cannot be loaded: {one_line(error)}. If its data is on the Hugging Face hub, run it once with a "
        "network connection; HF_HOME is the folder that keeps the data."
    )


def _scores(found: Mapping[str, Any]) -> dict[str, TaskScores]:
    counted, shots = found.get("n-samples", {}), found.get("n-shot", {})
    return {
        name: TaskScores(
            metrics=dict(_metrics(values)),
            version=None if found["versions"].get(name) is None else str(found["versions"][name]),
            shots=shots.get(name),
            documents=counted.get(name, {}).get("effective"),
        )
        for name, values in found["results"].items()
    }


def _metrics(values: Mapping[str, Any]) -> Iterator[tuple[str, Metric]]:
    """Metrics by name; the harness writes `acc,none` and `acc_stderr,none`, where the second part names a filter."""
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if comma and not name.endswith("_stderr"):
            stderr = values.get(f"{name}_stderr,{filtered}")
            label = name if filtered == "none" else f"{name} ({filtered})"
            yield label, Metric(_finite(value), _finite(stderr))


def _finite(value: Any) -> float | None:
    """None for infinite numbers, NaN, and what is no number, such as the harness's "N/A"."""
    return float(value) if isinstance(value, Real) and math.isfinite(value) else None


def _samples(row: str, found: Mapping[str, Any]) -> Iterator[Sample]:
    """The documents of all tasks, as plain data: values that JSON does not have become text."""
    for task, samples in found["samples"].items():
        for sample in samples:
            yield json.loads(json.dumps({"name": row, "task": task, **sample}, default=str))
