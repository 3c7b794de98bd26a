"""`gemma2 launch`: submits a run as a job to a cluster."""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma2_jax.cli.parsers import Verbs, add_actions, add_overrides, add_verb
from gemma2_jax.launching.settings import FOLDER, PRIORITIES, GkeSettings, SlurmSettings, TpuVmSettings

if TYPE_CHECKING:
    from gemma2_jax.launching.job import Job, Submission, SweepArguments
    from gemma2_jax.run import RunConfig

DESCRIPTION = f"""\
Submits `gemma2 train key=value …` as a job to an existing cluster or cloud engine. The job runs the committed code and
the composed configuration as of the launch; both are stored in {FOLDER}/NAME-ID, so later changes do not affect it. A
restarted job resumes from its newest checkpoint.

  gemma2 launch slurm  experiment=… --nodes 4 --gpus-per-node 8 --workdir /shared/gemma2
  gemma2 launch tpu-vm experiment=… --zone us-west4-a --accelerator-type v5litepod-16 \\
      --runtime-version v2-alpha-tpuv5-lite --bucket gs://mine/jobs --workdir /mnt/shared --mount 'mount -t nfs …'
  gemma2 launch gke    experiment=… --cluster mine --tpu-type v5litepod-16 --image … --workdir /mnt/shared

  ... --dry-run     prints the scripts and command lines, and runs nothing
"""

_PINNED = """\
Relative paths in the configuration start from --workdir, which must be visible to all hosts. The job has the
credentials that the engine gives it; none are copied from this machine.
"""
_SLURM = f"""\
Submits the run to SLURM through submitit (pip install -e '.[slurm]'), from a login node: one process per node, with all
of the node's GPUs. --folder and --workdir must be on a disk that all nodes share.

  gemma2 launch slurm experiment=quickstart/teacher --nodes 4 --gpus-per-node 8 --partition gpus
  gemma2 launch slurm experiment=quickstart/teacher --local        run on this machine, to try it
  gemma2 launch slurm --sweep learning_rate --workers 8 --gpus-per-node 1     an array of workers of a sweep

{_PINNED}"""
_TPU_VM = f"""\
Requests Cloud TPU VMs through gcloud's queued resources. Each VM installs the pinned code and its requirements and
runs it. A failed run restarts, but at most five times after exit code 1 or 2, which usually means a user error. Its
output is in the VM's log: `sudo journalctl -u google-startup-scripts`. The VMs keep running, and cost money, until you
delete them with `gcloud compute tpus queued-resources delete NAME --zone ZONE --force`. With several slices,
mesh.replica must be their number or a multiple of it.

  gemma2 launch tpu-vm model=gemma2_2b mesh.replica=2 … --slices 2 --zone us-west4-a --spot \\
      --accelerator-type v5litepod-16 --runtime-version v2-alpha-tpuv5-lite --bucket gs://mine/jobs \\
      --workdir /mnt/shared --mount 'apt-get install -y nfs-common && mount -t nfs 10.0.0.2:/share /mnt/shared'

{_PINNED}"""
_GKE = f"""\
Queues the run on a GKE cluster created with xpk (pipx install xpk), on TPUs or GPUs. With several slices, mesh.replica
must be their number or a multiple of it.

  gemma2 launch gke model=gemma2_2b … --cluster mine --tpu-type v5litepod-16 --image … --workdir /mnt/shared
  gemma2 launch gke model=gemma2_2b … --cluster mine --device-type h100-80gb-8 --nodes 4 --image … --workdir …

{_PINNED}"""
_SLICES = "number of slices; mesh.replica must be a multiple of it"


