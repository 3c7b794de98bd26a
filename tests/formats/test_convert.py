"""Conversions: bit for bit there and back, verified, and never half written."""

import json
import shutil
import signal
import subprocess
import sys
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
from gemma2_jax.formats.native import RunSource, write_run
from tests.model.models import vivid


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_there_and_back_is_bit_exact(exported, tmp_path):
    calls = []
    first = convert(exported, tmp_path / "run", progress=lambda *step: calls.append(step))
    second = convert(tmp_path / "run", tmp_path / "again")
    assert (first.source, first.target, first.dtype) == ("Hugging Face", "run", "bfloat16")
    assert (second.source, second.target) == ("run folder", "huggingface")
    assert {stage for stage, _, _ in calls} == {"reading", "writing", "verifying"}
    assert calls[-1] == ("verifying", first.weights, first.weights)
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
            "dtype is 'q8_0'; accepted for a run or huggingface target: float32, bfloat16, float16.",
        ),
        ({"kind": "gguff"}, "kind is 'gguff'; accepted: run, huggingface, gguf, litert, peft."),
        (
            {"kind": "gguf", "dtype": "q4_k"},
            "dtype is 'q4_k'; accepted for a gguf target: float32, bfloat16, float16, q8_0, q6_k, q5_k_m, q4_k_m, "
            "q4_0.",
        ),
        ({"source_path": "taken"}, "taken holds no checkpoint of a known kind; accepted: "),
        ({"target_path": "dangling"}, "dangling exists already; choose another target, or delete it."),
        (
            {"target_path": "file/a/b"},
            "file/a/b cannot be written: file is a file, where a folder is needed.",
        ),
        ({"target_path": "/proc/none/new"}, "/proc/none/new cannot be written: No such file or directory."),
        ({"target_path": "n" * 250}, f"{'n' * 250} cannot be written: File name too long."),
        ({"target_path": "n" * 300}, f"{'n' * 300} cannot be written: File name too long."),
        ({"source_path": "n" * 300}, f"{'n' * 300} cannot be read: File name too long."),
    ],
)
def test_refused(exported, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    Path("taken").mkdir()
    Path("file").touch()
    Path("dangling").symlink_to("nowhere")
    with pytest.raises(UserError) as caught:
        convert(**{"source_path": exported, "target_path": "new"} | arguments)
    assert str(caught.value).startswith(sentence)
    assert left(tmp_path) == ["dangling", "file", "taken"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target_path": "file/new"}, "file/new cannot be written"),
        ({"target_path": "n" * 250}, "cannot be written: File name too long"),
        ({"dtype": "q8_0"}, "dtype is 'q8_0'"),
        ({"kind": "gguff"}, "kind is 'gguff'"),
        ({"tokenizer_path": "none"}, "The tokenizer none cannot be read"),
        ({"tokenizer_path": "file"}, "file has no bos token"),
        ({"target_path": "new.gguf"}, "needs the extra gguf"),
    ],
)
def test_arguments_are_looked_at_before_the_source(tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr("gemma2_jax.formats.convert.open_source", None)  # may fetch gigabytes
    Path("file").touch()
    with pytest.raises(UserError, match=sentence):
        convert(**{"source_path": "source", "target_path": "new"} | arguments)


def test_folders_that_were_made_go_again(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoint"):
        convert(tmp_path, tmp_path / "a" / "b" / "new")
    assert left(tmp_path) == []


CONVERT = """
import resource, sys
if sys.argv.pop(1) == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
else:
    import time
    from gemma2_jax.formats import convert

    def half_way(*arguments):
        print("half way", flush=True)
        time.sleep(100)

    convert._compare = half_way
from gemma2_jax.cli.main import main
sys.exit(main(["convert", *sys.argv[1:]]))
"""


def started(*arguments) -> subprocess.Popen[str]:
    """`gemma2 convert` in a process of its own, which either waits half way or finds the disk full."""
    command = [sys.executable, "-c", CONVERT, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def is_half_way(process: subprocess.Popen[str]) -> bool:
    assert process.stdout is not None
    return process.stdout.readline() == "half way\n"


@pytest.mark.parametrize(
    "target",
    [
        pytest.param("run", marks=pytest.mark.thorough),
        "hf --to huggingface",
        pytest.param("new.gguf", marks=pytest.mark.thorough),
        pytest.param("new.litertlm", marks=pytest.mark.thorough),
    ],
)
def test_a_full_disk(exported, tmp_path, target):
    if target.endswith("litertlm"):
        pytest.importorskip("litert_converter", reason="needs the extra `litert`: pip install -e '.[litert]'")
    if target.endswith("gguf"):
        pytest.importorskip("gguf", reason="needs the extra `gguf`: pip install -e '.[gguf]'")
    name, *options = target.split()
    _, message = started("full", exported, tmp_path / name, *options).communicate(timeout=200)
    assert message.splitlines()[-1].startswith(f"gemma2: {tmp_path / name} cannot be written: ")
    assert "Traceback" not in message
    assert left(tmp_path) == []


@pytest.mark.thorough
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(exported, tmp_path, number):
    process = started("wait", exported, tmp_path / "deeper" / "new")
    assert is_half_way(process)
    assert len(left(tmp_path / "deeper")) == 2  # the lock, and what is being written
    process.send_signal(number)
    process.send_signal(number)  # as `timeout` does
    _, message = process.communicate(timeout=100)
    assert process.returncode == 128 + number
    assert message.splitlines()[-1] == "gemma2: stopped."
    assert "Traceback" not in message
    assert left(tmp_path) == []


@pytest.mark.thorough
def test_what_a_killed_conversion_has_left_goes_with_the_next(exported, tmp_path):
    process = started("wait", exported, tmp_path / "new")
    assert is_half_way(process)
    with pytest.raises(UserError, match=r"new is being written by another process"):
        convert(exported, tmp_path / "new")
    process.kill()
    process.communicate(timeout=100)
    assert len(left(tmp_path)) == 2
    others = [".new.txt", ".new.tmp", ".newer.01234567.tmp"]
    for name in [*others, "..new.01234567.tmp.89abcdef.tmp"]:
        (tmp_path / name).touch()
    convert(exported, tmp_path / "new")
    assert left(tmp_path) == sorted([*others, "new"])


@pytest.mark.thorough
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
    with pytest.raises(UserError, match=r"does not hold final_norm/scale as it was written"):
        convert(exported, tmp_path / "new", "huggingface")
    assert left(tmp_path) == []


def test_too_large_for_float16(small, params, tokenizer_config, tmp_path):
    large = {**params, "final_norm": {"scale": params["final_norm"]["scale"] + 1e6}}
    write_run(tmp_path / "run", small, large, Path(tokenizer_config.path))
    with pytest.raises(UserError, match=r"model.norm.weight has values beyond what float16 can hold"):
        convert(tmp_path / "run", tmp_path / "hf", dtype="float16")
    with pytest.raises(UserError, match=r"final_norm/scale has values beyond what float16 can hold"):
        convert(tmp_path / "run", tmp_path / "other", "run", dtype="float16")
    assert left(tmp_path) == ["run"]


def test_too_large_for_bfloat16(small, params, tokenizer_config, tmp_path):
    scale = params["final_norm"]["scale"].astype("float32").at[3].set(3.4e38)
    write_run(
        tmp_path / "run", small, {**params, "final_norm": {"scale": scale}}, Path(tokenizer_config.path)
    )
    with pytest.raises(UserError, match=r"has values beyond what bfloat16 can hold; choose float32\.$"):
        convert(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"d_model": 40, "num_heads": 6},
            "d_model is 40 and model.num_heads 6; transformers loads a Gemma 2 only",
        ),
        (
            {"query_pre_attn_scalar": 8.5},
            "query_pre_attn_scalar is 8.5; transformers accepts only whole numbers",
        ),
    ],
)
def test_what_transformers_does_not_load_is_not_written(
    small, tokenizer_config, tmp_path, monkeypatch, changes, sentence
):
    config = replace(small, **changes)
    write_run(tmp_path / "run", config, vivid(config).params(), Path(tokenizer_config.path))
    monkeypatch.setattr(RunSource, "weight", None)  # the error is raised before any weight is read
    with pytest.raises(UserError, match=sentence):
        convert(tmp_path / "run", tmp_path / "hf")
    assert left(tmp_path) == ["run"]


