"""The teacher's settings, and the online teacher: a frozen model that runs inside the student's training step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.rollouts import OnPolicyConfig
from gemma2_jax.formats.load import load_params, open_for, open_source
from gemma2_jax.formats.source import WeightSource
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.quantised import WEIGHT_FORMATS
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, dim_sizes, frozen_dtypes, weight_specs
from gemma2_jax.sharding.layout import (
    LayoutConfig,
    check_activations,
    key_in_use,
    laid_out,
    layout_in_use,
)


@dataclass(frozen=True)
class DistillConfig:
    """The teacher that a student is distilled from.

    Attributes:
        teacher: checkpoint of the teacher, a run folder or any other format that `gemma2 convert` accepts; null
            without distillation, or to train from a cache alone. With a cache, the teacher runs only in evaluations;
            without it, they report no divergence.
        dtype: dtype of the teacher's weights and activations. The teacher has no optimizer state and gets no gradient.
            No effect if teacher is null.
        cache: folder of teacher targets for the training data, written by `gemma2 teacher-cache` and used instead of
            the teacher; null to run the teacher in each step.
        encoding: encoding of the teacher's distributions in the cache; null to accept a cache with any encoding.
        on_policy: settings for training on the student's own samples at some steps; null to train on the data alone.
        match: layers of the teacher that the student is trained to match as well; null for none.
        model: sizes of the teacher, so that `gemma2 plan` needs no checkpoint; null to take them from the checkpoint. A
            checkpoint of other sizes is an error.
        layout: layout of the teacher on the mesh; null for the student's layout.
        quantize: format that the teacher's matrices are held in, `int8` or `int4`, for memory; its outputs then differ
            a little. Null for arrays of `dtype`. Only for a teacher that runs in the training step, not with a cache.
    """

    teacher: str | None
    dtype: Literal["float32", "bfloat16"]
    cache: str | None = None
    encoding: EncodingConfig | None = None
    on_policy: OnPolicyConfig | None = None
    match: MatchConfig | None = None
    model: ModelConfig | None = None
    layout: LayoutConfig | None = None
    quantize: Literal["int8", "int4"] | None = None

    def __post_init__(self) -> None:
        if self.encoding is not None and self.cache is None:
            raise UserError("distill.encoding is set, but distill.cache is null; set both, or neither.")
        if self.quantize is not None and (self.teacher is None or self.cache is not None):
            found = (
                "distill.teacher is null"
                if self.teacher is None
                else "distill.cache holds a teacher's outputs"
            )
            raise UserError(
                f"distill.quantize is {self.quantize}, but {found}; only a teacher that runs in the training step is "
                "quantised: set distill.quantize to null, or set distill.teacher alone."
            )
        if self.match is not None and self.teacher is None:
            raise UserError(
                "distill.match is set, but distill.teacher is null; set distill.teacher to a checkpoint, or "
                "distill.match to null."
            )
        if self.match is not None and self.cache is not None:
            raise UserError(
                "distill.match and distill.cache are both set, but a cache holds no hidden states; set one of them to "
                "null."
            )

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher or a teacher's cache; without either, a run is trained on text alone."""
        return self.teacher is not None or self.cache is not None


def load_teacher(config: DistillConfig, student: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> Gemma2:
    """Loads the teacher onto the student's mesh, with its vocabulary padded to the student's size.

    Raises:
        UserError: its checkpoint is incomplete or has other sizes than distill.model; or as `open_teacher`.
    """
    if config.teacher is None:
        raise UserError("distill.teacher is null; it must be a checkpoint of the teacher.")
    source, sizes = open_teacher(config.teacher, student, tokenizer)
    if config.model is not None:
        _check_sizes(config.model, sizes, config.teacher)
    with as_teacher(config):
        check_activations(mesh, dim_sizes(sizes))
        return Gemma2(sizes, load_params(source, sizes, _dtypes(config, sizes), mesh))


def open_teacher(path: str, student: ModelConfig, tokenizer: Tokenizer) -> tuple[WeightSource, ModelConfig]:
    """Opens a teacher's checkpoint; returns it and the teacher's sizes, with the student's padding of the vocabulary.

    Raises:
        UserError: it does not exist, or has another tokenizer than the student.
    """
    source = open_for(tokenizer, path, "distill.teacher")
    return source, replace(source.config, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)


def teacher_config(config: DistillConfig, student: ModelConfig) -> ModelConfig | None:
    """The sizes of the teacher, with the student's padding of the vocabulary; None without a teacher.

    Raises:
        UserError: distill.model is null, and the teacher's checkpoint cannot be read.
    """
    if config.teacher is None:
        return None
    sizes = open_source(config.teacher).config if config.model is None else config.model
    return replace(sizes, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)


def online_teacher(config: DistillConfig, student: ModelConfig) -> ModelConfig | None:
    """As `teacher_config`, but None if there is a cache, since the teacher then does not run in the training step."""
    return None if config.cache is not None else teacher_config(config, student)


def abstract_teacher(config: DistillConfig, sizes: ModelConfig, mesh: Mesh) -> Gemma2:
    """The teacher with the shapes, dtypes and shardings of its weights instead of arrays.

    Raises:
        UserError: the mesh does not divide a weight or an activation.
    """
    with as_teacher(config):
        check_activations(mesh, dim_sizes(sizes))
        return Gemma2(sizes, abstract_params(weight_specs(sizes), _dtypes(config, sizes), mesh))


def _dtypes(config: DistillConfig, sizes: ModelConfig) -> Any:
    """The dtype of the teacher's weights, or those of each weight if they are quantised."""
    if config.quantize is None:
        return jnp.dtype(config.dtype)
    return frozen_dtypes(weight_specs(sizes), config.dtype, WEIGHT_FORMATS[config.quantize], whole=True)


def as_teacher(config: DistillConfig) -> AbstractContextManager[None]:
    """Applies the teacher's layout to everything traced inside."""
    model = f"distill.teacher {config.teacher}"
    if config.layout is None:
        return laid_out(layout_in_use(), key_in_use(), model)
    return laid_out(config.layout, "distill.layout", model)


def _check_sizes(planned: ModelConfig, found: ModelConfig, teacher: str) -> None:
    """Raises UserError if the teacher's sizes differ from distill.model, apart from the padding of the vocabulary."""
    planned = replace(planned, vocab_size=found.vocab_size, vocab_padding=found.vocab_padding)
    for field in fields(planned):
        expected, value = getattr(planned, field.name), getattr(found, field.name)
        if expected != value:
            raise UserError(
                f"distill.model.{field.name} is {expected}, but distill.teacher {teacher} has {value}; set "
                "distill.model to the teacher's sizes, or to null."
            )
