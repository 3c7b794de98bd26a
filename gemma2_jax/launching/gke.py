"""Jobs for Google Kubernetes Engine, through xpk, which builds the image, creates the JobSet and queues it.

xpk copies the folder of the pinned job into the working directory of an image. The job uses the cluster's credentials
(a Kubernetes service account) and nothing from this machine's environment. Flags as in xpk 1.16.
"""

from gemma2_jax.launching.job import SCRIPT, Job, Submission, bash_script, require_tool, training_lines
from gemma2_jax.launching.settings import GkeSettings

_WORKING_DIRECTORY = "/app"  # of xpk's images
# xpk sets these variables in containers with GPUs; on TPUs, JAX detects the hosts itself.
_HOSTS_OF_GPUS = (
    'hosts.coordinator="$JAX_COORDINATOR_ADDRESS:$JAX_COORDINATOR_PORT"',
    'hosts.num_processes="$NNODES"',
    'hosts.process_id="$NODE_RANK"',
)
# By default, an xpk job fails for good at any exit code below 127 except 42. A process that loses another process or
# its devices exits with Python's error code, 1, and should be restarted.
_FAILURE = 1


def check_tools() -> None:
    require_tool("xpk", "makes jobs for GKE", "pipx install xpk")


def submission(settings: GkeSettings, job: Job) -> Submission:
    """Returns the script in the image and xpk's command line."""
    hosts = () if settings.device_type is None else _HOSTS_OF_GPUS
    code = f"{_WORKING_DIRECTORY}/code"
    script = bash_script(
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
