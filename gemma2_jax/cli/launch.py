"""`gemma2 launch`: a run as a job on a cluster."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_jax.cli.parsers import Verbs, add_actions, add_overrides, add_verb

if TYPE_CHECKING:
    from gemma2_jax.launching.job import Job
    from gemma2_jax.training.config import RunConfig

DESCRIPTION = """\
Makes a job of `gemma2 train key=value …` for an engine that is there already. The job runs the code as it was
committed and the configuration as it was composed when it was launched, whatever happens to either afterwards; both
lie in launches/NAME-ID. A job that is started again goes on from its newest checkpoint.

  gemma2 launch slurm  experiment=… --nodes 4 --gpus-per-node 8 --workdir /shared/gemma2
  gemma2 launch tpu-vm experiment=… --zone us-west4-a --accelerator-type v5litepod-16 \\
      --runtime-version v2-alpha-tpuv5-lite --bucket gs://mine/jobs --workdir /mnt/shared --mount 'mount -t nfs …'
  gemma2 launch gke    experiment=… --cluster mine --tpu-type v5litepod-16 --image … --workdir /mnt/shared

  ... --dry-run     shows what would be run, and runs nothing
"""

_PINNED = """\
Relative paths of the configuration begin in --workdir, which all hosts must see. Credentials
are what the engine gives the job; none are taken from here.
"""
_SLURM = f"""\
Submits the run to SLURM by submitit (pip install 'gemma2_jax[slurm]'), from a login node: one process a node, with
all of its GPUs.

  gemma2 launch slurm experiment=quickstart/teacher --nodes 4 --gpus-per-node 8 --partition gpus
  gemma2 launch slurm experiment=quickstart/teacher --local        on this machine, to try it

{_PINNED}"""
_TPU_VM = f"""\
Asks for Cloud TPU VMs by gcloud's queued resources. Each VM installs the pinned code and its requirements and runs
it; take the VMs down with `gcloud compute tpus queued-resources delete NAME --force`.

  gemma2 launch tpu-vm model=gemma2_2b … --zone us-west4-a --accelerator-type v5litepod-16 --spot \\
      --runtime-version v2-alpha-tpuv5-lite --bucket gs://mine/jobs --workdir /mnt/shared --mount 'mount -t nfs …'

{_PINNED}"""
_GKE = f"""\
Queues the run on a cluster that xpk made (pip install xpk), on TPUs or GPUs.

  gemma2 launch gke model=gemma2_2b … --cluster mine --tpu-type v5litepod-16 --image … --workdir /mnt/shared
  gemma2 launch gke model=gemma2_2b … --cluster mine --device-type h100-80gb-8 --nodes 4 --image … --workdir …

