"""Trains several students of one teacher at once, each in its own ordinary run folder."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax import stops
from gemma2_jax.checkpoints.checkpoint_metadata import Unreported
from gemma2_jax.checkpoints.store import find
from gemma2_jax.config import UserError, differences, to_dict
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.reader import CachedBatches
from gemma2_jax.messages import written
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.method import Method
from gemma2_jax.methods.students import Students
from gemma2_jax.run import RunConfig
from gemma2_jax.training.loop import (
    check_existing_run,
    check_inputs_of_finished,
    is_done,
    prepare_configs,
    resume_message,
    train_method,
)
from gemma2_jax.training.packages import check_packages
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.run_folder import Rows, RunFolder
from gemma2_jax.training.start import check_same_inputs
from gemma2_jax.training.state import TrainState, Update, UpdateRule


def train_together(configs: Sequence[RunConfig]) -> None:
    """Trains several runs in one compiled step that shares the data and one forward pass of the teacher.

    Each run gives the same result as on its own, up to rounding, in its own folder. After a stop,
    runs that are behind the others catch up first.

    Raises:
        UserError: as `train`; or the runs cannot be trained together.
    """
    check_together(configs)
    configs = prepare_configs(configs)
    with stops.resuming(partial(resume_message, configs)):
        for config in configs:
            check_existing_run(config)
        done = [config for config in configs if is_done(config)]
        for config in done:
            check_inputs_of_finished(config)
        left = [config for config in configs if config not in done]
        if left:
            check_same_inputs(left)
        while left:
            steps = {config.output: _step_of(config) for config in left}
            first, *later = sorted(set(steps.values()))
            until = min(later, default=left[0].training.steps)
            _train_group([config for config in left if steps[config.output] == first], until)
            left = left if later else []


def _train_group(configs: Sequence[RunConfig], until: int) -> None:
    """Trains runs that are at the same step, up to step `until`."""
    for runs in programs_of(configs):
        method = method_of(runs)
        if isinstance(method, Students):
            train_method(method, runs, partial(_open_folders, runs, method), until)
        else:
            train_method(method, runs, partial(RunFolder, runs[0], method), until)


def programs_of(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """Groups runs by the program that trains them: all in one program, or each in its own if none has a teacher.

    A run with a teacher comes first, since the settings that all runs share are taken from the first run.
    """
    if len(configs) == 1 or not any(config.distill.has_teacher for config in configs):
        return [[config] for config in configs]  # without a teacher, the runs would share only the batches
    return [sorted(configs, key=lambda config: not config.distill.has_teacher)]


def method_of(runs: Sequence[RunConfig]) -> LanguageModelling | Students:
    """Builds the training method of one program's runs (see `programs_of`)."""
    methods = {run.name: build_method(run) for run in runs}
    return methods[runs[0].name] if len(runs) == 1 else Students(methods)


def update_of(runs: Sequence[RunConfig], method: Method) -> UpdateRule:
    """Builds the update rule of one program's runs (see `programs_of`)."""
    if len(runs) == 1:
        return Update(runs[0], method.specs)
    return Updates({run.name: Update(run, method.specs[run.name]) for run in runs})


def _open_folders(
    runs: Sequence[RunConfig], method: Students, mesh: Mesh, progress: TrainingProgress, stack: ExitStack
) -> "RunFolders":
    folders = {run.name: RunFolder(run, method.members[run.name], mesh, progress, stack) for run in runs}
    return RunFolders(folders, method.base_of)


def _step_of(config: RunConfig) -> int:
    found = find(config.output)
    return 0 if found is None else found.step


