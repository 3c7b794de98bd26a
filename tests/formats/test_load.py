"""From files to devices: any kind, any mesh, any dtype."""

import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.formats import hub
from gemma2_jax.formats.load import load, load_params, open_source
from gemma2_jax.model.weights import abstract_params
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mesh_config", [MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)], ids=["fsdp", "all"])
def test_sharded(exported, small, params, mesh_config, dtype):
    mesh = build_mesh(mesh_config)
    loaded = load_params(open_source(exported), small, dtype, mesh)
    target = abstract_params(small, dtype, mesh)

    def check(leaf, wanted, original):
        assert (leaf.dtype, leaf.sharding) == (wanted.dtype, wanted.sharding)
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(original).astype(leaf.dtype))

    jax.tree.map(check, loaded, target, params)


def test_a_model_in_three_lines(exported, run_folder, params):
    for folder in (exported, run_folder):
        model, tokenizer = load(folder, dtype="bfloat16")
        jax.tree.map(np.testing.assert_array_equal, model.params(), params)
        assert (
            model(jax.numpy.array([tokenizer.encode("the model", bos=True)])).shape[-1]
            == tokenizer.vocab_size
        )


def test_rows_are_padded_and_cut(exported, small, params, tmp_path):
    wider = replace(small, vocab_size=small.vocab_size + 16, vocab_padding=16)
    loaded = load_params(open_source(exported), wider, "bfloat16")
    embedding = np.asarray(loaded["embedder"]["embedding"])
    np.testing.assert_array_equal(embedding[: small.vocab_size], params["embedder"]["embedding"])
    assert embedding.shape[0] == wider.vocab_size
    assert not embedding[small.vocab_size :].any()


def test_another_model_is_refused(exported, small):
    with pytest.raises(UserError, match=r"exported holds a model of d_ff 64, and the configuration's has 66"):
        load_params(open_source(exported), replace(small, d_ff=66), "float32")
    with pytest.raises(UserError, match=r"holds a model of 400 tokens, and the configuration's has 398"):
        load_params(open_source(exported), replace(small, vocab_padding=2), "float32")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no checkpoint that is known; accepted: a run folder, a Hugging"
    ):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"/nowhere is not a folder; accepted"):
        open_source(tmp_path / "nowhere")


def test_names_on_the_hub():
    assert hub.is_hub_name("google/gemma-2-2b-it")
    assert not any(map(hub.is_hub_name, ["runs", "./runs/a", "/runs/a", "a/b/c", "~/a"]))


def test_the_hub_cannot_be_reached(monkeypatch, tmp_path):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="needs the extra `hub`: pip install -e '.[hub]'"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # its own switch: nothing is faked
    with pytest.raises(UserError, match=r"^nobody/has-this is no folder here, and .* cannot be reached"):
        open_source("nobody/has-this")


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"is no folder here; to fetch it .* install the extra `hub`"):
        open_source("google/gemma-2-2b")


def test_the_hub_gives_a_folder(monkeypatch, exported, small):
    huggingface_hub = pytest.importorskip(
        "huggingface_hub", reason="needs the extra `hub`: pip install -e '.[hub]'"
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(exported))
    assert open_source("google/gemma-2-2b").config == small
