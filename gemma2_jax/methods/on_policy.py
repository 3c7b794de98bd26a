"""On-policy distillation (GKD, Agarwal et al., arXiv 2306.13649, Algorithm 1): some steps use the student's rollouts.

Teacher, divergence and step are those of `Distillation`; only the batch differs.
"""

from typing import Any

import jax
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.shards import read_data_manifest
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.rollouts import completion_stops, on_policy_steps, rollout
from gemma2_jax.methods.distillation import Distillation
from gemma2_jax.methods.method import BASE, PARAMS, Frozen, Trainable
from gemma2_jax.model.adaptation import Adaptation
from gemma2_jax.run import RunConfig


class OnPolicyDistillation(Distillation):
    """Distillation in which the batch of some steps is a rollout: the student continues prompts from the data."""

    def __init__(self, config: RunConfig, adaptation: Adaptation | None = None) -> None:
        super().__init__(config, adaptation)
        assert config.distill.on_policy is not None
        self._settings = config.distill.on_policy
        self._sampled = on_policy_steps(self._settings, config.seed, config.training.steps)
        self._stops: tuple[int, ...] | None = None

    def load_frozen(self, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
        self._stops = completion_stops(self.config.data, tokenizer)
        self._prompt_note()  # raises before the teacher is loaded
        return super().load_frozen(tokenizer, mesh)

    def describe(self, frozen: Frozen) -> list[str]:
        note = self._prompt_note()
        return [*super().describe(frozen), *([note] if note else [])]

    def _prompt_note(self) -> str | None:
        """Returns how many conversations have too long a prompt. Raises UserError if all have."""
        if not self.config.data.with_conversations:
            return None
        lengths, limit = (
            read_data_manifest(self.config.data.folder).train_lengths,
            self._settings.prompt_tokens,
        )
        without = lengths.conversations - lengths.with_loss(limit)
        if without == lengths.conversations:
            raise UserError(
                f"distill.on_policy.prompt_tokens is {limit}, and the prompts of all {without:,} conversations to "
                f"train on are longer; the shortest needs {min(lengths.to_loss)}."
            )
        if not without:
            return None
        return (
            f"prompts: {without:,} of {lengths.conversations:,} conversations have more than "
            f"distill.on_policy.prompt_tokens ({limit}) and carry no loss in on-policy steps"
        )

    def collects(self, step: int) -> bool:
        return bool(self._sampled[step])

    def collect(self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
        assert self._stops is not None
        params = self.adaptation.join(trainable[PARAMS], frozen.get(BASE, {}))
        config = self.config
        return rollout(
            self._settings, config.model, config.compute, params, batch, config.seed, step, self._stops
        )

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        """Adds `on_policy`, and renames the cross-entropy of an on-policy step to `sampled_cross_entropy`.

        The targets of such a step are the student's own samples.
        """
        row = {**metrics, "on_policy": self.collects(step)}
        if self.collects(step):
            row["sampled_cross_entropy"] = row.pop("cross_entropy")
        return row
