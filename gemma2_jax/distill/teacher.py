"""Who teaches; and the online teacher, a frozen model whose forward pass runs inside the student's training step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from typing import Literal

from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.matching import MatchConfig
from gemma2_jax.distill.on_policy import OnPolicyConfig
from gemma2_jax.formats.load import load_params, open_for
from gemma2_jax.formats.source import Source
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.model.weights import dim_sizes
from gemma2_jax.sharding.layout import (
    LayoutConfig,
    check_activations,
    key_in_use,
    laid_out,
    layout_in_use,
)


@dataclass(frozen=True)
class DistillConfig:
    """Who teaches.

    Attributes:
        teacher: a checkpoint of the teacher, a run folder or any other kind that `gemma2 convert` reads; null
            without distillation, or to train from a cache of whichever teacher. Beside a cache it is asked in
            validations alone, which have no divergence from it where it is null.
        dtype: of the teacher's weights and activations. It has no optimizer state and gets no gradient. Of no effect
            where teacher is null.
        cache: folder of what the teacher has said about the training data before (`gemma2 teacher-cache`), which
            is trained on in its stead; null to ask it in each step.
        encoding: what the cache keeps of the teacher's distributions; null to take a cache as it is.
        on_policy: train on the student's own samples at some steps; null for the data alone.
        match: which of its layers the student matches as well; null for none.
        model: its sizes, for `gemma2 plan`, which asks for no checkpoint; null to take them from there. A checkpoint
            of other sizes is refused.
        layout: how the teacher lies on the mesh; null to lie as the student does.
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
    def teaches(self) -> bool:
        """Whether there is a teacher, or a cache of what one has said; without either, a run learns from text alone."""
        return self.teacher is not None or self.cache is not None


def load_teacher(config: DistillConfig, student: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> Gemma2:
    """The teacher, laid out on the student's mesh, with as many rows of padding in its vocabulary.

    Raises:
        UserError: it is not whole, or what `open_teacher` refuses.
    """
    source, padded = open_teacher(config, student, tokenizer)
    with as_teacher(config):
        check_activations(mesh, dim_sizes(padded))
        return Gemma2(padded, load_params(source, padded, config.dtype, mesh))


def open_teacher(
    config: DistillConfig, student: ModelConfig, tokenizer: Tokenizer
) -> tuple[Source, ModelConfig]:
    """The teacher's checkpoint, found to suit the student, and its sizes with the student's rows of padding.

    Raises:
        UserError: there is none, it has another tokenizer than the student, or lacks a layer to match.
    """
    if config.teacher is None:
        raise UserError("distill.teacher is null; it must be a checkpoint of the teacher.")
    source = open_for(tokenizer, config.teacher, "distill.teacher")
    padded = replace(source.config, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)
    if config.match is not None:
        config.match.check_teacher(student, padded)
    if config.model is not None:
        _check_sizes(config.model, padded, config.teacher)
    return source, padded


def as_teacher(config: DistillConfig) -> AbstractContextManager[None]:
    """Has what is traced within lie as the teacher does."""
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
