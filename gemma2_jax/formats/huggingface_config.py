"""config.json of a Gemma 2: read as transformers 5 reads it, and written so that transformers loads it.

Keys that transformers ignores are ignored here too. Where several keys give the same setting, the one that
transformers uses applies: `hidden_activation`, not `hidden_act`; for RoPE, a non-empty `rope_scaling` overrides
`rope_parameters`, and a `rope_theta` inside either overrides the one at the top level.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma2_jax.config import UserError
from gemma2_jax.formats.json_file import read_object, shown
from gemma2_jax.formats.layouts import CONTEXT
from gemma2_jax.model.config import ModelConfig

CONFIG_FILE = "config.json"

# Our key: transformers' key, and its default if config.json lacks the key, which is the 2B's value.
_SIZES = {
    "vocab_size": ("vocab_size", 256_000),
    "num_layers": ("num_hidden_layers", 26),
    "d_model": ("hidden_size", 2304),
    "num_heads": ("num_attention_heads", 8),
    "num_kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256),
    "d_ff": ("intermediate_size", 9216),
}
_CONSTANTS = {
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
    "attn_logit_softcap": ("attn_logit_softcapping", 50.0),
    "final_logit_softcap": ("final_logit_softcapping", 30.0),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_RENAMED = {"attention": _GLOBAL}  # old names that transformers still accepts
# All of them are the tanh approximation of GELU, computed in another order.
_ACTIVATION = "gelu_pytorch_tanh"
_ACTIVATIONS = (_ACTIVATION, "gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh")
# Keys that, if set, mean another model or other files: what Gemma 2 has instead.
_ABSENT = {
    "attention_bias": "no bias in its attention",
    "use_bidirectional_attention": "causal attention",
    "per_layer_config": "one configuration for all layers",
}
_QUANTISED = ("quantization_config", "quantization")  # of transformers and of MLX
_FAMILY = {
    "gemma": "Gemma 1",
    "gemma3": "Gemma 3",
    "gemma3_text": "Gemma 3",
    "gemma3n": "Gemma 3n",
    "gemma3n_text": "Gemma 3n",
    "paligemma": "PaliGemma",
    "recurrent_gemma": "RecurrentGemma",
    "t5gemma": "T5Gemma",
}


def read_config(path: Path) -> ModelConfig:
    """Returns the model config in a config.json. Raises UserError if it is not a Gemma 2's."""
    data = read_object(path)
    _check_model_type(path, data)
    _check_same_formula(path, data)
    values: dict[str, Any] = {}
    for ours, (theirs, default) in _SIZES.items():
        values[ours] = _whole_number(path, theirs, data.get(theirs, default))
    for ours, (theirs, constant) in _CONSTANTS.items():
        values[ours] = _number(path, theirs, data.get(theirs, constant))
    values["rope_base"] = _rope_base(path, data)
    values["sliding_window"], values["global_every"] = _windows(path, data, values["num_layers"])
    try:
        return ModelConfig(**values)
    except UserError as error:
        raise UserError(f"{path} is not a Gemma 2: {error}") from None


def ties_embeddings(path: Path) -> bool:
    """Whether the LM head is the embedding, as in Gemma 2, according to a config.json."""
    return bool(read_object(path).get("tie_word_embeddings", True))