def test_nan_is_carried(small, params, tokenizer_config, tmp_path):
    embedding = params["embedder"]["embedding"].at[3, 5].set(np.nan)
    write_run(
        tmp_path / "run", small, {**params, "embedder": {"embedding": embedding}}, tokenizer_config.path
    )
    convert(tmp_path / "run", tmp_path / "hf", dtype="float16")
    tensor = load_file(tmp_path / "hf" / "model.safetensors")["model.embed_tokens.weight"]
    assert np.isnan(tensor[3, 5])
    assert np.isnan(tensor).sum() == 1


def test_several_dtypes_are_reported(hf_folder, tmp_path):
    tensors = load_file(hf_folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    save_file(tensors, hf_folder / "model.safetensors")
    done = convert(hf_folder, tmp_path / "run")
    assert (done.dtype, done.source_dtypes) == ("float32", ("bfloat16", "float32"))


def test_a_broken_run_is_refused(run_folder, tmp_path):
    folder = Path(shutil.copytree(run_folder, tmp_path / "run"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace("d_ff: 64", "d_ff: 66"))
    with pytest.raises(
        UserError, match=r"mlp/down of shape \[2, 64, 32\], but the model has \[2, 66, 32\] \(5 more"
    ):
        convert(folder, tmp_path / "hf")
