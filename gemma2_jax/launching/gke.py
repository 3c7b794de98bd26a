"""Google Kubernetes Engine, through xpk, which builds the image, makes the JobSet and queues it.

xpk copies a folder into the working directory of an image: that of the pinned job. Credentials are the cluster's own
(a Kubernetes service account); nothing of this machine's environment goes along. Flags as in xpk 1.16.
"""

from gemma2_jax.launching.job import SCRIPT, Job, Submission, need_tool, script_of, training_lines
from gemma2_jax.launching.settings import GkeSettings

_WORKING_DIRECTORY = "/app"  # of xpk's images
# What xpk tells a container of GPUs; of TPUs, JAX finds out itself.
_HOSTS_OF_GPUS = (
    'hosts.coordinator="$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"',
    'hosts.num_processes="$NNODES"',
    'hosts.process_id="$NODE_RANK"',
)
# Of itself, xpk gives a job up for good at any exit code below 127 but 42. A process that loses another one, or its
# devices, ends with Python's own code for an error.
_FAILURE = 1


def check_tools() -> None:
    need_tool("xpk", "makes jobs for GKE", "pipx install xpk")


def submission(settings: GkeSettings, job: Job) -> Submission:
    """The script in the image, and xpk's command line."""
    hosts = () if settings.device_type is None else _HOSTS_OF_GPUS
    code = f"{_WORKING_DIRECTORY}/code"
    script = script_of(
        training_lines(code, f"{_WORKING_DIRECTORY}/config.yaml", settings.workdir, hosts=hosts)
    )
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
        f"--restart-on-exit-codes={_FAILURE}",
    ]
    places = {"project": settings.project, "zone": settings.zone}
    command += [f"--{name}={value}" for name, value in places.items() if value is not None]
    return Submission([command], {job.folder / SCRIPT: script})
