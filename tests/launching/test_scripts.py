"""Behaviour of the scripts on a host, with fake programs for gcloud, pip and training."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2_jax.launching import slurm, tpu_vm
from gemma2_jax.launching.job import Job
from gemma2_jax.launching.settings import SlurmSettings, TpuVmSettings
from tests.launching.shell import write_program


def write_package(folder: Path, main: str) -> None:
    (folder / "gemma2_jax" / "cli").mkdir(parents=True)
    (folder / "gemma2_jax" / "__init__.py").touch()
    (folder / "gemma2_jax" / "cli" / "__init__.py").touch()
    (folder / "gemma2_jax" / "cli" / "main.py").write_text(main)


def test_the_pinned_code_runs_though_the_job_works_in_a_checkout(tmp_path: Path) -> None:
    checkout, job = tmp_path / "checkout", Job("toy", tmp_path / "toy")
    write_package(job.folder / "code", "print('pinned')")
    write_package(checkout, "print('changed since')")
    script = slurm.script(SlurmSettings(str(checkout)), job)
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(checkout)},
    )
    assert done.stdout == "pinned\n"


def test_a_slurm_job_does_not_end_at_the_signal_for_submitit(tmp_path: Path) -> None:
    job = Job("toy", tmp_path / "toy")
    write_package(
        job.folder / "code", "import os, signal; os.kill(os.getpid(), signal.SIGUSR2); print('alive')"
    )
    script = slurm.script(SlurmSettings(str(tmp_path / "work")), job)
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n")


@pytest.mark.thorough
@pytest.mark.parametrize("starting", [0.0, 1.0])  # seconds: the second is stopped while it starts
def test_a_stopped_node_stops_its_training(starting: float, tmp_path: Path) -> None:
    """submitit raises in the waiting process; the training would otherwise continue without it."""
    script = tmp_path / "job.sh"
    script.write_text(
        f"trap 'echo stopped > {tmp_path}/output; exit 1' TERM\necho $$ > {tmp_path}/pid\n"
        "while true; do sleep 0.05; done\n"
    )
    waiting = (
        "import subprocess, time\n"
        "from gemma2_jax.launching.slurm import Training\n"
        "class Popen(subprocess.Popen):\n"
        "    def __init__(self, *arguments, **keywords):\n"
        "        super().__init__(*arguments, **keywords)\n"
        f"        time.sleep({starting})\n"
        "subprocess.Popen = Popen\n"
        f"Training({str(script)!r})()"
    )
    with subprocess.Popen([sys.executable, "-c", waiting], stderr=subprocess.DEVNULL) as node:
        while not (tmp_path / "pid").exists():
            assert node.poll() is None
        node.send_signal(signal.SIGINT)
        assert node.wait(60) != 0
    assert (tmp_path / "output").read_text() == "stopped\n"


@pytest.fixture
def vm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a VM: `codes` has the exit codes of its trainings, one per line; `did` lists what ran."""
    monkeypatch.setattr(tpu_vm, "_LOCAL", str(tmp_path / "opt"))
    monkeypatch.setattr(tpu_vm, "_MOUNTED", str(tmp_path / "mounted"))
    write_program(tmp_path / "bin" / "gcloud", "exit 0")
    write_program(tmp_path / "bin" / "tar", "exit 0")
    write_program(tmp_path / "bin" / "python3", "exit 0")
    write_program(tmp_path / "bin" / "sleep", f"echo sleep >> {tmp_path}/did")
    train = f"echo train >> {tmp_path}/did\ncode=$(head -n1 {tmp_path}/codes)\nsed -i 1d {tmp_path}/codes\nexit $code"
    write_program(tmp_path / "opt" / "venv" / "bin" / "python", train)
    return tmp_path


def start(vm: Path, codes: list[int], mount: str | None = None) -> tuple[int, list[str], str]:
    """Runs the VM's script; returns its exit code, the programs called, and its output."""
    settings = TpuVmSettings("z", "v5litepod-16", "r", "gs://b", str(vm / "shared" / "work"), mount=mount)
    (script,) = tpu_vm.submission(settings, Job("toy", vm / "toy")).files.values()
    (vm / "codes").write_text("".join(f"{code}\n" for code in codes))
    (vm / "did").unlink(missing_ok=True)
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": f"{vm / 'bin'}:{os.environ['PATH']}"},
        timeout=60,
    )
    return done.returncode, (vm / "did").read_text().split(), done.stdout


def test_a_vm_tries_again_until_the_run_is_done(vm: Path) -> None:
    code, did, output = start(vm, [134, 143, 134, 137, 134, 134, 1, 0])
    assert code == 0
    assert did == ["train", "sleep"] * 7 + ["train"]
    assert output.startswith("gemma2: failed with exit code 134; starts again in 30 s.\n")


@pytest.mark.parametrize("mistake", [1, 2])
def test_a_vm_gives_up_after_repeated_mistakes(vm: Path, mistake: int) -> None:
    code, did, output = start(vm, [mistake] * 9)
    assert code == mistake
    assert did.count("train") == 5
    assert output.endswith(f"gave up after 5 failed tries; the last one ended with exit code {mistake}.\n")


def test_a_vm_mounts_once_and_before_it_works_there(vm: Path) -> None:
    """The folder exists before the mount; a second mount would fail."""
    mount = f"test -d {vm}/shared && echo mount >> {vm}/did"
    code, did, _ = start(vm, [134, 0], mount)
    assert (code, did) == (0, ["mount", "train", "sleep", "train"])


@pytest.mark.parametrize("then", ["&& true", "; true"])
def test_a_vm_does_not_train_without_its_mount(vm: Path, then: str) -> None:
    """The script tries again, since the disk may not be available yet."""
    mount = f"echo mount >> {vm}/did; test -e {vm}/up || {{ touch {vm}/up; false; }} {then}"
    code, did, _ = start(vm, [0], mount)
    assert (code, did) == (0, ["mount", "sleep", "mount", "train"])
