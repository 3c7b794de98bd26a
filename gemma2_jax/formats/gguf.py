"""Writes and verifies GGUF, the single-file format of a model for llama.cpp.

Matrices are stored in the requested encoding, with three exceptions, the first two as in llama.cpp's own tools: norms
stay float32; a matrix whose rows are not a multiple of the encoding's blocks of 32 is stored as f16; and a `q4_0` file
holds the embedding as q8_0, since it is also the LM head, where 4 bits cost the most.
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

_ROWS = 4096  # encoded at a time, to save memory: quantisation makes several float32 copies
# User-defined pieces of the model file that llama.cpp treats as control tokens, not as text.
_CONTROL_PIECE = re.compile(r"<(?:start|end)_of_turn>|<unused\d+>|<mask>|<2mass>|\[@BOS@\]")
_MOST_LAYERS = 512  # llama.cpp's limit
_NEVER_MERGED = -1000.0  # score of pieces that are only matched as a whole, never merged from smaller ones


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, np.ndarray]],
    tokenizer_model: bytes,
    encoding: str,
    name: str,
    metadata: Metadata = Metadata(),
) -> None:
    """Writes a model to one file, holding one tensor at a time; readers never see a partial file.

    Args:
        tensors: all tensors of `layouts.GGUF` by name, in its order; float32, float16 or bfloat16, the embedding
            without padding.
        tokenizer_model: content of the SentencePiece model file.
        encoding: one of `ENCODINGS`.
        name: name of the model, which programs display.
        metadata: metadata of the original checkpoint.

    Raises:
        UserError: the extra `gguf` is missing; GGUF cannot express the model or its tokenizer; or a value is too
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
                    raise ValueError(f"expected tensor {tensor} {shape}, got {given} {array.shape}")
                writer.write_tensor_data(_encode(gguf, tensor, array, kinds[tensor]))
        finally:
            writer.close()


def compare_gguf(
    path: str | Path, config: ModelConfig, tensors: Iterable[tuple[str, np.ndarray]], encoding: str
) -> None:
    """Raises UserError unless the file holds these tensors byte for byte as `write_gguf` encodes them."""
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
    """Returns the shape and the encoding of each tensor of a file."""
    shapes = {
        tensor: entry.shape for tensor, entry in expand(GGUF, weight_specs(without_padding(config))).items()
    }
    return shapes, {tensor: _kind(package(), tensor, shape, encoding) for tensor, shape in shapes.items()}


def check_expressible(config: ModelConfig) -> None:
    """Raises UserError if llama.cpp would load a GGUF file of this model as a different one, or not at all.

    It derives the scale of queries not from the file but from the sizes: (d_model / num_heads)^-1/2 in a model of
    46 layers, the 27B, and head_dim^-1/2 in every other.
    """
    scalar = query_pre_attn_scalar(config.num_layers, config.d_model, config.num_heads, config.head_dim)
    if not math.isclose(config.query_pre_attn_scalar, scalar, rel_tol=1e-6):
        rule = "d_model / num_heads" if scalar != config.head_dim else "head_dim"
        raise UserError(
            f"model.query_pre_attn_scalar is {config.query_pre_attn_scalar:g}, which GGUF cannot express; llama.cpp "
            f"always uses {rule}, here {scalar}."
        )
    if config.num_layers > _MOST_LAYERS:
        raise UserError(
            f"model.num_layers is {config.num_layers}; llama.cpp loads models of at most {_MOST_LAYERS} layers."
        )
    if config.sliding_window is None:
        raise UserError(
            "model.sliding_window is null, which GGUF cannot express; llama.cpp needs a number of tokens."
        )
    if config.global_every != 1:
        raise UserError(
            f"model.global_every is {config.global_every}, which GGUF cannot express; llama.cpp makes every second "
            "layer of a Gemma 2 global."
        )


