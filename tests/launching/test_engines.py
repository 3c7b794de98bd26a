"""What is run for each engine: command lines by their flags, scripts by shellcheck, SLURM on this machine."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.launching import gke, job, slurm, tpu_vm
from gemma2_jax.launching.job import Job

JOB = Job("toy-0123abcd", Path("/launches/toy-0123abcd"))
TPU_VM: dict[str, Any] = {
    "zone": "us-west4-a",
    "accelerator_type": "v5litepod-16",
    "runtime_version": "v2-alpha-tpuv5-lite",
    "bucket": "gs://mine/jobs/",
    "workdir": "/mnt/shared disk",
}
# The flags of `gcloud compute tpus queued-resources create` and of `xpk workload create` (1.16) that are used here.
QUEUED_RESOURCES = {
    "accelerator-type", "metadata-from-file", "node-count", "node-id", "node-prefix", "project", "reserved",
    "runtime-version", "service-account", "spot", "zone",
}  # fmt: skip
XPK_WORKLOAD = {
    "base-docker-image", "cluster", "command", "device-type", "max-restarts", "num-nodes", "num-slices", "priority",
    "project", "script-dir", "tpu-type", "workload", "zone",
}  # fmt: skip


def flags(command: Sequence[str]) -> dict[str, str]:
    pairs = (text.removeprefix("--").partition("=") for text in command if text.startswith("--"))
    return {name: value for name, _, value in pairs}


def check_script(text: str, path: Path) -> None:
    path.write_text(text)
    done = subprocess.run(
        [str(Path(sys.executable).parent / "shellcheck"), str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_tpu_slice_on_gke(tmp_path: Path) -> None:
    settings = gke.GkeSettings(
        "cluster", "/mnt/shared", "gcr.io/mine/image", "v5litepod-16", 2, project="p", max_restarts=3
    )
    submission = gke.submission(settings, JOB)
    (command,) = submission.commands
    assert command[:3] == ["xpk", "workload", "create"]
    assert flags(command) == {
        "workload": "toy-0123abcd",
        "cluster": "cluster",
        "tpu-type": "v5litepod-16",
        "num-slices": "2",
        "base-docker-image": "gcr.io/mine/image",
        "script-dir": "/launches/toy-0123abcd",
        "command": "bash /app/job.sh",
        "priority": "medium",
        "max-restarts": "3",
        "project": "p",
    }
    (script,) = submission.files.values()
    assert script.endswith("exec python3 -m gemma2_jax.cli.main train --config /app/config.yaml\n")
    assert "cd /mnt/shared\n" in script
    check_script(script, tmp_path / "job.sh")


def test_gpus_on_gke_are_told_their_hosts(tmp_path: Path) -> None:
    settings = gke.GkeSettings(
        "cluster", "/mnt/shared", "image", device_type="h100-80gb-8", nodes=4, zone="z"
    )
    submission = gke.submission(settings, JOB)
    found = flags(submission.commands[0])
    assert (found["device-type"], found["num-nodes"], found["zone"]) == ("h100-80gb-8", "4", "z")
    assert found.keys() <= XPK_WORKLOAD
    assert "tpu-type" not in found
    (script,) = submission.files.values()
    assert 'hosts.num_processes="$NNODES" hosts.process_id="$NODE_RANK"' in script
    check_script(script, tmp_path / "job.sh")


def test_one_slice_of_tpu_vms(tmp_path: Path) -> None:
    submission = tpu_vm.submission(
        tpu_vm.TpuVmSettings(**TPU_VM, spot=True, mount="mount -t nfs a:/b /c"), JOB
    )
    upload, create = submission.commands
    assert upload == [
        *(
            "gcloud",
            "storage",
            "cp",
            "/launches/toy-0123abcd/code.tar.gz",
            "/launches/toy-0123abcd/config.yaml",
        ),
        "gs://mine/jobs/toy-0123abcd/",
    ]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "toy-0123abcd"]
    assert flags(create) == {
        "zone": "us-west4-a",
        "node-id": "toy-0123abcd",
        "accelerator-type": "v5litepod-16",
        "runtime-version": "v2-alpha-tpuv5-lite",
        "metadata-from-file": "startup-script=/launches/toy-0123abcd/job.sh",
        "spot": "",
    }
    (script,) = submission.files.values()
    assert "gcloud storage cp gs://mine/jobs/toy-0123abcd/code.tar.gz " in script
    assert script.index("mount -t nfs a:/b /c\n") < script.index("cd '/mnt/shared disk'\n")
    check_script(script, tmp_path / "job.sh")


def test_several_slices_of_tpu_vms() -> None:
    settings = tpu_vm.TpuVmSettings(**TPU_VM, slices=2, project="p", reserved=True, service_account="a@b")
    found = flags(tpu_vm.submission(settings, JOB).commands[1])
    assert (found["node-count"], found["node-prefix"]) == ("2", "toy-0123abcd")
    assert (found["project"], found["service-account"]) == ("p", "a@b")
    assert found.keys() <= QUEUED_RESOURCES
    assert not {"node-id", "spot"} & found.keys()


def test_slurm(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    settings = slurm.SlurmSettings(
        "/shared", nodes=4, gpus_per_node=8, cpus_per_task=16, minutes=90, partition="long", account="me"
    )
    told = slurm.told(settings, JOB)
    script, sbatch = told.split("#!/bin/bash\n")[1:]
    lines = {line.removeprefix("#SBATCH --") for line in sbatch.splitlines() if line.startswith("#SBATCH")}
    assert {
        "nodes=4", "ntasks-per-node=1", "gpus-per-node=8", "cpus-per-task=16", "time=90", "partition=long",
        "account=me", "job-name=toy-0123abcd",
    } <= lines  # fmt: skip
    check_script(f"#!/bin/bash\n{script}", tmp_path / "job.sh")
    assert "export PYTHONPATH=/launches/toy-0123abcd/code\n" in script


def test_slurm_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way through submitit, with a script in the place of a training."""
    pytest.importorskip("submitit")
    settings = slurm.SlurmSettings(str(tmp_path / "work"), local=True)
    slurm.check_tools(settings)
    monkeypatch.setattr(slurm, "script", lambda *_: f"#!/bin/bash\necho trained > {tmp_path}/result\n")
    said = slurm.submit(settings, Job("toy", tmp_path / "toy"))
    assert said.startswith("toy is done; what it says goes to ")
    assert (tmp_path / "result").read_text() == "trained\n"
    monkeypatch.setattr(slurm, "script", lambda *_: "#!/bin/bash\nexit 3\n")
    with pytest.raises(UserError, match=r"^toy failed; what it says goes to "):
        slurm.submit(settings, Job("toy", tmp_path / "toy"))


