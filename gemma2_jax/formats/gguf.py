"""GGUF, the one-file form of a model that llama.cpp reads: written whole, and compared.

Matrices are stored in the encoding asked for, with three exceptions, the first two as llama.cpp's own tools have
them: norms stay float32; a matrix whose rows the encoding's blocks of 32 do not divide is stored as f16; and a
`q4_0` file holds the embedding as q8_0, since it is the LM head too, where 4 bits cost the most.
"""

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.chat_format import chat_template
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import replacing
from gemma2_jax.formats.gguf_header import (
    ARCHITECTURE,
    EMBEDDING,
    open_reader,
    package,
    query_pre_attn_scalar,
)
from gemma2_jax.formats.layouts import CONTEXT, GGUF, expand
from gemma2_jax.formats.metadata import Metadata, templates_json
from gemma2_jax.formats.tokenizer_files import parse_model
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.narrowing import check_range
from gemma2_jax.model.vocabulary import check_tokens, without_padding
from gemma2_jax.model.weights import weight_specs

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

ENCODINGS = ("f32", "f16", "bf16", "q8_0", "q4_0")

_ROWS = 4096  # encoded at a time: quantising works in float32, and some of it in copies of that
# Pieces that are no text though the model file has them as user-defined: what llama.cpp takes for control tokens.
_CONTROL_PIECE = re.compile(r"<(?:start|end)_of_turn>|<unused\d+>|<mask>|<2mass>|\[@BOS@\]")
_MOST_LAYERS = 512  # that llama.cpp has room for
_NEVER_MERGED = -1000.0  # score of pieces that are matched as wholes, never put together from smaller ones


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer_model: bytes,
    encoding: str,
    name: str,
    metadata: Metadata = Metadata(),
) -> None:
    """Writes a model to one file, holding one tensor at a time; a reader never sees half of it.

    Args:
        tensors: all that `layouts.GGUF` names and in its order, float32, float16 or bfloat16, the embedding
            without padding.
        tokenizer_model: content of the SentencePiece model file.
        encoding: one of `ENCODINGS`.
        name: of the model, as programs show it.
        metadata: what its origin holds beside.

    Raises:
        UserError: the extra `gguf` is missing; the model or its tokenizer cannot be expressed; a value is too
            large for the encoding.
    """
    gguf = package()
    if encoding not in ENCODINGS:
        raise UserError(f"The encoding is {encoding!r}; accepted: {', '.join(ENCODINGS)}.")
    check_expressible(config)
    shapes, kinds = _plan(config, encoding)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            context = metadata.model.get("max_position_embeddings", CONTEXT)
            _add_model(gguf, writer, config, encoding, name, context)
            _add_tokenizer(gguf, writer, config, tokenizer_model, metadata)
            for tensor, shape in shapes.items():
                block, bytes_a_block = gguf.GGML_QUANT_SIZES[kinds[tensor]]
                size = math.prod(shape) // block * bytes_a_block
                writer.add_tensor_info(tensor, shape, np.dtype(np.float32), size, raw_dtype=kinds[tensor])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (tensor, shape), (given, array) in zip(shapes.items(), tensors, strict=True):
                if (given, array.shape) != (tensor, shape):
                    raise ValueError(f"{given} {array.shape} came where {tensor} {shape} was due")
                writer.write_tensor_data(_encode(gguf, tensor, array, kinds[tensor]))
        finally:
            writer.close()


def compare_gguf(
    path: str | Path, config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], encoding: str
) -> None:
    """Raises UserError unless the file holds what `write_gguf` is to make of these tensors, byte for byte."""
    gguf = package()
    _, kinds = _plan(config, encoding)
    found = {tensor.name: tensor for tensor in open_reader(path).tensors}
    for name, array in tensors:
        expected = _encode(gguf, name, array, kinds[name])
        if not np.array_equal(found[name].data.view(np.uint8), expected.view(np.uint8)):
            raise UserError(
                f"{path} does not hold {name} as it was written; check the disk and convert again."
            )


def _plan(
    config: ModelConfig, encoding: str
) -> tuple[dict[str, tuple[int, ...]], "dict[str, GGMLQuantizationType]"]:
    """The shape and the encoding of each tensor of a file."""
    shapes = {
        tensor: entry.shape for tensor, entry in expand(GGUF, weight_specs(without_padding(config))).items()
    }
    return shapes, {tensor: _kind(package(), tensor, shape, encoding) for tensor, shape in shapes.items()}


def check_expressible(config: ModelConfig) -> None:
    """Raises UserError if llama.cpp would take a GGUF file of this model for a different one.

    It takes the scale of queries not from the file but from the sizes: (d_model / num_heads)^-1/2 in a model of
    46 layers, the 27B, and head_dim^-1/2 in every other.
    """
    scalar = query_pre_attn_scalar(config.num_layers, config.d_model, config.num_heads, config.head_dim)
    if not math.isclose(config.query_pre_attn_scalar, scalar, rel_tol=1e-6):
        rule = "d_model / num_heads" if scalar != config.head_dim else "head_dim"
        raise UserError(
            f"model.query_pre_attn_scalar is {config.query_pre_attn_scalar:g}, which GGUF cannot express; llama.cpp "
            f"takes {rule}, here {scalar}."
        )
    if config.num_layers > _MOST_LAYERS:
        raise UserError(
            f"model.num_layers is {config.num_layers}, which llama.cpp does not load; it takes {_MOST_LAYERS} at most."
        )
    if config.sliding_window is None:
        raise UserError(
            "model.sliding_window is null, which GGUF cannot express; llama.cpp takes a number of tokens."
        )


