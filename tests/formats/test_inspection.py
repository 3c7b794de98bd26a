"""Descriptions of checkpoints and of their problems."""

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gemma2_jax.formats.inspection import inspect
from gemma2_jax.formats.load import open_source
from gemma2_jax.model.counts import count_parameters


def test_a_hugging_face_folder(exported, small, tokenizer):
    found = inspect(exported, {"tiny": small})
    lines = dict(found.lines)
    total = count_parameters(small).total
    assert found.problems == []
    assert lines["kind"] == "Hugging Face"
    assert lines["dtype"] == "bfloat16 (46 tensors)"
    assert lines["files"].startswith("1 of ")
    assert lines["parameters"].startswith(f"{total:,} (12,800 embedding + ")
    assert lines["tiny"] == f"{total:,} parameters in the report (12,800 + {total - 12800:,}); the same model"
    assert lines["tokenizer"].endswith(f"400 tokens, fingerprint {tokenizer.fingerprint[:12]}")
    assert (lines["stops at"], lines["chats"]) == ("1, 5", "Gemma 2's format")


def test_a_run(run_folder, small):
    other = replace(small, query_pre_attn_scalar=144, vocab_size=416, vocab_padding=16)
    lines = dict(inspect(run_folder, {"tiny": other}).lines)
    assert (lines["kind"], lines["step"]) == ("run folder", "0")
    assert lines["tiny"].endswith(
        "; vocab_size 400, published 416; query_pre_attn_scalar 8.0, published 144; vocab_padding 0, published 16"
    )


def test_the_published_model_without_its_padded_rows(exported, small):
    published = replace(small, vocab_size=416, vocab_padding=16)
    lines = dict(inspect(exported, {"tiny": published}).lines)
    assert lines["tiny"].endswith("; the same model without its 16 padded rows")


def test_all_problems_are_reported(hf_folder, small):
    tensors = load_file(hf_folder / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["extra"] = np.zeros(3, np.float32)
    save_file(tensors, hf_folder / "model.safetensors")
    config = json.loads((hf_folder / "config.json").read_text())
    (hf_folder / "config.json").write_text(json.dumps(config | {"vocab_size": 398}))
    found = inspect(hf_folder, {})
    counts = count_parameters(small)
    parameters = dict(found.lines)["parameters"]
    assert parameters.startswith(f"{counts.total - 2 * 32:,} (")
    assert parameters.endswith(f"; the tensors found hold {counts.total - 32 + 3:,}")
    message = "\n".join(found.problems)
    assert len(found.problems) == 4
    for part in ("lacks the tensor model.norm.weight", "tensor extra, which", "[400, 32], but", "398 rows"):
        assert part in message
    assert dict(found.lines)["published"].startswith("no model of these sizes")
    assert dict(found.lines)["tokenizer"] == "does not match"


def test_a_source_without_tokenizer(hf_folder):
    (hf_folder / "tokenizer.model").unlink()
    assert open_source(hf_folder).problems() == []
    found = inspect(hf_folder, {})
    assert dict(found.lines)["tokenizer"] == "none"
    assert len(found.problems) == 1


def test_gguf(exported, small, tmp_path):
    pytest.importorskip("gguf", reason="needs the extra `gguf`: pip install -e '.[gguf]'")
    from gemma2_jax.formats.convert import convert

    convert(exported, tmp_path / "small.gguf", dtype="q8_0")
    (tmp_path / "small.gguf").rename(tmp_path / "small")  # the name does not matter
    convert(exported, tmp_path / "small.gguf", "huggingface")
    assert dict(inspect(tmp_path / "small.gguf", {}).lines)["kind"] == "Hugging Face"
    found = inspect(tmp_path / "small", {"tiny": small})
    lines = dict(found.lines)
    assert found.problems == []
    assert (lines["kind"], lines["encoding"]) == ("GGUF", "q8_0")
    assert "q8_0" in lines["dtype"]
    assert lines["tiny"].endswith("; the same model")
    assert lines["tokenizer"] == "in the file, 400 tokens"


def test_renamed_tokens(hf_folder):
    assert "renamed" not in dict(inspect(hf_folder, {}).lines)
    config = json.loads((hf_folder / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["5"]["content"] = "<|im_end|>"
    (hf_folder / "tokenizer_config.json").write_text(json.dumps(config))
    found = dict(inspect(hf_folder, {}).lines)["renamed"]
    assert found.endswith("files beside it differ: 5 <end_of_turn> (there <|im_end|>)")
