"""The command merge."""

from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.formats.native import write_run
from tests.model.models import vivid


@pytest.fixture(scope="module")
def run_folder(toy_run, tokenizer_config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "run"
    write_run(folder, toy_run.model, vivid(toy_run.model).params(), tokenizer_config.path)
    return folder


def test_models_are_merged(run_folder, tmp_path, capsys):
    target = tmp_path / "merged"
    command = ["merge", str(run_folder), str(run_folder), str(target), "--method", "linear"]
    assert main([*command, "--weights", "0.5,0.5"]) == 0
    message, stages = capsys.readouterr()
    assert stages == "gemma2: writing …\ngemma2: verifying …\n"
    assert message == (
        f"{target}: 24 weights, linear merge of {run_folder} and {run_folder}, as huggingface, float32; read back and "
        "compared.\n"
    )
    assert (target / "model.safetensors").exists()


def test_only_a_run_has_an_average_to_merge(run_folder, tmp_path, capsys):
    command = ["merge", str(run_folder), str(run_folder), str(tmp_path / "new"), "--method", "linear"]
    assert main([*command, "--averaged"]) == 1
    assert capsys.readouterr().err.startswith(f"gemma2: {run_folder} keeps no average of its weights,")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--method", "mean"], "--method is 'mean'; accepted: linear, slerp, task, ties, liti."),
        (
            ["--method", "linear", "--weights", "1", "runs/a"],
            "--weights has 'runs/a', which is not a number;",
        ),
    ],
)
def test_mistakes_are_one_sentence(options, sentence, tmp_path, capsys):
    assert main(["merge", "a", "b", str(tmp_path / "new"), *options]) == 1
    assert capsys.readouterr().err.startswith(f"gemma2: {sentence}")
    assert list(tmp_path.iterdir()) == []