def _kind(gguf: Any, tensor: str, shape: tuple[int, ...], encoding: str) -> "GGMLQuantizationType":
    """The encoding of one tensor; see the top of this file."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    if encoding == "q4_0" and tensor == EMBEDDING:
        encoding = "q8_0"
    kind = kinds[encoding.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kinds.F16 if shape[-1] % block else kind


def _encode(gguf: Any, tensor: str, array: np.ndarray, kind: "GGMLQuantizationType") -> np.ndarray:
    """The tensor as it lies in the file: float32, float16, or bytes."""
    kinds = gguf.GGMLQuantizationType
    if kind == kinds.BF16:
        check_range(array, "bfloat16", tensor)
    dtype = {kinds.F32: np.float32, kinds.F16: np.float16}.get(kind)
    shape = array.shape if dtype else gguf.quant_shape_to_byte_shape(array.shape, kind)
    encoded = np.empty(shape, dtype or np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):  # told below
        for start in range(0, len(array), _ROWS):
            rows = slice(start, start + _ROWS)
            encoded[rows] = gguf.quants.quantize(array[rows].astype(np.float32), kind)
    if not _is_finite(gguf, encoded, kind):
        largest = ", whose largest is 65504" if kind == kinds.F16 else ""
        raise UserError(
            f"{tensor} holds a value that is no finite number in {kind.name.lower()}{largest}; accepted: f32, bf16."
        )
    return encoded


def _is_finite(gguf: Any, encoded: np.ndarray, kind: "GGMLQuantizationType") -> bool:
    """Whether all numbers of a tensor are; those of a block of 8 or 4 bits are if the block's scale is.

    True of wider encodings, which hold what is not finite as it was.
    """
    kinds = gguf.GGMLQuantizationType
    if kind in (kinds.F32, kinds.BF16):
        return True
    if kind == kinds.F16:
        return bool(np.isfinite(encoded).all())
    _, size = gguf.GGML_QUANT_SIZES[kind]
    scales = np.ascontiguousarray(encoded.reshape(-1, size)[:, :2]).view(np.float16)
    return bool(np.isfinite(scales).all())


def _add_model(
    gguf: Any, writer: "GGUFWriter", config: ModelConfig, encoding: str, name: str, context: int
) -> None:
    assert config.sliding_window is not None
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    prefix = "ALL" if encoding == "f32" else "MOSTLY"
    writer.add_file_type(gguf.LlamaFileType[f"{prefix}_{encoding.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_context_length(context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_attn_logit_softcapping(config.attn_logit_softcap)
    writer.add_final_logit_softcapping(config.final_logit_softcap)
    writer.add_sliding_window(config.sliding_window)


def _add_tokenizer(
    gguf: Any, writer: "GGUFWriter", config: ModelConfig, model: bytes, metadata: Metadata
) -> None:
    tokenizer = Tokenizer(model, "The tokenizer", metadata.stop_ids)
    check_tokens(config, tokenizer.vocab_size, "The tokenizer")
    tokens, scores, types = _vocabulary(gguf.TokenType, model)
    writer.add_tokenizer_model("llama")  # what llama.cpp calls SentencePiece's BPE
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(tokenizer.bos_id)
    ends = _ends(tokenizer)
    writer.add_eos_token_id(ends[0])
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_unk_token_id(types.index(gguf.TokenType.UNKNOWN))
    writer.add_add_bos_token(bool(metadata.tokenizer.get("add_bos_token", True)))
    writer.add_add_eos_token(bool(metadata.tokenizer.get("add_eos_token", False)))
    writer.add_add_space_prefix(False)
    for add, number in zip((writer.add_eot_token_id, writer.add_eom_token_id), ends[1:], strict=False):
        add(number)
    if metadata.chat_template is not None:
        writer.add_chat_template(templates_json(metadata.chat_template))
    elif tokenizer.end_of_turn_id != tokenizer.eos_id:
        writer.add_chat_template(chat_template())


def _ends(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text, that of the tokenizer's own end of text and that of a turn first.

    llama.cpp has keys for three: the ends of a text, of a turn and of a message. It stops at all of them, and at
    `<end_of_turn>` by its name in any case.

    Raises:
        UserError: there are more.
    """
    usual = [tokenizer.eos_id, tokenizer.end_of_turn_id]
    stop = [number for number in tokenizer.stop_ids if number < tokenizer.vocab_size] or usual[:1]
    ends = sorted(stop, key=lambda number: (usual.index(number) if number in usual else len(usual), number))
    if tokenizer.end_of_turn_id not in (tokenizer.eos_id, *ends):
        ends.insert(1, tokenizer.end_of_turn_id)
    if len(ends) > 3:
        raise UserError(
            f"A text ends at the ids {', '.join(map(str, ends))}, and GGUF has room for 3 of them; leave some out of "
            "eos_token_id in the source's generation_config.json (metadata.json in a run folder)."
        )
    return ends


def _vocabulary(kinds: Any, model: bytes) -> tuple[list[str], list[float], list[int]]:
    """The text, score and type of every piece, as llama.cpp's own converter gives them.

    Raises:
        UserError: the tokenizer has a setting that llama.cpp does not know, so that it would encode differently.
    """
    proto = parse_model(model, "llama.cpp")
    tokens, scores, types = [], [], []
    for piece in proto.pieces:
        text, score, kind = piece.piece, piece.score, kinds(piece.type)  # the numbers are SentencePiece's
        if kind == kinds.USER_DEFINED and _CONTROL_PIECE.fullmatch(text):
            kind = kinds.CONTROL
        if kind == kinds.USER_DEFINED:
            text = text.replace("▁", " ")  # is looked for before spaces are replaced
        if kind in (kinds.USER_DEFINED, kinds.CONTROL, kinds.UNKNOWN):
            score = _NEVER_MERGED
        tokens.append(text)
        scores.append(score)
        types.append(kind)
    return tokens, scores, types
