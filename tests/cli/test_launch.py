"""`gemma2 launch`: its previews, its errors, and a run on this machine through submitit."""

import os
from contextlib import suppress
from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.config import load_config
from gemma2_jax.run import RunConfig
from gemma2_jax.training.metrics import read_metrics
from tests.launching.shell import write_program

# Importing submitit configures logging again and closes the stream of absl's handler unless it is the current
# sys.stderr. Within a test that stream belongs to pytest, which still needs it.
with suppress(ImportError):
    import submitit  # noqa: F401

VM = ["--zone", "z", "--accelerator-type", "v5litepod-16", "--runtime-version", "r", "--bucket", "gs://b"]
DRY_RUN = ["launch", "tpu-vm", "model=toy", *VM, "--workdir", "/shared", "--dry-run"]


def test_dry_run_shows_all_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*DRY_RUN, "name=mine"]) == 0
    printed = capsys.readouterr().out
    assert "gcloud compute tpus queued-resources create mine-" in printed
    assert "#!/bin/bash" in printed
    assert list(tmp_path.iterdir()) == []


def test_dry_run_reports_what_a_launch_would_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemma2_jax.launching.pin.refusal", lambda *_: "there are changes.")
    assert main(DRY_RUN) == 0
    printed = capsys.readouterr()
    assert printed.err == "gemma2: without --dry-run, this would be refused: there are changes.\n"
    assert "#!/bin/bash" in printed.out
    assert main([*DRY_RUN, "--allow-changes"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--slices", "2"], "mesh.replica is 1 and --slices is 2"),
        (["hosts=single"], "hosts.detect is false"),
        (["--folder", "file"], "file is a file, where a folder is needed"),
    ],
)
def test_what_fails_later_is_refused_at_once(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main([*DRY_RUN, *arguments]) == 1
    output = capsys.readouterr().err
    assert output.startswith("gemma2: ")
    assert words in output
    assert output.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir", "file"], "--workdir is {}/file, which cannot be used: {}/file is a file"),
        (["output=file/mine"], "output is {}/file/mine, which cannot be used: {}/file is a file"),
        (
            ["output=new/../file/mine"],
            "output is {}/new/../file/mine, which cannot be used: {}/file is a file",
        ),
        (["data.folder=file/data"], "data.folder is {}/file/data, which cannot be used: {}/file is a file"),
        (["tokenizer.path=file/my.model"], "tokenizer.path is {}/file/my.model, which cannot be used"),
    ],
)
def test_unwritable_slurm_paths_are_refused_before_the_code_is_pinned(
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemma2_jax.launching.pin.find_checkout", None)
    monkeypatch.setattr("gemma2_jax.launching.slurm.check_tools", lambda settings: None)
    (tmp_path / "file").touch()
    assert main(["launch", "slurm", "model=toy", "--local", *arguments]) == 1
    output = capsys.readouterr().err
    assert output.startswith(f"gemma2: {words.format(tmp_path, tmp_path)}")
    assert output.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pod_of_vms_waits_long_for_its_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless hosts.timeout is set. A fake gcloud accepts everything, and the output shows how to delete the VMs."""
    monkeypatch.chdir(tmp_path)
    write_program(tmp_path / "bin" / "gcloud", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for name, keys, seconds in (("usual", [], 1800), ("own", ["hosts.timeout=60"], 60)):
        keys = ["model=toy", f"name={name}", *keys]
        assert main(["launch", "tpu-vm", *keys, *VM, "--workdir", "/w", "--allow-changes"]) == 0
        (folder,) = (tmp_path / "launches").glob(f"{name}-*")
        assert load_config(RunConfig, folder / "config.yaml").hosts.timeout == seconds
        assert f"tpus queued-resources delete {folder.name} --zone=z --force" in capsys.readouterr().out


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
    assert capsys.readouterr().err.startswith("gemma2: xpk, which makes jobs for GKE, is not installed")


@pytest.mark.thorough
def test_a_sweep_is_checked_and_shown_as_an_array(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("submitit")
    monkeypatch.chdir(tmp_path)
    command = ["launch", "slurm", "--sweep", "learning_rate", "model=toy", "--workers", "4", "--dry-run"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "gemma2_jax.cli.main sweep learning_rate model=toy" in printed
    assert "#SBATCH --array=0-3%4" in printed
    assert list(tmp_path.iterdir()) == []
    for wrong, sentence in (
        (
            ["--sweep", "learning_rat", "--workers", "2"],
            "there is no sweep learning_rat, did you mean learning_rate",
        ),
        (["model=toy", "--workers", "2"], "--workers is 2, but a single run has one job; add --sweep"),
        (["--sweep", "learning_rate", "--workers", "0"], "--workers is 0; it must be at least 1."),
        (
            ["--sweep", "learning_rate", "--config-dir", "."],
            "--config-dir is ., which is not pinned with the code",
        ),
    ):
        assert main(["launch", "slurm", *wrong, "--dry-run"]) == 1
        assert sentence in capsys.readouterr().err


@pytest.mark.thorough
def test_a_run_on_this_machine(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As under SLURM, the pinned code trains with the pinned configuration."""
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
    assert "is done; its output is in " in capsys.readouterr().out
    assert [row["step"] for row in read_metrics(tmp_path / "work" / "runs" / "mine")] == [1, 2, 2]
    (launched,) = (tmp_path / "launches").iterdir()
    assert (launched / "code" / "gemma2_jax" / "__init__.py").exists()
