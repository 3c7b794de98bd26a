"""Commands and scripts of each engine: command lines are checked against the programs' help, scripts by shellcheck.

The golden files hold the help texts of the programs, and the JobSets that xpk creates from the commands made here.
"""

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from gemma2_jax.config import UserError
from gemma2_jax.launching import gke, job, slurm, tpu_vm
from gemma2_jax.launching.job import Job
from gemma2_jax.processes.hosts import HostsConfig
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from tests.launching.shell import check_script

JOB = Job("toy-0123abcd", Path("/tmp/launches/toy-0123abcd"))
GOLDEN = Path(__file__).parent / "golden"
TPU_VM: dict[str, Any] = {
    "zone": "us-west4-a",
    "accelerator_type": "v5litepod-16",
    "runtime_version": "v2-alpha-tpuv5-lite",
    "bucket": "gs://mine/jobs/",
    "workdir": "/mnt/shared disk",
}
GKE: dict[str, Any] = {
    "cluster": "mine",
    "workdir": "/mnt/shared",
    "image": "gcr.io/mine/image",
    "project": "p",
    "zone": "us-west4-a",
}


def flags(command: Sequence[str]) -> dict[str, str]:
    pairs = (text.removeprefix("--").partition("=") for text in command if text.startswith("--"))
    return {name: value for name, _, value in pairs}


def check_flags(command: Sequence[str], synopsis: str, elsewhere: Sequence[str] = ()) -> None:
    """Checks that the program's help lists each flag, and that a flag has a value if it takes one."""
    text = (GOLDEN / synopsis).read_text()
    takes_value = {name: bool(value) for name, value in re.findall(r"--([a-z-]+)([= ][A-Z[{])?", text)}
    for name, value in flags(command).items():
        if name not in elsewhere:
            assert takes_value.get(name) == bool(value), name


def jobset(golden: str, command: Sequence[str]) -> Any:
    """Returns the spec of the JobSet that xpk created from exactly this command."""
    text = (GOLDEN / golden).read_text()
    assert text.splitlines()[1] == f"# {shlex.join(command)}"
    made = yaml.safe_load(text)
    assert (made["kind"], made["metadata"]["name"]) == ("JobSet", JOB.name)
    return made["spec"]


def test_a_folder_with_commas_is_one_value_for_gcloud() -> None:
    for folder, argument in {
        "/tmp/launches": "startup-script=/tmp/launches/job.sh",
        "/tmp/a, b": "^:^startup-script=/tmp/a, b/job.sh",
        "/tmp/a:b,c": "^;^startup-script=/tmp/a:b,c/job.sh",
    }.items():
        made = tpu_vm.submission(tpu_vm.TpuVmSettings(**TPU_VM), Job("toy", Path(folder)))
        assert flags(made.commands[1])["metadata-from-file"] == argument