{_PINNED}"""


def add_parser(verbs: Verbs) -> None:
    engines = add_actions(verbs, "launch", "run on a cluster: SLURM, TPU VMs, GKE", DESCRIPTION)
    slurm = _add_engine(engines, "slurm", _launch_slurm, "a job for SLURM, through submitit", _SLURM)
    slurm.add_argument("--nodes", type=int, default=1, metavar="N", help="how many (1)")
    slurm.add_argument("--gpus-per-node", type=int, default=0, metavar="N", help="how many (0)")
    slurm.add_argument("--cpus-per-task", type=int, metavar="N", help="cores of each node's process")
    slurm.add_argument(
        "--minutes", type=int, default=24 * 60, metavar="N", help="after which it is queued anew (1440)"
    )
    slurm.add_argument("--restarts", type=int, default=10, metavar="N", help="how often at most (10)")
    for name in ("partition", "account", "qos", "constraint"):
        slurm.add_argument(f"--{name}", help=f"as sbatch's --{name}")
    slurm.add_argument("--local", action="store_true", help="run it on this machine, to try it")

    vm = _add_engine(engines, "tpu-vm", _launch_tpu_vm, "Cloud TPU VMs, through gcloud", _TPU_VM)
    vm.add_argument("--zone", required=True)
    vm.add_argument("--accelerator-type", required=True, help="of one slice, such as v5litepod-16")
    vm.add_argument("--runtime-version", required=True, help="such as v2-alpha-tpuv5-lite")
    vm.add_argument("--bucket", required=True, metavar="gs://…", help="carries the pinned job to the VMs")
    vm.add_argument("--mount", metavar="COMMAND", help="run on each VM, as root, to make --workdir visible")
    vm.add_argument("--slices", type=int, default=1, metavar="N", help="how many (1)")
    vm.add_argument("--project", help="instead of gcloud's own")
    vm.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
    vm.add_argument("--reserved", action="store_true", help="of the project's reservation")
    vm.add_argument("--service-account", metavar="EMAIL", help="of the VMs, instead of the project's own")

    gke = _add_engine(engines, "gke", _launch_gke, "a job for GKE, through xpk", _GKE)
    gke.add_argument("--cluster", required=True, help="as xpk knows it")
    gke.add_argument("--image", required=True, help="with Python and what the code requires")
    gke.add_argument("--tpu-type", help="of one slice, such as v5litepod-16")
    gke.add_argument("--slices", type=int, default=1, metavar="N", help="how many (1)")
    gke.add_argument("--device-type", help="of GPUs, such as h100-80gb-8")
    gke.add_argument("--nodes", type=int, default=1, metavar="N", help="of GPUs, how many (1)")
    gke.add_argument("--project", help="instead of gcloud's own")
    gke.add_argument("--zone", help="instead of gcloud's own")
    gke.add_argument(
        "--priority", default="medium", choices=("very-low", "low", "medium", "high", "very-high")
    )
    gke.add_argument("--max-restarts", type=int, default=0, metavar="N", help="after the loss of a host (0)")


def _add_engine(engines: Verbs, name: str, run: Any, help: str, description: str) -> argparse.ArgumentParser:
    parser = add_verb(engines, name, run, help, description)
    add_overrides(parser)
    required = name != "slurm"
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=required,
        help="that all hosts see; relative paths begin there" + ("" if required else " (this folder)"),
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and run nothing")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="launch the files as they are, though not all is committed",
    )
    parser.add_argument(
        "--folder", default="launches", metavar="DIR", help="where pinned jobs are kept (launches)"
    )
    return parser


def _launch_slurm(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import slurm

    values = _settings(arguments, slurm.SlurmSettings)
    settings = slurm.SlurmSettings(**{**values, "workdir": str(Path(values["workdir"] or ".").absolute())})
    if arguments.dry_run:
        print(slurm.told(settings, _job(arguments)))
        return
    slurm.check_tools(settings)
    job = _job(arguments)
    print(slurm.submit(settings, job))


def _launch_tpu_vm(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import tpu_vm

    _launch(arguments, tpu_vm, tpu_vm.TpuVmSettings)


def _launch_gke(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import gke

    _launch(arguments, gke, gke.GkeSettings)


def _launch(arguments: argparse.Namespace, engine: Any, settings_class: Any) -> None:
    """For an engine of command lines."""
    settings = settings_class(**_settings(arguments, settings_class))
    if not arguments.dry_run:
        engine.check_tools()
    job = _job(arguments)
    submission = engine.submission(settings, job)
    if arguments.dry_run:
        print(submission.told())
        return
    submission.carry_out()
    print(f"{job.name} is submitted; what it runs is pinned in {job.folder}.")


def _settings(arguments: argparse.Namespace, settings_class: Any) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(settings_class)}


def _job(arguments: argparse.Namespace) -> "Job":
    """The pinned job; written unless nothing is to be run."""
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.launching.job import Job
    from gemma2_jax.launching.pin import find_checkout, job_name, pin, write_pinned

    config: RunConfig = compose(arguments.overrides, arguments.config_dir)
    checkout = find_checkout()
    pinned = pin(config, checkout, arguments.allow_changes or arguments.dry_run)
    name = job_name(config.name, pinned)
    job = Job(name, Path(arguments.folder).absolute() / name)
    if not arguments.dry_run:
        write_pinned(job.folder, pinned, config, checkout)
    return job