def _kind(gguf: Any, tensor: str, shape: tuple[int, ...], encoding: str) -> "GGMLQuantizationType":
    """Returns the encoding of one tensor; see the top of this file."""
    kinds = gguf.GGMLQuantizationType
    if len(shape) == 1:
        return kinds.F32
    if encoding == "q4_0" and tensor == EMBEDDING:
        encoding = "q8_0"
    kind = kinds[encoding.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    return kinds.F16 if shape[-1] % block else kind


def _encode(gguf: Any, tensor: str, array: np.ndarray, kind: "GGMLQuantizationType") -> np.ndarray:
    """Returns the tensor as it is stored in the file: float32, float16, or bytes."""
    kinds = gguf.GGMLQuantizationType
    if kind == kinds.BF16:
        check_range(array, "bfloat16", tensor)
    dtype = {kinds.F32: np.float32, kinds.F16: np.float16}.get(kind)
    shape = array.shape if dtype else gguf.quant_shape_to_byte_shape(array.shape, kind)
    encoded = np.empty(shape, dtype or np.uint8)
    with np.errstate(over="ignore", invalid="ignore"):  # checked below
        for start in range(0, len(array), _ROWS):
            rows = slice(start, start + _ROWS)
            encoded[rows] = gguf.quants.quantize(array[rows].astype(np.float32), kind)
    if not _is_finite(gguf, encoded, kind):
        largest = ", whose largest number is 65504" if kind == kinds.F16 else ""
        raise UserError(
            f"{tensor} holds a value that is not finite in {kind.name.lower()}{largest}; accepted: f32, bf16."
        )
    return encoded


def _is_finite(gguf: Any, encoded: np.ndarray, kind: "GGMLQuantizationType") -> bool:
    """Whether all numbers of an encoded tensor are finite.

    A block of 8-bit or 4-bit numbers is finite if its scale is. Always True for f32 and bf16, which keep non-finite
    numbers unchanged.
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
    writer.add_tokenizer_model("llama")  # llama.cpp's name for SentencePiece's BPE
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
    """Returns the stop ids, starting with the tokenizer's end of text and end of turn.

    llama.cpp has keys for three: the ends of a text, of a turn and of a message. It stops at all of them, and always
    at `<end_of_turn>`, which it recognises by name.

    Raises:
        UserError: there are more than three.
    """
    usual = [tokenizer.eos_id, tokenizer.end_of_turn_id]
    stop = [number for number in tokenizer.stop_ids if number < tokenizer.vocab_size] or usual[:1]
    ends = sorted(stop, key=lambda number: (usual.index(number) if number in usual else len(usual), number))
    if tokenizer.end_of_turn_id not in (tokenizer.eos_id, *ends):
        ends.insert(1, tokenizer.end_of_turn_id)
    if len(ends) > 3:
        raise UserError(
            f"The stop ids are {', '.join(map(str, ends))}, but GGUF can store only 3; remove some from eos_token_id "
            "in the source's generation_config.json (metadata.json in a run folder)."
        )
    return ends


def _vocabulary(kinds: Any, model: bytes) -> tuple[list[str], list[float], list[int]]:
    """Returns the text, score and type of every piece, like llama.cpp's own converter.

    Raises:
        UserError: the tokenizer has a setting that llama.cpp does not support, so that it would encode differently.
    """
    proto = parse_model(model, "llama.cpp")
    tokens, scores, types = [], [], []
    for piece in proto.pieces:
        text, score, kind = piece.piece, piece.score, kinds(piece.type)  # the numbers are SentencePiece's
        if kind == kinds.USER_DEFINED and _CONTROL_PIECE.fullmatch(text):
            kind = kinds.CONTROL
        if kind == kinds.USER_DEFINED:
            text = text.replace("▁", " ")  # llama.cpp matches these pieces before it replaces spaces
        if kind in (kinds.USER_DEFINED, kinds.CONTROL, kinds.UNKNOWN):
            score = _NEVER_MERGED
        tokens.append(text)
        scores.append(score)
        types.append(kind)
    return tokens, scores, types
