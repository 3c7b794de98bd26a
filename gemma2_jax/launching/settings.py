"""Where a job runs, for each engine, with what is refused before anything is pinned; imports nothing heavy.

The command line takes its defaults from here, and asks for them at --help.
"""

import re
from dataclasses import dataclass
from typing import Any, NoReturn

FOLDER = "launches"  # of pinned jobs
PRIORITIES = ("very-low", "low", "medium", "high", "very-high")


@dataclass(frozen=True)
class SlurmSettings:
    """A job of SLURM's.

    Attributes:
        workdir: a folder that all nodes see.
        minutes: after which it is queued again, up to `restarts` times.
        local: run it on this machine, without SLURM, to try it.
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

    def __post_init__(self) -> None:
        _check_least(self, nodes=1, gpus_per_node=0, cpus_per_task=1, minutes=1, restarts=0)
        if self.local and self.nodes > 1:
            _refuse(f"--local runs on this machine alone, and --nodes is {self.nodes}.")


@dataclass(frozen=True)
class TpuVmSettings:
    """Queued resources: slices of TPU VMs.

    Attributes:
        accelerator_type: of one slice, such as v5litepod-16; slices: how many.
        runtime_version: the VMs' image, such as v2-alpha-tpuv5-lite.
        bucket: gs://… that carries the pinned job to the VMs.
        workdir: a folder that all VMs see; mount: the command that makes it so on each of them, if any.
        spot: cheaper, and taken away at any time. reserved: of the project's reservation.
        service_account: of the VMs; the project's default one where it is None.
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
        # gcloud takes the other signs for patterns and versions.
        if not re.fullmatch(r"gs://[^/\s*?#\[\]]+(/[^\s*?#\[\]]*)?", self.bucket):
            _refuse(
                f"--bucket is {self.bucket}; accepted: gs://BUCKET or gs://BUCKET/FOLDER, without blanks, *, ?, #, [ "
                "and ]."
            )
        if self.spot and self.reserved:
            _refuse("--spot and --reserved exclude one another.")
        _check_least(self, slices=1)
        _check_absolute(self.workdir)


@dataclass(frozen=True)
class GkeSettings:
    """A JobSet of xpk's.

    Attributes:
        cluster: made by `xpk cluster create`.
        workdir: a folder that all containers see, such as the mount point of an `xpk storage`.
        image: with Python and all that the code requires; the pinned code is put on top of it.
        tpu_type: of one slice, such as v5litepod-16; slices: how many.
        device_type: of GPUs instead, such as h100-80gb-8; nodes: how many.
        priority: in the queue. max_restarts: of the whole job, after a failure.
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
            _refuse("gke takes either --tpu-type or --device-type, one of the two.")
        _check_least(self, slices=1, nodes=1, max_restarts=0)
        if self.device_type is not None and self.slices != 1:
            _refuse(f"--slices is {self.slices}, and GPUs (--device-type) have none; give --nodes.")
        if self.tpu_type is not None and self.nodes != 1:
            _refuse(f"--nodes is {self.nodes}, and is for GPUs; TPUs (--tpu-type) are counted by --slices.")
        _check_absolute(self.workdir)


def _check_least(settings: Any, **least: int) -> None:
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None and value < smallest:
            _refuse(f"--{name.replace('_', '-')} is {value}; it must be at least {smallest}.")


def _check_absolute(workdir: str) -> None:
    if not workdir.startswith("/"):
        _refuse(
            f"--workdir is {workdir}; it must be absolute, as in /mnt/shared, since it is a folder over there."
        )


def _refuse(sentence: str) -> NoReturn:
    from gemma2_jax.config import UserError  # brings pydantic, which --help does without

    raise UserError(sentence)
