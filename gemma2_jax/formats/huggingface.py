"""Hugging Face's form of Gemma 2: config.json, safetensors in one file or several, tokenizer.model."""

import json
import sys
from collections.abc import Iterable, Mapping
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
from gemma2_jax.formats.layouts import CONTEXT, HUGGINGFACE
from gemma2_jax.formats.source import DTYPES, TOKENIZER_FILE, ForeignSource, TensorInfo, wrong_dtypes
from gemma2_jax.model.config import ModelConfig

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_SIZES = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "d_model": "hidden_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
}
# With what transformers takes for them where config.json says nothing.
_CONSTANTS = {
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
    "attn_logit_softcap": ("attn_logit_softcapping", 50.0),
    "final_logit_softcap": ("final_logit_softcapping", 30.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
# What makes another model of it, and the one value that Gemma 2 has.
_FIXED = {"tie_word_embeddings": True, "attention_bias": False}
# What makes another model, or other files, of it wherever it is set.
_ABSENT = ("use_bidirectional_attention", "quantization_config")
_ACTIVATION = "gelu_pytorch_tanh"
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LM_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
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
        self.tensors = self._tensors()
        self._head = self.tensors.pop(_LM_HEAD, None)  # some tools save the tied embedding a second time
        super().__init__(HUGGINGFACE)

    def read(self, name: str) -> np.ndarray:
        # Opened anew for each tensor: what was mapped of the file counts as this process's memory until then.
        return np.asarray(_opened(self.tensors[name].file, lambda file: file.get_tensor(name)))

    def token_ids(self, file: str) -> dict[str, Any]:
        """What CONFIG_FILE or GENERATION_FILE says of tokens, where it says anything."""
        path = self.path / file
        data = _read_json(path) if path.exists() else {}
        return {key: data[key] for key in _TOKEN_IDS if isinstance(data.get(key), int | list)}

    def problems(self) -> list[str]:
        return super().problems() + self._head_problems

    @cached_property
    def _head_problems(self) -> list[str]:
        head, embedding = self._head, self.tensors.get(_EMBEDDING)
        shape = self.entries[_EMBEDDING].shape
        if head is None or embedding is None or embedding.shape != shape or embedding.dtype not in DTYPES:
            return []  # what is wrong with the embedding itself is told already
        if head.dtype not in DTYPES:
            return wrong_dtypes({_LM_HEAD: head})
        blocks = [slice(start, min(start + _ROWS, shape[0])) for start in range(0, shape[0], _ROWS)]
        if head.shape == shape and all(
            np.array_equal(_block(head, _LM_HEAD, rows), _block(embedding, _EMBEDDING, rows))
            for rows in blocks
        ):
            return []
        return [f"{head.file} holds {_LM_HEAD} apart from the embedding, which Gemma 2 ties to it."]

    def _tensors(self) -> dict[str, TensorInfo]:
        """What the folder holds, of several files those that transformers would take."""
        if (self.path / WEIGHTS_FILE).exists():
            return _header(self.path / WEIGHTS_FILE)
        index = self.path / INDEX_FILE
        if not index.exists():
            files = sorted(file for file in self.path.glob("*.safetensors") if file.name != _ADAPTER)
            if not files:
                raise UserError(
                    f"{self.path} holds no *.safetensors of a whole model; other files of weights, which may run "
                    "code, are not read."
                )
            return {name: info for file in files for name, info in _header(file).items()}
        names = _read_json(index).get("weight_map")
        if (
            not isinstance(names, dict)
            or not names
            or not all(isinstance(file, str) for file in names.values())
        ):
            raise UserError(f"{index} has no weight_map, from names of tensors to names of files.")
        headers = {file: _header(self.path / file) for file in sorted(set(names.values()))}
        for name, file in names.items():
            if name not in headers[file]:
                raise UserError(f"{self.path / file} lacks the tensor {name}, which {index} says is there.")
        return {name: headers[file][name] for name, file in names.items()}


def read_config(path: Path) -> ModelConfig:
    """The model that a config.json tells of. Raises UserError if it is no Gemma 2."""
    data = _read_json(path)
    if data.get("model_type") != "gemma2":
        raise UserError(f"{path} has model_type {data.get('model_type')!r}; accepted: 'gemma2'.")
    for key, value in _FIXED.items():
        if data.get(key, value) != value:
            raise UserError(f"{path} has {key} {data[key]!r}; Gemma 2 has {value!r}.")
    for key in ("hidden_activation", "hidden_act"):
        if data.get(key) not in (None, _ACTIVATION):
            raise UserError(f"{path} has {key} {data[key]!r}; Gemma 2 has {_ACTIVATION!r}.")
    for key in _ABSENT:
        if data.get(key):
            raise UserError(f"{path} has {key} {_short(data[key])}; accepted: none, as Gemma 2 was released.")
    values: dict[str, Any] = {}
    for ours, theirs in _SIZES.items():
        values[ours] = _whole_number(path, theirs, data.get(theirs))
    for ours, (theirs, default) in _CONSTANTS.items():
        values[ours] = _number(path, theirs, data.get(theirs, default))
    values["rope_base"] = _rope_base(path, data)
    values["sliding_window"] = _window(path, data, values["num_layers"])
    try:
        return ModelConfig(**values)
    except UserError as error:
        raise UserError(f"{path} is no Gemma 2: {error}") from None


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json but for `token_ids`; `read_config` gives the same model back.

    Raises:
        UserError: queries are scaled by what transformers does not take.
    """
    if not float(config.query_pre_attn_scalar).is_integer():
        raise UserError(
            f"model.query_pre_attn_scalar is {config.query_pre_attn_scalar}, and transformers takes whole numbers only."
        )
    values = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    values |= {theirs: getattr(config, ours) for ours, (theirs, _) in _CONSTANTS.items()}
    values["query_pre_attn_scalar"] = int(config.query_pre_attn_scalar)
    kinds = ("full_attention" if config.sliding_window is None else "sliding_attention", "full_attention")
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **values,
        **_FIXED,
        "attention_dropout": 0.0,
        "hidden_act": _ACTIVATION,
        "hidden_activation": _ACTIVATION,
        "initializer_range": 0.02,
        "layer_types": list(kinds) * config.num_pairs,
        "max_position_embeddings": CONTEXT,
        "rope_theta": config.rope_base,
        "sliding_window": config.sliding_window or CONTEXT,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """What config.json and generation_config.json say of tokens: generation ends at the end of a text or a turn."""
    stop = sorted({tokenizer.eos_id, tokenizer.end_of_turn_id})
    ids = (tokenizer.bos_id, stop[0] if len(stop) == 1 else stop, tokenizer.pad_id)
    return dict(zip(_TOKEN_IDS, ids, strict=True))


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


def _rope_base(path: Path, data: Mapping[str, Any]) -> float:
    base = data.get("rope_theta", 10_000.0)
    for key in ("rope_scaling", "rope_parameters"):  # older, and what transformers 5 writes
        rope = data.get(key)
        if rope is None:
            continue
        if not isinstance(rope, dict):
            raise UserError(f"{path} has {key} {_short(rope)}; accepted: rope_type and rope_theta, or null.")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path} has RoPE of type {kind!r}; Gemma 2 has 'default'.")
        for name in rope:
            if name not in ("rope_type", "type", "rope_theta"):
                raise UserError(f"{path} has {key} with {name}; accepted: rope_type and rope_theta.")
        base = rope.get("rope_theta", base)
    return float(_number(path, "rope_theta", base))


def _window(path: Path, data: Mapping[str, Any], layers: int) -> int | None:
    kinds = data.get("layer_types")
    if kinds == ["full_attention"] * layers:
        return None
    if kinds not in (None, ["sliding_attention", "full_attention"] * (layers // 2)):
        raise UserError(
            f"{path} has layer_types {_short(kinds)}; accepted: sliding_attention and full_attention in turns, or "
            "full_attention alone."
        )
    return _whole_number(path, "sliding_window", data.get("sliding_window", 4096))


def _whole_number(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path} has {key} {_short(value)}; it must be a whole number.")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{path} has {key} {_short(value)}; it must be a number.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # some editors put a BOM in front
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON.") from None
    if not isinstance(data, dict):
        raise UserError(f"{path} holds no JSON object.")
    return data


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
        raise UserError(f"{file} is cut off or no safetensors file: {error}.") from None
