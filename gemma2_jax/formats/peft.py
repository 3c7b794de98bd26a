"""PEFT's form of a LoRA adapter: adapter_config.json and adapter_model.safetensors.

PEFT holds A as lora_A [R, in] and B as lora_B [out, R], the transposes of ours, for each module of each layer.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.formats.huggingface import opened
from gemma2_jax.formats.json_file import read_object
from gemma2_jax.formats.layouts import HUGGINGFACE, WeightPlace, place_of
from gemma2_jax.formats.recognise import ADAPTER_CONFIG as CONFIG_FILE
from gemma2_jax.formats.recognise import ADAPTER_WEIGHTS as WEIGHTS_FILE
from gemma2_jax.formats.source import DTYPES
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.model.config import ModelConfig
from gemma2_jax.model.lora import TARGETS
from gemma2_jax.model.weights import Weight, specs_by_path, weight_specs

Matrices = Mapping[WeightPlace, tuple[np.ndarray, np.ndarray]]

_PREFIX = "base_model.model."
_LAYER = "model.layers.{layer}."
_IDENTITY = "base_identity"  # our entry in the metadata of the safetensors file, which PEFT ignores
_NAME = re.compile(r"base_model\.model\.(?:model\.)?layers\.(\d+)\.([\w.]+)\.lora_([AB])\.weight")
# Modules by the path of our weight, such as self_attn.q_proj for attention/query.
_MODULES = {
    tensor.weights[0]: tensor.name.removeprefix(_LAYER).removesuffix(".weight")
    for tensor in HUGGINGFACE
    if tensor.weights[0] in TARGETS.values()
}
_PATHS = {module: path for path, module in _MODULES.items()}
# Settings of PEFT under which the matrices mean something else, or are not all that was trained; all must be unset.
_REFUSED = (
    "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layer_replication", "alora_invocation_tokens", "trainable_token_indices", "target_parameters",
)  # fmt: skip
# Initialisations after which the base weights are others than those of the base model.
_CHANGE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")


@dataclass(frozen=True)
class Settings:
    """What adapter_config.json says: base is the path or name of the base model."""

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    base: str | None


def is_adapter_alone(folder: Path) -> bool:
    """Whether a folder holds PEFT's adapter and no complete model."""
    others = {file.name for file in folder.glob("*.safetensors*")} - {WEIGHTS_FILE}
    return (folder / CONFIG_FILE).is_file() and not others


def read_settings(folder: Path) -> Settings:
    """Reads adapter_config.json. Raises UserError if it is damaged, or describes something other than plain LoRA."""
    path = folder / CONFIG_FILE
    found = read_object(path)
    kind = found.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path} has peft_type {kind}; accepted: LORA.")
    for name in _REFUSED:
        if found.get(name):
            shown = json.dumps(found[name])
            raise UserError(
                f"{path} has {name} {shown[:100]}, which is not supported; merge it into its base model with PEFT "
                "(merge_and_unload), and use the merged model."
            )
    start = found.get("init_lora_weights")
    if found.get("bias", "none") != "none" or (
        isinstance(start, str) and start.lower().startswith(_CHANGE_BASE)
    ):
        name = "bias" if found.get("bias", "none") != "none" else "init_lora_weights"
        raise UserError(
            f"{path} has {name} {found[name]}, so it changes weights of the base model itself; merge it into its base "
            "model with PEFT (merge_and_unload), and use the merged model."
        )
    rank, alpha = found.get("r"), found.get("lora_alpha")
    dropout = found.get("lora_dropout", 0.0)
    if (
        not (isinstance(rank, int) and isinstance(alpha, int | float) and isinstance(dropout, int | float))
        or not (rank > 0 and 0 < alpha < math.inf)
        or not 0 <= dropout < 1
    ):
        raise UserError(
            f"{path} has r {rank}, lora_alpha {alpha} and lora_dropout {dropout}; they must be numbers, r at least 1, "
            "lora_alpha above 0, and lora_dropout from 0 to below 1."
        )
    base = found.get("base_model_name_or_path")
    return Settings(
        rank,
        float(alpha),
        found.get("use_rslora") is True,
        float(dropout),
        base if isinstance(base, str) and base else None,
    )


