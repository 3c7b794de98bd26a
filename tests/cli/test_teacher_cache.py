"""The command teacher-cache: estimates, writing, verification and errors."""

from pathlib import Path

import jax
import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.run import RunConfig
from tests.distill.test_cache import write_teacher


@pytest.fixture
def overrides(toy_run: RunConfig, tmp_path: Path) -> list[str]:
    """The command line of a student of a toy teacher."""
    teacher = write_teacher(toy_run, Gemma2.init(toy_run.model, jax.random.key(0)), tmp_path / "teacher")
    data = toy_run.data
    return [
        *("model=small_1m", "objective=distillation", "distill=cached", "mesh.data=4", "mesh.fsdp=2"),
        *(f"distill.teacher={teacher}", f"distill.cache={tmp_path}/cache", "training.steps=50"),
        *(
            "data=files",
            f"data.source={data.source}",
            f"data.folder={data.folder}",
            "data.validation_fraction=0.2",
        ),
        *("data.seq_len=16", "data.batch_size=8"),
        *(f"tokenizer.path={toy_run.tokenizer.path}", "tokenizer.vocab_size=400"),
    ]


@pytest.mark.thorough
def test_a_cache_is_estimated_written_and_verified(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["teacher-cache", *overrides, "--estimate"]) == 0
    captured = capsys.readouterr()
    assert "400 rows to go, about" in captured.err
    assert not (tmp_path / "cache").exists()
    assert main(["teacher-cache", *overrides]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache holds teacher targets for 400 rows.\n"
    assert main(["teacher-cache", *overrides, "--estimate"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache holds teacher targets for 400 rows.\n"
    assert main(["teacher-cache", *overrides, "seed=3"]) == 0  # other weights, of the same data
    assert capsys.readouterr().out == f"{tmp_path}/cache holds teacher targets for 400 rows.\n"
    assert main(["teacher-cache", *overrides, "data.seed=3"]) == 1
    assert "a different data.seed (0, now 3); write data.seed=0 to use it, or set" in capsys.readouterr().err
    assert main(["teacher-cache", *overrides, "--verify"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/cache: 1 files were read; all match their checksums.\n"
    assert main(["teacher-cache", *overrides, "distill.encoding.entries=12"]) == 1
    assert "a different distill.encoding.entries (50, now 12)" in capsys.readouterr().err


def test_the_teacher_is_looked_for_before_data_is_prepared(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = [f"data.folder={tmp_path}/prepared", f"distill.teacher={tmp_path}/none"]
    assert main(["teacher-cache", *overrides, *elsewhere, "--estimate"]) == 1
    assert f"{tmp_path}/none does not exist" in capsys.readouterr().err
    assert not (tmp_path / "prepared").exists()


def test_without_a_folder_the_message_names_the_key_to_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["teacher-cache", "model=small_1m"]) == 1
    assert "distill.cache and distill.encoding must be set" in capsys.readouterr().err
