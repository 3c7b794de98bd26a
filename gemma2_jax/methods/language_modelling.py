"""Next-token prediction on text."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch, abstract_batch
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.kernels.lm_head import LMHead, TokenLoss, lm_head_sums
from gemma2_jax.methods.method import BASE, PARAMS, Frozen, FrozenModel, Record, RecordFile, Trainable
from gemma2_jax.model.adaptation import Adaptation, build_adaptation
from gemma2_jax.model.capture import Capture, CapturedLayer, forward
from gemma2_jax.model.config import ComputeConfig, ModelConfig
from gemma2_jax.model.counts import count_parameters, count_weights, training_flops_per_token
from gemma2_jax.model.lora import with_dropout
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, frozen_dtypes, key_of_path, weight_specs
from gemma2_jax.objectives.objective import build_coefficients, evaluation_loss, token_loss
from gemma2_jax.run import RunConfig

MODEL = "model"  # the name of the trained model's logits in the objective
Layers = Mapping[int, CapturedLayer]


class LanguageModelling:
    """Trains on the cross-entropy with the data's next token (`Method`).

    Args:
        adaptation: the one that the configuration selects by default.

    Attributes:
        record_file: the file of its `record`; None without one.
        capture: layers that the loss needs in addition to the final hidden states; None for none.
        terms: function that computes the loss of each token from its logits.
        coefficients: function from a step to the coefficients of the loss terms.
    """

    record_file: RecordFile | None = None
    frozen_models: Mapping[str, FrozenModel] = {}
    validation_only: Sequence[str] = ()
    capture: Capture | None = None

    def __init__(self, config: RunConfig, adaptation: Adaptation | None = None) -> None:
        self.config = config
        self.adaptation = (
            build_adaptation(config.adaptation, config.model) if adaptation is None else adaptation
        )
        trained, self._base_specs = self.adaptation.specs(weight_specs(config.model))
        self.specs: dict[str, Any] = {PARAMS: trained}
        self._frozen_weights = count_weights(self._base_specs)
        self._added_weights = (
            count_weights(trained) + self._frozen_weights - count_parameters(config.model).total
        )
        self.terms = token_loss(config.objective)
        self.coefficients = build_coefficients(config.objective, config.training.steps)
        self.flops_per_token = self.training_flops()

    def training_flops(self, teacher: ModelConfig | None = None) -> float:
        """Model FLOPs per token of a training step with this online teacher, or without one."""
        return training_flops_per_token(
            self.config.model, self.config.data.seq_len, teacher, self._frozen_weights, self._added_weights
        )

    def abstract_frozen(self, mesh: Mesh) -> dict[str, Any]:
        dtypes = frozen_dtypes(self._base_specs, self.config.compute.dtype, self.config.adaptation.format)
        return {BASE: abstract_params(self._base_specs, dtypes, mesh)}

    def load_frozen(self, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
        return {}

    def record(self, frozen: Frozen) -> Record | None:
        return None

    def describe(self, frozen: Frozen) -> list[str]:
        return []

    def examples(self, share: tuple[int, int]) -> grain.DatasetIterator:
        return train_batches(self.config.data, *share)

    def abstract_batch(self, mesh: Mesh) -> Batch:
        return abstract_batch(self.config.data, mesh)

    def collects(self, step: int) -> bool:
        return False

    def collect(self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array) -> Batch:
        return batch

    def forward(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array | None
    ) -> tuple[LMHead, Layers]:
        """The trained model's distributions over the vocabulary, and the layers of `capture`.

        Args:
            step: number of the training step; None in validations, which have no dropout and no rematerialisation.
        """
        params = self.adaptation.join(trainable[PARAMS], frozen.get(BASE, {}))
        compute, dropout = self.config.compute, self.config.adaptation.dropout
        if step is None:
            compute = replace(compute, remat="none")
        elif dropout:
            key = jax.random.fold_in(key_of_path(jax.random.key(self.config.seed), "dropout"), step)
            # Microbatches of a step differ only in their contents.
            key = jax.random.fold_in(key, jnp.sum(batch.tokens * (1 + batch.positions)))
            params = with_dropout(params, dropout, key)
        head, layers = head_and_layers(Gemma2(self.config.model, params), batch, compute, self.capture)
        return replace(head, embedding_trained="embedder" in self.specs[PARAMS]), layers

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        heads = {MODEL: self.forward(trainable, frozen, batch, step)[0]}
        block_tokens = self.config.objective.block_tokens
        total, metrics = loss_sums(self.terms, heads, batch, block_tokens, self.coefficients(step))
        return total, {"loss": total, **metrics, "targets": jnp.sum(batch.loss_mask)}

    def rates(self, step: jax.Array) -> dict[str, Any]:
        coefficients = self.coefficients(step)
        return {name: coefficients[name] for name in self.config.objective.schedules}

    def row(self, step: int, metrics: dict[str, Any]) -> dict[str, Any]:
        return metrics

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        head, _ = self.forward(trainable, frozen, batch, None)
        return evaluation_sums({MODEL: head}, batch, self.config.objective.block_tokens)


def head_and_layers(
    model: Gemma2, batch: Batch, compute: ComputeConfig, capture: Capture | None
) -> tuple[LMHead, Layers]:
    """Returns a model's head over a batch, whose logits are not yet computed, and the layers of `capture` by number."""
    hidden, layers = forward(model, batch.tokens, batch.positions, batch.segment_ids, compute, capture)
    return model.head(hidden), layers


def loss_sums(
    terms: TokenLoss, heads: Mapping[str, LMHead], batch: Batch, block_tokens: int, coefficients: Any = None
) -> tuple[jax.Array, Any]:
    """Returns the loss and the metrics of `terms`, summed over a batch's targets (`lm_head_sums`).

    Args:
        terms: takes, per token, `targets` and the batch's `extra`.
    """
    per_token = {"targets": batch.targets, **batch.extra}
    with jax.named_scope("loss"):
        return lm_head_sums(terms, heads, per_token, batch.loss_mask, block_tokens, coefficients)


def evaluation_sums(heads: Mapping[str, LMHead], batch: Batch, block_tokens: int) -> dict[str, Any]:
    """Returns the evaluation metrics summed over a batch's targets, and `targets`, the number of targets.

    Args:
        heads: head of the evaluated model under `model`, and of its teacher, if there is one, under `teacher`.
    """
    _, metrics = loss_sums(evaluation_loss, heads, replace(batch, extra={}), block_tokens)
    return {**metrics, "targets": jnp.sum(batch.loss_mask)}
