"""The training loop, for every method: take a step, then log, evaluate and save when due."""

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
    """Trains one run, or several runs in one step. `loop.train` checks folder, data and mesh beforehand.

    Args:
        config: the run's configuration; with several runs, the first one's.
        folder: loads and saves the state and writes the metrics.
        examples: the iterator from `method.examples`.
        frozen: the frozen trees from `method.load_frozen`.
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
        # Compiled ahead of time, so that no step's time includes compilation.
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
        # Metrics of the steps since the last row.
        self._rows: list[Mapping[str, Any]] = list(unreported.rows)

    def train(self, until: int, profile: Profile) -> None:
        """Takes the steps up to `until`. A signal ends training after the current step, whose state is saved."""
        training = self._config.training
        with stopping_together(self._config.checkpoint.grace_seconds, self._progress.print_line) as stop:
            self._evaluate_if_due(stop)  # repeats an evaluation that an earlier stop interrupted
            self._stop_if_due(stop)
            while self._step < until:
                with profile.step(self._step + 1, wait=self._wait):
                    self._take_step()
                self._progress.advance(self._step)
                if training.is_due(self._step, training.log_every):
                    self._log()
                self._evaluate_if_due(stop)
                self._folder.save_if_due(self._step, self._state, self._examples)
                self._stop_if_due(stop)
            if until < training.steps:
                self._save_now()

    def _take_step(self) -> None:
        """Dispatches a step; the devices may still be computing it when this returns."""
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

    def _wait(self) -> None:
        """Waits until the devices have finished all dispatched steps."""
        jax.block_until_ready(self._state)

    def _log(self) -> None:
        self._wait()
        self._stopwatch.stop()
        self._folder.log(self._step, self._rows, self._stopwatch.take())
        self._rows = []

    def _evaluate_if_due(self, stop: AgreedStop) -> None:
        """Evaluates if an evaluation is due and not yet done at this step.

        A stop interrupts the evaluation, which is then made when the run is resumed. At the last step it is finished
        despite a stop, since no step is left to resume for.
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
        except _InterruptedError:
            return
        self._folder.report_evaluation(self._step, sums)

    def _stop_if_due(self, stop: AgreedStop) -> None:
        if stop.is_due():
            self._save_now()
            stops.check()

    def _save_now(self) -> None:
        self._wait()
        self._stopwatch.stop()
        self._folder.save_now(self._step, self._state, self._examples, self._rows, self._stopwatch.take())


class _InterruptedError(Exception):
    """A stop interrupted an evaluation."""


def _until(stop: AgreedStop, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if stop.is_due():
            raise _InterruptedError
        yield batch
