"""Reads the header of a GGUF file, without its weights; the lists in its metadata only on demand."""

import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2_jax.config import UserError, build
from gemma2_jax.files import reason
from gemma2_jax.formats.gguf_private import header_reader
from gemma2_jax.formats.source import TensorInfo
from gemma2_jax.model.config import ModelConfig

if TYPE_CHECKING:
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderField

ARCHITECTURE = "gemma2"
EMBEDDING = "token_embd.weight"
_MAGIC = b"GGUF"
_NUMPY_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True)
class Header:
    """The header of a Gemma 2's GGUF file.

    Attributes:
        name: name of the model, empty if it has none.
        encoding: encoding of most matrices; "unknown" if the file does not give it.
        config: model config as llama.cpp reads it from the file.
        num_tokens: number of tokens of its tokenizer.
        tensors: tensors by name, with shapes in NumPy's order, (out, in).
    """

    name: str
    encoding: str
    config: ModelConfig
    num_tokens: int
    tensors: Mapping[str, TensorInfo]


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a file that begins like GGUF, whatever its name. Raises UserError if it cannot be read."""
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None


def read_header(path: str | Path) -> Header:
    """Returns the header of a GGUF file.

    Raises:
        UserError: the extra `gguf` is missing; the file is missing, truncated or not GGUF; or its model is not a
            Gemma 2.
    """
    return header_of(Path(path), open_reader(path))


def open_reader(path: str | Path) -> "GGUFReader":
    """Returns the package's reader of a file, which maps the weights and gives only the length of metadata lists.

    Raises:
        UserError: the extra `gguf` is missing, or the file is missing, truncated or not GGUF.
    """
    reader_class = header_reader(package())
    try:
        reader: GGUFReader = reader_class(path)
        return reader
    except OSError as error:
        raise UserError(f"{path} cannot be read: {reason(error, path)}.") from None
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError, struct.error):
        # The errors that the package raises for invalid bytes.
        raise _damaged(path) from None


def _damaged(path: str | Path | None) -> UserError:
    return UserError(f"{path} is not a GGUF file, or is truncated or damaged.")


def package() -> Any:
    """Imports and returns the package `gguf`. Raises UserError if it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("A GGUF file needs the extra gguf: pip install 'gemma2_jax[gguf]'.") from None
    return gguf


def query_pre_attn_scalar(num_layers: int, d_model: int, num_heads: int, head_dim: int) -> int:
    """Returns the number whose power of -1/2 llama.cpp scales queries by."""
    return d_model // num_heads if num_layers == 46 else head_dim


def header_of(path: Path, reader: "GGUFReader") -> Header:
    """Returns the header of an open file; errors as in `read_header`."""
    values = read_values(reader)
    architecture = values.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise UserError(f"{path} holds a model with architecture {architecture}; accepted: {ARCHITECTURE}.")
    tensors = {
        tensor.name: TensorInfo(
            tuple(int(size) for size in reversed(tensor.shape)),
            _NUMPY_NAMES.get(tensor.tensor_type.name, tensor.tensor_type.name.lower()),
            path,
        )
        for tensor in reader.tensors
    }
    if EMBEDDING not in tensors:
        raise UserError(f"{path} lacks the tensor {EMBEDDING}.")
    encodings = {
        kind.value: re.sub("^(MOSTLY|ALL)_", "", kind.name).lower() for kind in package().LlamaFileType
    }
    return Header(
        name=values.get("general.name", ""),
        encoding=encodings.get(values.get("general.file_type"), "unknown"),
        config=_read_config(str(path), values, tensors[EMBEDDING].shape[0]),
        num_tokens=values.get("tokenizer.ggml.tokens", 0),
        tensors=tensors,
    )


def read_values(reader: "GGUFReader") -> dict[str, Any]:
    """Returns the keys and values of a file; of a list its length. Raises UserError if a text is not UTF-8."""
    try:
        return {key: _value(field) for key, field in reader.fields.items()}
    except UnicodeDecodeError:
        raise _damaged(reader.data.filename) from None


def read_list(reader: "GGUFReader", key: str) -> list[str] | np.ndarray | None:
    """Returns a list of texts or numbers in a little-endian file's metadata; None if there is no such list.

    Raises UserError if a text is not UTF-8.
    """
    gguf, field = package(), reader.fields.get(key)
    if field is None or field.parts[2][0] != gguf.GGUFValueType.ARRAY:
        return None
    place = field.offset + sum(part.nbytes for part in field.parts[:3])  # behind the key and the value's type
    data = reader.data.data
    item, length = struct.unpack_from("<IQ", data, place)
    place += struct.calcsize("<IQ")
    if item != gguf.GGUFValueType.STRING:
        return np.frombuffer(data, reader.gguf_scalar_to_np[gguf.GGUFValueType(item)], length, place)
    texts = []
    for _ in range(length):
        (size,) = struct.unpack_from("<Q", data, place)
        place += 8
        try:
            texts.append(str(data[place : place + size], "utf-8"))
        except UnicodeDecodeError:
            raise _damaged(reader.data.filename) from None
        place += size
    return texts


def _value(field: "ReaderField") -> Any:
    """Returns a text, a number, or a list's length; a float32 as the shortest decimal that rounds to it, like 1e-06."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _read_config(path: str, values: Mapping[str, Any], rows: int) -> ModelConfig:
    """Returns the model config, with llama.cpp's defaults for missing keys."""

    def get(key: str, default: Any = None) -> Any:
        value = values.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise UserError(f"{path} lacks the key {ARCHITECTURE}.{key}.")
        return value

    num_layers, d_model, num_heads = get("block_count"), get("embedding_length"), get("attention.head_count")
    head_dim = get("attention.key_length", d_model // max(num_heads, 1))
    data = {
        "vocab_size": rows,
        "num_layers": num_layers,
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": get("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "d_ff": get("feed_forward_length"),
        "sliding_window": get("attention.sliding_window", 4096),
        "query_pre_attn_scalar": query_pre_attn_scalar(num_layers, d_model, max(num_heads, 1), head_dim),
        "attn_logit_softcap": get("attn_logit_softcapping", 50.0),
        "final_logit_softcap": get("final_logit_softcapping", 30.0),
        "rope_base": get("rope.freq_base", 10_000.0),
        "norm_eps": get("attention.layer_norm_rms_epsilon"),
    }
    return build(ModelConfig, data, path)
