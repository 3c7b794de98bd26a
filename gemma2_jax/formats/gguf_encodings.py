"""The encodings of GGUF: the type in which each tensor of a file is stored, and its bytes.

A file's matrices are stored in the type that gives its encoding the name, with these exceptions, as in llama.cpp's own
tools:

- Norms stay float32.
- Some matrices, whose errors cost the most, get a finer type: in q4_0 the embedding, which is also the LM head, is
  q8_0. In q4_k_m and q5_k_m the embedding is q6_k, and so are the value and down projections of about half of the
  layers (`_has_more_bits`).
- A matrix whose rows are not a multiple of its type's blocks gets the next type with blocks of 32 and at least as many
  bits, or f16 if its rows are no multiple of 32 either (`_FALLBACKS`).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.formats import k_quants
from gemma2_jax.formats.gguf_header import EMBEDDING
from gemma2_jax.model.narrowing import check_range

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

CALIBRATED = ("q6_k", "q5_k_m", "q4_k_m")  # packed by `k_quants`, which takes the importance of inputs
QUANTISED = ("q8_0", *CALIBRATED, "q4_0")
ENCODINGS = ("f32", "f16", "bf16", *QUANTISED)

_ROWS = 4096  # encoded at a time, to save memory: quantisation makes several float32 copies
_TYPES = {"q4_k_m": "q4_k", "q5_k_m": "q5_k"}  # of most matrices, where the encoding has another name
_FINER = {"q4_0": "q8_0", "q4_k_m": "q6_k", "q5_k_m": "q6_k"}  # for the matrices whose errors cost the most
_FALLBACKS = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_MIXED = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")
_SCALES = {
    "q6_k": slice(-2, None),
    "q5_1": slice(4),
    "q4_k": slice(4),
    "q5_k": slice(4),
}  # float16s of a block

Blocks = np.ndarray | Iterator[np.ndarray]  # a tensor, or parts of its rows in order


@dataclass(frozen=True)
class Storage:
    """How a tensor is stored: its shape, its type, and the type that it would have if its rows were longer or shorter.

    Types are the lower-case names of `gguf.GGMLQuantizationType`.
    """

    shape: tuple[int, ...]
    type: str
    usual: str


def plan_storage(gguf: Any, shapes: Mapping[str, tuple[int, ...]], encoding: str) -> dict[str, Storage]:
    """Returns how each tensor of a file is stored; see the top of this file.

    Args:
        gguf: the package.
        shapes: of all tensors by name.
        encoding: one of `ENCODINGS`.
    """
    layers = sum(name.endswith("ffn_down.weight") for name in shapes)
    found = {}
    for name, shape in shapes.items():
        usual = "f32" if len(shape) == 1 else _usual_type(name, encoding, layers)
        kind = usual
        if shape[-1] % _block(gguf, kind)[0]:
            kind = _FALLBACKS.get(kind, "f16")
        if shape[-1] % _block(gguf, kind)[0]:
            kind = "f16"
        found[name] = Storage(shape, kind, usual)
    return found


def fallback_note(gguf: Any, storage: Mapping[str, Storage]) -> str | None:
    """Returns a clause on the tensors whose rows do not fit the usual type; None if there are none."""
    groups: dict[tuple[int, str, str], list[str]] = {}
    for name, found in storage.items():
        if found.type != found.usual:
            groups.setdefault((found.shape[-1], found.usual, found.type), []).append(name)
    clauses = []
    for (row, usual, kind), names in groups.items():
        parts = dict.fromkeys(re.sub(r"blk\.\d+\.|\.weight", "", name) for name in names)
        block, _ = _block(gguf, usual)
        clauses.append(
            f"{len(names)} {'tensor' if len(names) == 1 else 'tensors'} ({', '.join(parts)}) as {kind}, since rows of "
            f"{row} are not a multiple of {usual}'s blocks of {block}"
        )
    return f"stored {'; '.join(clauses)}" if clauses else None


def size_of(gguf: Any, storage: Storage) -> int:
    """Returns the number of bytes of a tensor."""
    block, size = _block(gguf, storage.type)
    return math.prod(storage.shape) // block * size


def ggml_type(gguf: Any, kind: str) -> "GGMLQuantizationType":
    found: GGMLQuantizationType = gguf.GGMLQuantizationType[kind.upper()]
    return found


def encode_tensor(
    gguf: Any, name: str, tensor: Blocks, storage: Storage, importance: np.ndarray | None = None
) -> np.ndarray:
    """Returns a tensor as it is stored in the file: float32, float16, or bytes.

    Args:
        name: of the tensor, for messages.
        importance: [n], the importance of each input of a matrix with rows of n numbers, for the K types.

    Raises:
        UserError: a value is not finite, or too large for the type.
        ValueError: the tensor has another shape.
    """
    dtype = {"f32": np.float32, "f16": np.float16}.get(storage.type)
    kind = ggml_type(gguf, storage.type)
    shape = storage.shape if dtype else gguf.quant_shape_to_byte_shape(storage.shape, kind)
    encoded = np.empty(shape, dtype or np.uint8)
    done = 0
    for rows in _row_blocks(tensor):
        if rows.shape[1:] != storage.shape[1:] or done + len(rows) > len(encoded):
            raise ValueError(f"expected tensor {name} {storage.shape}, got rows {rows.shape}")
        if storage.type == "bf16":
            check_range(rows, "bfloat16", name)
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            if storage.type in k_quants.BYTES:
                part = k_quants.pack(rows, storage.type, importance)
            else:
                part = gguf.quants.quantize(rows.astype(np.float32), kind)
        encoded[done : done + len(rows)] = part
        done += len(rows)
    if done != len(encoded):
        raise ValueError(f"expected tensor {name} {storage.shape}, got {done} rows")
    if not _is_finite(gguf, encoded, storage.type):
        largest = ", whose largest number is 65504" if storage.type == "f16" else ""
        raise UserError(
            f"{name} holds a value that is not finite in {storage.type}{largest}; accepted: f32, bf16."
        )
    return encoded


def _usual_type(name: str, encoding: str, layers: int) -> str:
    """Returns the type of a matrix whose rows fit it."""
    mixed = _MIXED.fullmatch(name)
    is_finer = name == EMBEDDING
    if encoding in CALIBRATED and mixed is not None:
        is_finer = _has_more_bits(int(mixed[1]), layers)
    return _FINER[encoding] if is_finer and encoding in _FINER else _TYPES.get(encoding, encoding)


def _has_more_bits(layer: int, layers: int) -> bool:
    """Whether q4_k_m and q5_k_m store a layer's value and down projections as q6_k.

    These are the first and the last eighth of the layers, and every third one in between.
    """
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _block(gguf: Any, kind: str) -> tuple[int, int]:
    """Returns the numbers and the bytes of a type's block."""
    found: tuple[int, int] = gguf.GGML_QUANT_SIZES[ggml_type(gguf, kind)]
    return found


def _row_blocks(tensor: Blocks) -> Iterable[np.ndarray]:
    for part in [tensor] if isinstance(tensor, np.ndarray) else tensor:
        for start in range(0, len(part), _ROWS):
            yield part[start : start + _ROWS]


def _is_finite(gguf: Any, encoded: np.ndarray, kind: str) -> bool:
    """Whether all numbers of an encoded tensor are finite.

    A block of quantised numbers is finite if its scales are. Always True for f32 and bf16, which keep non-finite
    numbers unchanged.
    """
    if kind in ("f32", "bf16"):
        return True
    if kind == "f16":
        return bool(np.isfinite(encoded).all())
    _, size = _block(gguf, kind)
    scales = np.ascontiguousarray(encoded.reshape(-1, size)[:, _SCALES.get(kind, slice(2))]).view(np.float16)
    return bool(np.isfinite(scales).all())
