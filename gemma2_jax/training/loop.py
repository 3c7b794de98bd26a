"""The one training loop: restore or start, step, log, evaluate, save."""

import math
from contextlib import ExitStack
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.checkpoints.store import CheckpointStore, latest_step
from gemma2_jax.config import UserError, to_dict
from gemma2_jax.data.pipeline import validation_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import locked
from gemma2_jax.model.counts import training_flops_per_token
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.inputs import Inputs
from gemma2_jax.training.metrics import Writer, open_writers, perplexity
from gemma2_jax.training.optimizer import build_optimizer, learning_rate_schedule
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.start import check_batch, check_data, check_same_run, load_initial, write_inputs
from gemma2_jax.training.state import TrainState, abstract_state, init_state, state_from_params
from gemma2_jax.training.step import build_evaluation_step, build_train_step
from gemma2_jax.training.throughput import Stopwatch, peak_flops
from gemma2_jax.training.validation import validate


def train(config: RunConfig) -> None:
    """Train to `config.training.steps`, going on from the newest checkpoint in the run folder if there is one.

    Writes config.yaml, tokenizer.model, data.json, metrics.jsonl, tensorboard/ and checkpoints/ into
    config.output.
    A run that is done already is left as it is.

    Raises:
        UserError: data, teacher, mesh or checkpoint do not fit the configuration, or the loss is not finite.
    """
    check_same_run(config)
    if latest_step(config.output) == config.training.steps:
        return
    mesh = build_mesh(config.mesh)
    check_batch(config, mesh)
    tokenizer = check_data(config)
    with jax.set_mesh(mesh), ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                stack.enter_context(locked(config.output, wait=False))
            except BlockingIOError:
                raise UserError(
                    f"{config.output} is being trained by another process; wait for it, or choose another output."
                ) from None
        trainer = _Trainer(config, tokenizer, mesh, stack)
        if jax.process_index() == 0:
            write_inputs(config)  # now that nothing was refused
        trainer.run()


class _Trainer:
    """A run in progress: its state, its data, and whom it reports to."""

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh, stack: ExitStack) -> None:
        self.config, self.mesh = config, mesh
        optimizer = build_optimizer(config.optimizer, config.training.steps)
        abstract = abstract_state(config.model, optimizer, mesh)
        self.inputs = Inputs(config, tokenizer, mesh)
        self.store = stack.enter_context(CheckpointStore(config.output, config.checkpoint.keep))
        self.step = self.store.latest_step or 0
        first_process = jax.process_index() == 0
        self.progress = stack.enter_context(
            TrainingProgress(config.name, config.training.steps, self.step, show=first_process)
        )
        if self.step:
            self.progress.say(f"{config.name} goes on from its checkpoint at step {self.step}")
            self.state = self._restore(abstract)
        elif config.training.init_from is not None:
            params = load_initial(config.training.init_from, config.model, tokenizer, mesh)
            self.state = state_from_params(params, optimizer, abstract)
        else:
            self.state = init_state(config.model, optimizer, abstract, config.seed)
        train_step = build_train_step(config, optimizer, abstract)
        # Compiled ahead, so that no step's time contains it.
        self.train_step = train_step.lower(abstract, self.inputs.teacher, *self.inputs.abstract()).compile()
        self.evaluation_step = build_evaluation_step(
            config.compute, config.distill, config.objective.block_tokens
        )
        self.learning_rate = learning_rate_schedule(config.optimizer, config.training.steps)
        teacher_config = None if self.inputs.teacher is None else self.inputs.teacher.config
        self.flops_per_token = training_flops_per_token(config.model, config.data.seq_len, teacher_config)
        self.peak_flops = peak_flops(jax.devices()[0])
        self.writers: list[Writer] = []
        if first_process:
            self.writers = open_writers(config.metrics, Path(config.output), self.step, to_dict(config))
            for writer in self.writers:
                stack.callback(writer.close)

    def run(self) -> None:
        training, checkpoint = self.config.training, self.config.checkpoint
        stopwatch = Stopwatch()
        rows: list[dict[str, jax.Array]] = []
        while self.step < training.steps:
            stopwatch.start()
            self.state, row = self.train_step(self.state, self.inputs.teacher, *next(self.inputs))
            rows.append(row)
            self.step += 1
            self.progress.advance(self.step)
            last = self.step == training.steps
            if last or self.step % training.log_every == 0:
                jax.block_until_ready(self.state)
                stopwatch.stop()
                self._log(rows, stopwatch.take())
                rows = []
            if last or self.step % training.eval_every == 0:
                self._evaluate()
            if last or self.step % checkpoint.every == 0:
                self._save()

    def _log(self, rows: list[dict[str, jax.Array]], seconds: float) -> None:
        """One row: averages over the steps since the last one, and the speed, which all devices have reached."""
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
            "learning_rate": float(self.learning_rate(self.step - 1)),
            "tokens": self.step * self.config.data.batch_size * self.config.data.seq_len,
            "tokens_per_second": speed,
        }
        if self.peak_flops is not None:
            row["mfu"] = speed * self.flops_per_token / (self.peak_flops * self.mesh.size)
        self._write("train", row)

    def _evaluate(self) -> None:
        model = Gemma2(self.config.model, self.state.params)
        batches = validation_batches(self.config.data, jax.process_index(), jax.process_count())
        teacher = self.inputs.teacher
        self._write("validation", validate(self.evaluation_step, model, teacher, batches, self.mesh))

    def _write(self, split: str, row: dict[str, float]) -> None:
        for writer in self.writers:
            writer.write(self.step, split, row)
        self.progress.report(self.step, split, row)

    def _save(self) -> None:
        trees = {"params": self.state.params, "optimizer": self.state.optimizer}
        self.store.save(self.step, trees, self.inputs.batches, to_dict(self.config))

    def _restore(self, abstract: TrainState) -> TrainState:
        targets = {"params": abstract.params, "optimizer": abstract.optimizer}
        trees = self.store.restore(self.step, targets, self.inputs.batches)
        step = jax.device_put(jnp.int32(self.step), abstract.step.sharding)
        return TrainState(step, trees["params"], trees["optimizer"])