class Updates:
    """The update rules of several runs: as `Update`, with every argument and result a mapping by run name."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        self._updates = updates

    def abstract_state(self, mesh: Mesh) -> dict[str, TrainState]:
        return {name: update.abstract_state(mesh) for name, update in self._updates.items()}

    def trainable(self, state: Mapping[str, TrainState]) -> dict[str, Any]:
        return {name: update.trainable(state[name]) for name, update in self._updates.items()}

    def averaged(self, state: Mapping[str, TrainState]) -> dict[str, Any] | None:
        """The averages of all runs, with the weights themselves for a run without; None if no run has averages."""
        found = {name: update.averaged(state[name]) for name, update in self._updates.items()}
        if not any(found.values()):
            return None
        return {name: trees or state[name].trainable for name, trees in found.items()}

    def step(self, state: Mapping[str, TrainState]) -> jax.Array:
        """The step of the first run; all runs are at the same step."""
        return next(update.step(state[name]) for name, update in self._updates.items())

    def __call__(
        self,
        state: Mapping[str, TrainState],
        gradients: Mapping[str, Any],
        sums: Mapping[str, Any],
        rates: Mapping[str, Any],
    ) -> tuple[dict[str, TrainState], dict[str, Any]]:
        following, metrics = {}, {}
        for name, update in self._updates.items():
            following[name], metrics[name] = update(state[name], gradients[name], sums[name], rates[name])
        return following, metrics


class RunFolders:
    """The folders of several runs at the same step: as `RunFolder`, with states and metrics by run name.

    Args:
        base_of: see `Students`.
    """

    def __init__(self, folders: Mapping[str, RunFolder], base_of: Mapping[str, str]) -> None:
        self._folders, self._base_of = folders, base_of
        self.update = Updates({name: folder.update for name, folder in folders.items()})
        self.abstract = {name: folder.abstract for name, folder in folders.items()}
        self.step = next(folder.step for folder in folders.values())
        rows = {name: folder.unreported.rows for name, folder in folders.items()}
        # A run that was behind the others may have more unreported steps; only the steps common to all are reported.
        count = min(map(len, rows.values()))
        common = [of_run[len(of_run) - count :] for of_run in rows.values()]
        self.unreported = Unreported(
            [dict(zip(rows, of_step, strict=True)) for of_step in zip(*common, strict=True)],
            max(folder.unreported.seconds for folder in folders.values()),
        )
        self._broken: dict[str, UserError] = {}

    def open_writers(self, stack: ExitStack) -> None:
        for folder in self._folders.values():
            folder.open_writers(stack)

    def start(self, examples: Any, tokenizer: Tokenizer) -> tuple[dict[str, TrainState], dict[str, Any]]:
        states: dict[str, TrainState] = {}
        bases: dict[str, Any] = {}
        begin = examples.get_state()
        # Runs that use the cache come last, since only their checkpoints hold the iterator's position in it.
        for name in sorted(self._folders, key=self._uses_cache):
            examples.set_state(begin)
            states[name], base = self._folders[name].start(self._examples_of(name, examples), tokenizer)
            bases.setdefault(self._base_of[name], base)
        return {name: states[name] for name in self._folders}, bases

    def log(self, step: int, rows: Rows, seconds: float) -> None:
        for name, folder in self._folders.items():
            with self._collect_error(name):
                folder.log(step, [row[name] for row in rows], seconds)

    def must_evaluate(self, step: int) -> bool:
        due = [
            folder.must_evaluate(step) for folder in self._folders.values()
        ]  # a list, since each call updates its folder
        return any(due)

    def report_evaluation(
        self, step: int, sums: Mapping[str, Any], averaged: Mapping[str, Any] | None
    ) -> None:
        for name, folder in self._folders.items():
            if folder.must_evaluate(step):
                own = (
                    averaged[name]
                    if averaged is not None and folder.config.training.ema is not None
                    else None
                )
                folder.report_evaluation(step, sums[name], own)

    def save_if_due(self, step: int, state: Mapping[str, TrainState], examples: Any) -> None:
        """Saves the runs with finite metrics, then raises UserError if another run's metrics are not finite."""
        for name, folder in self._folders.items():
            if name not in self._broken:
                folder.save_if_due(step, state[name], self._examples_of(name, examples))
        self._raise_if_broken()

    def save_now(
        self, step: int, state: Mapping[str, TrainState], examples: Any, rows: Rows, seconds: float
    ) -> None:
        for name, folder in self._folders.items():
            own = [row[name] for row in rows]
            with self._collect_error(name):
                folder.save_now(step, state[name], self._examples_of(name, examples), own, seconds)
        self._raise_if_broken()

    def _uses_cache(self, name: str) -> bool:
        return self._folders[name].config.distill.cache is not None

    def _examples_of(self, name: str, examples: Any) -> Any:
        """The iterator that the run would have on its own: without the cache if the run has no teacher."""
        if isinstance(examples, CachedBatches) and not self._uses_cache(name):
            return examples.batches
        return examples

    @contextmanager
    def _collect_error(self, name: str) -> Iterator[None]:
        """Collects a run's UserError, so that the other runs can be saved before it is raised."""
        try:
            yield
        except UserError as error:
            self._broken[name] = error

    def _raise_if_broken(self) -> None:
        if not self._broken:
            return
        first = next(iter(self._broken.values()))
        if len(self._broken) == len(self._folders):
            raise first
        without = " ".join(f"--student {name}" for name in self._broken)
        raise UserError(
            f"{str(first).removesuffix('.')}; the same command without {without} resumes the other runs."
        )


def check_together(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if the runs cannot be trained together (see `check_alike`) or one needs a missing package."""
    for config in configs:
        check_packages(config)
    check_alike(configs)


def check_alike(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if the runs cannot be trained together.

    All runs need the same steps and batches, and all runs with a teacher need the same teacher.
    """
    for config in configs:
        if config.distill.on_policy is not None:
            raise UserError(
                f"{config.name} sets distill.on_policy, so it samples its own batches and cannot share the teacher's "
                "forward pass; train it on its own with `gemma2 train`."
            )
    _check_same(configs, _shared)
    _check_same([config for config in configs if config.distill.has_teacher], _shared_with_teacher)
    outputs = [config.output for config in configs]
    for output in outputs:
        if outputs.count(output) > 1:
            raise UserError(f"output is {output} for two runs; each run needs its own folder.")


def _check_same(configs: Sequence[RunConfig], shared: Callable[[RunConfig], dict[str, Any]]) -> None:
    for config in configs[1:]:
        first = configs[0]
        for key, one, other in differences(shared(first), shared(config)):
            raise UserError(
                f"{first.name} has {key}={written(one)}, but {config.name} has {key}={written(other)}; runs that are "
                "trained together must have the same value."
            )


def _shared(config: RunConfig) -> dict[str, Any]:
    """The settings that must be the same in all runs that are trained together."""
    whole = to_dict(config)
    names = ("data", "tokenizer", "mesh", "layout", "compute", "profile", "compilation_cache")
    in_training = ["steps", "log_every", "accumulation", "eval_batches"]
    in_training += ["profile_steps"] if config.profile else []
    shared = {name: whole[name] for name in names}
    return {**shared, "training": {name: whole["training"][name] for name in in_training}}


def _shared_with_teacher(config: RunConfig) -> dict[str, Any]:
    """The settings that must also be the same in all runs with a teacher: `distill` except for `match`, and more."""
    whole = to_dict(config)
    shared = {"distill": {name: value for name, value in whole["distill"].items() if name != "match"}}
    # The teacher's vocabulary is padded like the student's, and a cache has one temperature.
    shared["model"] = {name: whole["model"][name] for name in ("vocab_size", "vocab_padding")}
    if config.distill.cache is not None:
        shared["objective"] = {"temperature": whole["objective"]["temperature"]}
    return shared
