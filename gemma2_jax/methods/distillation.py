"""Distillation: training a student on a teacher's distributions (Hinton et al., arXiv 1503.02531).

The teacher's forward pass runs within the student's step, or its sparse targets come from a cache. With
`distill.match`, the loss also compares the student's layers with the teacher's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch, abstract_batch, abstract_rows
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.manifest import CacheManifest, find_cache
from gemma2_jax.distill.cache.reader import cached_batches, check_cache
from gemma2_jax.distill.matching import match_sums
from gemma2_jax.distill.teacher import abstract_teacher, as_teacher, load_teacher, teacher_config
from gemma2_jax.distill.teacher_record import (
    TEACHER_FILE,
    TeacherRecord,
    check_same_teacher,
    read_teacher_record,
)
from gemma2_jax.formats.identity import model_identity
from gemma2_jax.kernels.lm_head import LMHead
from gemma2_jax.methods.language_modelling import (
    MODEL,
    LanguageModelling,
    Layers,
    evaluation_sums,
    head_and_layers,
    loss_sums,
)
from gemma2_jax.methods.method import Frozen, FrozenModel, RecordFile, Trainable
from gemma2_jax.model.adaptation import Adaptation
from gemma2_jax.model.capture import Capture
from gemma2_jax.model.counts import count_parameters
from gemma2_jax.objectives.targets import SparseTargets
from gemma2_jax.run import RunConfig
from gemma2_jax.schedule import ScheduleConfig

TEACHER = "teacher"  # name of the teacher among the frozen trees, and of its logits in the objective
TARGETS = "teacher_targets"  # name of a batch's teacher targets, which come from a cache
MATCHING = "matching"  # name of the trained tree of projections


def _free_keys(config: RunConfig) -> set[str]:
    """The keys that select what the teacher's record in the run folder identifies (`RecordFile`)."""
    record = read_teacher_record(config.output)
    if record is None or not record.is_comparable:
        return set()
    is_cached = record.encoding is not None and config.distill.cache is not None
    return {"distill.teacher", *(("distill.cache", "distill.encoding", "distill.dtype") if is_cached else ())}


@dataclass(frozen=True)
class TeacherOfRuns:
    """The teacher of the runs that have one (`Record`)."""

    teacher: TeacherRecord

    def check(self, config: RunConfig) -> None:
        check_same_teacher(config.output, config.distill, self.teacher)

    def save(self, config: RunConfig) -> None:
        if config.distill.has_teacher:
            self.teacher.save(Path(config.output))


