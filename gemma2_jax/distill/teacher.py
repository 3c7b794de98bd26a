"""Who teaches; and the online teacher, a frozen model whose forward pass runs inside the student's training step."""

from dataclasses import dataclass, replace
from typing import Literal

from jax.sharding import Mesh

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.on_policy import OnPolicyConfig
from gemma2_jax.formats.load import load_params, open_for
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.transformer import Gemma2


@dataclass(frozen=True)
class DistillConfig:
    """Who teaches.

    Attributes:
        teacher: a checkpoint of the teacher, a run folder or any other kind that `gemma2 convert` reads; null
            without distillation, or to train from a cache of whichever teacher.
        dtype: of the teacher's weights and activations. It has no optimizer state and gets no gradient.
        cache: folder of what the teacher has said about the training data before (`gemma2 teacher-cache`), which
            is trained on in its stead; null to ask it in each step.
        encoding: what the cache keeps of the teacher's distributions; null to take a cache as it is.
        on_policy: train on the student's own samples at some steps; null for the data alone.
    """

    teacher: str | None
    dtype: Literal["float32", "bfloat16"]
    cache: str | None = None
    encoding: EncodingConfig | None = None
    on_policy: OnPolicyConfig | None = None

    def __post_init__(self) -> None:
        if self.encoding is not None and self.cache is None:
            raise UserError(
                "distill.encoding is set, but distill.cache is null, so there is nothing that it is of."
            )


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
