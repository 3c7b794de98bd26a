"""`gemma2 launch`: a run as a job on a cluster."""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_jax.cli.parsers import Verbs, add_actions, add_overrides, add_verb
from gemma2_jax.launching.settings import FOLDER, PRIORITIES, GkeSettings, SlurmSettings, TpuVmSettings

if TYPE_CHECKING:
    from gemma2_jax.launching.job import Job, Submission
    from gemma2_jax.run import RunConfig

DESCRIPTION = f"""\
Makes a job of `gemma2 train key=value …` for an engine that is there already. The job runs the code as it was
committed and the configuration as it was composed when it was launched, whatever happens to either afterwards; both
lie in {FOLDER}/NAME-ID. A job that is started again goes on from its newest checkpoint.

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
Submits the run to SLURM by submitit (pip install -e '.[slurm]'), from a login node: one process a node, with all of
its GPUs. --folder and --workdir must lie on a disk that all nodes see.

  gemma2 launch slurm experiment=quickstart/teacher --nodes 4 --gpus-per-node 8 --partition gpus
  gemma2 launch slurm experiment=quickstart/teacher --local        on this machine, to try it

{_PINNED}"""
_TPU_VM = f"""\
Asks for Cloud TPU VMs by gcloud's queued resources. Each VM installs the pinned code and its requirements and runs
it, again where it fails; five times at most with an exit code of 1 or 2, which most often means a mistake. Its output
is in the VM's log: `sudo journalctl -u google-startup-scripts`. The VMs stay, and cost, until you take them down with
`gcloud compute tpus queued-resources delete NAME --zone ZONE --force`. Several slices want mesh.replica to be their
number, or a multiple.

  gemma2 launch tpu-vm model=gemma2_2b mesh.replica=2 … --slices 2 --zone us-west4-a --spot \\
      --accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --bucket gs://mine/jobs \\
      --workdir /mnt/shared --mount 'apt-get install -y nfs-common && mount -t nfs 10.0.0.2:/share /mnt/shared'

{_PINNED}"""
_GKE = f"""\
Queues the run on a cluster that xpk made (pipx install xpk), on TPUs or GPUs. Several slices want mesh.replica to be
their number, or a multiple.

  gemma2 launch gke model=gemma2_2b … --cluster mine --tpu-type v5litepod-16 --image … --workdir /mnt/shared
  gemma2 launch gke model=gemma2_2b … --cluster mine --device-type h100-80gb-8 --nodes 4 --image … --workdir …

{_PINNED}"""
_SLICES = "how many, of which mesh.replica is a multiple"


def add_parser(verbs: Verbs) -> None:
    engines = add_actions(verbs, "launch", "run on a cluster: SLURM, TPU VMs, GKE", DESCRIPTION)
    slurm = _add_engine(engines, "slurm", _launch_slurm, "a job for SLURM, through submitit", _SLURM)
    number = _numbers(slurm, SlurmSettings)
    number("--nodes", "how many")
    number("--gpus-per-node", "how many")
    number("--cpus-per-task", "cores of each node's process")
    number("--minutes", "after which it is queued anew")
    number("--restarts", "how often at most")
    for name in ("partition", "account", "qos", "constraint"):
        slurm.add_argument(f"--{name}", help=f"as sbatch's --{name}")
    slurm.add_argument("--local", action="store_true", help="run it on this machine, to try it")

    vm = _add_engine(engines, "tpu-vm", _launch_tpu_vm, "Cloud TPU VMs, through gcloud", _TPU_VM)
    vm.add_argument("--zone", required=True)
    vm.add_argument("--accelerator-type", required=True, help="of one slice, such as v5litepod-16")
    vm.add_argument("--runtime-version", required=True, help="such as v2-alpha-tpuv5-lite")
    vm.add_argument("--bucket", required=True, metavar="gs://…", help="carries the pinned job to the VMs")
    vm.add_argument("--mount", metavar="COMMAND", help="run on each VM, as root, to make --workdir visible")
    _numbers(vm, TpuVmSettings)("--slices", _SLICES)
    vm.add_argument("--project", help="instead of gcloud's own")
    vm.add_argument("--spot", action="store_true", help="cheaper, and taken away at any time")
    vm.add_argument("--reserved", action="store_true", help="of the project's reservation")
    vm.add_argument("--service-account", metavar="EMAIL", help="of the VMs, instead of the project's own")

    gke = _add_engine(engines, "gke", _launch_gke, "a job for GKE, through xpk", _GKE)
    number = _numbers(gke, GkeSettings)
    gke.add_argument("--cluster", required=True, help="as xpk knows it")
    gke.add_argument("--image", required=True, help="with Python and what the code requires")
    gke.add_argument("--tpu-type", help="of one slice, such as v5litepod-16")
    number("--slices", _SLICES)
    gke.add_argument("--device-type", help="of GPUs, such as h100-80gb-8")
    number("--nodes", "of GPUs, how many")
    gke.add_argument("--project", help="instead of gcloud's own")
    gke.add_argument("--zone", help="instead of gcloud's own")
    gke.add_argument("--priority", default=GkeSettings.priority, choices=PRIORITIES, help="in the queue")
    number("--max-restarts", "of all processes, after one of them failed for whatever reason")


