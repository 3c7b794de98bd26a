"""One run in progress: its state, its compiled steps, its checkpoints, and whom it reports to."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from gemma2_jax.checkpoints.store import CheckpointStore, Found, Unreported
from gemma2_jax.config import UserError, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches, validation_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.initialise import initial_params
from gemma2_jax.distill.on_policy import build_rollout, on_policy_steps
from gemma2_jax.model.counts import training_flops_per_token
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.agreed_stop import AgreedStop
from gemma2_jax.sharding.hosts import is_first
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.going_on import older_schedule
from gemma2_jax.training.inputs import Inputs
from gemma2_jax.training.matching import abstract_matching, init_matching
from gemma2_jax.training.metrics import Writer, open_writers, perplexity
from gemma2_jax.training.optimizer import build_optimizer, learning_rate_schedule
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from gemma2_jax.training.step import Taught, build_evaluation_step, build_train_step
from gemma2_jax.training.throughput import Stopwatch, peak_flops
from gemma2_jax.training.validation import validate


class Trainer:
    """A run between its steps. Folder, data and mesh are checked before, see `loop.train`.

    Args:
        inputs: what it is fed; their iterator is moved to where the run stood.
        found: the checkpoint to go on from; None to begin.
        stack: closes what is opened here.
    """

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        tokenizer: Tokenizer,
        mesh: Mesh,
        progress: TrainingProgress,
        stack: ExitStack,
        found: Found | None = None,
    ) -> None:
        self.config, self.inputs, self.mesh, self.progress = config, inputs, mesh, progress
        optimizer = build_optimizer(config.optimizer, config.training.steps)
        abstract = abstract_state(config.model, optimizer, mesh)
        abstract = replace(abstract, matching=abstract_matching(config, inputs.teacher, mesh))
        self.store = stack.enter_context(CheckpointStore(config.output, config.checkpoint.keep))
        self.step = 0 if found is None else found.step
        unreported = Unreported()
        if found is not None:
            unreported = self.store.unreported(self.step)
            passed_over = "".join(f"; {clause}" for clause in found.passed_over)
            self.progress.say(f"{config.name} goes on from its checkpoint at step {self.step}{passed_over}")
            if (line := older_schedule(config, self.step)) is not None:
                self.progress.say(line)
            self.state = self._restore(abstract)
        elif config.initialise.source is not None:
            rows = train_batches(config.data, *inputs.share)
            batches = (on_mesh(batch, mesh) for batch in rows)
            with self.progress.doing(f"{config.name}: loading the initial weights"):
                params = initial_params(config.initialise, config.model, tokenizer, mesh, batches)
            self.state = state_from_params(params, optimizer, replace(abstract, matching=None))
        else:
            with self.progress.doing("drawing the initial weights", brief=True):
                self.state = init_state(
                    config.model, optimizer, replace(abstract, matching=None), config.seed
                )
        if abstract.matching is not None and not self.step:
            self.state = replace(self.state, matching=init_matching(config, abstract.matching))
        train_step = build_train_step(config, optimizer, abstract)
        # Compiled ahead, so that no step's time contains it.
        batch, taught = inputs.abstract()
        with self.progress.doing(f"{config.name}: compiling the training step"):
            self._train_step = train_step.lower(abstract, inputs.teacher, batch, taught).compile()
        self._rollout: Compiled | None = None
        if config.distill.on_policy is not None:
            self._on_policy_steps = on_policy_steps(
                config.distill.on_policy, config.seed, config.training.steps
            )
            rollout = build_rollout(
                config.distill.on_policy, config.model, config.compute, mesh, config.seed, tokenizer.eos_id
            )
            with self.progress.doing(f"{config.name}: compiling the sampling of own tokens"):
                self._rollout = rollout.lower(abstract.params, batch, abstract.step).compile()
        self._evaluation_step = build_evaluation_step(
            config.compute, config.distill, config.objective.block_tokens
        )
        self._learning_rate = learning_rate_schedule(config.optimizer, config.training.steps)
        teacher = None if inputs.teacher is None else inputs.teacher.config
        self._flops_per_token = training_flops_per_token(config.model, config.data.seq_len, teacher)
        self._peak_flops = peak_flops(jax.devices()[0])
        self._stopwatch = Stopwatch(unreported.seconds)
        # Of the steps since the last row of metrics.
        self._rows: list[Mapping[str, jax.Array | float]] = list(unreported.rows)
        # Whether what is due at this step is done. (A run that was to be longer may end here.)
        self._evaluated = unreported.evaluated and self.step < config.training.steps
        self._writers: list[Writer] = []

    def open_writers(self, stack: ExitStack) -> None:
        """Opens what metrics go to: once no other run beside this one can be refused."""
        config = self.config
        if is_first():
            self._writers = open_writers(
                config.metrics, Path(config.output), self.step, to_dict(config), self._evaluated
            )
            for writer in self._writers:
                stack.callback(writer.close)

    def take_step(self, batch: Batch, taught: Callable[[], Taught]) -> None:
        """Begins a step on what `next(inputs)` gave; it may still be computed when this returns."""
        self._stopwatch.start()
        origin = {}
        if self._rollout is not None:
            origin["on_policy"] = self._on_policy_steps[self.step]
            if origin["on_policy"]:
                batch = self._rollout(self.state.params, batch, self.state.step)
                taught = partial(self.inputs.read, batch)
        self.state, row = self._train_step(self.state, self.inputs.teacher, batch, taught())
        if origin.get("on_policy"):
            row["sampled_cross_entropy"] = row.pop("cross_entropy")
        self._rows.append(row | origin)
        self.step += 1
        self._evaluated = not self._is_due(self.config.training.eval_every)

    def settle(self) -> None:
        """Where metrics are due, waits for the devices, and stops the clock."""
        if self._is_due(self.config.training.log_every):
            jax.block_until_ready(self.state)
            self._stopwatch.stop()

    def report(self, stop: AgreedStop) -> None:
        """Logs, evaluates and saves, each where it is due. Goes after `settle`."""
        if self._is_due(self.config.training.log_every):
            self._log(self._rows, self._stopwatch.take())
            self._rows = []
        self.evaluate_if_due(stop)
        if self._is_due(self.config.checkpoint.every):
            self._save()

    def evaluate_if_due(self, stop: AgreedStop) -> None:
        """Evaluates, unless that is done at this step.

        A stop cuts it short, and it is done when the run goes on; except at the last step, where a run does not go on.
        """
        if self._evaluated:
            return
        batches: Iterable[Batch] = validation_batches(
            self.config.data, *self.inputs.share, self.config.training.eval_batches
        )
        if self.step < self.config.training.steps:
            batches = _until(stop, batches)
        with suppress(_CutShortError):
            self._evaluate(batches)
            self._evaluated = True

    def save_what_is_left(self) -> None:
        """Saves the step that the run is at, if that is not done, and waits until it is written.

        Raises:
            UserError: a metric is not finite; nothing is saved then.
        """
        self.store.wait()
        if self.step and self.store.latest_step != self.step:
            jax.block_until_ready(self.state)
            self._stopwatch.stop()
            rows = [{name: float(value) for name, value in row.items()} for row in self._rows]
            for row in rows:
                self._check_finite(row)
            self._save(rows, self._stopwatch.take())
        self.store.wait()

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.training.steps

    def _log(self, rows: Sequence[Mapping[str, jax.Array | float]], seconds: float) -> None:
        """One row: averages over the steps since the last one, and the speed, which all devices have reached.

        `loss` is the objective. `cross_entropy` and `perplexity` are those of text alone; of on-policy steps, whose
        targets the student has chosen itself, it is `sampled_cross_entropy`. `tokens_seen` counts the positions of all
        batches since the run began, padding included.
        `tokens_per_second` counts targets of the loss. The time of an on-policy step is also that of its sampling, and
        its targets are the tokens that were sampled, without their prompts.
        """
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: [float(row[name]) for row in rows if name in row] for name in names}
        tokens = sum(values.pop("tokens"))
        averages = {name: sum(steps) / len(steps) for name, steps in values.items()}
        self._check_finite(averages)
        speed = tokens / seconds
        row = {
            **averages,
            "learning_rate": float(self._learning_rate(self.step - 1)),
            "tokens_seen": self.step * self.config.data.batch_size * self.config.data.seq_len,
            "tokens_per_second": speed,
        }
        if "cross_entropy" in averages:
            row["perplexity"] = perplexity(averages["cross_entropy"])
        if self._peak_flops is not None:
            row["mfu"] = speed * self._flops_per_token / (self._peak_flops * self.mesh.size)
        self._write("train", row)

    def _check_finite(self, row: Mapping[str, float]) -> None:
        """Before anything is saved: a checkpoint of broken weights would replace the last good one."""
        for name, value in row.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{self.config.output} stopped before step {self.step}: {name} is {value}; try a lower "
                    "optimizer.learning_rate or optimizer.clip_norm in another output."
                )

    def _evaluate(self, batches: Iterable[Batch]) -> None:
        model = Gemma2(self.config.model, self.state.params)
        judge = self.inputs.judge
        with self.progress.doing("validating", brief=True):
            row = validate(self._evaluation_step, model, judge, batches, self.mesh)
        self._write("validation", row)

    def _write(self, split: str, row: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(self.step, split, row)
        self.progress.report(self.config.name, self.step, split, row)

    def _save(self, rows: Sequence[Mapping[str, float]] = (), seconds: float = 0.0) -> None:
        """Args: of the steps since the last row of metrics, if there are any."""
        unreported = Unreported(rows, seconds, self._evaluated)
        with self.progress.doing("saving", brief=True):
            self.store.save(
                self.step, _trees(self.state), self.inputs.batches, to_dict(self.config), unreported
            )

    def _restore(self, abstract: TrainState) -> TrainState:
        trees = self.store.restore(self.step, _trees(abstract), self.inputs.batches)
        return TrainState(jax.device_put(jnp.int32(self.step), abstract.step.sharding), **trees)


class _CutShortError(Exception):
    """An evaluation is not finished because the run is stopped."""


def _until(stop: AgreedStop, batches: Iterable[Batch]) -> Iterator[Batch]:
    for batch in batches:
        if stop.is_due():
            raise _CutShortError
        yield batch


def _trees(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state, each part by its name there."""
    trees = {"params": state.params, "optimizer": state.optimizer, "matching": state.matching}
    return {name: tree for name, tree in trees.items() if tree is not None}
