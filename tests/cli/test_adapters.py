"""Adapters on the command line: several on one base when generating, and conversions."""

import json
from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.model.adaptation import AdaptationConfig
from gemma2_jax.run import RunConfig
from tests.distill.test_cache import write_teacher
from tests.formats.adapters import write_adapter
from tests.model.models import vivid

GREEDY = ["--prompt", "the model", "--max-new-tokens", "4", "--temperature", "0"]


@pytest.fixture(scope="module")
def base(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write_teacher(toy_run, vivid(toy_run.model), tmp_path_factory.mktemp("adapters") / "base"))


@pytest.fixture(scope="module")
def adapters(toy_run: RunConfig, base: Path) -> list[Path]:
    settings = AdaptationConfig("lora", 4, 16.0, targets=("q", "down"))
    return [write_adapter(toy_run, base, settings, base.parent / f"lora{n}", seed=n) for n in range(2)]


def completions(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    assert main(["generate", "--json", *GREEDY, *arguments]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_several_adapters_complete_the_prompts_in_turn(
    base: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    one, other = map(str, adapters)
    assert main(["convert", other, str(tmp_path / "peft"), "--to", "peft"]) == 0
    assert "8 weights from" in capsys.readouterr().out  # A and B of two weights of two layers
    rows = completions(
        capsys, "--checkpoint", str(base), "--adapter", one, "--adapter", str(tmp_path / "peft")
    )
    assert [row["adapter"] for row in rows] == [one, str(tmp_path / "peft")]
    for row, folder in zip(rows, (one, other), strict=True):
        (alone,) = completions(capsys, "--checkpoint", folder)
        assert "adapter" not in alone
        assert row["tokens"] == alone["tokens"]
    assert rows[0]["tokens"] != rows[1]["tokens"]
    assert main(["generate", *GREEDY, "--checkpoint", str(base), "--adapter", one, "--adapter", other]) == 0
    out = capsys.readouterr().out
    assert out.index(f"=== {one}\nthe model") < out.index(f"=== {other}\nthe model")


def test_the_merged_model_writes_the_same_text(
    adapters: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    merged = str(tmp_path / "merged")
    assert main(["convert", str(adapters[0]), merged, "--merge"]) == 0
    assert (
        "(LoRA adapter on run folder) as huggingface, float32; read back and compared"
        in capsys.readouterr().out
    )
    assert completions(capsys, "--checkpoint", merged) == completions(
        capsys, "--checkpoint", str(adapters[0])
    )
    assert main(["inspect", str(adapters[0])]) == 0
    assert "LoRA adapter on run folder" in capsys.readouterr().out


def test_adapters_that_cannot_be_used(
    base: Path, adapters: list[Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = ["generate", "--checkpoint", str(base)]
    assert main([*checkpoint, *GREEDY, "--adapter", str(base)]) == 1
    assert (
        "base holds no adapter; accepted: a run folder of a training with adaptation=lora"
        in capsys.readouterr().err
    )
    twice = ["--adapter", str(adapters[0]), "--adapter", str(adapters[1])]
    assert main([*checkpoint, "--interactive", *twice]) == 1
    assert "--interactive chats with one model; give at most one --adapter." in capsys.readouterr().err
    assert main([*checkpoint, *GREEDY, "--adapter", str(tmp_path / "missing")]) == 1
    assert "missing does not exist" in capsys.readouterr().err
