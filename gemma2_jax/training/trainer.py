"""The loop over steps, for every method: a step, then what is to be reported and saved."""

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from gemma2_jax import stops
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import validation_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.methods.method import BASE, Method, frozen_in_step
from gemma2_jax.processes.agreed_stop import AgreedStop, stopping_together
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.profile import Profile
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.run_folder import Folder
from gemma2_jax.training.step import build_evaluation_step, build_train_step
from gemma2_jax.training.throughput import Stopwatch
from gemma2_jax.training.validation import sum_over


class Trainer:
    """A run between its steps. Folder, data and mesh are checked before, see `loop.train`.

    Args:
        config: steps, batches, mesh and layout of the run.
        folder: where its state comes from, and where that and its metrics go.
        examples, frozen: the method's.
    """

    def __init__(
        self,
        config: RunConfig,
        method: Method,
        folder: Folder,
        examples: Any,
        frozen: Mapping[str, Any],
        tokenizer: Tokenizer,
        mesh: Mesh,
        progress: TrainingProgress,
    ) -> None:
        self._config, self._method, self._folder, self._examples = config, method, folder, examples
        self._mesh, self._progress = mesh, progress
        self._step, unreported = folder.step, folder.unreported
        self._state, base = folder.start(examples, tokenizer)
        self._frozen = {**frozen, BASE: base}
        self._in_step = frozen_in_step(method, self._frozen)
        # Compiled ahead, so that no step's time contains it.
        train_step = build_train_step(
            method, folder.update, folder.abstract, config.layout, config.training.accumulation
        )
        batch = method.abstract_batch(mesh)
        with progress.doing(f"{config.name}: compiling the training step"):
            self._train_step = train_step.lower(folder.abstract, self._in_step, batch).compile()
        self._collect: Compiled | None = None
        if any(map(method.collects, range(self._step, config.training.steps))):
            collect = jax.jit(method.collect, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, batch))
            trainable, step = folder.update.trainable(folder.abstract), folder.update.step(folder.abstract)
            with progress.doing(f"{config.name}: compiling the rollout"):
                self._collect = collect.lower(trainable, self._in_step, batch, step).compile()
        self._evaluation_step = build_evaluation_step(method)
        self._stopwatch = Stopwatch(unreported.seconds)
        self._rows: list[Mapping[str, Any]] = list(
            unreported.rows
        )  # of the steps since the last row of metrics

    def train(self, until: int, profile: Profile) -> None:
        """Takes the steps up to `until`; a signal ends it behind one of them, which is saved."""
        with stopping_together(self._config.checkpoint.grace_seconds, self._progress.say) as stop:
            self._evaluate_if_due(stop)  # what an earlier stop has cut short
            self._stop_if_due(stop)
            while self._step < until:
                with profile.step(self._step + 1, settle=self._settle):
                    self._take_step()
                self._progress.advance(self._step)
                if self._is_due(self._config.training.log_every):
                    self._log()
                self._evaluate_if_due(stop)
                self._folder.save_if_due(self._step, self._state, self._examples)
                self._stop_if_due(stop)
            if until < self._config.training.steps:
                self._save_now()

    def _take_step(self) -> None:
        """Begins a step; it may still be computed when this returns."""
        batch = on_mesh(next(self._examples), self._mesh)
        self._stopwatch.start()
        if self._method.collects(self._step):
            assert self._collect is not None
            trainable, step = (
                self._folder.update.trainable(self._state),
                self._folder.update.step(self._state),
            )
            batch = self._collect(trainable, self._in_step, batch, step)
        self._state, metrics = self._train_step(self._state, self._in_step, batch)
        self._rows.append(self._method.row(self._step, metrics))
        self._step += 1

    def _settle(self) -> None:
        jax.block_until_ready(self._state)

    def _is_due(self, every: int) -> bool:
        return self._step % every == 0 or self._step == self._config.training.steps

    def _log(self) -> None:
        self._settle()
        self._stopwatch.stop()
        self._folder.log(self._step, self._rows, self._stopwatch.take())
        self._rows = []

    def _evaluate_if_due(self, stop: AgreedStop) -> None:
        """Evaluates, unless that is done at this step.

        A stop cuts it short, and it is done when the run goes on; except at the last step, where a run does not go on.
        """
        if not self._step or not self._folder.must_evaluate(self._step):
            return
        config = self._config
        batches: Iterable[Batch] = validation_batches(
            config.data, *feeding_share(self._mesh), config.training.eval_batches
        )
        if self._step < config.training.steps:
            batches = _until(stop, batches)
        trainable = self._folder.update.trainable(self._state)
        try:
            with self._progress.doing("validating", brief=True):
                step = partial(self._evaluation_step, trainable, self._frozen)
                sums = sum_over(step, batches, self._mesh)
        except _CutShortError:
            return
        self._folder.report_evaluation(self._step, sums)

    def _stop_if_due(self, stop: AgreedStop) -> None:
        if stop.is_due():
            self._save_now()
            stops.check()

    def _save_now(self) -> None:
        self._settle()
        self._stopwatch.stop()
        self._folder.save_now(self._step, self._state, self._examples, self._rows, self._stopwatch.take())


class _CutShortError(Exception):
    """An evaluation is not finished because the run is stopped."""


def _until(stop: AgreedStop, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if stop.is_due():
            raise _CutShortError
        yield batch
