"""Runs tasks of the language-model evaluation harness (lm-eval, extra `eval`) on a model, in this process."""

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

import gemma2_jax
from gemma2_jax.config import UserError, suggest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.evaluation.suites import SUITES, SuiteTask, expand
from gemma2_jax.messages import one_line
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2

if TYPE_CHECKING:
    from gemma2_jax.evaluation.harness_model import Show

SHIPPED = Path(__file__).with_name("tasks")  # the folder of the tasks that come with the project
_BOOTSTRAPS = 100  # resamplings for the standard errors that have no formula


@dataclass(frozen=True)
class HarnessSettings:
    """How tasks are run.

    Attributes:
        shots: examples in each prompt; None for the number that each suite or task sets.
        limit: number of documents per task, the first ones; None for all.
        chat: whether prompts are put into Gemma 2's chat format, for instruction-tuned models.
        batch_size: texts that are computed at a time.
        max_length: the model's context in tokens.
        tasks_folder: a folder with further tasks, in the harness's YAML format.
        run_code: whether to run programs that the model writes, as humaneval and mbpp need.
    """

    shots: int | None = None
    limit: int | None = None
    chat: bool = False
    batch_size: int = 8
    max_length: int = 8192
    tasks_folder: str | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("limit", 1), ("batch_size", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                option = {"batch_size": "batch", "max_length": "max-length"}.get(name, name)
                raise UserError(f"--{option} is {value}; it must be at least {least}.")
        if self.tasks_folder is not None and not Path(self.tasks_folder).is_dir():
            raise UserError(
                f"--tasks-folder is {self.tasks_folder}, which is not a folder; give one with tasks in YAML files."
            )


@dataclass(frozen=True)
class HarnessResults:
    """The results of tasks.

    Attributes:
        tasks: by name of a task or group: its metrics, each with `value` and `stderr` (None if unknown), its version,
            its number of shots, and its number of documents (None for a group).
        left_out: by name of a task, why it did not run.
        samples: by task, one record per document: prompts, the model's answers, and metrics.
        versions: of the packages that determine the results.
    """

    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


class Tasks:
    """Tasks by name: those shipped with the project, the harness's own, and those of the user's folder.

    Raises:
        UserError: lm-eval is not installed, or the user's folder cannot be read as tasks; or, for each wrong name, the
            nearest right one.
    """

    def __init__(self, names: Sequence[str], tasks_folder: str | None = None) -> None:
        if not names or not all(names):
            raise UserError(
                "--tasks has an empty name; give names separated by commas, as in --tasks arc_easy,gsm8k."
            )
        with _harness():
            from lm_eval.tasks import TaskManager
        folders = [str(SHIPPED), *([] if tasks_folder is None else [tasks_folder])]
        self.chosen = expand(names)
        wanted = {task.name for task in self.chosen}
        # The harness's own tasks are thousands of files, so its index is built only if it is needed.
        self._manager = _indexed(tasks_folder, lambda: TaskManager(include_path=folders, include_defaults=False))
        if not wanted <= set(self._manager.all_tasks):
            self._manager = _indexed(tasks_folder, lambda: TaskManager(include_path=folders))
        wrong = sorted(wanted - set(self._manager.all_tasks))
        if wrong:
            raise UserError("\n".join(map(self._correction, wrong)))

    def load(self, task: SuiteTask) -> list[Any]:
        """The task with its data, or the group with its tasks. Raises anything if the data cannot be fetched."""
        loaded = self._manager.load([task.name])
        group = loaded["groups"].get(task.name)
        return [group] if group is not None else list(loaded["tasks"].values())

    def runs_code(self, task: SuiteTask) -> bool:
        """Whether the task runs programs that a model writes, which loading it may try already."""
        path = self._manager.task_index[task.name].yaml_path
        return path is not None and bool(re.search(r"^unsafe_code: *true", path.read_text(), re.MULTILINE | re.I))

    @property
    def manager(self) -> Any:
        return self._manager

    def _correction(self, name: str) -> str:
        accepted = [*SUITES, *self._manager.all_tasks]
        near = suggest(name, accepted).partition(" (")[0]
        hint = near if near.startswith("did you mean") else "`lm-eval ls tasks` lists the harness's tasks"
        return f"--tasks has {name}, which is no task or suite; {hint} (suites: {', '.join(SUITES)})."


def run_harness(
    model: Gemma2,
    tokenizer: Tokenizer,
    tasks: Tasks,
    settings: HarnessSettings,
    compute: ComputeConfig,
    mesh: Mesh | None = None,
    show: "Show" = lambda kind, done, total: None,
) -> HarnessResults:
    """Runs the tasks one after another; one that cannot run is left out with the reason, and the others go on.

    Args:
        mesh: the mesh that the weights are on, which is in context; None for one device.
        show: called with the progress of each kind of request.
    """
    with _harness():
        from lm_eval.evaluator import simple_evaluate

        from gemma2_jax.evaluation.harness_model import HarnessModel
    adapter = HarnessModel(
        model, tokenizer, compute, settings.batch_size, settings.max_length, settings.chat, mesh, show
    )
    results = HarnessResults(
        versions={
            "gemma2_jax": gemma2_jax.__version__,
            **{name: version(name) for name in ("jax", "lm_eval")},
        }
    )
    for task in tasks.chosen:
        if tasks.runs_code(task) and not settings.run_code:
            results.left_out[task.name] = (
                f"{task.name} runs programs that the model writes; add --run-code to allow that."
            )
            continue
        try:
            with _quiet(settings.run_code):
                loaded = tasks.load(task)
        except Exception as error:  # each kind of data set has errors of its own
            results.left_out[task.name] = _unfetched(task.name, error)
            continue
        try:
            with _quiet(settings.run_code):
                found = simple_evaluate(
                    model=adapter,
                    tasks=loaded,
                    num_fewshot=task.shots if settings.shots is None else settings.shots,
                    limit=settings.limit,
                    task_manager=tasks.manager,
                    bootstrap_iters=_BOOTSTRAPS,
                    apply_chat_template=settings.chat,
                    confirm_run_unsafe_code=settings.run_code,
                )
        except (ValueError, AssertionError, LookupError, ImportError) as error:  # what the harness raises, and UserError
            results.left_out[task.name] = f"{task.name} cannot be run: {one_line(error)}."
            continue
        _add(results, found)
    return results


def _add(results: HarnessResults, found: Mapping[str, Any]) -> None:
    counted, shots = found.get("n-samples", {}), found.get("n-shot", {})
    for name, values in found["results"].items():
        results.tasks[name] = {
            "metrics": _metrics(values),
            "version": found["versions"].get(name),
            "shots": shots.get(name),
            "documents": counted.get(name, {}).get("effective"),
        }
    results.samples.update(found["samples"])


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Metrics by name; the harness writes `acc,none` and `acc_stderr,none`, where the second part names a filter."""
    metrics = {}
    for key, value in values.items():
        name, comma, filtered = key.partition(",")
        if not comma or name.endswith("_stderr"):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        metrics[name if filtered == "none" else f"{name} ({filtered})"] = {
            "value": value,
            "stderr": None if isinstance(stderr, str) else stderr,  # "N/A"
        }
    return metrics


def _unfetched(name: str, error: Exception) -> str:
    if isinstance(error, ImportError) and error.name:
        return f"{name} needs the package {error.name}: pip install {error.name}."
    return (
        f"{name} cannot be loaded: {one_line(error)}; its data comes from the Hugging Face hub, so run it once with a "
        "network connection (HF_HOME names the folder that keeps the data)."
    )


def _indexed(tasks_folder: str | None, index: Any) -> Any:
    try:
        with _quiet():
            return index()
    except Exception as error:  # YAML's errors, and the harness's
        raise UserError(
            f"--tasks-folder {tasks_folder} cannot be read as tasks: {one_line(error)}."
            if tasks_folder
            else f"the harness's tasks cannot be read: {one_line(error)}."
        ) from None


@contextmanager
def _harness() -> Iterator[None]:
    """Raises UserError if an import inside finds no lm-eval."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"--tasks needs the extra eval ({error.name} is not installed): pip install 'gemma2_jax[eval]'."
        ) from None


@contextmanager
def _quiet(run_code: bool = False) -> Iterator[None]:
    """Silences the harness's log, and keeps it from forking this process, in which JAX has threads.

    Args:
        run_code: whether to allow Hugging Face's metric for programs to run them.
    """
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    wanted = {"DISABLE_MULTIPROC": "1", **({"HF_ALLOW_CODE_EVAL": "1"} if run_code else {})}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
