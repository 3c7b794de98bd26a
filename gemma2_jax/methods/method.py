"""The protocol of a training method. Trainer, validation, checkpoints, metrics and `plan` depend only on it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import grain
import jax
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.model.adaptation import Adaptation
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.run import RunConfig

PARAMS = "params"  # name of the model's trained tree
BASE = "base"  # name of the model's frozen base weights, as its adaptation defines them

# Trained trees of float32 arrays by name: the model's (`PARAMS`), and any others.
Trainable = Mapping[str, Any]
# Further inputs of a loss by name: the model's base weights (`BASE`), a teacher.
Frozen = Mapping[str, Any]
# Float32 scalars by name: metrics summed over the targets of a batch, and `targets`, the number of targets.
Sums = Mapping[str, Any]


@dataclass(frozen=True)
class FrozenModel:
    """A frozen model whose forward pass a method runs, such as a teacher.

    Attributes:
        config: its sizes.
        dtype: dtype of its weights and activations.
        dtype_key: the key that sets the dtype.
        has_own_layout: whether it has another layout than the trained model.
        laid_out: returns a context that applies its layout to everything traced inside.
    """

    config: ModelConfig
    dtype: str
    dtype_key: str
    has_own_layout: bool
    laid_out: Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class RecordFile:
    """The file that a `Record` is in a run folder.

    Attributes:
        name: name of the file.
        purpose: what it is, as the rest of a sentence that begins with its name.
        sources: keys of the places that the identified trees come from.
        free_keys: returns, for a configuration, the keys that a resumed run may change, since `Record.check` compares
            what they select by its contents.
    """

    name: str
    purpose: str
    sources: frozenset[str]
    free_keys: Callable[[RunConfig], set[str]]


class Record(Protocol):
    """Identifies the frozen trees that runs are trained with, such as a teacher, in their folders."""

    def check(self, config: RunConfig) -> None:
        """Raises UserError if the run in the configured folder was trained with other trees."""

    def save(self, config: RunConfig) -> None:
        """Writes the record into the run's folder, if the run uses these trees."""


class Method(Protocol):
    """A training method."""

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs per token of a training step, for the model FLOPs utilisation (MFU)."""

    @property
    def specs(self) -> Mapping[str, Any]:
        """Specs of the trained trees, by name; `params` is the model's."""

    @property
    def frozen_models(self) -> Mapping[str, FrozenModel]:
        """The models among the frozen trees, except `BASE`, by name."""

    @property
    def validation_only(self) -> Sequence[str]:
        """Names of the frozen trees that `evaluate` uses and `loss` does not."""

    def abstract_frozen(self, mesh: Mesh) -> Frozen:
        """Shapes, dtypes and shardings of all frozen trees.

        Raises:
            UserError: the mesh does not divide a weight.
        """

    def load_frozen(self, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
        """Loads the frozen trees onto the mesh, except `BASE`, which is loaded with the run's initial weights.

        Raises:
            UserError: a tree is missing or does not fit the run.
        """

    def record(self, frozen: Frozen) -> Record | None:
        """Identifies the frozen trees, except `BASE`, in run folders; None if the method has no others."""

    def describe(self, frozen: Frozen) -> list[str]:
        """Lines about the method, shown before the first step."""

    def examples(self, share: tuple[int, int]) -> grain.DatasetIterator:
        """Returns an endless iterator over this process's part of each batch, a `Batch` of NumPy arrays.

        Checkpoints save the iterator's state.

        Args:
            share: index of this process's part, and the number of parts.

        Raises:
            UserError: the data does not fit the run.
        """

    def abstract_batch(self, mesh: Mesh) -> Batch:
        """Shapes, dtypes and shardings of a whole batch."""

    def collects(self, step: int) -> bool:
        """Whether the batch of this step, counted from 0, is made by `collect`."""

    def collect(self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
        """Makes a step's batch from a batch of examples, for example by a rollout; same shapes. Traced."""

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the loss of a batch and its metrics: `Sums`, with the loss as `loss`. Traced; differentiable."""

    def rates(self, step: jax.Array) -> dict[str, Any]:
        """Numbers that change over the run, reported with a step's metrics. Traced."""

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Converts the metrics of a step to those that are reported."""

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        """Returns the metrics of a validation batch (`Sums`). Traced."""


class ModelMethod(Method, Protocol):
    """A method that trains one model, whose initial weights are those of the run."""

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""

    @property
    def adaptation(self) -> Adaptation:
        """Defines which of the model's weights are trained."""


def frozen_in_step(method: Method, frozen: Frozen) -> dict[str, Any]:
    """The frozen trees that a training step uses."""
    return {name: tree for name, tree in frozen.items() if name not in method.validation_only}
