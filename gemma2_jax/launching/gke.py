"""Google Kubernetes Engine, through xpk, which builds the image, makes the JobSet and queues it.

xpk copies a folder into the working directory of an image: that of the pinned job. Credentials are the cluster's own
(a Kubernetes service account); nothing of this machine's environment goes along. Flags as in xpk 1.16.
"""

from dataclasses import dataclass

from gemma2_jax.config import UserError
from gemma2_jax.launching.job import SCRIPT, Job, Submission, need_tool, training_script

_WORKING_DIRECTORY = "/app"  # of xpk's images
# What xpk tells a container of GPUs; of TPUs, JAX finds out itself.
_HOSTS_OF_GPUS = (
    'hosts.coordinator="$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"',
    'hosts.num_processes="$NNODES"',
    'hosts.process_id="$NODE_RANK"',
)


@dataclass(frozen=True)
class GkeSettings:
    """Where a job runs.

    Attributes:
        cluster: made by `xpk cluster create`.
        workdir: a folder that all containers see, such as the mount point of an `xpk storage`.
        image: with Python and all that the code requires; the pinned code is put on top of it.
        tpu_type: of one slice, such as v5litepod-16; slices: how many.
        device_type: of GPUs instead, such as h100-80gb-8; nodes: how many.
        priority: in the queue. max_restarts: of the whole job, after the loss of a host.
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
            raise UserError("gke takes either --tpu-type or --device-type, one of the two.")


def check_tools() -> None:
    need_tool("xpk", "makes jobs for GKE", "pip install xpk")


def submission(settings: GkeSettings, job: Job) -> Submission:
    """The script in the image, and xpk's command line."""
    hosts = () if settings.device_type is None else _HOSTS_OF_GPUS
    code = f"{_WORKING_DIRECTORY}/code"
    script = training_script(code, f"{_WORKING_DIRECTORY}/config.yaml", settings.workdir, hosts=hosts)
    devices = (
        [f"--tpu-type={settings.tpu_type}", f"--num-slices={settings.slices}"]
        if settings.device_type is None
        else [f"--device-type={settings.device_type}", f"--num-nodes={settings.nodes}"]
    )
    command = [
        "xpk",
        "workload",
        "create",
        f"--workload={job.name}",
        f"--cluster={settings.cluster}",
        *devices,
        f"--base-docker-image={settings.image}",
        f"--script-dir={job.folder}",
        f"--command=bash {_WORKING_DIRECTORY}/{SCRIPT}",
        f"--priority={settings.priority}",
        f"--max-restarts={settings.max_restarts}",
    ]
    places = {"project": settings.project, "zone": settings.zone}
    command += [f"--{name}={value}" for name, value in places.items() if value is not None]
    return Submission([command], {job.folder / SCRIPT: script})
