"""config.json: what is read out of it, what is refused, and that transformers takes both as we do."""

import json
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.formats.huggingface_config import config_json, read_config
from gemma2_jax.formats.load import load, open_source
from gemma2_jax.model.config import ModelConfig


def edit_config(folder, **values):
    """Sets keys of config.json; `...` takes one out."""
    path = folder / "config.json"
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


@pytest.mark.parametrize("window", [7, None])
def test_there_and_back(tmp_path, small, window):
    config = replace(small, sliding_window=window, query_pre_attn_scalar=144, rope_base=5e4, norm_eps=1e-5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_json(config, "float32")))
    assert read_config(path) == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"query_pre_attn_scalar": 8.5},
            "query_pre_attn_scalar is 8.5; transformers accepts only whole numbers",
        ),
        ({"d_model": 40, "num_heads": 6}, "model.d_model is 40 and model.num_heads 6; transformers loads"),
    ],
)
def test_what_transformers_does_not_load_is_not_written(small, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        config_json(replace(small, **changes), "float32")


def test_a_config_as_transformers_5_writes_it(hf_folder, small):
    rope = {"rope_theta": 5e4, "rope_type": "default"}
    path = edit_config(
        hf_folder, rope_theta=..., rope_parameters=rope, use_bidirectional_attention=None, layer_types=None
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # a BOM, which an editor put there
    assert read_config(path) == replace(small, rope_base=5e4)


def test_an_older_config_without_constants(hf_folder, small):
    """As transformers fills them in: those of the 2B and 9B."""
    gone = dict.fromkeys(
        ["query_pre_attn_scalar", "attn_logit_softcapping", "layer_types", "rope_theta", "hidden_activation"],
        ...,
    )
    path = edit_config(hf_folder, **gone)
    assert read_config(path) == replace(small, query_pre_attn_scalar=256)


def test_a_config_without_sizes(tmp_path):
    """As transformers fills them in: those of the 2B."""
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gemma2"}')
    assert read_config(path) == ModelConfig(
        vocab_size=256_000,
        num_layers=26,
        d_model=2304,
        num_heads=8,
        num_kv_heads=4,
        head_dim=256,
        d_ff=9216,
        sliding_window=4096,
        query_pre_attn_scalar=256,
    )


ROPE = {"rope_type": "default", "rope_theta": 500.0}
# Keys of config.json, and what they change of the model.
SAME_MODEL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"hidden_act": "relu"}, {}),
    ({"hidden_act": "relu", "hidden_activation": ...}, {}),
    ({"hidden_activation": "gelu_new"}, {}),
    ({"hidden_activation": "gelu_fast"}, {}),
    ({"partial_rotary_factor": 1.0}, {}),
    ({"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}}, {"rope_base": 500.0}),
    ({"rope_scaling": ROPE, "rope_parameters": {**ROPE, "rope_theta": 7e4}}, {"rope_base": 500.0}),
    ({"rope_scaling": {"rope_type": "default"}, "rope_parameters": ROPE}, {}),
    ({"rope_scaling": {"type": "default"}, "rope_theta": 500.0}, {"rope_base": 500.0}),
    ({"rope_scaling": {}, "rope_parameters": ROPE}, {"rope_base": 500.0}),
    ({"rope_scaling": None, "rope_parameters": ROPE, "rope_theta": 7e4}, {"rope_base": 500.0}),
    ({"rope_parameters": ROPE, "rope_theta": None}, {"rope_base": 500.0}),
    ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, {}),
    ({"rope_scaling": {"type": "linear", "factor": 1.0}}, {}),
    ({"rope_theta": 500}, {"rope_base": 500.0}),
    ({"is_causal": True}, {}),
    ({"layer_types": ["sliding_attention", "attention"] * 2}, {}),
    ({"layer_types": ["full_attention"] * 4}, {"sliding_window": None}),
    ({"layer_types": ["sliding_attention"] * 3 + ["full_attention"]}, {"global_every": 2}),
    ({"layer_types": ...}, {}),
    ({"head_dim": ...}, {"head_dim": 256}),
    ({"attention_dropout": 0.5, "cache_implementation": "hybrid", "max_position_embeddings": 64}, {}),
    ({"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0}, {
        "attn_logit_softcap": 40.0, "final_logit_softcap": 20.0
    }),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "changes"), SAME_MODEL, ids=lambda value: str(value))
