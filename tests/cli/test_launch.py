"""`gemma2 launch`: what it shows, what it refuses, and a run on this machine by submitit."""

from contextlib import suppress
from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.training.metrics import read_metrics

# On import it sets logging up anew, which closes the stream of absl's handler unless that is today's sys.stderr: within
# a test it is pytest's, and pytest goes on to use it.
with suppress(ImportError):
    import submitit  # noqa: F401

VM = ["--zone", "z", "--accelerator-type", "v5litepod-16", "--runtime-version", "r", "--bucket", "gs://b"]


def test_dry_run_shows_all_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "tpu-vm", "model=toy", "name=mine", *VM, "--workdir", "/shared", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "gcloud compute tpus queued-resources create mine-" in printed
    assert "#!/bin/bash" in printed
    assert list(tmp_path.iterdir()) == []


def test_a_missing_tool_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    gke = [
        "launch",
        "gke",
        "model=toy",
        "--cluster",
        "c",
        "--image",
        "i",
        "--tpu-type",
        "t",
        "--workdir",
        "/w",
    ]
    assert main(gke) == 1
    assert capsys.readouterr().err.startswith("gemma2: xpk is not installed")


def test_a_run_on_this_machine(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As SLURM runs it: the pinned code trains by the pinned configuration."""
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    keys = [
        "model=toy", "name=mine", f"data.source={corpus}", "data=files", "data.seq_len=32", "data.batch_size=4",
        "data.workers=1", "data.validation_fraction=0.1",
        "tokenizer.vocab_size=400", "tokenizer.path=tokenizer.model", "data.folder=data",
        "training.steps=2", "training.log_every=1", "training.eval_every=2", "checkpoint.every=2",
        "optimizer.warmup_steps=1",
    ]  # fmt: skip
    assert main(["launch", "slurm", *keys, "--local", "--allow-changes", "--workdir", "work"]) == 0
    assert "is done; what it says goes to " in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "work" / "runs" / "mine")] == [1, 2, 2]
    (launched,) = (tmp_path / "launches").iterdir()
    assert (launched / "code" / "gemma2_jax" / "__init__.py").exists()
