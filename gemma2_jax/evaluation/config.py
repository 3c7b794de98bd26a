"""The settings of an evaluation (`EvaluationConfig`)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from gemma2_jax.config import refuse, suggest
from gemma2_jax.evaluation.windows import DOCUMENT, KINDS, PACKED, SLIDING
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.quantised import WEIGHT_FORMATS
from gemma2_jax.sharding.layout import LayoutConfig
from gemma2_jax.sharding.mesh import MeshConfig

UNQUANTISED = "none"  # in a list of formats


@dataclass(frozen=True)
class EvaluationConfig:
    """What checkpoints are evaluated on, and how.

    Attributes:
        text: globs of files (as `data.source`), or "python-docs"; each is a domain with scores of its own. NAME=GLOB
            names a domain. Empty for prepared data.
        data: folder of prepared data, whose held-out documents are scored; null for `text`. With neither, the held-out
            documents of the first checkpoint, which must be a run folder.
        windows: "document" (whole documents, in windows that do not overlap), "sliding" (overlapping windows) or
            "packed" (rows as in training, of prepared data); null for packed with prepared data, else document.
        context: tokens in a window; null for the run's data.seq_len, or 2048 if the first checkpoint is no run folder.
        stride: tokens between two sliding windows; null for half the context.
        batch: rows in a batch; null for 8, or the next multiple of the mesh's shares of a batch.
        limit: maximum number of documents of each domain; with packed windows, of batches. Null for all.
        teacher: checkpoint to compare each model with.
        adapters: LoRA adapters of the one checkpoint; each is evaluated in place of the checkpoint alone.
        sliding_window: tokens that a query of the models' local layers attends to, null for all before it, or
            "checkpoint" for what the checkpoint has. A teacher keeps its own.
        averaged: evaluate the average of a run's weights, or of each adapter's (`training.ema`).
        quantize: formats of the weights, each of which is a row of every checkpoint: none (arrays of compute.dtype),
            int8 or int4. Empty for none alone. The teacher is not quantised.
        tokenizer: SentencePiece model file, for checkpoints without one.
        memorisation: maximum number of documents of each domain whose continuations are tested for memorisation; 0 for
            no test. Of prepared data, documents of the training split are tested.
        text_field, skip_invalid: as in `data`.
        compute: its dtype is that of weights and activations.
        block_tokens: number of tokens per device whose logits exist at a time.
    """

    text: Sequence[str] = ()
    data: str | None = None
    windows: str | None = None
    context: int | None = None
    stride: int | None = None
    batch: int | None = None
    limit: int | None = None
    teacher: str | None = None
    adapters: Sequence[str] = ()
    sliding_window: int | Literal["checkpoint"] | None = "checkpoint"
    averaged: bool = False
    quantize: Sequence[str] = ()
    tokenizer: str | None = None
    memorisation: int = 0
    text_field: str = "text"
    skip_invalid: int | float = 0
    compute: ComputeConfig = ComputeConfig()
    mesh: MeshConfig = field(default_factory=MeshConfig)
    layout: LayoutConfig = field(default_factory=LayoutConfig)
    block_tokens: int = 512

    def __post_init__(self) -> None:
        refuse(self._complaints())

    def _complaints(self) -> Iterator[str]:
        if any(
            isinstance(each, str) for each in (self.text, self.adapters, self.quantize)
        ):  # not its letters
            yield "evaluation.text, adapters and quantize must be lists, as in ['notes/*.txt']."
            return
        if self.text and self.data is not None:
            yield "evaluation.text and evaluation.data are both set; give one of them."
        if self.windows is not None and self.windows not in KINDS:
            yield f"evaluation.windows is {self.windows!r}, {suggest(self.windows, KINDS)}."
        if self.windows == PACKED and self.text:
            yield (
                "evaluation.windows is packed, which takes the rows of prepared data; choose document or sliding for "
                "evaluation.text, or set evaluation.data."
            )
        if self.context is not None and not 2 <= self.context < 2**31:
            yield f"evaluation.context is {self.context}; accepted: at least 2, below 2**31."
        if self.stride is not None and self.windows != SLIDING:
            yield f"evaluation.stride is {self.stride}, which only evaluation.windows=sliding uses; set that, too."
        if self.stride is not None and self.stride < 1:
            yield f"evaluation.stride is {self.stride}; it must be at least 1."
        for name in ("batch", "limit", "block_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value < 2**31:
                yield f"evaluation.{name} is {value}; accepted: at least 1, below 2**31."
        for name in self.quantize:
            if name not in (UNQUANTISED, *WEIGHT_FORMATS):
                yield f"evaluation.quantize has {name!r}, {suggest(name, (UNQUANTISED, *WEIGHT_FORMATS))}."
        if len(set(self.quantize)) != len(self.quantize):
            yield f"evaluation.quantize is {','.join(self.quantize)}; it must be a list of different formats."
        if self.memorisation < 0:
            yield f"evaluation.memorisation is {self.memorisation}; it must be a number of documents, 0 for no test."

    @property
    def kind(self) -> str:
        """The kind of windows, chosen by the input where `windows` is null."""
        return self.windows or (DOCUMENT if self.text else PACKED)