def test_keys_of_the_same_model(hf_folder, small, keys, changes):
    assert read_config(edit_config(hf_folder, **keys)) == replace(small, **changes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "keys", [keys for keys, changes in SAME_MODEL if "head_dim" not in changes], ids=lambda value: str(value)
)
def test_transformers_computes_the_same_of_them(hf_folder, keys):
    torch = pytest.importorskip("torch", reason="needs the extra `reference`: pip install -e '.[reference]'")
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    edit_config(hf_folder, sliding_window=4)
    edit_config(hf_folder, **keys)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        hf_folder, attn_implementation="eager", dtype="float32"
    )
    ids = [[2, *range(20, 52)]]
    with torch.no_grad():
        expected = theirs.eval()(torch.tensor(ids)).logits.numpy()
    logits = jax.jit(load(hf_folder)[0])(jnp.array(ids))
    assert np.abs(logits - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "gemma"}, 'describes a Gemma 1: it has model_type "gemma"; accepted: "gemma2".'),
        (
            {"model_type": "gemma3_text"},
            'describes a Gemma 3: it has model_type "gemma3_text"; accepted: "gemma2".',
        ),
        (
            {"model_type": "llama"},
            'describes a model other than Gemma 2: it has model_type "llama"; accepted: "gemma2".',
        ),
        (
            {"model_type": ["gemma2"]},
            'describes a model other than Gemma 2: it has model_type ["gemma2"]; accepted: "gemma2".',
        ),
        (
            {"model_type": ..., "registered_name": "x"},
            "belongs to a Keras preset; accepted: a folder saved by",
        ),
        ({"attention_bias": True}, "has attention_bias true; Gemma 2 has no bias in its attention."),
        ({"hidden_activation": "gelu"}, 'has hidden_activation "gelu"; Gemma 2 has "gelu_pytorch_tanh".'),
        ({"is_causal": False}, "has is_causal false; Gemma 2 has causal attention."),
        ({"is_causal": None}, "has is_causal null; Gemma 2 has causal attention."),
        ({"num_hidden_layers": None}, "has num_hidden_layers null; it must be a whole number."),
        ({"attn_logit_softcapping": None}, "has attn_logit_softcapping null; it must be a number."),
        (
            {"num_hidden_layers": 3, "layer_types": ...},
            "is not a Gemma 2: model.num_layers is 3; it must be even",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, 'has RoPE of type "yarn"; Gemma 2 has "default".'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'has RoPE of type "linear"; Gemma 2 has'),
        ({"rope_scaling": ["x"]}, 'has rope_scaling ["x"]; accepted: rope_type and rope_theta, or null.'),
        ({"rope_parameters": "default"}, 'has rope_parameters "default"; accepted: rope_type and'),
        ({"rope_parameters": {"rope_theta": None}}, "has rope_theta null; it must be a number."),
        ({"rope_parameters": {"rope_theta": "abc"}}, 'has rope_theta "abc"; it must be a number.'),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "has rope_parameters for full_attention; accepted: the same values for all layers.",
        ),
        ({"partial_rotary_factor": 0.5}, "has partial_rotary_factor 0.5; Gemma 2 has 1.0."),
        ({"rope_scaling": {**ROPE, "partial_rotary_factor": 0.5}}, "has partial_rotary_factor 0.5; Gemma 2"),
        ({"rope_theta": None}, "has rope_theta null; it must be a number."),
        ({"rope_theta": float("inf")}, "has rope_theta Infinity; it must be a number."),
        ({"rms_norm_eps": 10**400}, "has rms_norm_eps 1000"),
        ({"vocab_size": True}, "has vocab_size true; it must be a whole number."),
        ({"sliding_window": True}, "has sliding_window true; it must be a whole number."),
        ({"sliding_window": None}, "has sliding_window null; it must be a whole number."),
        ({"use_bidirectional_attention": True}, "has use_bidirectional_attention true; Gemma 2 has causal"),
        ({"per_layer_config": {"1": {}}}, 'has per_layer_config {"1": {}}; Gemma 2 has one configuration'),
        (
            {"quantization_config": {"bits": 4}},
            'has quantization_config {"bits": 4}, so its weights are quantised, which cannot be read; give the check',
        ),
        ({"quantization": {"bits": 4}}, 'has quantization {"bits": 4}, so its weights are quantised'),
        (
            {"layer_types": 5},
            "has layer_types 5; accepted for 4 layers: sliding_attention and full_attention",
        ),
        (
            {"layer_types": {}},
            "has layer_types {}; accepted for 4 layers: sliding_attention and full_attention",
        ),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "accepted for 4 layers: sliding_attention and full_attention alternating",
        ),
        ({"layer_types": ["sliding_attention"] * 4}, "the same odd number of sliding_attention before each"),
        (
            {
                "num_hidden_layers": 6,
                "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
            },
            "the same odd number of sliding_attention before each",
        ),
    ],
)
def test_a_config_that_is_no_gemma_2(hf_folder, values, sentence):
    path = edit_config(hf_folder, **values)
    with pytest.raises(UserError) as caught:
        open_source(hf_folder)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff", "[" * 100_000])
def test_a_config_that_is_no_json(hf_folder, content):
    (hf_folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(
        UserError,
        match=r"config.json (is empty; JSON is expected|is cut off or not valid JSON: .*|holds no JSON object)\.$",
    ):
        open_source(hf_folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcap": 50, "final_logit_softcap": 30, "rope_base": 10_000, "norm_eps": 1},
        {"d_model": 36, "num_heads": 6, "num_kv_heads": 3},
        {"head_dim": 2, "num_heads": 1, "num_kv_heads": 1, "sliding_window": 1},
        {"sliding_window": None, "vocab_size": 8, "num_layers": 2},
    ],
    ids=str,
)
def test_transformers_takes_what_is_written(tmp_path, small, changes):
    """Its checks are those of types, too: it refuses a whole number where it has floats."""
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    pytest.importorskip("torch", reason="needs the extra `reference`")
    config = replace(small, **changes)
    (tmp_path / "config.json").write_text(json.dumps(config_json(config, "float32")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    transformers.AutoModelForCausalLM.from_config(theirs)
    assert read_config(tmp_path / "config.json") == config
