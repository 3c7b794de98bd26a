"""The commands convert and inspect."""

import shutil
import sys

import pytest
from safetensors.numpy import load_file, save_file

from gemma2_jax.cli.main import main
from gemma2_jax.formats.native import write_run
from tests.model.models import vivid


@pytest.fixture(scope="module")
def run_folder(toy_run, tokenizer_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "run"
    write_run(folder, toy_run.model, vivid(toy_run.model).params(), tokenizer_config.path)
    return folder


@pytest.mark.thorough
def test_a_run_goes_out_and_comes_back(run_folder, tmp_path, capsys):
    assert main(["convert", str(run_folder), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
    message, stages = capsys.readouterr()
    assert stages == "gemma2: writing …\ngemma2: verifying …\n"  # a line each, where no bar can be drawn
    assert message.startswith(
        f"{tmp_path}/hf: 24 weights from {run_folder} (run folder) as huggingface, bfloat16;"
    )
    assert main(["inspect", str(tmp_path / "hf")]) == 0
    shown = capsys.readouterr().out
    assert "Hugging Face" in shown
    assert "gemma2_27b" in shown
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    texts = set()
    for folder in ("hf", "back"):
        generate = [
            "generate",
            "--checkpoint",
            str(tmp_path / folder),
            "--prompt",
            "the model",
            "--temperature=0",
        ]
        capsys.readouterr()
        assert main([*generate, "--max-new-tokens", "8"]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    assert texts.pop().startswith("the model")


def test_several_dtypes_are_reported(run_folder, tmp_path, capsys):
    main(["convert", str(run_folder), str(tmp_path / "hf"), "--dtype", "bfloat16"])
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("float32")
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert "as run, float32 (from bfloat16 and float32);" in capsys.readouterr().out


def test_mistakes_are_one_sentence(run_folder, tmp_path, capsys):
    assert main(["convert", str(run_folder), str(run_folder)]) == 1
    assert main(["inspect", str(tmp_path)]) == 1
    assert main(["inspect", "google/gemma-2-2b-nowhere.gguf"]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("gemma2: ")


def test_problems_are_shown_and_set_the_exit_code(run_folder, tmp_path, capsys):
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "tokenizer.model").unlink()
    assert main(["inspect", str(tmp_path / "run")]) == 1
    assert "problem      " in capsys.readouterr().out


def test_without_the_extra_for_gguf(run_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["convert", str(run_folder), str(tmp_path / "a.gguf")]) == 1
    assert "needs the extra gguf" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_gguf_there_and_back(run_folder, corpus, tmp_path, capsys):
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    file = tmp_path / "a.gguf"
    convert = ["convert", str(run_folder), str(file), "--dtype", "q4_k_m"]
    assert main([*convert, "--calibrate", str(corpus)]) == 0
    first, stored, beside = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{file}: 24 weights from {run_folder} (run folder) as gguf, q4_k_m; read back")
    assert stored.startswith("stored ")
    assert "since rows of" in stored
    assert beside == f"{tmp_path}/a.Modelfile describes it for Ollama."
    assert (
        main(["generate", "--checkpoint", str(file), "--prompt", "the model", "--max-new-tokens", "4"]) == 0
    )
    shown = capsys.readouterr()
    assert shown.out.startswith("the model")
    assert f"the weights of {file} in " in shown.err
    assert main(["convert", str(file), str(tmp_path / "run")]) == 0
    assert f"{tmp_path}/run: 24 weights from {file} (GGUF) as run, float32" in capsys.readouterr().out
    assert main(["convert", str(run_folder), str(tmp_path / "b.gguf"), "--calibrate", str(corpus)]) == 1
    assert "add --dtype q4_k_m" in capsys.readouterr().err
