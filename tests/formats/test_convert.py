"""Conversions: bit for bit there and back, verified, and never half written."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2_jax.config import UserError
from gemma2_jax.formats import huggingface
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.load import load, open_source
from gemma2_jax.formats.run import write_run


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back_is_bit_exact(exported, tmp_path):
    told = []
    first = convert(exported, tmp_path / "run", progress=lambda *step: told.append(step))
    second = convert(tmp_path / "run", tmp_path / "again")
    assert (first.source, first.target, first.dtype) == ("Hugging Face", "run", "bfloat16")
    assert (second.source, second.target) == ("run folder", "huggingface")
    assert {stage for stage, _, _ in told} == {"reading", "writing", "verifying"}
    assert told[-1] == ("verifying", first.weights, first.weights)
    assert left(tmp_path / "again") == left(exported)
    for name in left(exported):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name


def test_a_wider_dtype(exported, params, tmp_path):
    convert(exported, tmp_path / "wide", "huggingface", "float32")
    tensors = load_file(tmp_path / "wide" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype("float32")}
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    np.testing.assert_array_equal(tensors["model.norm.weight"], params["final_norm"]["scale"])


def test_padding_is_left_out_of_exports(small, params, tokenizer_config, tmp_path):
    rows = np.concatenate([np.asarray(params["embedder"]["embedding"]), np.full((16, 32), 9.0, "bfloat16")])
    padded = replace(small, vocab_size=small.vocab_size + 16, vocab_padding=16)
    write_run(
        tmp_path / "run", padded, {**params, "embedder": {"embedding": rows}}, Path(tokenizer_config.path)
    )
    convert(tmp_path / "run", tmp_path / "hf")
    source = open_source(tmp_path / "hf")
    assert source.config == small
    model, _ = load(tmp_path / "hf", "bfloat16")
    jax.tree.map(np.testing.assert_array_equal, model.params(), params)


def test_a_source_without_tokenizer(hf_folder, tokenizer_config, tmp_path):
    (hf_folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match=r"hf has no tokenizer.model"):
        convert(hf_folder, tmp_path / "run")
    convert(hf_folder, tmp_path / "run", tokenizer_path=tokenizer_config.path)
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == Path(tokenizer_config.path).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target_path": "taken"}, "taken exists already; choose another target, or delete it."),
        (
            {"dtype": "q8_0"},
            "dtype is 'q8_0'; accepted for a run target: float32, bfloat16, float16.",
        ),
        ({"kind": "gguff"}, "kind is 'gguff'; accepted: run, huggingface, gguf."),
        (
            {"kind": "gguf", "dtype": "q4_k"},
            "dtype is 'q4_k'; accepted for a gguf target: float32, bfloat16, float16, q8_0, q4_0.",
        ),
        ({"source_path": "taken"}, "taken holds no checkpoint that is known; accepted: "),
    ],
)
def test_refused(exported, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    with pytest.raises(UserError) as caught:
        convert(**{"source_path": exported, "target_path": "new"} | arguments)
    assert str(caught.value).startswith(sentence)
    assert left(tmp_path) == ["taken"]


@pytest.mark.parametrize("kind", ["run", "huggingface"])
def test_an_interrupted_conversion_leaves_nothing(exported, tmp_path, kind):
    def stop(stage, done, total):
        if stage == "verifying":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(exported, tmp_path / "new", kind, progress=stop)
    assert left(tmp_path) == []


def test_a_broken_source_leaves_nothing(hf_folder, tmp_path):
    tensors = load_file(hf_folder / "model.safetensors")
    save_file({**tensors, "model.bias": np.zeros(3, np.float32)}, hf_folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model.bias, which this model does not have"):
        convert(hf_folder, tmp_path / "new")
    assert left(tmp_path) == ["hf"]


def test_what_reads_back_differently_is_not_put_in_place(exported, tmp_path, monkeypatch):
    written = huggingface.write_shards

    def spoiled(folder, *arguments):
        written(folder, *arguments)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"][3] += 1
        save_file(tensors, folder / "model.safetensors")

    monkeypatch.setattr(huggingface, "write_shards", spoiled)
    with pytest.raises(UserError, match=r"reads back another final_norm/scale than was written"):
        convert(exported, tmp_path / "new", "huggingface")
    assert left(tmp_path) == []


def test_too_large_for_float16(small, params, tokenizer_config, tmp_path):
    large = {**params, "final_norm": {"scale": params["final_norm"]["scale"] + 1e6}}
    write_run(tmp_path / "run", small, large, Path(tokenizer_config.path))
    with pytest.raises(UserError, match=r"model.norm.weight has values beyond what float16 can hold"):
        convert(tmp_path / "run", tmp_path / "hf", dtype="float16")
    assert left(tmp_path) == ["run"]


def test_a_broken_run_is_refused(run_folder, tmp_path):
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("d_ff: 64", "d_ff: 66"))
    with pytest.raises(
        UserError, match=r"mlp/down of shape \[2, 64, 32\], where the model has \[2, 66, 32\] \(5 more"
    ):
        convert(folder, tmp_path / "hf")