def read(folder: Path, config: ModelConfig) -> tuple[AdaptationConfig, str | None, Matrices]:
    """Reads an adapter for a model of these sizes: settings, identity of the base if we wrote it, and matrices.

    Raises:
        UserError: a file is damaged, a tensor is missing or of another shape, or adapts a module other than `TARGETS`.
    """
    settings, file = read_settings(folder), folder / WEIGHTS_FILE
    if not file.exists() and (pickle := file.with_suffix(".bin")).exists():
        raise UserError(
            f"{pickle} is a pickle, which may run code and cannot be read; save the adapter as safetensors, in PEFT "
            "with model.save_pretrained(NEW)."
        )
    tensors, metadata = opened(file, _content)
    weights = specs_by_path(weight_specs(config))
    halves: dict[WeightPlace, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        place, half = _place(name, file, config)
        spec = weights[place.path]
        into, out = _sides(spec)
        rows = (settings.rank, int(np.prod(into))) if half == "A" else (int(np.prod(out)), settings.rank)
        if tensor.shape != rows:
            raise UserError(
                f"{file} holds {name} of shape {list(tensor.shape)}, but the base model and rank {settings.rank} need "
                f"{list(rows)}."
            )
        if tensor.dtype.name not in DTYPES:
            raise UserError(f"{file} holds {name} as {tensor.dtype.name}; accepted: {', '.join(DTYPES)}.")
        shape = (*into, settings.rank) if half == "A" else (settings.rank, *out)
        halves.setdefault(place, {})[half] = tensor.T.reshape(shape)
    for place, found in halves.items():
        if set(found) != {"A", "B"}:
            raise UserError(f"{file} lacks {_name(place, 'A' if 'B' in found else 'B')}.")
    if not halves:
        raise UserError(f"{file} holds no tensors.")
    layers = sorted({_layer(place) for place in halves})
    adaptation = AdaptationConfig(
        "lora",
        settings.rank,
        settings.alpha,
        settings.rslora,
        settings.dropout,
        tuple(name for name, path in TARGETS.items() if any(place.path.endswith(path) for place in halves)),
        None if len(layers) == config.num_layers else tuple(layers),
    )
    return (
        adaptation,
        metadata.get(_IDENTITY),
        {place: (both["A"], both["B"]) for place, both in halves.items()},
    )


def write(
    folder: Path,
    adaptation: AdaptationConfig,
    identity: str | None,
    matrices: Matrices,
    base: str,
    dtype: str,
) -> None:
    """Writes an adapter as PEFT does.

    Args:
        base: path or hub name of its base model; identity: that of the base's weights, if it is known.

    Raises:
        OSError: a file cannot be written.
    """
    alpha, rank = adaptation.alpha, adaptation.rank
    assert alpha is not None
    assert rank is not None
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": adaptation.dropout,
        "use_rslora": adaptation.rslora,
        "target_modules": [_MODULES[TARGETS[target]].split(".")[-1] for target in adaptation.targets],
        "layers_to_transform": None if adaptation.layers is None else list(adaptation.layers),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    tensors = {}
    for place, (a, b) in matrices.items():
        for half, matrix in (("A", a.reshape(-1, rank)), ("B", b.reshape(rank, -1))):
            tensors[_name(place, half)] = np.ascontiguousarray(matrix.T).astype(dtype)
    metadata = {"format": "pt", **({} if identity is None else {_IDENTITY: identity})}
    try:
        save_file(tensors, folder / WEIGHTS_FILE, metadata=metadata)
    except SafetensorError as error:
        raise OSError(str(error)) from None


def _content(opened: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and the metadata of an open file."""
    names = opened.keys()
    return {name: np.asarray(opened.get_tensor(name)) for name in names}, opened.metadata() or {}


def _place(name: str, file: Path, config: ModelConfig) -> tuple[WeightPlace, str]:
    match = _NAME.fullmatch(name)
    if match is None or match[2] not in _PATHS:
        module = name.removeprefix(_PREFIX).split(".lora_")[0] if match is None else match[2]
        raise UserError(
            f"{file} holds {name}, which adapts {module}; accepted: the modules {', '.join(_PATHS)} of layers."
        )
    layer = int(match[1])
    if layer >= config.num_layers:
        raise UserError(f"{file} holds {name}, but the base model has only {config.num_layers} layers.")
    return place_of(_PATHS[match[2]], layer), match[3]


def _layer(place: WeightPlace) -> int:
    assert place.pair is not None
    return 2 * place.pair + place.path.startswith("pairs/global_block/")


def _name(place: WeightPlace, half: str) -> str:
    module = _MODULES[place.path.split("/", 2)[2]]
    return f"{_PREFIX}{_LAYER.format(layer=_layer(place))}{module}.lora_{half}.weight"


def _sides(spec: Weight) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a stacked weight's in… and out…."""
    sizes, k = spec.shape[1:], len(spec.fan_in)
    return sizes[:k], sizes[k:]