def test_tpu_slices_on_gke(tmp_path: Path) -> None:
    settings = gke.GkeSettings(**GKE, tpu_type="v5litepod-16", slices=2, max_restarts=3)
    submission = gke.submission(settings, JOB)
    (command,) = submission.commands
    check_flags(command, "xpk_create.txt")
    spec = jobset("xpk_tpu.yaml", command)
    (slices,) = spec["replicatedJobs"]
    assert (slices["replicas"], slices["template"]["spec"]["parallelism"]) == (2, 4)
    pod = slices["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["priorityClassName"] == "medium"
    assert "\n(bash /app/job.sh) & PID=$!;" in pod["containers"][0]["command"][2]
    (script,) = submission.files.values()
    assert script.endswith("exec python3 -m gemma2_jax.cli.main train --config /app/config.yaml\n")
    assert "cd /mnt/shared\n" in script
    check_script(script, tmp_path / "job.sh")


def test_a_job_on_gke_begins_again_after_an_error_of_python() -> None:
    """xpk's default exit codes to restart on start at 42: losing another process would fail the JobSet for good."""
    settings = gke.GkeSettings(**GKE, tpu_type="v5litepod-16", slices=2, max_restarts=3)
    spec = jobset("xpk_tpu.yaml", gke.submission(settings, JOB).commands[0])
    assert spec["failurePolicy"]["maxRestarts"] == 3
    (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    assert {1, 42, 134, 137, 143} <= set(rule["onExitCodes"]["values"])
    assert 2 not in rule["onExitCodes"]["values"]


def test_gpus_on_gke_get_their_hosts_from_xpk(tmp_path: Path) -> None:
    settings = gke.GkeSettings(**GKE, device_type="h100-80gb-8", nodes=4, priority="high")
    submission = gke.submission(settings, JOB)
    (command,) = submission.commands
    check_flags(command, "xpk_create.txt")
    (nodes,) = jobset("xpk_gpu.yaml", command)["replicatedJobs"]
    assert (nodes["replicas"], nodes["template"]["spec"]["parallelism"]) == (1, 4)
    (container,) = nodes["template"]["spec"]["template"]["spec"]["containers"]
    (script,) = submission.files.values()
    used = set(re.findall(r"\$([A-Z_]+)", script.splitlines()[-1]))
    assert used == {"JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT", "NNODES", "NODE_RANK"}
    assert used <= {variable["name"] for variable in container["env"]}
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
            "/tmp/launches/toy-0123abcd/code.tar.gz",
            "/tmp/launches/toy-0123abcd/config.yaml",
        ),
        "gs://mine/jobs/toy-0123abcd/",
    ]
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "toy-0123abcd"]
    assert flags(create) == {
        "zone": "us-west4-a",
        "node-id": "toy-0123abcd",
        "accelerator-type": "v5litepod-16",
        "runtime-version": "v2-alpha-tpuv5-lite",
        "metadata-from-file": "startup-script=/tmp/launches/toy-0123abcd/job.sh",
        "spot": "",
    }
    check_flags(create, "gcloud_create.txt")
    (script,) = submission.files.values()
    assert "gcloud storage cp gs://mine/jobs/toy-0123abcd/code.tar.gz " in script
    made, mounted = script.index("mkdir -p '/mnt/shared disk'\n"), script.index("'mount -t nfs a:/b /c'\n")
    assert made < mounted < script.index("cd '/mnt/shared disk'\n")
    check_script(script, tmp_path / "job.sh")


def test_several_slices_of_tpu_vms() -> None:
    settings = tpu_vm.TpuVmSettings(**TPU_VM, slices=2, project="p", reserved=True, service_account="a@b")
    create = tpu_vm.submission(settings, JOB).commands[1]
    check_flags(create, "gcloud_create.txt", elsewhere=["project"])  # of all gcloud's commands
    found = flags(create)
    assert (found["node-count"], found["node-prefix"]) == ("2", "toy-0123abcd")
    assert (found["project"], found["service-account"]) == ("p", "a@b")
    assert not {"node-id", "spot"} & found.keys()


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job.shutil, "which", lambda _: None)
    with pytest.raises(
        UserError, match="xpk, which makes jobs for GKE, is not installed; pipx install xpk, or use"
    ):
        gke.check_tools()
    with pytest.raises(
        UserError, match="gcloud, which requests TPU VMs, is not installed; see https://cloud"
    ):
        tpu_vm.check_tools()
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"submitit.* is not installed: pip install -e '\.\[slurm\]'"):
        slurm.check_tools(slurm.SlurmSettings("."))


def test_a_failed_command_is_reported() -> None:
    with pytest.raises(UserError, match=r"^`false` failed with exit code 1; its output is above"):
        job.Submission([["false"], ["true"]]).execute()


