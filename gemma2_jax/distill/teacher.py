"""The online teacher: a frozen model whose forward pass runs inside the student's training step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from gemma2_jax.checkpoints.store import TOKENIZER_FILE, load_model, load_model_config
from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2


@dataclass(frozen=True)
class DistillConfig:
    """Who teaches.

    Attributes:
        teacher: the run folder of the teacher; null without distillation.
        dtype: of the teacher's weights and activations. It has no optimizer state and gets no gradient.
    """

    teacher: str | None
    dtype: Literal["float32", "bfloat16"]


def load_teacher(config: DistillConfig, student: ModelConfig, tokenizer: Tokenizer, mesh: Mesh) -> Gemma2:
    """The teacher, laid out on the student's mesh.

    Raises:
        UserError: it has another vocabulary or tokenizer than the student.
    """
    if config.teacher is None:
        raise UserError("distill.teacher is null; it must be the run folder of the teacher.")
    teacher = load_model_config(config.teacher)
    if teacher.vocab_size != student.vocab_size:
        raise UserError(
            f"distill.teacher {config.teacher} has a vocabulary of {teacher.vocab_size} and the student (model) "
            f"one of {student.vocab_size}; both must be the same."
        )
    fingerprint = Tokenizer.load(Path(config.teacher) / TOKENIZER_FILE).fingerprint
    if fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"distill.teacher {config.teacher} was trained with tokenizer {fingerprint[:12]} and the student's "
            f"(tokenizer.path) is {tokenizer.fingerprint[:12]}; both must be the same."
        )
    return load_model(config.teacher, config.dtype, mesh)
