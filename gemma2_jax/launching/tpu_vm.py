"""Cloud TPU VMs, through gcloud's queued resources: a start-up script of each VM fetches the pinned job and runs it.

A VM that starts anew runs the script again, and so goes on from the newest checkpoint. Credentials are those of the
VMs' service account; nothing of this machine's environment goes along. Flags as in
https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create.
"""

import shlex
from dataclasses import dataclass

from gemma2_jax.config import UserError
from gemma2_jax.launching.job import SCRIPT, Job, Submission, need_tool, training_script
from gemma2_jax.launching.pin import ARCHIVE, CONFIG

_LOCAL = "/opt/gemma2"  # on each VM


@dataclass(frozen=True)
class TpuVmSettings:
    """Where a job runs.

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
        if not self.bucket.startswith("gs://"):
            raise UserError(f"--bucket is {self.bucket}; accepted: gs://BUCKET or gs://BUCKET/FOLDER.")
        if self.spot and self.reserved:
            raise UserError("--spot and --reserved exclude one another.")
        if self.slices < 1:
            raise UserError(f"--slices is {self.slices}; it must be at least 1.")


def check_tools() -> None:
    need_tool("gcloud", "asks for TPU VMs", "see https://cloud.google.com/sdk/docs/install")


def submission(settings: TpuVmSettings, job: Job) -> Submission:
    """The VMs' script, and gcloud's command lines: one to upload the job, one to ask for the VMs."""
    remote = f"{settings.bucket.rstrip('/')}/{job.name}"
    script = training_script(
        f"{_LOCAL}/code",
        f"{_LOCAL}/{CONFIG}",
        settings.workdir,
        _preparation(remote, settings.mount),
        python=f"{_LOCAL}/venv/bin/python",
    )
    script_path = job.folder / SCRIPT
    place = [f"--zone={settings.zone}"]
    place += [] if settings.project is None else [f"--project={settings.project}"]
    nodes = (
        [f"--node-id={job.name}"]
        if settings.slices == 1
        else [f"--node-count={settings.slices}", f"--node-prefix={job.name}"]
    )
    create = [
        *("gcloud", "compute", "tpus", "queued-resources", "create", job.name),
        *place,
        *nodes,
        f"--accelerator-type={settings.accelerator_type}",
        f"--runtime-version={settings.runtime_version}",
        f"--metadata-from-file=startup-script={script_path}",
    ]
    create += ["--spot"] if settings.spot else []
    create += ["--reserved"] if settings.reserved else []
    create += [] if settings.service_account is None else [f"--service-account={settings.service_account}"]
    pinned = [str(job.folder / name) for name in (ARCHIVE, CONFIG)]
    upload = ["gcloud", "storage", "cp", *pinned, f"{remote}/"]
    return Submission([upload, create], {script_path: script})


def _preparation(remote: str, mount: str | None) -> list[str]:
    """Fetches the job, and installs what it requires beside the image's own Python, which is too old."""
    lines = [
        "export HOME=/root",  # start-up scripts have none
        f"mkdir -p {_LOCAL}",
        f"cd {_LOCAL}",
        f"gcloud storage cp {shlex.quote(f'{remote}/{ARCHIVE}')} {shlex.quote(f'{remote}/{CONFIG}')} .",
        f"tar -xzf {ARCHIVE}",
        "python3 -m pip install --quiet uv",
        "python3 -m uv venv --allow-existing --python 3.12 venv",
        "python3 -m uv pip install --quiet --python venv/bin/python './code[tpu]' "
        "-c code/constraints/jax-0.12-py312.txt",
    ]
    return lines if mount is None else [*lines, mount]
