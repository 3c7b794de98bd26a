"""A run's folder during training: initial or restored state, metrics, evaluations and checkpoints."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.checkpoints.checkpoint_metadata import Unreported, read_unreported
from gemma2_jax.checkpoints.store import AVERAGED, CheckpointStore, FoundCheckpoint, find
from gemma2_jax.config import UserError, to_dict
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.initialise import initial_params
from gemma2_jax.methods.choose import own_name
from gemma2_jax.methods.method import BASE, PARAMS, ModelMethod
from gemma2_jax.processes.hosts import is_first
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import on_mesh
from gemma2_jax.training.metrics import open_writers, perplexity
from gemma2_jax.training.optimizer import learning_rate_schedule
from gemma2_jax.training.progress import TrainingProgress
from gemma2_jax.training.resume import older_schedule_note
from gemma2_jax.training.state import TrainState, Update, UpdateRule, initial_dtypes, initial_state
from gemma2_jax.training.throughput import peak_flops
from gemma2_jax.training.trackers.tracker import TrackedRun, Tracker
from gemma2_jax.training.validation import averages

Rows = Sequence[Mapping[str, Any]]  # the metrics of some steps, one mapping per step


class Folder(Protocol):
    """Loads and saves the training state and writes the metrics, of one run or of several.

    The members are those of `RunFolder`.
    """

    step: int
    unreported: Unreported

    @property
    def update(self) -> UpdateRule: ...

    @property
    def abstract(self) -> Any: ...

    def open_writers(self, stack: ExitStack) -> None: ...

    def start(self, examples: Any, tokenizer: Tokenizer) -> tuple[Any, Any]: ...

    def log(self, step: int, rows: Rows, seconds: float) -> None: ...

    def must_evaluate(self, step: int) -> bool: ...

    def report_evaluation(
        self, step: int, sums: Mapping[str, Any], averaged: Mapping[str, Any] | None
    ) -> None: ...

    def save_if_due(self, step: int, state: Any, examples: Any) -> None: ...

    def save_now(self, step: int, state: Any, examples: Any, rows: Rows, seconds: float) -> None: ...


class RunFolder:
    """One run: its update rule, its checkpoints and its metrics writers.

    Args:
        stack: exit stack that closes the checkpoint store.

    Attributes:
        step: step of the checkpoint that the run resumes from, 0 without a checkpoint.
        unreported: metrics and time of the steps before that checkpoint that no row of metrics has reported.
    """

    def __init__(
        self,
        config: RunConfig,
        method: ModelMethod,
        mesh: Mesh,
        progress: TrainingProgress,
        stack: ExitStack,
    ) -> None:
        self.config, self._method, self._mesh, self._progress = config, method, mesh, progress
        self.update = Update(config, method.specs)
        self.abstract = self.update.abstract_state(mesh)
        self._found = find(config.output)
        self._store = stack.enter_context(CheckpointStore(config.output, config.checkpoint.keep))
        self.step = 0 if self._found is None else self._found.step
        self.unreported = Unreported() if self._found is None else read_unreported(self._found.path)
        # Whether the evaluation due at the current step is done. (A run whose training.steps was lowered to this step
        # may have been saved here without an evaluation.)
        self._evaluated = self.unreported.evaluated and self.step < config.training.steps
        self._learning_rate = learning_rate_schedule(config.optimizer, config.training.steps)
        self._peak_flops = peak_flops(jax.devices()[0])
        self._writers: list[Tracker] = []

    def open_writers(self, stack: ExitStack) -> None:
        """Opens the metrics writers. Call it after all checks have passed."""
        config = self.config
        if is_first():
            metrics = config.metrics
            run = TrackedRun(
                Path(config.output), config.name, to_dict(config), self.step, metrics.group, metrics.tags
            )
            self._writers = open_writers(metrics, run, self._evaluated, self._progress.print_line)
            for writer in self._writers:
                stack.callback(writer.close)

    def start(self, examples: Any, tokenizer: Tokenizer) -> tuple[TrainState, Any]:
        """Returns the restored or initial state, and the frozen part of the model.

        Args:
            examples: iterator of the data; it is moved to the position saved in the checkpoint.
        """
        found = self._found
        if found is None:
            return self._initialise(tokenizer)
        self._announce(found)
        # Checkpoints do not hold frozen weights: they are loaded again from where the run first got them.
        frozen = jax.tree.leaves(self._method.abstract_frozen(self._mesh)[BASE])
        base = self._initialise(tokenizer)[1] if frozen else {}
        return self._restore(examples), base

    def _announce(self, found: FoundCheckpoint) -> None:
        skipped = "".join(f"; {clause}" for clause in found.skipped)
        self._progress.print_line(
            f"{self.config.name} resumes from its checkpoint at step {self.step}{skipped}"
        )
        if (line := older_schedule_note(self.config, self.step)) is not None:
            self._progress.print_line(line)

    def _initialise(self, tokenizer: Tokenizer) -> tuple[TrainState, Any]:
        config, params = self.config, None
        if config.initialise.source is not None:
            rows = train_batches(config.data, *feeding_share(self._mesh))
            batches = (on_mesh(batch, self._mesh) for batch in rows)
            with self._progress.doing(f"{config.name}: loading the initial weights"):
                dtypes = initial_dtypes(config, self._method, self._mesh)
                params = initial_params(
                    config.initialise, config.model, tokenizer, self._mesh, batches, dtypes
                )
        with self._progress.doing("drawing the initial weights", brief=True):
            return initial_state(config, self._method, self._mesh, params)

    def _restore(self, examples: Any) -> TrainState:
        trees = self._store.restore(self.step, _trees(self.abstract), examples)
        trainable, optimizer = {PARAMS: trees.pop(PARAMS, {})}, {PARAMS: trees.pop("optimizer")}
        averaged = {PARAMS: trees.pop(AVERAGED, {})} if self.abstract.averaged else {}
        for name, saved in trees.items():
            trainable[name], optimizer[name] = saved["weights"], saved["optimizer"]
            averaged |= {name: saved[AVERAGED]} if AVERAGED in saved else {}
        step = jax.device_put(jnp.int32(self.step), self.abstract.step.sharding)
        return TrainState(step, trainable, optimizer, averaged)

    def log(self, step: int, rows: Rows, seconds: float) -> None:
        """Writes one row of metrics: averages over the steps since the last row, and the speed of all devices together.

        `loss` is the objective. `cross_entropy` and `perplexity` are those of text alone. `tokens_seen` counts the
        positions of all batches since the run began, padding included. `tokens_per_second` counts targets of the loss.
        `seconds` is the time of the steps since the last row.
        The time of an on-policy step includes its rollout, and its targets are the sampled tokens without their
        prompts.

        Args:
            rows: metrics of the steps since the last row.
            seconds: time that these steps took, up to when the devices finished them.

        Raises:
            UserError: a metric is not finite.
        """
        names = dict.fromkeys(name for row in rows for name in row)
        values = {name: [float(row[name]) for row in rows if name in row] for name in names}
        targets = sum(values.pop("targets"))
        found = {name: sum(steps) / len(steps) for name, steps in values.items()}
        self._check_finite(step, found)
        speed = targets / seconds
        row = {
            **found,
            "learning_rate": float(self._learning_rate(step - 1)),
            "tokens_seen": step * self.config.data.batch_size * self.config.data.seq_len,
            "tokens_per_second": speed,
            "seconds": seconds,
        }
        if "cross_entropy" in found:
            row["perplexity"] = perplexity(found["cross_entropy"])
        if self._peak_flops is not None:
            row["mfu"] = speed * self._method.flops_per_token / (self._peak_flops * self._mesh.size)
        self._write(step, "train", row)

    def must_evaluate(self, step: int) -> bool:
        """Whether an evaluation is due at a step and not yet done."""
        if step != self.step:
            training = self.config.training
            self.step, self._evaluated = step, not training.is_due(step, training.eval_every)
        return not self._evaluated

    def report_evaluation(
        self, step: int, sums: Mapping[str, Any], averaged: Mapping[str, Any] | None
    ) -> None:
        """Writes the row of an evaluation from its sums over the targets.

        Args:
            averaged: the sums of the averaged weights, whose metrics are written beside the others as `averaged_NAME`.
        """
        row = averages(sums)
        if averaged is not None:
            row |= {
                f"{AVERAGED}_{name}": value for name, value in averages(averaged).items() if name != "targets"
            }
        self._write(step, "validation", row)
        self._evaluated = True

    def save_if_due(self, step: int, state: TrainState, examples: Any) -> None:
        """Starts saving the state if a checkpoint is due at this step."""
        if self.config.training.is_due(step, self.config.checkpoint.every):
            self._save(step, state, examples, Unreported((), 0.0, self._evaluated))

    def save_now(self, step: int, state: TrainState, examples: Any, rows: Rows, seconds: float) -> None:
        """Saves the state unless it is saved already, and waits until it is written.

        Args:
            rows: metrics of the steps that no row of metrics has reported.
            seconds: time that these steps took.

        Raises:
            UserError: a metric is not finite; nothing is saved in that case.
        """
        self._store.wait()
        if step and self._store.latest_step != step:
            numbers = [{name: float(value) for name, value in row.items()} for row in rows]
            for row in numbers:
                self._check_finite(step, row)
            self._save(step, state, examples, Unreported(numbers, seconds, self._evaluated))
        self._store.wait()

    def _check_finite(self, step: int, row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{self.config.output} stopped before step {step} because {name} is {value}; try a lower "
                    "optimizer.learning_rate or optimizer.clip_norm with another output."
                )

    def _write(self, step: int, split: str, row: dict[str, float]) -> None:
        for writer in self._writers:
            writer.write(step, split, row)
        self._progress.report(self.config.name, step, split, row)

    def _save(self, step: int, state: TrainState, examples: Any, unreported: Unreported) -> None:
        with self._progress.doing("saving", brief=True):
            name = own_name(self.config, self._method)
            self._store.save(step, _trees(state), examples, to_dict(self.config), unreported, name)


def _trees(state: TrainState) -> dict[str, Any]:
    """The trees of a checkpoint: the model's parameters, optimizer state and average, and those of other trees."""
    trees = {"optimizer": state.optimizer[PARAMS]}
    if state.trainable[
        PARAMS
    ]:  # Orbax refuses trees without arrays, and an adaptation may freeze the whole model
        trees[PARAMS] = state.trainable[PARAMS]
        trees |= {AVERAGED: state.averaged[PARAMS]} if state.averaged else {}
    for name, tree in state.trainable.items():
        if name != PARAMS:
            trees[name] = {"weights": tree, "optimizer": state.optimizer[name]}
            trees[name] |= {AVERAGED: state.averaged[name]} if state.averaged else {}
    return trees