def add_parser(verbs: Verbs) -> None:
    engines = add_actions(verbs, "launch", "run on a cluster: SLURM, TPU VMs, GKE", DESCRIPTION)
    slurm = _add_engine(engines, "slurm", _launch_slurm, "a job for SLURM, through submitit", _SLURM)
    number = _numbers(slurm, SlurmSettings)
    number("--nodes", "number of nodes")
    number("--gpus-per-node", "GPUs per node")
    number("--cpus-per-task", "cores for the process on each node")
    number("--minutes", "time limit, after which the job is queued again")
    number("--restarts", "maximum restarts after a time limit or preemption")
    slurm.add_argument(
        "--sweep",
        action="store_true",
        help="the arguments are those of gemma2 sweep; --workers jobs share its runs",
    )
    number("--workers", "jobs of a sweep, as one array")
    for name in ("partition", "account", "qos", "constraint"):
        slurm.add_argument(f"--{name}", help=f"passed to sbatch as --{name}")
    slurm.add_argument("--local", action="store_true", help="run the job on this machine, to try it")

    vm = _add_engine(engines, "tpu-vm", _launch_tpu_vm, "Cloud TPU VMs, through gcloud", _TPU_VM)
    vm.add_argument("--zone", required=True)
    vm.add_argument("--accelerator-type", required=True, help="type of one slice, such as v5litepod-16")
    vm.add_argument(
        "--runtime-version", required=True, help="VM software version, such as v2-alpha-tpuv5-lite"
    )
    vm.add_argument(
        "--bucket", required=True, metavar="gs://…", help="bucket through which the VMs get the pinned job"
    )
    vm.add_argument("--mount", metavar="COMMAND", help="command run as root on each VM, to mount --workdir")
    _numbers(vm, TpuVmSettings)("--slices", _SLICES)
    vm.add_argument("--project", help="Google Cloud project (default: gcloud's)")
    vm.add_argument("--spot", action="store_true", help="cheaper VMs that can be preempted at any time")
    vm.add_argument("--reserved", action="store_true", help="use the project's reservation")
    vm.add_argument(
        "--service-account", metavar="EMAIL", help="service account of the VMs (default: the project's)"
    )

    gke = _add_engine(engines, "gke", _launch_gke, "a job for GKE, through xpk", _GKE)
    number = _numbers(gke, GkeSettings)
    gke.add_argument("--cluster", required=True, help="name of the xpk cluster")
    gke.add_argument("--image", required=True, help="container image with Python and the requirements")
    gke.add_argument("--tpu-type", help="type of one TPU slice, such as v5litepod-16")
    number("--slices", _SLICES)
    gke.add_argument("--device-type", help="type of GPU node, such as h100-80gb-8")
    number("--nodes", "number of GPU nodes")
    gke.add_argument("--project", help="Google Cloud project (default: gcloud's)")
    gke.add_argument("--zone", help="zone of the cluster (default: gcloud's)")
    gke.add_argument(
        "--priority", default=GkeSettings.priority, choices=PRIORITIES, help="priority in the queue"
    )
    number("--max-restarts", "maximum restarts of all processes after one fails")


def _numbers(parser: argparse.ArgumentParser, settings_class: Any) -> Callable[[str, str], None]:
    """Returns a function that adds integer options, with defaults from `settings_class`."""

    def add(option: str, help: str) -> None:
        default = getattr(settings_class, option.removeprefix("--").replace("-", "_"))
        text = help if default is None else f"{help} ({default})"
        parser.add_argument(option, type=int, default=default, metavar="N", help=text)

    return add


def _add_engine(engines: Verbs, name: str, run: Any, help: str, description: str) -> argparse.ArgumentParser:
    parser = add_verb(engines, name, run, help, description)
    add_overrides(parser)
    slurm = name == "slurm"
    parser.add_argument(
        "--workdir",
        metavar="DIR",
        required=not slurm,
        help="folder visible to all hosts, where relative paths start" + (" (this folder)" if slurm else ""),
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print scripts and command lines, and run nothing"
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="launch uncommitted changes too; untracked files count only within gemma2_jax, configs and experiments",
    )
    parser.add_argument(
        "--folder",
        default=FOLDER,
        metavar="DIR",
        help=f"folder of pinned jobs{', on a disk that all nodes share' if slurm else ''} ({FOLDER})",
    )
    return parser


def _launch_slurm(arguments: argparse.Namespace) -> None:
    from gemma2_jax.config import UserError
    from gemma2_jax.launching import slurm

    values = _settings(arguments, SlurmSettings)
    settings = SlurmSettings(**{**values, "workdir": str(Path(values["workdir"] or ".").absolute())})
    if settings.workers > 1 and not arguments.sweep:
        raise UserError(
            f"--workers is {settings.workers}, but a single run has one job; add --sweep, or leave it out."
        )
    make = _sweep_job if arguments.sweep else _job
    if arguments.dry_run:
        print(slurm.preview(settings, make(arguments, workdir=settings.workdir)))
        return
    slurm.check_tools(settings)
    print(slurm.submit(settings, make(arguments, workdir=settings.workdir)))


