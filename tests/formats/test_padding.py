"""Embeddings of more rows than the tokenizer has tokens: padding, or tokens that were added to it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2_jax.config import UserError
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.inspection import inspect
from gemma2_jax.formats.load import load, open_source
from gemma2_jax.sampling.config import SamplingConfig
from gemma2_jax.sampling.sampler import Sampler
from tests.formats.test_huggingface_config import edit_config
from tests.parameters import mostly_thorough

EMBEDDING = "model.embed_tokens.weight"


def resize(folder, rows):
    """As `resize_token_embeddings`: new rows are something like the mean of the others."""
    tensors = load_file(folder / "model.safetensors")
    old = tensors[EMBEDDING]
    mean = old.astype(np.float32).mean(axis=0, keepdims=True)
    new = np.repeat(5 * mean, max(0, rows - len(old)), axis=0)
    tensors[EMBEDDING] = np.concatenate([old[:rows], new.astype(old.dtype)])
    save_file(tensors, folder / "model.safetensors")
    edit_config(folder, vocab_size=rows)


@mostly_thorough("rows", [401, 448, 1024])
def test_rows_that_nothing_names_are_padding(hf_folder, exported, tmp_path, rows):
    resize(hf_folder, rows)
    edit_config(
        hf_folder, pad_token_id=400
    )  # of a token without a name, which transformers refuses without its row
    source = open_source(hf_folder)
    assert (source.config.vocab_size, source.config.vocab_padding) == (rows, rows - 400)
    convert(hf_folder, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (exported / name).read_bytes()


@pytest.mark.thorough
def test_padding_is_never_generated(hf_folder, exported):
    resize(hf_folder, 448)
    config = SamplingConfig(max_new_tokens=20, temperature=0.0, stop_tokens=())
    texts = [Sampler(*load(folder)).generate(["the"], config) for folder in (hf_folder, exported)]
    assert texts[0] == texts[1]


@pytest.mark.filterwarnings("ignore")
def test_as_transformers_resizes_it(exported, tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs the extra `reference`")
    pytest.importorskip("torch", reason="needs the extra `reference`")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="float32")
    theirs.resize_token_embeddings(401, pad_to_multiple_of=64)
    theirs.save_pretrained(tmp_path / "resized")
    tokenizer = exported / "tokenizer.model"
    model, _ = load(tmp_path / "resized", tokenizer=tokenizer)
    assert (model.config.vocab_size, model.config.vocab_padding) == (448, 48)
    convert(tmp_path / "resized", tmp_path / "run", tokenizer_path=tokenizer)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "run")[0].params(), model.params())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"400": {"content": "[PAD]"}}}),
        ("tokenizer.json", {"added_tokens": [{"id": 400, "content": "[PAD]"}]}),
        ("tokenizer.json", {"model": {"vocab": {"a": 7, "[PAD]": 400}}}),
        ("added_tokens.json", {"[PAD]": 400}),
    ],
)
def test_added_tokens_are_named(hf_folder, tmp_path, name, content):
    resize(hf_folder, 448)
    path = hf_folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | content))
    sentence = r"hf adds tokens to the 400 of .*tokenizer.model: '\[PAD\]' \(400\); give `gemma2 convert` a tokenizer"
    for use in (load, lambda folder: convert(folder, tmp_path / "run")):
        with pytest.raises(UserError, match=sentence):
            use(hf_folder)
    assert "'[PAD]' (400)" in inspect(hf_folder, {}).problems[0]
    assert not (tmp_path / "run").exists()


def test_many_added_tokens(hf_folder):
    resize(hf_folder, 448)
    (hf_folder / "added_tokens.json").write_text(json.dumps({f"<{n}>": n for n in range(400, 430)}))
    with pytest.raises(
        UserError, match=r"'<400>' \(400\), '<401>' \(401\), '<402>' \(402\) and 27 more; give"
    ):
        load(hf_folder)


def test_names_without_a_row_are_no_tokens_of_the_model(hf_folder):
    (hf_folder / "added_tokens.json").write_text('{"<mask>": 400}')
    assert load(hf_folder)[0].config.vocab_padding == 0


@pytest.mark.parametrize("rows", [399, 2000])
def test_a_tokenizer_of_another_model(hf_folder, rows):
    resize(hf_folder, rows)
    with pytest.raises(
        UserError, match=rf"tokenizer.model has 400 tokens, but the embedding in .* has {rows} rows"
    ):
        load(hf_folder)
    (hf_folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"hf has no tokenizer.model"):
        load(hf_folder)
