"""Several students of one teacher trained at once, each in a run folder like any other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax import stops
from gemma2_jax.checkpoints.store import Unreported, find
from gemma2_jax.config import UserError, differences, to_dict
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.reader import CachedBatches
from gemma2_jax.methods.choose import build_method
from gemma2_jax.methods.language_modelling import LanguageModelling
from gemma2_jax.methods.method import Method
from gemma2_jax.methods.students import Students
from gemma2_jax.run import RunConfig
from gemma2_jax.training.loop import (
    check_begun,
    check_teacher_of_done,
    how_to_go_on,
    is_done,
    prepared,
    train_method,
)
from gemma2_jax.training.packages import check_packages
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.run_folder import Rows, RunFolder
from gemma2_jax.training.start import check_same_inputs
from gemma2_jax.training.state import TrainState, Update, UpdateRule


def train_together(configs: Sequence[RunConfig]) -> None:
    """Trains several runs in one compiled step, which share their data and one forward pass of their teacher.

    Each ends as it would alone, but for rounding, in its own folder. Those that are behind, after a stop, are trained
    up to the others first.

    Raises:
        UserError: as `train`; or the runs do not go together.
    """
    check_together(configs)
    configs = prepared(configs)
    with stops.resuming(partial(how_to_go_on, configs)):
        for config in configs:
            check_begun(config)
        done = [config for config in configs if is_done(config)]
        for config in done:
            check_teacher_of_done(config)
        left = [config for config in configs if config not in done]
        if left:
            check_same_inputs(left)
        while left:
            steps = {config.output: _step_of(config) for config in left}
            first, *later = sorted(set(steps.values()))
            until = min(later, default=left[0].training.steps)
            _train_in_step([config for config in left if steps[config.output] == first], until)
            left = left if later else []


def _train_in_step(configs: Sequence[RunConfig], until: int) -> None:
    """Trains runs that are at the same step, up to another one."""
    for runs in programs_of(configs):
        method = method_of(runs)
        if isinstance(method, Students):
            train_method(method, runs, partial(_open_folders, runs, method), until)
        else:
            train_method(method, runs, partial(RunFolder, runs[0], method), until)


def programs_of(configs: Sequence[RunConfig]) -> list[list[RunConfig]]:
    """The runs of each program that trains them: all runs in one, or each in its own where there is no teacher.

    A run with a teacher comes first: what all share is taken from it.
    """
    if len(configs) == 1 or not any(config.distill.teaches for config in configs):
        return [[config] for config in configs]  # they would share nothing but the batches
    return [sorted(configs, key=lambda config: not config.distill.teaches)]


def method_of(runs: Sequence[RunConfig]) -> LanguageModelling | Students:
    """The method of one program's runs, see `programs_of`."""
    methods = {run.name: build_method(run) for run in runs}
    return methods[runs[0].name] if len(runs) == 1 else Students(methods)


def update_of(runs: Sequence[RunConfig], method: Method) -> UpdateRule:
    """The update rule of one program's runs."""
    if len(runs) == 1:
        return Update(runs[0], method.specs)
    return Updates({run.name: Update(run, method.specs[run.name]) for run in runs})


def _open_folders(
    runs: Sequence[RunConfig], method: Students, mesh: Mesh, progress: TrainingProgress, stack: ExitStack
) -> "RunFolders":
    return RunFolders(
        {run.name: RunFolder(run, method.members[run.name], mesh, progress, stack) for run in runs}
    )


def _step_of(config: RunConfig) -> int:
    found = find(config.output)
    return 0 if found is None else found.step


