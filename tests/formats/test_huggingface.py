"""Hugging Face folders: what is read, what is refused, what is written. See test_huggingface_config for config.json."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2_jax.config import UserError
from gemma2_jax.formats import huggingface
from gemma2_jax.formats.huggingface import HuggingFaceSource, write_shards
from gemma2_jax.formats.load import load_params, open_source

WEIGHTS = "model.safetensors"


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
            "{folder}/model.safetensors holds model.layers.2.self_attn.q_proj.weight of shape [16, 64], but the "
            "model has [32, 32].",
        ),
        (
            {NORM: lambda w: w.astype(np.int8)},
            "{folder}/model.safetensors holds model.norm.weight as I8; accepted: float32, bfloat16, float16.",
        ),
        (
            {"lm_head__weight": lambda _: np.zeros((400, 32), np.float32)},
            "{folder}/model.safetensors holds an lm_head.weight that differs from the embedding; "
            "Gemma 2 has one matrix for both.",
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


def test_the_second_embedding_is_compared_once_and_does_not_affect_the_dtype(hf_folder, monkeypatch):
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
    with pytest.raises(UserError, match=r"index.json has no weight_map from tensor names"):
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
    with pytest.raises(UserError, match=r"hf holds adapter_model.safetensors without adapter_config.json"):
        open_source(hf_folder)
    (hf_folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"hf holds no \*.safetensors of a complete model\.$"):
        open_source(hf_folder)


def test_several_dtypes_are_held_by_float32(hf_folder):
    edit_weights(hf_folder, model__norm__weight=lambda w: w.astype(np.float16))
    assert open_source(hf_folder).dtype == "float32"


def test_files_that_are_cut_or_missing(hf_folder):
    weights = hf_folder / WEIGHTS
    whole = weights.read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"PK\3\4 no safetensors at all"):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=rf"{weights} is truncated or not a safetensors file: .*\.$"):
            open_source(hf_folder)
    weights.rename(hf_folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"hf holds PyTorch pickles, which may run code and cannot be read"):
        open_source(hf_folder)


def test_shards(exported, hf_folder, small, params):
    tensors = load_file(exported / WEIGHTS)
    (hf_folder / WEIGHTS).unlink()
    blocks = ((name, [tensor[:1], tensor[1:]]) for name, tensor in tensors.items())
    write_shards(hf_folder, blocks, {name: t.shape for name, t in tensors.items()}, "bfloat16", 40_000)
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
    with pytest.raises(UserError, match=rf"{last} does not exist; download or copy"):
        open_source(hf_folder)
    first = hf_folder / files[0]
    first.rename(hf_folder / "away")
    with pytest.raises(UserError, match=rf"{first} does not exist, nor do 1 other weight files;"):
        open_source(hf_folder)
    (hf_folder / "model.safetensors.index.json").rename(hf_folder / "index")
    with pytest.raises(UserError, match=rf"{first} does not exist, nor do 1 other"):
        open_source(hf_folder)
    (hf_folder / "index").rename(hf_folder / "model.safetensors.index.json")
    (hf_folder / "away").rename(first)
    save_file({"other": np.zeros(2)}, last)
    with pytest.raises(UserError, match=rf"{last} lacks the tensor model.*, which .*index.json lists"):
        open_source(hf_folder)
    last.write_bytes(kept[:-10])
    with pytest.raises(UserError, match="truncated"):
        open_source(hf_folder)


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["whole", "saved without its head"])
def test_buffers_of_older_transformers_are_passed_over(hf_folder, small, params, prefix):
    """And a Gemma2Model that was saved by itself has names without `model.`, which transformers takes too."""
    tensors = {
        prefix + name.removeprefix("model."): tensor
        for name, tensor in load_file(hf_folder / WEIGHTS).items()
    }
    for layer in range(small.num_layers):
        tensors[f"{prefix}layers.{layer}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors[f"{prefix}rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, hf_folder / WEIGHTS)
    source = open_source(hf_folder)
    assert (source.problems(), source.dtype) == ([], "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, load_params(source, small, "bfloat16"), params)


def test_a_head_of_its_own_that_is_the_embedding(hf_folder):
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    assert open_source(hf_folder).problems() == [
        f"{hf_folder}/config.json has tie_word_embeddings false, but lm_head.weight is missing."
    ]
    embedding = load_file(hf_folder / WEIGHTS)["model.embed_tokens.weight"]
    edit_weights(hf_folder, lm_head__weight=lambda _: embedding)
    assert open_source(hf_folder).problems() == []
    edit_weights(hf_folder, lm_head__weight=lambda _: embedding + 1)
    assert len(open_source(hf_folder).problems()) == 1


def test_a_pointer_of_git_lfs(hf_folder):
    (hf_folder / WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5000000\n"
    )
    with pytest.raises(UserError, match=r"model.safetensors is a Git LFS pointer; .*`git lfs pull`"):
        open_source(hf_folder)
