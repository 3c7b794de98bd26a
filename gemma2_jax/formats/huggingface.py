"""Hugging Face's form of Gemma 2: config.json, one or several safetensors files, tokenizer.model."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # registers the dtype bfloat16 with NumPy, which safetensors needs
import numpy as np
from safetensors import SafetensorError, safe_open

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import write_text
from gemma2_jax.formats.added_tokens import named_tokens
from gemma2_jax.formats.huggingface_config import CONFIG_FILE, read_config, ties_embeddings
from gemma2_jax.formats.json_file import read_object
from gemma2_jax.formats.layouts import EMBEDDING, HUGGINGFACE, WeightPlace
from gemma2_jax.formats.metadata import read_metadata
from gemma2_jax.formats.recognise import ADAPTER_WEIGHTS, describe_weights, is_lfs_pointer, missing_shards
from gemma2_jax.formats.source import DTYPES, TOKENIZER_FILE, ForeignSource, TensorInfo, wrong_dtypes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PREFIX = "model."  # of all names except the head's; a Gemma2Model saved without its head lacks it
# Buffers that older versions of transformers saved; they follow from config.json.
_BUFFER = re.compile(r"(.+\.)?(rotary_emb\.(original_)?inv_freq|embed_scale)")
_ROWS = 8192  # rows of embedding and head to compare at a time


class HuggingFaceSource(ForeignSource):
    """A folder as `save_pretrained` writes it, like those on the hub.

    Raises:
        UserError: a file is missing or damaged, or describes a model other than Gemma 2.
    """

    kind = "Hugging Face"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config = read_config(self.path / CONFIG_FILE)
        tokenizer = self.path / TOKENIZER_FILE
        self.tokenizer = tokenizer if tokenizer.exists() else None
        self.metadata = read_metadata(self.path)
        saved = {name: info for name, info in self._saved().items() if not _BUFFER.fullmatch(name)}
        self._head = saved.pop(_LM_HEAD, None)  # some tools save the tied embedding twice
        missing = _PREFIX if _EMBEDDING.removeprefix(_PREFIX) in saved else ""
        self.tensors = {missing + name: info for name, info in saved.items()}
        self._saved_names = {missing + name: name for name in saved}
        super().__init__(HUGGINGFACE)

    def read(self, name: str) -> np.ndarray:
        # The file is reopened for each tensor, since mapped pages count as this process's memory until it is closed.
        saved = self._saved_names[name]
        return np.asarray(opened(self.tensors[name].file, lambda file: file.get_tensor(saved)))

    def rows(self, place: WeightPlace, rows: slice) -> np.ndarray:
        if place.path == EMBEDDING:
            saved = self._saved_names[_EMBEDDING]
            return np.asarray(opened(self.tensors[_EMBEDDING].file, lambda file: file.get_slice(saved)[rows]))
        return super().rows(place, rows)

    def added_tokens(self, first: int) -> dict[int, str]:
        found = named_tokens(self.path)
        return {number: found[number] for number in sorted(found) if first <= number < self.config.vocab_size}

    def problems(self) -> list[str]:
        return super().problems() + self._head_problems

    @cached_property
    def _head_problems(self) -> list[str]:
        head, embedding = self._head, self.tensors.get(_EMBEDDING)
        shape = self.entries[_EMBEDDING].shape
        if head is None and not ties_embeddings(self.path / CONFIG_FILE):
            return [f"{self.path / CONFIG_FILE} has tie_word_embeddings false, but {_LM_HEAD} is missing."]
        if head is None or embedding is None or embedding.shape != shape or embedding.dtype not in DTYPES:
            return []  # problems of the embedding itself are reported elsewhere
        if head.dtype not in DTYPES:
            return wrong_dtypes({_LM_HEAD: head})
        blocks = [slice(start, min(start + _ROWS, shape[0])) for start in range(0, shape[0], _ROWS)]
        if head.shape == shape and all(
            np.array_equal(
                _block(head, _LM_HEAD, rows), _block(embedding, self._saved_names[_EMBEDDING], rows)
            )
            for rows in blocks
        ):
            return []
        return [
            f"{head.file} holds an {_LM_HEAD} that differs from the embedding; Gemma 2 has one matrix for both."
        ]

    def _saved(self) -> dict[str, TensorInfo]:
        """Returns the tensors by their names in the files; of several sets of files, the one that transformers uses."""
        if (self.path / WEIGHTS_FILE).exists():
            return _header(self.path / WEIGHTS_FILE)
        index = self.path / INDEX_FILE
        if index.exists():
            return self._indexed(index)
        files = sorted(file for file in self.path.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS)
        if not files:
            found = describe_weights(self.path) or "holds no *.safetensors of a complete model"
            raise UserError(f"{self.path} {found}.")
        _check_all_there(self.path, missing_shards(file.name for file in files))
        return {name: info for file in files for name, info in _header(file).items()}

    def _indexed(self, index: Path) -> dict[str, TensorInfo]:
        names = read_object(index).get("weight_map")
        if (
            not isinstance(names, dict)
            or not names
            or not all(isinstance(file, str) for file in names.values())
        ):
            raise UserError(f"{index} has no weight_map from tensor names to file names.")
        files = sorted(set(names.values()))
        _check_all_there(self.path, [file for file in files if not (self.path / file).exists()])
        headers = {file: _header(self.path / file) for file in files}
        for name, file in names.items():
            if name not in headers[file]:
                raise UserError(f"{self.path / file} lacks the tensor {name}, which {index} lists.")
        return {name: headers[file][name] for name, file in names.items()}


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Returns the token ids of config.json and generation_config.json for a model whose source lists none."""
    stop = sorted(number for number in tokenizer.stop_ids if number < tokenizer.vocab_size)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop[0] if len(stop) == 1 else stop or tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, Iterable[np.ndarray]]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: str,
    shard_bytes: int,
) -> None:
    """Writes tensors into safetensors files of at most `shard_bytes` each; only a single tensor may be larger.

    Args:
        tensors: names in the order of `shapes`, and for each the blocks of rows of its array, of dtype `dtype`; one
            block is in memory at a time.
        shapes: shape of each tensor.

    Raises:
        OSError: the files cannot be written.
    """
    width = np.dtype(dtype).itemsize
    sizes = {name: math.prod(shape) * width for name, shape in shapes.items()}
    shards: list[list[str]] = []
    filled = 0
    for name, size in sizes.items():
        if not shards or filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    arrays = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as opened:
            opened.write(_safetensors_header({name: shapes[name] for name in names}, dtype))
            for _ in names:
                for block in next(arrays)[1]:
                    opened.write(np.ascontiguousarray(block).view(np.uint8).data)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _safetensors_header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> bytes:
    """Returns the beginning of a file whose tensors follow in this order."""
    name_of_dtype = next(name for name, ours in _DTYPES.items() if ours == dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": name_of_dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text


def _check_all_there(folder: Path, missing: Sequence[str]) -> None:
    """Raises UserError if any weight files are missing."""
    if missing:
        more = f", nor do {len(missing) - 1} other weight files" if missing[1:] else ""
        raise UserError(
            f"{folder / missing[0]} does not exist{more}; download or copy the missing files again."
        )


def _block(info: TensorInfo, name: str, rows: slice) -> np.ndarray:
    """Returns some rows as the bits of float32, so that equal numbers of any dtypes, also NaNs, compare equal."""
    block = np.asarray(opened(info.file, lambda file: file.get_slice(name)[rows]))
    with np.errstate(invalid="ignore"):
        return block.astype(np.float32).view(np.uint32)


def _header(file: Path) -> dict[str, TensorInfo]:
    def read(opened: Any) -> dict[str, TensorInfo]:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
        return {
            name: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()), file)
            for name, part in slices.items()
        }

    headers: dict[str, TensorInfo] = opened(file, read)
    return headers


def opened(file: Path, use: Any) -> Any:
    """Returns the result of `use` on an open safetensors file. Raises UserError if the file is missing or damaged."""
    try:
        with safe_open(file, framework="np") as opened:
            return use(opened)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist.") from None
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(file):
            raise UserError(
                f"{file} is a Git LFS pointer; fetch the file itself with `git lfs pull`."
            ) from None
        raise UserError(f"{file} is truncated or not a safetensors file: {error}.") from None