def config_json(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the content of config.json without token ids; `read_config` returns the same model from it.

    Raises:
        UserError: transformers would not load the model.
    """
    if config.d_model % config.num_heads:
        raise UserError(
            f"model.d_model is {config.d_model} and model.num_heads {config.num_heads}; transformers loads a Gemma 2 "
            "only if d_model is a multiple of num_heads, so this one cannot become a Hugging Face folder."
        )
    if not float(config.query_pre_attn_scalar).is_integer():
        raise UserError(
            f"model.query_pre_attn_scalar is {config.query_pre_attn_scalar}; transformers accepts only whole numbers."
        )
    # transformers 5 rejects an int where it expects a float, and vice versa.
    values: dict[str, Any] = {theirs: int(getattr(config, ours)) for ours, (theirs, _) in _SIZES.items()}
    values |= {theirs: float(getattr(config, ours)) for ours, (theirs, _) in _CONSTANTS.items()}
    values["query_pre_attn_scalar"] = int(config.query_pre_attn_scalar)
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        **values,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": _ACTIVATION,
        "hidden_activation": _ACTIVATION,
        "initializer_range": 0.02,
        "layer_types": [_GLOBAL if window is None else _LOCAL for window in config.windows],
        "max_position_embeddings": CONTEXT,
        "rope_theta": float(config.rope_base),
        "sliding_window": config.sliding_window or CONTEXT,
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _check_model_type(path: Path, data: Mapping[str, Any]) -> None:
    if "model_type" not in data and "registered_name" in data:
        raise UserError(f"{path} belongs to a Keras preset; accepted: a folder saved by transformers.")
    kind = data.get("model_type")
    if kind != "gemma2":
        name = _FAMILY[kind] if isinstance(kind, str) and kind in _FAMILY else "model other than Gemma 2"
        raise UserError(f'{path} describes a {name}: it has model_type {shown(kind)}; accepted: "gemma2".')


def _check_same_formula(path: Path, data: Mapping[str, Any]) -> None:
    """Raises UserError if the model differs from Gemma 2 in something other than its sizes and constants."""
    if data.get("hidden_activation") not in (None, *_ACTIVATIONS):
        raise UserError(
            f'{path} has hidden_activation {shown(data["hidden_activation"])}; Gemma 2 has "{_ACTIVATION}".'
        )
    if not data.get("is_causal", True):
        raise UserError(f"{path} has is_causal {shown(data['is_causal'])}; Gemma 2 has causal attention.")
    for key, accepted in _ABSENT.items():
        if data.get(key):
            raise UserError(f"{path} has {key} {shown(data[key])}; Gemma 2 has {accepted}.")
    for key in _QUANTISED:
        if data.get(key):
            raise UserError(
                f"{path} has {key} {shown(data[key])}, so its weights are quantised, which cannot be read; give the "
                "checkpoint that they were quantised from, and to hold that one in few bits, add adaptation=qlora for "
                "training or --quantize int4 for generation."
            )


def _rope_base(path: Path, data: Mapping[str, Any]) -> float:
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(data.get(key), dict | None):
            raise UserError(
                f"{path} has {key} {shown(data[key])}; accepted: rope_type and rope_theta, or null."
            )
    key = "rope_scaling" if data.get("rope_scaling") else "rope_parameters"
    rope: dict[str, Any] = data.get(key) or {}
    for name in (_LOCAL, _GLOBAL):
        if name in rope:
            raise UserError(f"{path} has {key} for {name}; accepted: the same values for all layers.")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" and not (kind == "linear" and rope.get("factor") == 1):
        raise UserError(f'{path} has RoPE of type {shown(kind)}; Gemma 2 has "default".')
    for share in (rope.get("partial_rotary_factor"), data.get("partial_rotary_factor")):
        if share not in (None, 1):
            raise UserError(f"{path} has partial_rotary_factor {shown(share)}; Gemma 2 has 1.0.")
    return _number(path, "rope_theta", rope.get("rope_theta", data.get("rope_theta", 10_000.0)))


def _windows(path: Path, data: Mapping[str, Any], layers: int) -> tuple[int | None, int]:
    """Returns `sliding_window` and `global_every`."""
    kinds = data.get("layer_types")
    if isinstance(kinds, list):
        kinds = [_RENAMED.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    if kinds == [_GLOBAL] * layers:
        return None, 1
    # The first global layer determines the pattern; without layer_types, every second layer is global.
    period = kinds.index(_GLOBAL) + 1 if isinstance(kinds, list) and _GLOBAL in kinds else 2
    if kinds not in (None, ([_LOCAL] * (period - 1) + [_GLOBAL]) * (layers // period)) or period % 2:
        raise UserError(
            f"{path} has layer_types {shown(kinds)}; accepted for {layers} layers: {_LOCAL} and {_GLOBAL} alternating, "
            f"the same odd number of {_LOCAL} before each {_GLOBAL}, or {_GLOBAL} alone."
        )
    return _whole_number(path, "sliding_window", data.get("sliding_window", 4096)), period // 2


def _whole_number(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise UserError(f"{path} has {key} {shown(value)}; it must be a whole number.")
    return value


def _number(path: Path, key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= sys.float_info.max:
        raise UserError(f"{path} has {key} {shown(value)}; it must be a number.")
    return float(value)