class Updates:
    """The update rules of several runs: as `Update`, with a branch for each run in whatever it takes and gives."""

    def __init__(self, updates: Mapping[str, Update]) -> None:
        self._updates = updates

    def abstract_state(self, mesh: Mesh) -> dict[str, TrainState]:
        return {name: update.abstract_state(mesh) for name, update in self._updates.items()}

    def trainable(self, state: Mapping[str, TrainState]) -> dict[str, Any]:
        return {name: update.trainable(state[name]) for name, update in self._updates.items()}

    def step(self, state: Mapping[str, TrainState]) -> jax.Array:
        """All runs are at the same step."""
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
    """The folders of several runs that are at the same step: as `RunFolder`, with a branch for each run."""

    def __init__(self, folders: Mapping[str, RunFolder]) -> None:
        self._folders = folders
        self.update = Updates({name: folder.update for name, folder in folders.items()})
        self.abstract = {name: folder.abstract for name, folder in folders.items()}
        self.step = next(folder.step for folder in folders.values())
        rows = {name: folder.unreported.rows for name, folder in folders.items()}
        # A run that was behind the others has more of them: their common steps are reported.
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
        states, bases = {}, {}
        begin = examples.get_state()
        # Those that learn from the cache last: only they know where the iterator stood in it.
        for name in sorted(self._folders, key=self._learns_from_cache):
            examples.set_state(begin)
            states[name], bases[name] = self._folders[name].start(
                self._examples_of(name, examples), tokenizer
            )
        return {name: states[name] for name in self._folders}, bases

    def log(self, step: int, rows: Rows, seconds: float) -> None:
        for name, folder in self._folders.items():
            with self._noted(name):
                folder.log(step, [row[name] for row in rows], seconds)

    def must_evaluate(self, step: int) -> bool:
        due = [folder.must_evaluate(step) for folder in self._folders.values()]  # all of them note the step
        return any(due)

    def report_evaluation(self, step: int, sums: Mapping[str, Any]) -> None:
        for name, folder in self._folders.items():
            if folder.must_evaluate(step):
                folder.report_evaluation(step, sums[name])

    def save_if_due(self, step: int, state: Mapping[str, TrainState], examples: Any) -> None:
        """Raises UserError if a run's loss is not finite: when the others have saved what is due."""
        for name, folder in self._folders.items():
            if name not in self._broken:
                folder.save_if_due(step, state[name], self._examples_of(name, examples))
        self._raise_if_broken()

    def save_now(
        self, step: int, state: Mapping[str, TrainState], examples: Any, rows: Rows, seconds: float
    ) -> None:
        for name, folder in self._folders.items():
            own = [row[name] for row in rows]
            with self._noted(name):
                folder.save_now(step, state[name], self._examples_of(name, examples), own, seconds)
        self._raise_if_broken()

    def _learns_from_cache(self, name: str) -> bool:
        return self._folders[name].config.distill.cache is not None

    def _examples_of(self, name: str, examples: Any) -> Any:
        """The iterator as a run alone would have it: without the cache, if the run learns from the text."""
        if isinstance(examples, CachedBatches) and not self._learns_from_cache(name):
            return examples.batches
        return examples

    @contextmanager
    def _noted(self, name: str) -> Iterator[None]:
        """Notes what a run is refused for, so that the others can be saved before it is raised."""
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
            f"{str(first).removesuffix('.')}; without {without}, the same command goes on with the others."
        )


def check_together(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if runs cannot be trained at once (`check_alike`), or a package is missing that one of them
    needs."""
    for config in configs:
        check_packages(config)
    check_alike(configs)


def check_alike(configs: Sequence[RunConfig]) -> None:
    """Raises UserError if runs cannot be trained at once: in the same steps, on the same batches, and those with a
    teacher from the same one."""
    for config in configs:
        if config.distill.on_policy is not None:
            raise UserError(
                f"{config.name} has distill.on_policy, and students that sample for themselves share no pass of the "
                "teacher; train each of them by itself, with gemma2 train."
            )
    _check_same(configs, _shared)
    _check_same([config for config in configs if config.distill.teaches], _shared_with_teacher)
    outputs = [config.output for config in configs]
    for output in outputs:
        if outputs.count(output) > 1:
            raise UserError(f"output is {output} for two runs; each needs a folder of its own.")


def _check_same(configs: Sequence[RunConfig], shared: Callable[[RunConfig], dict[str, Any]]) -> None:
    for config in configs[1:]:
        first = configs[0]
        for key, one, other in differences(shared(first), shared(config)):
            raise UserError(
                f"{first.name} has {key}={one}, and {config.name} has {other}; runs that are trained together share it."
            )


def _shared(config: RunConfig) -> dict[str, Any]:
    """What runs that are trained together have in common."""
    whole = to_dict(config)
    names = ("data", "tokenizer", "mesh", "layout", "compute", "profile", "compilation_cache")
    in_training = ["steps", "log_every", "accumulation", "eval_batches"]
    in_training += ["profile_steps"] if config.profile else []
    shared = {name: whole[name] for name in names}
    return {**shared, "training": {name: whole["training"][name] for name in in_training}}


def _shared_with_teacher(config: RunConfig) -> dict[str, Any]:
    """What those with a teacher have in common beside that: everything about it but the layers that each matches."""
    whole = to_dict(config)
    shared = {"distill": {name: value for name, value in whole["distill"].items() if name != "match"}}
    # The teacher has the rows of the student's vocabulary, and a cache one temperature.
    shared["model"] = {name: whole["model"][name] for name in ("vocab_size", "vocab_padding")}
    if config.distill.cache is not None:
        shared["objective"] = {"temperature": whole["objective"]["temperature"]}
    return shared