@pytest.mark.parametrize(
    ("settings", "values", "words"),
    [
        (gke.GkeSettings, GKE, "either --tpu-type or --device-type"),
        (gke.GkeSettings, {**GKE, "tpu_type": "t", "slices": 0}, "--slices is 0; it must be at least 1"),
        (gke.GkeSettings, {**GKE, "tpu_type": "t", "max_restarts": -1}, "--max-restarts is -1; it must be at least 0"),
        (gke.GkeSettings, {**GKE, "tpu_type": "t", "nodes": 2}, "--nodes is 2, but --nodes is for GPUs"),
        (gke.GkeSettings, {**GKE, "device_type": "g", "slices": 2}, "--slices is 2, but GPUs"),
        (gke.GkeSettings, {**GKE, "tpu_type": "t", "workdir": "w"}, "--workdir is w; it must be absolute"),
        (tpu_vm.TpuVmSettings, {**TPU_VM, "bucket": "mine"}, "--bucket is mine; accepted: gs://BUCKET"),
        (tpu_vm.TpuVmSettings, {**TPU_VM, "bucket": "gs://"}, "--bucket is gs://; accepted: gs://BUCKET"),
        (tpu_vm.TpuVmSettings, {**TPU_VM, "bucket": "gs://a/b*"}, r"--bucket is gs://a/b\*; accepted: gs://BUCKET"),
        (tpu_vm.TpuVmSettings, {**TPU_VM, "bucket": "gs://a/[b]"}, r"--bucket is gs://a/\[b\]; accepted: gs://BUCKET"),
        (tpu_vm.TpuVmSettings, {**TPU_VM, "slices": 0}, "--slices is 0; it must be at least 1"),
        (tpu_vm.TpuVmSettings, {**TPU_VM, "workdir": "w"}, "--workdir is w; it must be absolute"),
        (tpu_vm.TpuVmSettings, {**TPU_VM, "spot": True, "reserved": True}, "--spot and --reserved exclude"),
        (slurm.SlurmSettings, {"workdir": ".", "nodes": 0}, "--nodes is 0; it must be at least 1"),
        (slurm.SlurmSettings, {"workdir": ".", "minutes": 0}, "--minutes is 0; it must be at least 1"),
        (slurm.SlurmSettings, {"workdir": ".", "restarts": -1}, "--restarts is -1; it must be at least 0"),
        (slurm.SlurmSettings, {"workdir": ".", "gpus_per_node": -1}, "--gpus-per-node is -1; it must be at least 0"),
        (slurm.SlurmSettings, {"workdir": ".", "cpus_per_task": 0}, "--cpus-per-task is 0; it must be at least 1"),
        (slurm.SlurmSettings, {"workdir": ".", "nodes": 2, "local": True}, "--local runs on this machine only"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings: Any, values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings(**values)


def test_configurations_that_would_fail_on_the_hosts_are_refused(toy_run: RunConfig) -> None:
    for replica, slices in ((1, 1), (2, 2), (4, 2), (-1, 2)):
        job.check_config(replace(toy_run, mesh=MeshConfig(data=1, replica=replica)), slices)
    with pytest.raises(
        UserError, match=r"^mesh\.replica is 1 and --slices is 2; mesh\.replica must be a multiple"
    ):
        job.check_config(replace(toy_run, mesh=MeshConfig()), slices=2)
    job.check_config(replace(toy_run, hosts=HostsConfig(timeout=5)))
    for hosts in (HostsConfig(detect=False), HostsConfig(process_id=0)):
        with pytest.raises(
            UserError, match=r"^hosts\.(detect is false|process_id is 0), but the processes of a launched run"
        ):
            job.check_config(replace(toy_run, hosts=hosts))


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    job.check_launch_folder(tmp_path / "new" / "folder")
    for path in (
        tmp_path / "file",
        tmp_path / "file" / "within",
        tmp_path / "new" / ".." / "file" / "within",
    ):
        with pytest.raises(
            UserError, match=r"^--folder is .*, which cannot be used: .*/file is a file, where"
        ):
            job.check_launch_folder(path)
