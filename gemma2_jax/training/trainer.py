"""One run in progress: its state, its compiled steps, its checkpoints, and whom it reports to."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from gemma2_jax.checkpoints.store import CheckpointStore
from gemma2_jax.config import UserError, to_dict
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches, validation_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.initialise import initial_params
from gemma2_jax.distill.on_policy import build_rollout, on_policy_steps
from gemma2_jax.model.counts import training_flops_per_token
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.hosts import is_first
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.config import RunConfig
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
    ) -> None:
        self.config, self.inputs, self.mesh, self.progress = config, inputs, mesh, progress
        optimizer = build_optimizer(config.optimizer, config.training.steps)
        abstract = abstract_state(config.model, optimizer, mesh)
        abstract = replace(abstract, matching=abstract_matching(config, inputs.teacher, mesh))
        self.store = stack.enter_context(CheckpointStore(config.output, config.checkpoint.keep))
        self.step = self.store.latest_step or 0
        if self.step:
            self.progress.say(f"{config.name} goes on from its checkpoint at step {self.step}")
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
        self._stopwatch = Stopwatch()
        self._rows: list[dict[str, jax.Array]] = []  # of the steps since the last row of metrics
        self._writers: list[Writer] = []

    def open_writers(self, stack: ExitStack) -> None:
        """Opens what metrics go to: once no other run beside this one can be refused."""
        config = self.config
        if is_first():
            self._writers = open_writers(config.metrics, Path(config.output), self.step, to_dict(config))
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
        self._rows.append(row | origin)
        self.step += 1

    def settle(self) -> None:
        """Where metrics are due, waits for the devices, and stops the clock."""
        if self._is_due(self.config.training.log_every):
            jax.block_until_ready(self.state)
            self._stopwatch.stop()

    def report(self) -> None:
        """Logs, evaluates and saves, each where it is due. Goes after `settle`."""
        if self._is_due(self.config.training.log_every):
            self._log(self._rows, self._stopwatch.take())
            self._rows = []
        if self._is_due(self.config.training.eval_every):
            self._evaluate()
        if self._is_due(self.config.checkpoint.every):
            self._save()

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.config.training.steps

    def _log(self, rows: list[dict[str, jax.Array]], seconds: float) -> None:
        """One row: averages over the steps since the last one, and the speed, which all devices have reached.

        `tokens_per_second` counts targets of the loss. The time of an on-policy step is also that of its sampling, and
        its targets are the tokens that were sampled, without their prompts.
        """
        values = {name: [float(row[name]) for row in rows] for name in rows[0]}
        tokens = sum(values.pop("tokens"))
        averages = {name: sum(steps) / len(steps) for name, steps in values.items()}
        for name, average in averages.items():
            # Before anything is saved: a checkpoint of broken weights would replace the last good one.
            if not math.isfinite(average):
                raise UserError(
                    f"{self.config.output} stopped before step {self.step}: {name} is {average}; try a lower "
                    "optimizer.learning_rate or optimizer.clip_norm in another output."
                )
        speed = tokens / seconds
        row = {
            **averages,
            "perplexity": perplexity(averages["cross_entropy"]),
            "learning_rate": float(self._learning_rate(self.step - 1)),
            "tokens": self.step * self.config.data.batch_size * self.config.data.seq_len,
            "tokens_per_second": speed,
        }
        if self._peak_flops is not None:
            row["mfu"] = speed * self._flops_per_token / (self._peak_flops * self.mesh.size)
        self._write("train", row)

    def _evaluate(self) -> None:
        model = Gemma2(self.config.model, self.state.params)
        batches = validation_batches(self.config.data, *self.inputs.share)
        judge = self.inputs.judge
        with self.progress.doing("validating", brief=True):
            row = validate(self._evaluation_step, model, judge, batches, self.mesh)
        self._write("validation", row)

    def _write(self, split: str, row: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(self.step, split, row)
        self.progress.report(self.config.name, self.step, split, row)

    def _save(self) -> None:
        with self.progress.doing("saving", brief=True):
            self.store.save(self.step, _trees(self.state), self.inputs.batches, to_dict(self.config))

    def _restore(self, abstract: TrainState) -> TrainState:
        trees = self.store.restore(self.step, _trees(abstract), self.inputs.batches)
        return TrainState(jax.device_put(jnp.int32(self.step), abstract.step.sharding), **trees)


def _trees(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state, each part by its name there."""
    trees = {"params": state.params, "optimizer": state.optimizer, "matching": state.matching}
    return {name: tree for name, tree in trees.items() if tree is not None}