class Distillation(LanguageModelling):
    """Trains on the divergences from a teacher in addition to the objective's terms on text (`Method`).

    Attributes:
        teacher: sizes of the teacher; None for training from a cache alone.
    """

    record_file = RecordFile(
        TEACHER_FILE,
        "which identifies the teacher that the run was distilled from",
        frozenset({"distill.teacher", "distill.cache"}),
        _free_keys,
    )

    def __init__(self, config: RunConfig, adaptation: Adaptation | None = None) -> None:
        super().__init__(config, adaptation)
        distill = config.distill
        self.teacher = teacher_config(distill, config.model)
        self._manifest: CacheManifest | None = None
        if distill.cache is not None:
            self.validation_only = (TEACHER,)
        if self.teacher is not None:
            self.frozen_models = {
                TEACHER: FrozenModel(
                    config=self.teacher,
                    dtype=distill.dtype,
                    dtype_key="distill.dtype",
                    has_own_layout=distill.layout is not None,
                    laid_out=partial(as_teacher, distill),
                )
            }
        online = self.teacher if distill.cache is None else None
        self.flops_per_token = self.training_flops(online)
        self._teacher_compute = replace(config.compute, dtype=distill.dtype, remat="none")
        self._match = distill.match
        if self._match is not None:
            assert self.teacher is not None
            self._match.check_teacher(config.model, self.teacher)
            self.capture = self._match.student_capture
            projections = self._match.projection_specs(config.model, self.teacher)
            if projections is not None:
                self.specs[MATCHING] = projections

    @property
    def teacher_capture(self) -> Capture | None:
        """The teacher's layers that the loss needs; None for none."""
        return None if self._match is None else self._match.teacher_capture

    def abstract_frozen(self, mesh: Mesh) -> dict[str, Any]:
        frozen = super().abstract_frozen(mesh)
        if self.teacher is not None:
            frozen[TEACHER] = abstract_teacher(self.config.distill, self.teacher, mesh)
        return frozen

    def load_frozen(self, tokenizer: Tokenizer, mesh: Mesh) -> dict[str, Any]:
        if self.config.distill.teacher is None:
            return {}
        return {TEACHER: load_teacher(self.config.distill, self.config.model, tokenizer, mesh)}

    def record(self, frozen: Frozen) -> TeacherOfRuns:
        manifest = self._manifest
        if manifest is not None:
            return TeacherOfRuns(TeacherRecord(manifest.teacher, manifest.dtype, manifest.encoding))
        return TeacherOfRuns(TeacherRecord(model_identity(frozen[TEACHER]), self.config.distill.dtype))

    def describe(self, frozen: Frozen) -> list[str]:
        distill = self.config.distill
        if distill.cache is not None:
            return [f"teacher: the cache {distill.cache}"]
        assert self.teacher is not None
        return [f"teacher: {count_parameters(self.teacher).total:,} parameters, from {distill.teacher}"]

    def examples(self, share: tuple[int, int]) -> grain.DatasetIterator:
        config, distill = self.config, self.config.distill
        if distill.cache is None:
            return super().examples(share)
        temperature = config.objective.temperature
        assert not isinstance(temperature, ScheduleConfig)  # RunConfig refuses it
        self._manifest = check_cache(
            distill.cache,
            config.data,
            config.training.steps,
            share[1],
            temperature,
            distill.teacher,
            distill.encoding,
            None if distill.teacher is None else distill.dtype,
        )
        return cached_batches(config.data, distill.cache, *share)

    def abstract_batch(self, mesh: Mesh) -> Batch:
        distill, data = self.config.distill, self.config.data
        batch = abstract_batch(data, mesh)
        if distill.cache is None:
            return batch
        K = self._entries(distill.cache)
        targets = SparseTargets(
            ids=abstract_rows(data, mesh, jnp.int32, K),
            log_weights=abstract_rows(data, mesh, jnp.float32, K),
            tail=abstract_rows(data, mesh, jnp.float32),
        )
        return replace(batch, extra={TARGETS: targets})

    def _entries(self, cache: str) -> int:
        """K, the maximum number of entries per position in the cache, or in the cache to be written if it is empty."""
        manifest, encoding = self._manifest or find_cache(cache), self.config.distill.encoding
        if manifest is not None and manifest.files:
            return manifest.largest
        if encoding is None:
            raise UserError(
                "distill.encoding is null, so the cache's size is unknown; set it, as distill=cached does."
            )
        return encoding.entries or self.config.model.num_tokens

    def teacher_forward(
        self, frozen: Frozen, batch: Batch, capture: Capture | None
    ) -> tuple[LMHead | None, Layers]:
        """Returns the teacher's distributions and captured layers, without gradients; (None, {}) with a cache."""
        if TARGETS in batch.extra:
            return None, {}
        with jax.named_scope("teacher"), as_teacher(self.config.distill):
            head, layers = head_and_layers(frozen[TEACHER], batch, self._teacher_compute, capture)
            return replace(jax.lax.stop_gradient(head), trained=False), jax.lax.stop_gradient(layers)

    def loss(
        self, trainable: Trainable, frozen: Frozen, batch: Batch, step: jax.Array
    ) -> tuple[jax.Array, dict[str, Any]]:
        head, layers = self.forward(trainable, frozen, batch, step)
        teacher, teacher_layers = self.teacher_forward(frozen, batch, self.teacher_capture)
        heads = {MODEL: head}
        if teacher is not None and self.config.objective.needs_teacher:
            heads[TEACHER] = teacher
        block_tokens = self.config.objective.block_tokens
        total, metrics = loss_sums(self.terms, heads, batch, block_tokens, self.coefficients(step))
        matched, distances = self.match_loss(trainable, layers, teacher_layers, batch)
        total += matched
        return total, {"loss": total, **metrics, **distances, "targets": jnp.sum(batch.loss_mask)}

    def match_loss(
        self, trainable: Trainable, layers: Layers, teacher_layers: Layers, batch: Batch
    ) -> tuple[jax.Array | float, Mapping[str, jax.Array]]:
        """Returns the weighted distance between the matched layers and its metrics; (0, {}) without `distill.match`."""
        if self._match is None:
            return 0.0, {}
        projections = trainable[MATCHING]["projections"] if MATCHING in trainable else None
        with jax.named_scope("match"):
            return match_sums(self._match, projections, layers, teacher_layers, batch)

    def evaluate(self, trainable: Trainable, frozen: Frozen, batch: Batch) -> dict[str, Any]:
        heads = {MODEL: self.forward(trainable, frozen, batch, None)[0]}
        if TEACHER in frozen:
            teacher, _ = self.teacher_forward(frozen, replace(batch, extra={}), None)
            assert teacher is not None
            heads[TEACHER] = teacher
        return evaluation_sums(heads, batch, self.config.objective.block_tokens)