def _launch_tpu_vm(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import tpu_vm

    settings = TpuVmSettings(**_settings(arguments, TpuVmSettings))
    if not arguments.dry_run:
        tpu_vm.check_tools()
    job = _job(arguments, settings.slices, tpu_vm.HOSTS_TIMEOUT)
    _submit(arguments, tpu_vm.submission(settings, job), job)
    if not arguments.dry_run:
        print(
            f"The VMs keep running, and cost money, until you delete them: {tpu_vm.delete_command(settings, job)}"
        )


def _launch_gke(arguments: argparse.Namespace) -> None:
    from gemma2_jax.launching import gke

    settings = GkeSettings(**_settings(arguments, GkeSettings))
    if not arguments.dry_run:
        gke.check_tools()
    job = _job(arguments, settings.slices)
    _submit(arguments, gke.submission(settings, job), job)


def _submit(arguments: argparse.Namespace, submission: "Submission", job: "Job") -> None:
    if arguments.dry_run:
        print(submission.preview())
        return
    submission.execute()
    print(f"{job.name} is submitted; its code and configuration are in {job.folder}.")


def _settings(arguments: argparse.Namespace, settings_class: Any) -> dict[str, Any]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(settings_class)}


def _job(
    arguments: argparse.Namespace,
    slices: int = 1,
    hosts_timeout: int | None = None,
    workdir: str | None = None,
) -> "Job":
    """Returns the pinned job, written to disk except with --dry-run.

    Args:
        hosts_timeout: replacement for the default hosts.timeout, in seconds.
        workdir: the run's working directory, if this machine shares that folder.
    """
    from gemma2_jax.cli.compose import compose
    from gemma2_jax.launching.job import check_config

    config: RunConfig = compose(arguments.overrides, arguments.config_dir)
    check_config(config, slices)
    if hosts_timeout is not None and config.hosts.timeout == type(config.hosts).timeout:
        config = dataclasses.replace(config, hosts=dataclasses.replace(config.hosts, timeout=hosts_timeout))
    return _pinned(arguments, config, config.name, [config], workdir)


def _sweep_job(arguments: argparse.Namespace, workdir: str) -> "Job":
    """Returns the pinned job of a sweep's workers, written to disk except with --dry-run."""
    from gemma2_jax.cli.compose_sweep import compose_sweep
    from gemma2_jax.config import UserError
    from gemma2_jax.launching.job import SweepArguments, check_config

    if arguments.config_dir is not None:
        raise UserError(
            f"--config-dir is {arguments.config_dir}, which is not pinned with the code; put the sweep and what it "
            "uses into configs and experiments of the checkout."
        )
    sweep = compose_sweep(arguments.overrides)
    configs = [run.config for trial in sweep.trials for run in trial]
    for config in configs:
        check_config(config)
    job = _pinned(
        arguments, SweepArguments(tuple(arguments.overrides)), f"sweep-{sweep.output}", configs, workdir
    )
    return dataclasses.replace(job, sweep=tuple(arguments.overrides))


def _pinned(
    arguments: argparse.Namespace,
    pinning: "RunConfig | SweepArguments",
    name: str,
    configs: "Sequence[RunConfig]",
    workdir: str | None,
) -> "Job":
    """Returns a job whose code and configuration are pinned, after all checks.

    Args:
        pinning: what the job runs, beside the code.
        configs: the configurations of all runs.
        workdir: as in `_job`.
    """
    from gemma2_jax.config import UserError, check_place
    from gemma2_jax.launching.job import Job, check_launch_folder
    from gemma2_jax.launching.pin import find_checkout, job_name, pin, refusal, write_pinned
    from gemma2_jax.training.prerequisites import check_places_below

    launches = Path(arguments.folder).absolute()
    check_launch_folder(launches)
    if workdir is not None:
        check_place("--workdir", workdir)
        for config in configs:
            check_places_below(workdir, config)
    checkout = find_checkout()
    refused = None if arguments.allow_changes else refusal(checkout, launches)
    if refused is not None:
        if not arguments.dry_run:
            raise UserError(refused)
        print(f"gemma2: without --dry-run, this would be refused: {refused}", file=sys.stderr)
    pinned = pin(pinning, checkout, launches, arguments.dry_run)
    name = job_name(name, pinned)
    job = Job(name, launches / name)
    if not arguments.dry_run:
        write_pinned(job.folder, pinned, pinning, checkout)
    return job