def test_a_stopped_slurm_job_is_queued_again() -> None:
    pytest.importorskip("submitit")
    begun_again: Any = slurm.Training("job.sh").checkpoint().function
    assert begun_again.script == "job.sh"


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.shutil, "which", lambda _: None)
    with pytest.raises(
        UserError, match="xpk is not installed, which makes jobs for GKE; pip install xpk, or look"
    ):
        gke.check_tools()
    with pytest.raises(UserError, match="gcloud is not installed, which asks for TPU VMs; see https://cloud"):
        tpu_vm.check_tools()
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"submitit is not installed.*: pip install 'gemma2_jax\[slurm\]'"):
        slurm.check_tools(slurm.SlurmSettings("."))


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(UserError, match=r"^`false` failed with exit code 1; its own words are above"):
        job.Submission([["false"], ["true"]]).carry_out()


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="either --tpu-type or --device-type"):
        gke.GkeSettings("cluster", "/mnt", "image")
    with pytest.raises(UserError, match="--bucket is mine; accepted: gs://BUCKET"):
        tpu_vm.TpuVmSettings(**{**TPU_VM, "bucket": "mine"})
    with pytest.raises(UserError, match="--spot and --reserved exclude"):
        tpu_vm.TpuVmSettings(**TPU_VM, spot=True, reserved=True)
    with pytest.raises(UserError, match="--local runs on this machine alone, and --nodes is 2"):
        slurm.SlurmSettings(".", nodes=2, local=True)
