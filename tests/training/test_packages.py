"""A missing package is reported before anything is prepared or compiled."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.config import UserError
from gemma2_jax.data.sources import open_documents
from gemma2_jax.distill.initialise import InitConfig
from gemma2_jax.distill.teacher import DistillConfig
from gemma2_jax.kernels.self_attention import AttentionConfig
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.objectives.objective import ObjectiveConfig
from gemma2_jax.training.metrics import MetricsConfig
from gemma2_jax.training.packages import check_packages

MISSING = {"wandb", "trackio", "gcsfs", "tokamax", "huggingface_hub", "pyarrow"}
NEEDS: dict[str, dict[str, Any]] = {
    "wandb": {"metrics": MetricsConfig(tensorboard=False, wandb_project="study")},
    "pip install 'gemma2_jax.trackio.'": {
        "metrics": MetricsConfig(tensorboard=False, wandb_project=None, trackio_project="study")
    },
    "gcsfs": {"compilation_cache": "gs://bucket/programs"},
    "tokamax": {"compute": ComputeConfig(attention=AttentionConfig(kernel="tokamax"))},
    "is not a local folder; to download it from the Hugging Face hub": {
        "initialise": InitConfig("google/gemma-2-2b")
    },
    "google/gemma-2-9b is not a local folder": {
        "objective": ObjectiveConfig(cross_entropy=0.0, forward_kl=1.0, temperature=1.0, block_tokens=48),
        "distill": DistillConfig(teacher="google/gemma-2-9b", dtype="float32"),
    },
}


@pytest.fixture
def without(monkeypatch):
    """Hides all packages that only some runs need."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name in MISSING else find(name, *more)
    )


@pytest.mark.parametrize("words", NEEDS)
def test_a_run_that_needs_a_package_is_refused(without, toy_run, words):
    with pytest.raises(UserError, match=words):
        check_packages(replace(toy_run, **NEEDS[words]))


def test_a_run_that_needs_none_is_not(without, toy_run):
    check_packages(toy_run)


def test_parquet_is_refused_before_the_files_in_front_of_it_are_read(without, tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"b\.parquet needs pyarrow"):
        open_documents((str(tmp_path / "*"),), "text")


STUDENT = ["--student", "one", "seed=1"]
CACHED = ["objective=distillation", "distill=cached", "distill.teacher=t", "distill.cache=c"]


@pytest.mark.parametrize(
    "command",
    [
        ["train", "metrics=wandb"],
        ["train-together", "metrics=wandb", *STUDENT],
        ["teacher-cache", "metrics=wandb", *CACHED],
        ["sweep", "metrics=wandb", "seed=1,2"],
        ["run", "quickstart", "metrics=wandb"],
    ],
    ids=lambda command: command[0],
)
def test_every_verb_refuses_before_it_prepares_data(without, monkeypatch, tmp_path, capsys, command):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 1
    assert "wandb is not installed; install the extra" in capsys.readouterr().err
    assert list(Path().iterdir()) == []
