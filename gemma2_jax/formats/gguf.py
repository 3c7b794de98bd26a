"""Writes and verifies GGUF, the single-file format of a model for llama.cpp; `gguf_encodings.py` encodes tensors."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.files import replacing
from gemma2_jax.formats.gguf_encodings import (
    ENCODINGS,
    Blocks,
    Storage,
    encode_tensor,
    fallback_note,
    ggml_type,
    plan_storage,
    size_of,
)
from gemma2_jax.formats.gguf_header import ARCHITECTURE, open_reader, package, query_pre_attn_scalar
from gemma2_jax.formats.gguf_tokenizer import add_tokenizer
from gemma2_jax.formats.layouts import CONTEXT, GGUF, expand
from gemma2_jax.formats.metadata import Metadata
from gemma2_jax.formats.source import row_blocks
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.vocabulary import without_padding
from gemma2_jax.model.weights import weight_specs

if TYPE_CHECKING:
    from gguf import GGUFWriter

_MOST_LAYERS = 512  # llama.cpp's limit

Importance = Mapping[str, np.ndarray]  # of each input of a matrix, by the tensor's name
NO_IMPORTANCE: Importance = MappingProxyType({})  # all inputs are equally important


def write_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Blocks]],
    tokenizer_model: bytes,
    encoding: str,
    name: str,
    metadata: Metadata = Metadata(),
    importance: Importance = NO_IMPORTANCE,
) -> str | None:
    """Writes a model to one file, holding one tensor at a time; readers never see a partial file.

    Args:
        tensors: all tensors of `layouts.GGUF` by name, in its order, each whole or in blocks of rows; float32, float16
            or bfloat16, the embedding without padding.
        tokenizer_model: content of the SentencePiece model file.
        encoding: one of `ENCODINGS`.
        name: name of the model, which programs display.
        metadata: metadata of the original checkpoint.
        importance: used by the K types; see `k_quants.pack`.

    Returns:
        A clause on the tensors whose rows do not fit the encoding, and how they are stored; None if there are none.

    Raises:
        UserError: the extra `gguf` is missing; GGUF cannot express the model or its tokenizer; or a value is too
            large for the encoding.
    """
    gguf = package()
    if encoding not in ENCODINGS:
        raise UserError(f"The encoding is {encoding!r}; accepted: {', '.join(ENCODINGS)}.")
    check_expressible(config)
    storage = _plan(gguf, config, encoding)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        try:
            context = metadata.model.get("max_position_embeddings", CONTEXT)
            _add_model(gguf, writer, config, encoding, name, context)
            add_tokenizer(gguf, writer, config, tokenizer_model, metadata)
            for tensor, stored in storage.items():
                size, kind = size_of(gguf, stored), ggml_type(gguf, stored.type)
                writer.add_tensor_info(tensor, stored.shape, np.dtype(np.float32), size, raw_dtype=kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (tensor, stored), (given, blocks) in zip(storage.items(), tensors, strict=True):
                if given != tensor:
                    raise ValueError(f"expected tensor {tensor}, got {given}")
                writer.write_tensor_data(encode_tensor(gguf, tensor, blocks, stored, importance.get(tensor)))
        finally:
            writer.close()
    return fallback_note(gguf, storage)


def compare_gguf(
    path: str | Path,
    config: ModelConfig,
    tensors: Iterable[tuple[str, Blocks]],
    encoding: str,
    importance: Importance = NO_IMPORTANCE,
) -> None:
    """Raises UserError unless the file holds these tensors byte for byte as `write_gguf` encodes them."""
    gguf = package()
    storage = _plan(gguf, config, encoding)
    found = {tensor.name: tensor for tensor in open_reader(path).tensors}
    # Read block by block, since all of a mapped file would stay in memory.
    with open(path, "rb") as file:
        for name, blocks in tensors:
            expected = encode_tensor(gguf, name, blocks, storage[name], importance.get(name))
            file.seek(int(found[name].data_offset))
            if found[name].data.shape != expected.shape or not all(
                file.read(block.nbytes) == block.tobytes()
                for block in (expected[rows] for rows in row_blocks(expected.shape))
            ):
                raise UserError(
                    f"{path} does not hold {name} as it was written; check the disk and convert again."
                )


def _plan(gguf: Any, config: ModelConfig, encoding: str) -> dict[str, Storage]:
    entries = expand(GGUF, weight_specs(without_padding(config)))
    return plan_storage(gguf, {name: entry.shape for name, entry in entries.items()}, encoding)


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
