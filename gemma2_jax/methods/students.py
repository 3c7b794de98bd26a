"""Several students of one teacher, in one compiled step.

The teacher's layers, and each block of its logits, are computed once for all students. Weights and metrics of each
student are in a subtree under its name.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.matching import join_captures
from gemma2_jax.methods.distillation import TEACHER, Distillation
from gemma2_jax.methods.language_modelling import MODEL, LanguageModelling, loss_sums
from gemma2_jax.methods.method import BASE, Frozen, Record, Trainable

_TEACHER = "teacher of all"  # name of the teacher among the students' heads; a student may be called teacher


class Students:
    """Trains students of one teacher, and baselines on text alone, on the same batches (`Method`).

    Args:
        members: methods by name; at least one has a teacher.

    Attributes:
        base_of: for each member, the name of the first one that has the same base weights; the frozen tree `base` holds
            them under that name.
    """

    def __init__(self, members: Mapping[str, LanguageModelling]) -> None:
        self.members = dict(members)
        self.base_of = {name: self._first_with_base_of(name) for name in members}
        self._distilled = [member for member in members.values() if isinstance(member, Distillation)]
        self._first = self._distilled[0]  # loads the teacher and the data, which all of them share
        self.specs = {name: member.specs for name, member in members.items()}
        self.frozen_models = self._first.frozen_models
        self.validation_only: Sequence[str] = self._first.validation_only
        self._capture = join_captures(member.teacher_capture for member in self._distilled)
        self._block_tokens = min(member.config.objective.block_tokens for member in members.values())
        # One student's FLOPs include the teacher's forward pass, which all students share.
        self.flops_per_token = self._first.flops_per_token + sum(
            member.training_flops() for member in members.values() if member is not self._first
        )

    def abstract_frozen(self, mesh: Mesh) -> dict[str, Any]:
        each = {name: member.abstract_frozen(mesh) for name, member in self.members.items()}
        return self._first.abstract_frozen(mesh) | {
            BASE: {name: each[name][BASE] for name in dict.fromkeys(self.base_of.values())}
        }

    def load_frozen(self, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
        return self._first.load_frozen(tokenizer, mesh)

    def record(self, frozen: Frozen) -> Record | None:
        return self._first.record(frozen)

    def describe(self, frozen: Frozen) -> list[str]:
        return self._first.describe(frozen)

    def examples(self, share: tuple[int, int]) -> grain.DatasetIterator:
        return self._first.examples(share)

    def abstract_batch(self, mesh: Mesh) -> Batch:
        return self._first.abstract_batch(mesh)

    def collects(self, step: int) -> bool:
        return False

    def collect(self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
        return batch

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the sum of the students' losses, each of which depends only on its own weights; metrics by student.

        Traced.
        """
        teacher, teacher_layers = self._first.teacher_forward(frozen, batch, self._capture)
        forward = {
            name: member.forward(trainable[name], self._frozen_of(name, frozen), batch, step)
            for name, member in self.members.items()
        }
        heads = {name: head for name, (head, _) in forward.items()}
        if teacher is not None and any(member.config.objective.needs_teacher for member in self._distilled):
            heads[_TEACHER] = teacher

        def terms(
            logits: Mapping[str, jax.Array], per_token: Any, coefficients: Any
        ) -> tuple[jax.Array, dict[str, Any]]:
            total, metrics = jnp.float32(0), {}
            for name, member in self.members.items():
                own = {MODEL: logits[name]}
                tokens = {"targets": per_token["targets"]}
                if isinstance(member, Distillation):
                    own |= {TEACHER: logits[_TEACHER]} if _TEACHER in logits else {}
                    tokens = per_token
                loss, found = member.terms(own, tokens, coefficients[name])
                total, metrics[name] = total + loss, {"loss": loss, **found}
            return total, metrics

        coefficients = {name: member.coefficients(step) for name, member in self.members.items()}
        total, metrics = loss_sums(terms, heads, batch, self._block_tokens, coefficients)
        targets = jnp.sum(batch.loss_mask)
        for name, member in self.members.items():
            metrics[name]["targets"] = targets
            if isinstance(member, Distillation):
                matched, distances = member.match_loss(
                    trainable[name], forward[name][1], teacher_layers, batch
                )
                metrics[name] |= {"loss": metrics[name]["loss"] + matched, **distances}
                total += matched
        return total, metrics

    def rates(self, step: jax.Array) -> dict[str, Any]:
        return {name: member.rates(step) for name, member in self.members.items()}

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        return {
            name: member.evaluate(trainable[name], self._frozen_of(name, frozen), batch)
            for name, member in self.members.items()
        }

    def _frozen_of(self, name: str, frozen: Frozen) -> dict[str, Any]:
        """The frozen trees in the form that the method of one student takes."""
        return {**frozen, BASE: frozen[BASE][self.base_of[name]]}

    def _first_with_base_of(self, name: str) -> str:
        """The first member with an adapter beside the same base weights; without an adapter, the member itself."""
        config = self.members[name].config
        if not config.adaptation.is_adapter:
            return name
        wanted = config.initialise, config.model, config.adaptation.base
        return next(
            other
            for other, member in self.members.items()
            if member.config.adaptation.is_adapter
            and (member.config.initialise, member.config.model, member.config.adaptation.base) == wanted
        )
