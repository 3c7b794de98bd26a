"""Which tasks of the language-model evaluation harness run, and how: its own, those shipped here, and the user's."""

import logging
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from gemma2_jax.config import UserError, refuse, suggest
from gemma2_jax.evaluation.suites import SUITES, SuiteTask, expand_suites
from gemma2_jax.messages import one_line

SHIPPED = Path(__file__).with_name("tasks")  # the folder of the tasks that come with the project
OFFLINE = "offline"  # the suite of those tasks
_HUB = "https://huggingface.co"
_SECONDS = 3  # to wait for the hub


@dataclass(frozen=True)
class TaskSettings:
    """Which tasks are run, and how.

    Attributes:
        tasks: names of tasks, groups or tags of the harness, or of suites (`SUITES`).
        shots: examples in each prompt; null for the number that each suite or task sets. A task that sets 0 keeps it.
        chat: whether prompts are put into Gemma 2's chat format, for instruction-tuned models.
        tasks_folder: folder with further tasks, in the harness's YAML format.
        run_code: whether to run programs that the model generates, as humaneval and mbpp need.
    """

    tasks: Sequence[str]
    shots: int | None = None
    chat: bool = False
    tasks_folder: str | None = None
    run_code: bool = False

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        if not self.tasks or not all(self.tasks):
            yield (
                "evaluation.tasks has an empty name; give names of tasks or suites separated by commas, as in "
                "arc_easy,gsm8k."
            )
        if self.shots is not None and self.shots < 0:
            yield f"evaluation.shots is {self.shots}; it must be at least 0."
        if self.tasks_folder is not None and not Path(self.tasks_folder).is_dir():
            yield (
                f"evaluation.tasks_folder is {self.tasks_folder}, which is not a folder; give one that holds tasks in "
                "YAML files."
            )


class Tasks:
    """The chosen tasks, found by name.

    Attributes:
        chosen: tasks in the order of their names, suites expanded.
        manager: lm-eval's `TaskManager`.

    Raises:
        UserError: lm-eval is not installed; a file of the user's folder is not YAML; or, for each wrong name, the
            nearest right one.
    """

    def __init__(self, settings: TaskSettings) -> None:
        self.chosen = expand_suites(settings.tasks)
        self._run_code = settings.run_code
        if settings.tasks_folder is not None:
            _check_yaml(Path(settings.tasks_folder))
        wanted = {task.name for task in self.chosen}
        if not wanted <= {task.name for task in SUITES[OFFLINE]} and not _reaches_hub():
            # Otherwise each data set is tried for half a minute. These are read at the import below.
            os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")
        with needs_harness():
            from lm_eval.tasks import TaskManager
        folders = [str(SHIPPED), *([] if settings.tasks_folder is None else [settings.tasks_folder])]
        with quiet():
            # The harness's own tasks are thousands of files, which take seconds, so they are read only if needed.
            self.manager = TaskManager(include_path=folders, include_defaults=False)
            if not wanted <= set(self.manager.all_tasks):
                self.manager = TaskManager(include_path=folders)
        known = set(self.manager.all_tasks)
        refuse(self._correction(name) for name in sorted(wanted - known))

    def load(self, task: SuiteTask) -> list[Any]:
        """Returns the task with its data, or the group with its tasks.

        Raises:
            Exception: the data cannot be fetched; each kind of data set has errors of its own.
        """
        with quiet(self._run_code):
            loaded = self.manager.load([task.name])
        group = loaded["groups"].get(task.name)
        return [group] if group is not None else list(loaded["tasks"].values())

    def runs_code(self, task: SuiteTask) -> bool:
        """Whether the task runs programs that the model generates; loading such a task already runs one."""
        path = self.manager.task_index[task.name].yaml_path
        if path is None:
            return False
        return bool(re.search(r"^unsafe_code: *true", path.read_text(encoding="utf-8"), re.MULTILINE))

    def _correction(self, name: str) -> str:
        near = suggest(name, [*SUITES, *self.manager.all_tasks]).partition(" (")[0]
        hint = near if near.startswith("did you mean") else "`lm-eval ls tasks` lists the harness's tasks"
        return (
            f"evaluation.tasks has {name}, which is no task or suite; {hint} (suites: {', '.join(SUITES)})."
        )


def _check_yaml(folder: Path) -> None:
    """Raises UserError for files that are not YAML; the harness would skip them without a message."""
    for path in sorted(folder.rglob("*.yaml")):
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise UserError(
                f"evaluation.tasks_folder has {path}, which cannot be read as YAML: {one_line(error)}."
            ) from None


@contextmanager
def needs_harness() -> Iterator[None]:
    """Raises UserError if an import inside finds no lm-eval, or not what it needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(
            f"evaluation.tasks needs the extra eval ({error.name} is not installed): pip install 'gemma2_jax[eval]'."
        ) from None


@contextmanager
def quiet(run_code: bool = False) -> Iterator[None]:
    """Silences the harness's log, and keeps it from forking this process, in which JAX has threads.

    The harness records the commit of the working directory; where there is none, git prints an error, so the look-up
    is left out.

    Args:
        run_code: whether Hugging Face's metric for programs may run them.
    """
    from lm_eval import evaluator

    commit, evaluator.get_git_commit_hash = evaluator.get_git_commit_hash, lambda: None
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    wanted = {"DISABLE_MULTIPROC": "1", **({"HF_ALLOW_CODE_EVAL": "1"} if run_code else {})}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = commit
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _reaches_hub() -> bool:
    """Whether the Hugging Face hub seems to be reachable; true behind a proxy, where that cannot be seen."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    parts = urlsplit(os.environ.get("HF_ENDPOINT", _HUB))
    try:
        with socket.create_connection((parts.hostname, parts.port or 443), timeout=_SECONDS):
            return True
    except OSError:
        return False
