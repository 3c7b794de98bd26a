"""Hugging Face folders: what is read, what is refused, what is written."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2_jax.config import UserError
from gemma2_jax.formats import huggingface
from gemma2_jax.formats.huggingface import HuggingFaceSource, config_json, read_config, write_shards
from gemma2_jax.formats.load import load, load_params, open_source

WEIGHTS = "model.safetensors"


def edit_config(folder, **values):
    path = folder / "config.json"
    data = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    return path


def edit_weights(folder, **changes):
    tensors = load_file(folder / WEIGHTS)
    for name, change in changes.items():
        name = name.replace("__", ".")
        tensors[name] = change(tensors.get(name))
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / WEIGHTS)


def test_read_as_written(exported, small, params):
    source = open_source(exported)
    assert isinstance(source, HuggingFaceSource)
    assert (source.config, source.dtype, source.problems()) == (small, "bfloat16", [])
    jax.tree.map(np.testing.assert_array_equal, load_params(source, small, "bfloat16"), params)


@pytest.mark.parametrize("window", [7, None])
def test_config_there_and_back(tmp_path, small, window):
    config = replace(small, sliding_window=window, query_pre_attn_scalar=144, rope_base=5e4, norm_eps=1e-5)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_json(config, "float32")))
    assert read_config(path) == config


def test_a_query_scale_that_transformers_does_not_take(small):
    with pytest.raises(
        UserError, match=r"query_pre_attn_scalar is 8.5, and transformers takes whole numbers"
    ):
        config_json(replace(small, query_pre_attn_scalar=8.5), "float32")


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


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model_type": "gemma"}, "has model_type 'gemma'; accepted: 'gemma2'."),
        ({"tie_word_embeddings": False}, "has tie_word_embeddings False; Gemma 2 has True."),
        ({"attention_bias": True}, "has attention_bias True; Gemma 2 has False."),
        ({"hidden_activation": "gelu"}, "has hidden_activation 'gelu'; Gemma 2 has 'gelu_pytorch_tanh'."),
        ({"num_hidden_layers": ...}, "has num_hidden_layers None; it must be a whole number."),
        ({"attn_logit_softcapping": None}, "has attn_logit_softcapping None; it must be a number."),
        (
            {"num_hidden_layers": 3, "layer_types": ...},
            "is no Gemma 2: model.num_layers is 3; it must be even",
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, "has RoPE of type 'yarn'; Gemma 2 has 'default'."),
        ({"rope_scaling": ["x"]}, "has rope_scaling ['x']; accepted: rope_type and rope_theta, or null."),
        ({"rope_parameters": "default"}, "has rope_parameters 'default'; accepted: rope_type and"),
        ({"rope_parameters": {"rope_theta": None}}, "has rope_theta None; it must be a number."),
        ({"rope_parameters": {"rope_theta": "abc"}}, "has rope_theta 'abc'; it must be a number."),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "has rope_parameters with full_attention; accepted: rope_type and rope_theta.",
        ),
        ({"rope_theta": None}, "has rope_theta None; it must be a number."),
        ({"rope_theta": float("inf")}, "has rope_theta inf; it must be a number."),
        ({"rms_norm_eps": 10**400}, "has rms_norm_eps 1000"),
        ({"vocab_size": True}, "has vocab_size True; it must be a whole number."),
        ({"sliding_window": True}, "has sliding_window True; it must be a whole number."),
        ({"use_bidirectional_attention": True}, "has use_bidirectional_attention True; accepted: none"),
        ({"quantization_config": {"bits": 4}}, "has quantization_config {'bits': 4}; accepted: none"),
        ({"layer_types": 5}, "has layer_types 5; accepted: sliding_attention and full_attention in turns"),
        ({"layer_types": {}}, "has layer_types {}; accepted: sliding_attention and full_attention in turns"),
        (
            {"layer_types": ["full_attention", "sliding_attention"] * 2},
            "accepted: sliding_attention and full_attention in turns",
        ),
    ],
)
def test_a_config_that_is_no_gemma_2(hf_folder, values, sentence):
    path = edit_config(hf_folder, **values)
    with pytest.raises(UserError) as caught:
        open_source(hf_folder)
    assert str(caught.value).startswith(str(path))
    assert sentence in str(caught.value)


NORM, QUERY = "model__norm__weight", "model__layers__2__self_attn__q_proj__weight"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({NORM: lambda _: None}, "{folder} lacks the tensor model.norm.weight of shape [32]."),
        (
            {"model__bias": lambda _: np.zeros(3, np.float32)},
            "{folder}/model.safetensors holds the tensor model.bias, which this model does not have.",
        ),
        (
            {QUERY: lambda w: w.reshape(16, -1)},
            "{folder}/model.safetensors holds model.layers.2.self_attn.q_proj.weight of shape [16, 64], where the "
            "model has [32, 32].",
        ),
        (
            {NORM: lambda w: w.astype(np.int8)},
            "{folder}/model.safetensors holds model.norm.weight as I8; accepted: float32, bfloat16, float16.",
        ),
        (
            {"lm_head__weight": lambda _: np.zeros((400, 32), np.float32)},
            "{folder}/model.safetensors holds lm_head.weight apart from the embedding, which Gemma 2 ties to it.",
        ),
    ],
)
def test_tensors_that_do_not_fit(hf_folder, small, changes, sentence):
    edit_weights(hf_folder, **changes)
    source = open_source(hf_folder)
    assert source.problems() == [sentence.format(folder=hf_folder)]
    with pytest.raises(UserError):
        load_params(source, small, "float32")


def test_an_embedding_saved_twice_is_taken(hf_folder):
    embedding = load_file(hf_folder / WEIGHTS)["model.embed_tokens.weight"]
    edit_weights(hf_folder, lm_head__weight=lambda _: embedding)
    assert open_source(hf_folder).problems() == []


def test_an_embedding_with_nan_saved_twice(hf_folder, monkeypatch):
    monkeypatch.setattr(huggingface, "_ROWS", 7)  # in blocks, the last one shorter
    embedding = load_file(hf_folder / WEIGHTS)["model.embed_tokens.weight"]
    embedding[3, 5] = np.nan
    edit_weights(
        hf_folder, lm_head__weight=lambda _: embedding, model__embed_tokens__weight=lambda _: embedding
    )
    assert open_source(hf_folder).problems() == []
    apart = embedding.copy()
    apart[399, 31] += 1
    edit_weights(hf_folder, lm_head__weight=lambda _: apart)
    assert len(open_source(hf_folder).problems()) == 1


def test_the_second_embedding_is_compared_once_and_has_no_say_in_the_dtype(hf_folder, monkeypatch):
    embedding = load_file(hf_folder / WEIGHTS)["model.embed_tokens.weight"]
    edit_weights(hf_folder, lm_head__weight=lambda _: embedding.astype(np.float32))
    source = open_source(hf_folder)
    assert source.dtype == "bfloat16"
    assert source.problems() == []
    monkeypatch.setattr(huggingface, "_block", None)
    assert source.problems() == []


def test_a_second_embedding_of_another_kind(hf_folder):
    edit_weights(hf_folder, lm_head__weight=lambda _: np.zeros((400, 32), np.int8))
    assert open_source(hf_folder).problems() == [
        f"{hf_folder}/model.safetensors holds lm_head.weight as I8; accepted: float32, bfloat16, float16."
    ]


def test_a_second_embedding_without_the_first(hf_folder):
    embedding = load_file(hf_folder / WEIGHTS)["model.embed_tokens.weight"]
    edit_weights(hf_folder, lm_head__weight=lambda _: embedding, model__embed_tokens__weight=lambda _: None)
    assert open_source(hf_folder).problems() == [
        f"{hf_folder} lacks the tensor model.embed_tokens.weight of shape [400, 32]."
    ]


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"model.norm.weight": 3}}'],
)
def test_an_index_without_its_map(hf_folder, content):
    (hf_folder / WEIGHTS).rename(hf_folder / "model-00001-of-00001.safetensors")
    (hf_folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index.json has no weight_map, from names of tensors"):
        open_source(hf_folder)


def test_other_files_in_the_folder(hf_folder):
    """As transformers chooses: model.safetensors, then the index, then what else there is."""
    (hf_folder / "model.safetensors.index.json").write_text("{}")
    save_file({"lora": np.zeros(2)}, hf_folder / "adapter_model.safetensors")
    assert open_source(hf_folder).problems() == []
    (hf_folder / WEIGHTS).rename(hf_folder / "weights.safetensors")
    (hf_folder / "model.safetensors.index.json").unlink()
    assert open_source(hf_folder).problems() == []
    (hf_folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no \*.safetensors of a whole model"):
        open_source(hf_folder)


def test_several_dtypes_are_held_by_float32(hf_folder):
    edit_weights(hf_folder, model__norm__weight=lambda w: w.astype(np.float16))
    assert open_source(hf_folder).dtype == "float32"


def test_files_that_are_cut_or_missing(hf_folder):
    weights = hf_folder / WEIGHTS
    whole = weights.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"PK\3\4 no safetensors at all"):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=rf"{weights} is cut off or no safetensors file: .*\.$"):
            open_source(hf_folder)
    weights.rename(hf_folder / "pytorch_model.bin")
    with pytest.raises(
        UserError,
        match=r"holds no \*.safetensors of a whole model; other files of weights, which may run code",
    ):
        open_source(hf_folder)


def test_shards(exported, hf_folder, small, params):
    tensors = load_file(exported / WEIGHTS)
    (hf_folder / WEIGHTS).unlink()
    write_shards(hf_folder, iter(tensors.items()), {name: t.nbytes for name, t in tensors.items()}, 40_000)
    index = json.loads((hf_folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in hf_folder.glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    jax.tree.map(
        np.testing.assert_array_equal, load_params(open_source(hf_folder), small, "bfloat16"), params
    )

    last = hf_folder / files[-1]
    kept = last.read_bytes()
    last.unlink()
    with pytest.raises(UserError, match=rf"{last} does not exist"):
        open_source(hf_folder)
    save_file({"other": np.zeros(2)}, last)
    with pytest.raises(
        UserError, match=rf"{last} lacks the tensor model.*, which .*index.json says is there"
    ):
        open_source(hf_folder)
    last.write_bytes(kept[:-10])
    with pytest.raises(UserError, match="cut off"):
        open_source(hf_folder)


def test_a_tokenizer_of_another_size(hf_folder):
    edit_config(hf_folder, vocab_size=401)
    edit_weights(hf_folder, model__embed_tokens__weight=lambda w: np.concatenate([w, w[:1]]))
    with pytest.raises(UserError, match=r"tokenizer.model has 400 tokens and the model 401"):
        load(hf_folder)
    (hf_folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"hf has no tokenizer.model"):
        load(hf_folder)


@pytest.mark.parametrize("content", ["", "[1]", "{", "\xff"])
def test_a_config_that_is_no_json(hf_folder, content):
    (hf_folder / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"config.json (is not valid JSON|holds no JSON object)\.$"):
        open_source(hf_folder)
