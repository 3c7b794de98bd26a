"""Hugging Face's form of Gemma 2: config.json, safetensors in one file or several, tokenizer.model."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  # teaches numpy the name bfloat16, which safetensors asks it for
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gemma2_jax.config import UserError
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.files import write_text
from gemma2_jax.formats.added_tokens import named_tokens
from gemma2_jax.formats.huggingface_config import CONFIG_FILE, read_config, ties_embeddings
from gemma2_jax.formats.json_file import read_object
from gemma2_jax.formats.layouts import HUGGINGFACE
from gemma2_jax.formats.metadata import read_metadata
from gemma2_jax.formats.recognise import describe_weights, is_lfs_pointer, missing_shards
from gemma2_jax.formats.source import DTYPES, TOKENIZER_FILE, ForeignSource, TensorInfo, wrong_dtypes

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PREFIX = "model."  # of all names but the head's; a Gemma2Model that was saved by itself has none
# Buffers that older versions of transformers saved, computed from config.json when a model is loaded.
_BUFFER = re.compile(r"(.+\.)?(rotary_emb\.(original_)?inv_freq|embed_scale)")
_ADAPTER = "adapter_model.safetensors"  # of a LoRA, which peft puts beside the model
_ROWS = 8192  # of two embeddings that are compared at a time


class HuggingFaceSource(ForeignSource):
    """A folder as `save_pretrained` writes it and the hub holds it.

    Raises:
        UserError: a file is missing, is not what it should be, or tells of another model than Gemma 2.
    """

    kind = "Hugging Face"

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.config = read_config(self.path / CONFIG_FILE)
        tokenizer = self.path / TOKENIZER_FILE
        self.tokenizer = tokenizer if tokenizer.exists() else None
        self.metadata = read_metadata(self.path)
        saved = {name: info for name, info in self._saved().items() if not _BUFFER.fullmatch(name)}
        self._head = saved.pop(_LM_HEAD, None)  # some tools save the tied embedding a second time
        missing = _PREFIX if _EMBEDDING.removeprefix(_PREFIX) in saved else ""
        self.tensors = {missing + name: info for name, info in saved.items()}
        self._saved_names = {missing + name: name for name in saved}
        super().__init__(HUGGINGFACE)

    def read(self, name: str) -> np.ndarray:
        # Opened anew for each tensor: what was mapped of the file counts as this process's memory until then.
        saved = self._saved_names[name]
        return np.asarray(_opened(self.tensors[name].file, lambda file: file.get_tensor(saved)))

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
            return [f"{self.path / CONFIG_FILE} has tie_word_embeddings false, and {_LM_HEAD} is not there."]
        if head is None or embedding is None or embedding.shape != shape or embedding.dtype not in DTYPES:
            return []  # what is wrong with the embedding itself is told already
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
        return [f"{head.file} holds another {_LM_HEAD} than the embedding; Gemma 2 has one matrix for both."]

    def _saved(self) -> dict[str, TensorInfo]:
        """What the folder holds by the names in its files; of several files, those that transformers would take."""
        if (self.path / WEIGHTS_FILE).exists():
            return _header(self.path / WEIGHTS_FILE)
        index = self.path / INDEX_FILE
        if index.exists():
            return self._indexed(index)
        files = sorted(file for file in self.path.glob("*.safetensors") if file.name != _ADAPTER)
        if not files:
            found = describe_weights(self.path) or "holds no *.safetensors of a whole model"
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
            raise UserError(f"{index} has no weight_map, from names of tensors to names of files.")
        files = sorted(set(names.values()))
        _check_all_there(self.path, [file for file in files if not (self.path / file).exists()])
        headers = {file: _header(self.path / file) for file in files}
        for name, file in names.items():
            if name not in headers[file]:
                raise UserError(f"{self.path / file} lacks the tensor {name}, which {index} lists.")
        return {name: headers[file][name] for name, file in names.items()}


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """The ids of config.json and generation_config.json, for a model whose origin names none."""
    stop = sorted(number for number in tokenizer.stop_ids if number < tokenizer.vocab_size)
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stop[0] if len(stop) == 1 else stop or tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, np.ndarray]], sizes: Mapping[str, int], shard_bytes: int
) -> None:
    """Write tensors as they come into safetensors of at most `shard_bytes`, more only for a single tensor.

    Args:
        tensors: name and array, in the order of `sizes`; one shard of them is in memory at a time.
        sizes: bytes of each tensor.

    Raises:
        OSError: the disk does not take them.
    """
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
        shard = dict(next(arrays) for _ in names)
        try:
            save_file(shard, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from None
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")


def _check_all_there(folder: Path, missing: Sequence[str]) -> None:
    """Raises UserError if the weights are in several files, of which these are missing."""
    if missing:
        more = f", nor do {len(missing) - 1} other files of its weights" if missing[1:] else ""
        raise UserError(
            f"{folder / missing[0]} does not exist{more}; download or copy what is missing again."
        )


def _block(info: TensorInfo, name: str, rows: slice) -> np.ndarray:
    """The bits of some rows, in float32: the same for the same number in any dtype, and a NaN equal to itself."""
    block = np.asarray(_opened(info.file, lambda file: file.get_slice(name)[rows]))
    with np.errstate(invalid="ignore"):
        return block.astype(np.float32).view(np.uint32)


def _header(file: Path) -> dict[str, TensorInfo]:
    def read(opened: Any) -> dict[str, TensorInfo]:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # no mapping
        return {
            name: TensorInfo(tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), part.get_dtype()), file)
            for name, part in slices.items()
        }

    headers: dict[str, TensorInfo] = _opened(file, read)
    return headers


def _opened(file: Path, use: Any) -> Any:
    try:
        with safe_open(file, framework="np") as opened:
            return use(opened)
    except FileNotFoundError:
        raise UserError(f"{file} does not exist.") from None
    except (SafetensorError, OSError) as error:
        if is_lfs_pointer(file):
            raise UserError(
                f"{file} is a pointer of Git LFS; fetch the file itself with `git lfs pull`."
            ) from None
        raise UserError(f"{file} is cut off or no safetensors file: {error}.") from None
