"""Writes and verifies a LiteRT-LM file: a model with its tokenizer, chat format and stops, for phones and browsers."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template, turn_parts
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import beside, replacing
from gemma2_jax.formats.litert_graph import Graph
from gemma2_jax.formats.litert_model import Blocks, ModelFile, exported, storages
from gemma2_jax.formats.litert_quantise import FORMATS
from gemma2_jax.formats.metadata import Metadata
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.vocabulary import check_tokens, without_padding

CONTEXT = 4096  # positions
PREFILL = (128, 1024)  # tokens


@dataclass(frozen=True)
class LiteRTSettings:
    """What a LiteRT-LM file fixes besides the model.

    Attributes:
        quantize: format of the matrices, `int8` or `int4`; None for float32.
        prefill: numbers of tokens of a prompt that the engine can run at a time; a shorter rest of a prompt is padded.
            By default those of PREFILL that the context holds, or else the context.
        context: tokens of a chat, prompts and replies together. The engine allocates the cache for all of them.

    Raises:
        UserError: a value is not accepted; the message names the option of `gemma2 convert`.
    """

    quantize: str | None = None
    prefill: tuple[int, ...] = ()
    context: int = CONTEXT

    def __post_init__(self) -> None:
        if self.quantize not in (None, *FORMATS):
            raise UserError(f"--quantize is {self.quantize}; accepted: {', '.join(FORMATS)}.")
        if self.context < 2:
            raise UserError(f"--context is {self.context}; it must be at least 2: a token and the next one.")
        lengths = self.prefill or tuple(n for n in PREFILL if n <= self.context) or (self.context,)
        if not all(1 <= length <= self.context for length in lengths):
            raise UserError(
                f"--prefill is {','.join(map(str, lengths))}; accepted: numbers of tokens from 1 to the context "
                f"({self.context}), such as --prefill {min(PREFILL[0], self.context)}."
            )
        object.__setattr__(self, "prefill", tuple(sorted(set(lengths))))


def check_extra() -> None:
    """Raises UserError if the packages that write these files are not installed."""
    try:
        import litert_converter  # noqa: F401
        import litert_lm_builder  # noqa: F401
    except ImportError:
        raise UserError(
            "A LiteRT-LM file needs the extra litert: pip install 'gemma2_jax[litert]'."
        ) from None


class LiteRTFile:
    """A LiteRT-LM file to write.

    Args:
        config: of the model; tokenizer_model: content of the SentencePiece model file.
        metadata: of the original checkpoint.

    Raises:
        UserError: the extra `litert` is missing, the tokenizer has another number of tokens than the model, or int4
            cannot hold the model's rows.
    """

    def __init__(
        self,
        config: ModelConfig,
        settings: LiteRTSettings,
        tokenizer_model: bytes,
        metadata: Metadata = Metadata(),
    ) -> None:
        check_extra()
        tokenizer = Tokenizer(tokenizer_model, "The tokenizer", metadata.stop_ids)
        check_tokens(config, tokenizer.vocab_size, "The tokenizer")
        graph = Graph(without_padding(config), settings.context)
        weights = storages(graph, settings.quantize)
        self._tokenizer_model = tokenizer_model
        self._metadata = llm_metadata(tokenizer, settings.context)
        self._model = ModelFile(exported(graph, settings.prefill), weights)

    def write(self, path: str | Path, tensors: Iterable[tuple[str, Blocks]]) -> None:
        """Writes the file, holding one weight at a time; readers never see a partial file.

        Args:
            tensors: all weights of `layouts.HUGGINGFACE` by name, in its order, each whole or in blocks of rows; the
                embedding without padding.

        Raises:
            UserError: a weight holds a number that cannot be stored.
        """
        from litert_lm_builder import DType, LitertLmFileBuilder, Metadata, TfLiteModelType

        # Gemma 2's activations go beyond float16, which the engine would choose on a GPU.
        float32 = [Metadata("prefer_activation_type", "fp32", DType.STRING)]
        with replacing(path) as temporary, beside(temporary) as parts:
            parts.mkdir()
            model, tokenizer, metadata = (parts / name for name in ("model", "tokenizer", "metadata"))
            with model.open("wb") as file:
                for _, place, content in self._model.pieces(tensors):
                    file.seek(place)
                    file.write(np.ascontiguousarray(content).data)
            tokenizer.write_bytes(self._tokenizer_model)
            metadata.write_bytes(self._metadata.SerializeToString())
            builder = LitertLmFileBuilder()
            builder.add_llm_metadata(str(metadata))
            builder.add_sentencepiece_tokenizer(str(tokenizer))
            builder.add_tflite_model(str(model), TfLiteModelType.PREFILL_DECODE, additional_metadata=float32)
            with temporary.open("wb") as bundle:
                builder.build(bundle)

    def compare(self, path: str | Path, tensors: Iterable[tuple[str, Blocks]]) -> None:
        """Raises UserError unless the file holds these weights, and the description of the model, byte for byte."""
        begin = model_offset(path)
        with Path(path).open("rb") as file:
            for name, place, content in self._model.pieces(tensors):
                file.seek(begin + place)
                if file.read(content.nbytes) != content.tobytes():
                    raise UserError(
                        f"{path} does not hold {name} as it was written; check the disk and convert again."
                    )


def model_offset(path: str | Path) -> int:
    """Returns the place of the TFLite model in a LiteRT-LM file, in bytes."""
    from litert_lm_builder import litertlm_header_schema_py_generated as schema
    from litert_lm_builder.litertlm_peek import read_litertlm_header

    sections = read_litertlm_header(str(path), io.StringIO()).SectionMetadata()
    each = [sections.Objects(number) for number in range(sections.ObjectsLength())]
    (found,) = (one for one in each if one.DataType() == schema.AnySectionDataType.TFLiteModel)
    begin: int = found.BeginOffset()
    return begin


def llm_metadata(tokenizer: Tokenizer, context: int) -> Any:
    """Returns the LlmMetadata of a file: start token, stops, context and, with turn tokens, Gemma 2's chat format."""
    from litert_lm_builder.runtime.proto import llm_metadata_pb2

    found = llm_metadata_pb2.LlmMetadata(max_num_tokens=context)
    found.start_token.token_ids.ids.append(tokenizer.bos_id)
    found.pad_token.token_ids.ids.append(tokenizer.pad_id)
    for number in sorted(tokenizer.stop_ids):
        if number < tokenizer.vocab_size:
            found.stop_tokens.add().token_ids.ids.append(number)
    found.llm_model_type.generic_model.SetInParent()
    if tokenizer.end_of_turn_id != tokenizer.eos_id:
        found.jinja_prompt_template = template()  # for conversations
        for role in ("user", "model"):  # for sessions
            header, _, terminator, newline = turn_parts(role, "")
            affixes = getattr(found.prompt_templates, role)
            affixes.prefix, affixes.suffix = header, terminator + newline
    return found


def template() -> str:
    """Returns Gemma 2's chat format in Jinja for the engine.

    The published template does not fit: the engine passes a message as a list of parts, and adds `<bos>` itself. A
    system message, which the published one refuses, becomes the beginning of the user's turn, with a blank line.
    """
    return Path(__file__).with_name("litert_template.jinja").read_text(encoding="utf-8")


def template_note(metadata: Metadata) -> str | None:
    """Returns a clause if the original has a chat template of its own, which the engine could not use; else None."""
    if metadata.chat_template in (None, chat_template()):
        return None
    return "the source's own chat template is not in the file, which has Gemma 2's"
