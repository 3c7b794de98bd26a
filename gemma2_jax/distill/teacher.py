"""The teacher's settings, and the online teacher: a frozen model that runs inside the student's training step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.on_policy import OnPolicyConfig
from gemma2_jax.formats.load import load_params, open_for, open_source
from gemma2_jax.formats.source import Source
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import abstract_params, dim_sizes, weight_specs
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
        teacher: a checkpoint of the teacher, a run folder or any other kind that `gemma2 convert` reads; null
            without distillation, or to train from a cache alone. With a cache, the teacher runs in validations only;
            without it, they report no divergence.
        dtype: of the teacher's weights and activations. It has no optimizer state and gets no gradient. Of no effect
            where teacher is null.
        cache: folder of the teacher's outputs for the training data, written by `gemma2 teacher-cache` and used in the
            place of the teacher; null to run the teacher in each step.
        encoding: what the cache keeps of the teacher's distributions; null to take a cache as it is.
        on_policy: train on the student's own samples at some steps; null for the data alone.
        match: which of its layers the student matches as well; null for none.
        model: its sizes, for `gemma2 plan`, which needs no checkpoint; null to take them from the checkpoint. A
            checkpoint of other sizes is refused.
        layout: how the teacher is laid out on the mesh; null for the student's layout.
    """

    teacher: str | None
    dtype: Literal["float32", "bfloat16"]
    cache: str | None = None
    encoding: EncodingConfig | None = None
    on_policy: OnPolicyConfig | None = None
    match: MatchConfig | None = None
    model: ModelConfig | None = None
    layout: LayoutConfig | None = None

    def __post_init__(self) -> None:
        if self.encoding is not None and self.cache is None:
            raise UserError("distill.encoding is set, but distill.cache is null; set both, or neither.")
        if self.match is not None and self.teacher is None:
            raise UserError(
                "distill.match is set, which needs a teacher; set distill.teacher to its checkpoint."
            )
        if self.match is not None and self.cache is not None:
            raise UserError(
                "distill.match and distill.cache are both set; a cache holds no hidden states, so one of them must be "
                "null."
            )

    @property
    def has_teacher(self) -> bool:
        """Whether there is a teacher, or a cache of one; without either, a run learns from text alone."""
        return self.teacher is not None or self.cache is not None


def load_teacher(config: DistillConfig, student: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> Gemma2:
    """The teacher, laid out on the student's mesh, with as many rows of padding in its vocabulary.

    Raises:
        UserError: it is not whole or not of the sizes in distill.model, or what `open_teacher` refuses.
    """
    if config.teacher is None:
        raise UserError("distill.teacher is null; it must be a checkpoint of the teacher.")
    source, sizes = open_teacher(config.teacher, student, tokenizer)
    if config.model is not None:
        _check_sizes(config.model, sizes, config.teacher)
    with as_teacher(config):
        check_activations(mesh, dim_sizes(sizes))
        return Gemma2(sizes, load_params(source, sizes, config.dtype, mesh))


def open_teacher(path: str, student: ModelConfig, tokenizer: Tokenizer) -> tuple[Source, ModelConfig]:
    """A teacher's checkpoint, which suits the student, and its sizes with the student's rows of padding.

    Raises:
        UserError: there is none, or it has another tokenizer than the student.
    """
    source = open_for(tokenizer, path, "distill.teacher")
    return source, replace(source.config, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)


def teacher_config(config: DistillConfig, student: ModelConfig) -> ModelConfig | None:
    """The sizes of the teacher, with the student's rows of padding in its vocabulary; None without a teacher.

    Raises:
        UserError: its checkpoint cannot be read, and its sizes are not given.
    """
    if config.teacher is None:
        return None
    sizes = open_source(config.teacher).config if config.model is None else config.model
    return replace(sizes, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)


def online_teacher(config: DistillConfig, student: ModelConfig) -> ModelConfig | None:
    """As `teacher_config`, of a teacher whose forward pass runs in each step: None beside a cache."""
    return None if config.cache is not None else teacher_config(config, student)


def abstract_teacher(config: DistillConfig, sizes: ModelConfig, mesh: Mesh) -> Gemma2:
    """The teacher's shapes, dtypes and shardings.

    Raises:
        UserError: the mesh does not divide it.
    """
    with as_teacher(config):
        check_activations(mesh, dim_sizes(sizes))
        return Gemma2(sizes, abstract_params(weight_specs(sizes), jnp.dtype(config.dtype), mesh))


def as_teacher(config: DistillConfig) -> AbstractContextManager[None]:
    """Applies the teacher's layout to everything traced inside."""
    model = f"distill.teacher {config.teacher}"
    if config.layout is None:
        return laid_out(layout_in_use(), key_in_use(), model)
    return laid_out(config.layout, "distill.layout", model)


def _check_sizes(planned: ModelConfig, found: ModelConfig, teacher: str) -> None:
    """Raises UserError if the teacher is not of the sizes that were planned for, but for its rows of padding."""
    planned = replace(planned, vocab_size=found.vocab_size, vocab_padding=found.vocab_padding)
    for field in fields(planned):
        expected, value = getattr(planned, field.name), getattr(found, field.name)
        if expected != value:
            raise UserError(
                f"distill.model.{field.name} is {expected}, and {teacher} has {value}; set distill.model to the "
                "teacher's sizes, or to null."
            )
