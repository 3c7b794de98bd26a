"""Settings of each engine, checked before anything is pinned.

The command line takes its defaults from here, for --help too, so this module imports nothing heavy.
"""

import re
from dataclasses import dataclass
from typing import Any, NoReturn

FOLDER = "launches"  # default folder of pinned jobs
PRIORITIES = ("very-low", "low", "medium", "high", "very-high")


@dataclass(frozen=True)
class SlurmSettings:
    """Settings of a SLURM job.

    Attributes:
        workdir: folder visible to all nodes.
        minutes: time limit, after which the job is queued again.
        restarts: maximum restarts after a time limit or preemption.
        local: whether to run the job on this machine, without SLURM, to try it.
        workers: number of jobs, as one array; several for a sweep.
    """

    workdir: str
    nodes: int = 1
    gpus_per_node: int = 0
    cpus_per_task: int | None = None
    minutes: int = 24 * 60
    restarts: int = 10
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    local: bool = False
    workers: int = 1

    def __post_init__(self) -> None:
        _check_least(self, nodes=1, gpus_per_node=0, cpus_per_task=1, minutes=1, restarts=0, workers=1)
        if self.local and self.nodes > 1:
            _refuse(f"--nodes is {self.nodes}, but --local runs on this machine only; remove one of the two.")


@dataclass(frozen=True)
class TpuVmSettings:
    """Settings of Cloud TPU VMs, requested as queued resources.

    Attributes:
        accelerator_type: type of one slice, such as v5litepod-16.
        runtime_version: image of the VMs, such as v2-alpha-tpuv5-lite.
        bucket: gs://… address through which the pinned job reaches the VMs.
        workdir: folder visible to all VMs.
        slices: number of slices.
        mount: command that mounts the shared folder on each VM, if one is needed.
        spot: whether to use spot VMs, which cost less and can be taken away at any time.
        reserved: whether to use the project's reservation.
        service_account: service account of the VMs; None for the project's default.
    """

    zone: str
    accelerator_type: str
    runtime_version: str
    bucket: str
    workdir: str
    slices: int = 1
    project: str | None = None
    mount: str | None = None
    spot: bool = False
    reserved: bool = False
    service_account: str | None = None

    def __post_init__(self) -> None:
        # gcloud interprets the other characters as patterns and versions.
        if not re.fullmatch(r"gs://[^/\s*?#\[\]]+(/[^\s*?#\[\]]*)?", self.bucket):
            _refuse(
                f"--bucket is {self.bucket}; accepted: gs://BUCKET or gs://BUCKET/FOLDER, without blanks, *, ?, #, [ "
                "or ]."
            )
        if self.spot and self.reserved:
            _refuse("--spot and --reserved exclude each other; give only one of the two.")
        _check_least(self, slices=1)
        _check_absolute(self.workdir)


@dataclass(frozen=True)
class GkeSettings:
    """Settings of a JobSet that xpk creates.

    Attributes:
        cluster: name of a cluster made by `xpk cluster create`.
        workdir: folder visible to all containers, such as the mount point of an `xpk storage`.
        image: image with Python and the code's requirements; the pinned code is added to it.
        tpu_type: type of one TPU slice, such as v5litepod-16; None for GPUs.
        slices: number of TPU slices.
        device_type: type of a GPU node, such as h100-80gb-8; None for TPUs.
        nodes: number of GPU nodes.
        priority: priority in the queue.
        max_restarts: maximum restarts of all processes after one fails.
    """

    cluster: str
    workdir: str
    image: str
    tpu_type: str | None = None
    slices: int = 1
    device_type: str | None = None
    nodes: int = 1
    project: str | None = None
    zone: str | None = None
    priority: str = "medium"
    max_restarts: int = 0

    def __post_init__(self) -> None:
        if (self.tpu_type is None) == (self.device_type is None):
            _refuse("gke needs either --tpu-type or --device-type; give one of the two.")
        _check_least(self, slices=1, nodes=1, max_restarts=0)
        if self.device_type is not None and self.slices != 1:
            _refuse(f"--slices is {self.slices}, but GPUs (--device-type) have no slices; give --nodes.")
        if self.tpu_type is not None and self.nodes != 1:
            _refuse(f"--nodes is {self.nodes}, but --nodes is for GPUs; for TPUs (--tpu-type) give --slices.")
        _check_absolute(self.workdir)


def _check_least(settings: Any, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            _refuse(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}.")


def _check_absolute(workdir: str) -> None:
    if not workdir.startswith("/"):
        _refuse(
            f"--workdir is {workdir}; it must be absolute, as in /mnt/shared, since it is a folder on the hosts."
        )


def _refuse(sentence: str) -> NoReturn:
    from gemma2_jax.config import UserError  # imports pydantic, which --help does not need

    raise UserError(sentence)
