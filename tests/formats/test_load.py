"""From files to devices: any kind, any mesh, any dtype."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.formats import hub
from gemma2_jax.formats.convert import convert
from gemma2_jax.formats.huggingface import HuggingFaceSource
from gemma2_jax.formats.layouts import WeightPlace
from gemma2_jax.formats.load import load, load_params, open_source
from gemma2_jax.formats.native import RunSource, write_run
from gemma2_jax.model.weights import abstract_params, weight_specs
from gemma2_jax.sharding.mesh import MeshConfig, build_mesh
from tests.parameters import mostly_thorough


@mostly_thorough("dtype", ["float32", "bfloat16"])
@mostly_thorough("mesh_config", [MeshConfig(1, 8, 1), MeshConfig(2, 2, 2)], ids=["fsdp", "all"])
def test_sharded(exported, small, params, mesh_config, dtype):
    mesh = build_mesh(mesh_config)
    loaded = load_params(open_source(exported), small, dtype, mesh)
    target = abstract_params(weight_specs(small), dtype, mesh)

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
    with pytest.raises(UserError, match=r"exported holds a model with d_ff 64, but the configuration has 66"):
        load_params(open_source(exported), replace(small, d_ff=66), "float32")
    with pytest.raises(UserError, match=r"holds a model with 400 tokens, but the configuration has 398"):
        load_params(open_source(exported), replace(small, vocab_padding=2), "float32")


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(
        UserError, match=r"holds no checkpoint of a known kind; accepted: a run folder, a Hugging"
    ):
        open_source(tmp_path)
    with pytest.raises(UserError, match=r"/nowhere does not exist; accepted"):
        open_source(tmp_path / "nowhere")


def test_a_folder_above_names_the_one_below(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "weights" / "run")
    (tmp_path / "weights" / "other").mkdir()
    with pytest.raises(UserError, match=r"weights is not a checkpoint, but .*weights/run in it is\.$"):
        open_source(tmp_path / "weights")


def test_files_are_known_by_what_is_in_them(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"GGUF and more")
    pytest.importorskip("gguf", reason="needs the extra `gguf`: pip install -e '.[gguf]'")
    with pytest.raises(UserError, match=r"model.bin is not a GGUF file, or is truncated or damaged"):
        open_source(tmp_path / "model.bin")
    (tmp_path / "model.gguf").write_bytes(b"not so")
    with pytest.raises(UserError, match=r"model.gguf is a file of unknown type; .*a GGUF file"):
        open_source(tmp_path / "model.gguf")


def test_a_config_of_another_tool_hides_nothing(hf_folder, run_folder):
    (hf_folder / "config.yaml").write_text("training: {}")
    assert isinstance(open_source(hf_folder), HuggingFaceSource)
    shutil.copytree(run_folder / "checkpoints", hf_folder / "checkpoints")
    shutil.copyfile(run_folder / "config.yaml", hf_folder / "config.yaml")
    assert isinstance(open_source(hf_folder), RunSource)
    (hf_folder / "config.yaml").rename(hf_folder / "gone.yaml")
    (hf_folder / "config.json").rename(hf_folder / "gone.json")
    with pytest.raises(UserError, match=r"config\.yaml"):
        open_source(hf_folder)
    (hf_folder / "gone.yaml").rename(hf_folder / "config.yaml")
    shutil.rmtree(hf_folder / "checkpoints")
    with pytest.raises(UserError, match=r"hf holds no checkpoint; expected one in"):
        open_source(hf_folder)


@pytest.mark.parametrize("kind", ["run", "huggingface"])
def test_a_weight_that_the_dtype_cannot_hold_is_refused(small, params, tokenizer_config, tmp_path, kind):
    scale = params["final_norm"]["scale"]
    for name, value in (("large", 1e5), ("infinite", np.inf)):
        changed = {**params, "final_norm": {"scale": scale.at[3].set(value)}}
        write_run(tmp_path / name, small, changed, Path(tokenizer_config.path))
        if kind == "huggingface":
            convert(tmp_path / name, tmp_path / f"{name} again")
            shutil.rmtree(tmp_path / name)
            (tmp_path / f"{name} again").rename(tmp_path / name)
    with pytest.raises(UserError, match=r"final_norm/scale has values beyond what float16 can hold; choose"):
        load(tmp_path / "large", "float16")
    assert load(tmp_path / "large")[0].final_norm.scale[...][3] == np.float32(99840)
    assert np.isinf(load(tmp_path / "infinite", "float16")[0].final_norm.scale[...][3])  # as it was


@pytest.mark.parametrize("dtype", ["bf16", "int8", None, "float64"])
def test_another_dtype_is_refused(exported, dtype):
    with pytest.raises(UserError, match=rf"^dtype is {dtype!r}; accepted: float32, bfloat16, float16\.$"):
        load(exported, dtype)


def test_dtypes_have_several_names(exported):
    for dtype in (jax.numpy.bfloat16, np.dtype("bfloat16")):
        assert load(exported, dtype)[0].embedder.embedding[...].dtype == jax.numpy.bfloat16


def test_a_folder_with_the_tokenizer_of_transformers_5(hf_folder, tokenizer, tokenizer_config):
    (hf_folder / "tokenizer.model").rename(hf_folder / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"hf has no tokenizer.model, .*its tokenizer.json is not enough; .*--tokenizer FILE"
    ):
        load(hf_folder)
    _, found = load(hf_folder, tokenizer=tokenizer_config.path)
    assert found.fingerprint == tokenizer.fingerprint


def test_names_on_the_hub():
    assert hub.is_hub_name("google/gemma-2-2b-it")
    assert not any(map(hub.is_hub_name, ["runs", "./runs/a", "/runs/a", "a/b/c", "~/a", "a/b.gguf"]))


def test_the_hub_cannot_be_reached(monkeypatch, tmp_path):
    constants = pytest.importorskip(
        "huggingface_hub.constants", reason="needs the extra `hub`: pip install -e '.[hub]'"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # its own switch: nothing is faked
    with pytest.raises(UserError, match=r"^nobody/has-this is not a local folder, and .* cannot be reached"):
        open_source("nobody/has-this")


@pytest.mark.parametrize("name", ["foo/bar--baz", "a/b..c", "a/" + 200 * "b", "a/" + 300 * "b"])
def test_what_can_be_no_name_on_the_hub(monkeypatch, tmp_path, name):
    pytest.importorskip("huggingface_hub", reason="needs the extra `hub`: pip install -e '.[hub]'")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=rf"^{name} is neither a local folder nor a model on the Hugging Face"
    ):
        open_source(name)


def test_why_the_hub_gives_nothing(monkeypatch, tmp_path):
    huggingface_hub = pytest.importorskip(
        "huggingface_hub", reason="needs the extra `hub`: pip install -e '.[hub]'"
    )
    errors = huggingface_hub.errors

    class Answer:
        status_code, headers, request = 503, {}, None

    busy = errors.HfHubHTTPError("busy", response=Answer())
    unlisted = errors.LocalEntryNotFoundError("unlisted")
    unlisted.__cause__ = busy
    for error, message in {
        busy: "the Hugging Face hub responded with HTTP status 503",
        unlisted: "the Hugging Face hub responded with HTTP status 503",
        OSError(28, "No space left on device"): "cannot be stored: No space left on device.",
        errors.HTTPError("proxy"): "the Hugging Face hub cannot be reached",
        ConnectionRefusedError(111, "refused"): "the Hugging Face hub cannot be reached",
    }.items():

        def fail(name, allow_patterns, error=error):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(UserError, match=rf"^nobody/this is not a local folder, and .*{message}"):
            hub.download("nobody/this")


def test_without_the_extra(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"is not a local folder; to download it .* install the extra `hub`"):
        open_source("google/gemma-2-2b")


def test_the_hub_gives_a_folder(monkeypatch, exported, small):
    huggingface_hub = pytest.importorskip(
        "huggingface_hub", reason="needs the extra `hub`: pip install -e '.[hub]'"
    )
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(exported))
    assert open_source("google/gemma-2-2b").config == small


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "config.yaml",
            r"run/config\.yaml, which describes the model in .*run/checkpoints, is missing; copy it",
        ),
        ("checkpoints", r"run holds no checkpoint; .*run/checkpoints is missing"),
        ("tokenizer.model", r"run has no tokenizer\.model"),
    ],
)
def test_what_is_missing_of_a_run_folder_is_named(run_folder, tmp_path, name, message):
    run = shutil.copytree(run_folder, tmp_path / "run")
    shutil.move(run / name, tmp_path / "elsewhere")
    with pytest.raises(UserError, match=message):
        load(run)


@pytest.mark.parametrize(
    "content", ["", "model:\n", "model:\n  num_layers: 2\n", "model: {", "\0\0\0", "- model\n"]
)
def test_a_broken_configuration_of_a_run_is_named(run_folder, tmp_path, content):
    run = shutil.copytree(run_folder, tmp_path / "run")
    (run / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=r"run/config\.yaml"):
        load(run)


def test_weights_that_changed_on_the_disk_are_not_read(run_folder, tmp_path):
    run = shutil.copytree(run_folder, tmp_path / "run")
    largest = max((run / "checkpoints" / "0" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    source = open_source(run)
    with pytest.raises(
        UserError, match=r"run/checkpoints/0 is not intact \(params/.* has changed since it was written"
    ):
        source.weight(WeightPlace("final_norm/scale", None))
    with pytest.raises(UserError, match=r"has changed since it was written"):
        load(run)