def _numbers(parser: argparse.ArgumentParser, settings_class: Any) -> Callable[[str, str], None]:
    """Adds options of whole numbers, with their defaults from `settings_class`."""

    def add(option: str, help: str) -> None:
        default = getattr(settings_class, option.removeprefix("--").replace("-", "_"))
        told = help if default is None else f"{help} ({default})"
        parser.add_argument(option, type=int, default=default, metavar="N", help=told)

    return add


def _add_engine(engines: Verbs, name: str, run: Any, help: str, description: str) -> argparse.ArgumentParser:
    parser = add_verb(engines, name, run, help, description)
    add_overrides(parser)
    slurm = name == "slurm"
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=not slurm,
        help="that all hosts see; relative paths begin there" + (" (this folder)" if slurm else ""),
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be run, and run nothing")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="launch the files as they are, though not all is committed; new ones count within gemma2_jax, configs and "
        "experiments",
    )
    parser.add_argument(
        "--folder",
        default=FOLDER,
        metavar="DIR",
        help=f"where pinned jobs are kept{', on a disk that all nodes see' if slurm else ''} ({FOLDER})",
    )
    return parser


def _launch_slurm(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import slurm

    values = _settings(arguments, SlurmSettings)
    settings = SlurmSettings(**{**values, "workdir": str(Path(values["workdir"] or ".").absolute())})
    if arguments.dry_run:
        print(slurm.told(settings, _job(arguments, workdir=settings.workdir)))
        return
    slurm.check_tools(settings)
    print(slurm.submit(settings, _job(arguments, workdir=settings.workdir)))


def _launch_tpu_vm(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import tpu_vm

    settings = TpuVmSettings(**_settings(arguments, TpuVmSettings))
    if not arguments.dry_run:
        tpu_vm.check_tools()
    job = _job(arguments, settings.slices, tpu_vm.HOSTS_TIMEOUT)
    _carry_out(arguments, tpu_vm.submission(settings, job), job)
    if not arguments.dry_run:
        print(f"The VMs stay, and cost, until they are deleted: {tpu_vm.delete_command(settings, job)}")


def _launch_gke(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import gke

    settings = GkeSettings(**_settings(arguments, GkeSettings))
    if not arguments.dry_run:
        gke.check_tools()
    job = _job(arguments, settings.slices)
    _carry_out(arguments, gke.submission(settings, job), job)


def _carry_out(arguments: argparse.Namespace, submission: "Submission", job: "Job") -> None:
    if arguments.dry_run:
        print(submission.told())
        return
    submission.carry_out()
    print(f"{job.name} is submitted; what it runs is pinned in {job.folder}.")


def _settings(arguments: argparse.Namespace, settings_class: Any) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(settings_class)}


def _job(
    arguments: argparse.Namespace,
    slices: int = 1,
    hosts_timeout: int | None = None,
    workdir: str | None = None,
) -> "Job":
    """The pinned job; written unless nothing is to be run.

    Args:
        hosts_timeout: instead of the usual one.
        workdir: where the run begins, if this machine sees that folder too.
    """
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.config import UserError, check_place
    from gemma2_jax.launching.job import Job, check_config, check_folder
    from gemma2_jax.launching.pin import find_checkout, job_name, pin, refusal, write_pinned
    from gemma2_jax.training.prerequisites import check_places_below

    config: RunConfig = compose(arguments.overrides, arguments.config_dir)
    check_config(config, slices)
    if hosts_timeout is not None and config.hosts.timeout == type(config.hosts).timeout:
        config = dataclasses.replace(config, hosts=dataclasses.replace(config.hosts, timeout=hosts_timeout))
    launches = Path(arguments.folder).absolute()
    check_folder(launches)
    if workdir is not None:
        check_place("--workdir", workdir)
        check_places_below(workdir, config)
    checkout = find_checkout()
    refused = None if arguments.allow_changes else refusal(checkout, launches)
    if refused is not None:
        if not arguments.dry_run:
            raise UserError(refused)
        print(f"gemma2: without --dry-run, this is refused: {refused}", file=sys.stderr)
    pinned = pin(config, checkout, launches, arguments.dry_run)
    name = job_name(config.name, pinned)
    job = Job(name, launches / name)
    if not arguments.dry_run:
        write_pinned(job.folder, pinned, config, checkout)
    return job
