"""SLURM: submitted jobs, rejected jobs, and a whole run through submitit on this machine."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.launching import slurm
from gemma2_jax.launching.job import Job
from gemma2_jax.launching.settings import SlurmSettings
from tests.launching.shell import check_script, write_program

pytest.importorskip("submitit")


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with a fake srun; each test writes its own `sbatch`."""
    write_program(tmp_path / "bin" / "srun", "exit 0")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return tmp_path


def test_the_script_and_sbatch_file_of_a_slurm_job(tmp_path: Path) -> None:
    settings = SlurmSettings(
        "/shared", nodes=4, gpus_per_node=8, cpus_per_task=16, minutes=90, partition="long", account="me"
    )
    preview = slurm.preview(settings, Job("toy-0123abcd", Path("/launches/toy-0123abcd")))
    script, sbatch = preview.split("#!/bin/bash\n")[1:]
    lines = {line.removeprefix("#SBATCH --") for line in sbatch.splitlines() if line.startswith("#SBATCH")}
    assert {
        "nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=16", "time=90", "partition=long",
        "account=me", "job-name=toy-0123abcd",
    } <= lines  # fmt: skip
    check_script(f"#!/bin/bash\n{script}", tmp_path / "job.sh")
    for text in (script, sbatch):
        assert "PYTHONPATH=/launches/toy-0123abcd/code${PYTHONPATH:+:$PYTHONPATH}\n" in text


def test_a_sweep_is_an_array_of_workers(cluster: Path) -> None:
    settings = SlurmSettings(str(cluster), workers=3)
    job = Job("sweep", cluster / "sweep", sweep=("rates", "training.steps=20", "name='a b'"))
    preview = slurm.preview(settings, job)
    assert "-m gemma2_jax.cli.main sweep rates training.steps=20 'name='\"'\"'a b'\"'\"''\n" in preview
    assert "#SBATCH --array=0-2%3" in preview.splitlines()
    write_program(cluster / "bin" / "sbatch", f'cp "$1" {cluster}/sent; echo Submitted batch job 17')
    sentence = slurm.submit(settings, job)
    assert sentence.startswith("sweep was submitted as job 17, an array of 3; its output is in ")
    assert "#SBATCH --array=0-2%3" in (cluster / "sent").read_text().splitlines()


def test_a_job_is_submitted_as_previewed(cluster: Path) -> None:
    write_program(cluster / "bin" / "sbatch", f'cp "$1" {cluster}/sent; echo Submitted batch job 17')
    settings, job = SlurmSettings(str(cluster), nodes=2), Job("toy", cluster / "toy")
    slurm.check_tools(settings)
    assert slurm.submit(settings, job).startswith("toy was submitted as job 17; its output is in ")
    lines = (cluster / "sent").read_text().splitlines()
    shown = slurm.preview(settings, job).splitlines()
    assert "#SBATCH --nodes=2" in lines
    assert {line for line in lines if line.startswith("export")} <= set(shown)


def test_a_job_that_slurm_rejects(cluster: Path) -> None:
    settings, job = SlurmSettings(str(cluster)), Job("toy", cluster / "toy")
    write_program(cluster / "bin" / "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(UserError, match=r"^SLURM rejected the job: sbatch: error: invalid partition"):
        slurm.submit(settings, job)
    write_program(cluster / "bin" / "sbatch", "echo queued somehow")
    with pytest.raises(UserError, match=r"^SLURM rejected the job: .*queued somehow"):
        slurm.submit(settings, job)
    (cluster / "bin" / "sbatch").write_bytes(b"\x7fELF no program")
    with pytest.raises(UserError, match=r"^SLURM rejected the job: .*Exec format error"):
        slurm.submit(settings, job)


def test_sbatch_is_needed(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(cluster / "bin"))
    with pytest.raises(UserError, match=r"^sbatch, which submits jobs, is not installed"):
        slurm.check_tools(SlurmSettings("."))


@pytest.mark.thorough
def test_a_job_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole run through submitit, with a script in place of training."""
    settings, job = SlurmSettings(str(tmp_path / "work"), local=True), Job("toy", tmp_path / "toy")
    slurm.check_tools(settings)
    monkeypatch.setattr(slurm, "script", lambda *_: f"#!/bin/bash\necho trained > {tmp_path}/result\n")
    output = slurm.submit(settings, job)
    assert output.startswith("toy is done; its output is in ")
    assert (tmp_path / "result").read_text() == "trained\n"
    failing = "#!/bin/bash\necho 'gemma2: first' >&2\necho 'gemma2: no such disk.' >&2\nexit 1\n"
    monkeypatch.setattr(slurm, "script", lambda *_: failing)
    with pytest.raises(UserError, match=r"^toy failed: no such disk; its output is in "):
        slurm.submit(settings, job)


@pytest.mark.thorough
def test_a_job_on_this_machine_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job leaves no result, for which submitit would wait for seconds."""
    from submitit.core.core import Job as Submitted

    monkeypatch.setattr(Submitted, "_results_timeout_s", 0)
    monkeypatch.setattr(slurm, "script", lambda *_: "#!/bin/bash\nkill -9 $PPID\n")
    with pytest.raises(UserError, match=r"^toy failed; its output is in "):
        slurm.submit(SlurmSettings(str(tmp_path), local=True), Job("toy", tmp_path / "toy"))


@pytest.mark.thorough
def test_a_job_on_this_machine_ends_with_the_command(tmp_path: Path) -> None:
    script = f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; exec sleep 300"
    command = f"""
from pathlib import Path
from gemma2_jax.launching import slurm
from gemma2_jax.launching.job import Job
slurm.script = lambda *_: {script!r}
slurm.submit(slurm.SlurmSettings({str(tmp_path)!r}, local=True), Job("toy", Path({str(tmp_path)!r}) / "toy"))
"""
    with subprocess.Popen([sys.executable, "-c", command], stderr=subprocess.DEVNULL) as launching:
        while not (tmp_path / "pid").exists():
            assert launching.poll() is None
            time.sleep(0.05)
        launching.send_signal(signal.SIGINT)  # KeyboardInterrupt, as of SIGTERM in the command line
        assert launching.wait(60) != 0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_stopped_job_is_queued_again() -> None:
    begun_again: Any = slurm.Training("job.sh").checkpoint().function
    assert begun_again.script == "job.sh"
