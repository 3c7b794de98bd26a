"""The online teacher: a frozen model whose forward pass runs inside the student's training step."""

from dataclasses import dataclass, replace
from typing import Literal

from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.formats.load import load_params, open_for
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2


@dataclass(frozen=True)
class DistillConfig:
    """Who teaches.

    Attributes:
        teacher: a checkpoint of the teacher, a run folder or any other kind that `gemma2 convert` reads; null
            without distillation.
        dtype: of the teacher's weights and activations. It has no optimizer state and gets no gradient.
    """

    teacher: str | None
    dtype: Literal["float32", "bfloat16"]


def load_teacher(config: DistillConfig, student: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> Gemma2:
    """The teacher, laid out on the student's mesh, with as many rows of padding in its vocabulary.

    Raises:
        UserError: it is not whole, or has another tokenizer than the student.
    """
    if config.teacher is None:
        raise UserError("distill.teacher is null; it must be a checkpoint of the teacher.")
    source = open_for(tokenizer, config.teacher, "distill.teacher")
    padded = replace(source.config, vocab_size=student.vocab_size, vocab_padding=student.vocab_padding)
    return Gemma2(padded, load_params(source, padded, config.dtype, mesh))
