"""What a run learns. Trainer, validation, checkpoints, metrics and `plan` know a method by this protocol alone."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import grain
import jax
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.teacher_record import TeacherRecord
from gemma2_jax.model.adaptation import Adaptation

PARAMS = "params"  # the trained tree that belongs to the model
BASE = "base"  # the frozen part of the model, from its adaptation

# Trees of float32 arrays by name: of the model (`PARAMS`), and what is trained beside it.
Trainable = Mapping[str, Any]
# What a loss takes beside: the model's frozen weights (`BASE`), a teacher.
Frozen = Mapping[str, Any]
# Float32 scalars by name, summed over the targets of a batch, and `targets`, their number.
Sums = Mapping[str, Any]


class Method(Protocol):
    """A way of training."""

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a training step for each token, of which the utilisation is computed."""

    @property
    def specs(self) -> Mapping[str, Any]:
        """Of the trees that are trained, by name; `params` is the model's."""

    @property
    def validation_only(self) -> Sequence[str]:
        """Names of what `evaluate` takes from the frozen trees, and `loss` does not."""

    def abstract_frozen(self, mesh: Mesh) -> Frozen:
        """Shapes, dtypes and shardings of everything frozen.

        Raises:
            UserError: the mesh does not divide a weight.
        """

    def load_frozen(self, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
        """What is frozen on the mesh, except for `BASE`, which comes from where the run's weights do.

        Raises:
            UserError: it is not there, or does not fit the run.
        """

    def record(self, frozen: Frozen) -> TeacherRecord | None:
        """What identifies the teacher, for the run folder; None without a teacher."""

    def describe(self, frozen: Frozen) -> list[str]:
        """Lines on what the method adds to a run, shown before its first step."""

    def examples(self, share: tuple[int, int]) -> grain.DatasetIterator:
        """An endless iterator of this process's part of each batch: `Batch` of NumPy arrays; its state is saved.

        Raises:
            UserError: the data does not fit the run.
        """

    def abstract_batch(self, mesh: Mesh) -> Batch:
        """Shapes, dtypes and shardings of a whole batch."""

    def collects(self, step: int) -> bool:
        """Whether `collect` makes the batch of the step with this number, counted from 0."""

    def collect(self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
        """A batch as the step takes it, from one of the examples: by a rollout, say. Traced; of the same shapes."""

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The loss of a batch, and its metrics: `Sums`, with the loss as `loss`. Traced; differentiable."""

    def rates(self, step: jax.Array) -> dict[str, Any]:
        """Numbers that change over the run, to be reported with a step's metrics. Traced."""

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """The metrics of a step as they are reported."""

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        """Metrics of a validation batch (`Sums`). Traced."""


class ModelMethod(Method, Protocol):
    """A way of training one model, whose weights begin as a run's do."""

    @property
    def adaptation(self) -> Adaptation:
        """Which of the model's weights are trained."""


def frozen_in_step(method: Method, frozen: Frozen) -> dict[str, Any]:
    """What of the frozen trees a training step takes."""
    return {name: tree for name, tree in frozen.items() if name not in method.validation_only}
