"""Cloud TPU VMs, through gcloud's queued resources: a start-up script of each VM fetches the pinned job and runs it.

The script begins anew where it fails, and when its VM does, and so goes on from the newest checkpoint. Credentials are
those of the VMs' service account; nothing of this machine's environment goes along. Flags as in
https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create.
"""

import shlex
from collections.abc import Sequence

from gemma2_jax.launching.job import SCRIPT, Job, Submission, need_tool, training_lines
from gemma2_jax.launching.pin import ARCHIVE, CONFIG
from gemma2_jax.launching.settings import TpuVmSettings

# VMs of one pod start minutes apart, and one that is repaired comes back while the others wait.
HOSTS_TIMEOUT = 1800  # seconds
_LOCAL = "/opt/gemma2"  # on each VM
_MOUNTED = "/run/gemma2-mounted"  # a file that is gone after a restart, as mounts are
_TRIES = 5  # that end with an exit code of a mistake: most are, but a host whose network is lost may have one of them
_PAUSE = 30  # seconds


def check_tools() -> None:
    need_tool("gcloud", "asks for TPU VMs", "see https://cloud.google.com/sdk/docs/install")


def submission(settings: TpuVmSettings, job: Job) -> Submission:
    """The VMs' script, and gcloud's command lines: one to upload the job, one to ask for the VMs."""
    remote = f"{settings.bucket.rstrip('/')}/{job.name}"
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
        f"--metadata-from-file={_one_item(f'startup-script={script_path}')}",
    ]
    create += ["--spot"] if settings.spot else []
    create += ["--reserved"] if settings.reserved else []
    create += [] if settings.service_account is None else [f"--service-account={settings.service_account}"]
    pinned = [str(job.folder / name) for name in (ARCHIVE, CONFIG)]
    upload = ["gcloud", "storage", "cp", *pinned, f"{remote}/"]
    return Submission([upload, create], {script_path: _script(settings, remote)})


def _one_item(text: str) -> str:
    """One item of what gcloud takes for a list with commas; see `gcloud topic escaping`."""
    if "," not in text:
        return text
    delimiter = next(sign for sign in ":;|@~!%" if sign not in text)
    return f"^{delimiter}^{text}"


def delete_command(settings: TpuVmSettings, job: Job) -> str:
    """Takes the VMs down, which stay (and cost) after the run."""
    project = [] if settings.project is None else [f"--project={settings.project}"]
    command = [
        *("gcloud", "compute", "tpus", "queued-resources", "delete", job.name),
        f"--zone={settings.zone}",
        *project,
        "--force",
    ]
    return shlex.join(command)


def _script(settings: TpuVmSettings, remote: str) -> str:
    """A VM runs it once each time that it starts; so the tries are the script's own."""
    train = training_lines(
        f"{_LOCAL}/code", f"{_LOCAL}/{CONFIG}", settings.workdir, python=f"{_LOCAL}/venv/bin/python"
    )
    tried = "\n".join(f"        {line}" for line in [*_fetch(remote), *_mount(settings), *train])
    # `set -e` is within the brackets, and they are no condition of an `if` or `||`, which would have them ignore it.
    return f"""\
#!/bin/bash
set -uo pipefail
mistakes=0
while true; do
    (
        set -e
{tried}
    )
    code=$?
    if [ "$code" -eq 0 ]; then exit 0; fi
    if [ "$code" -le 2 ]; then mistakes=$((mistakes + 1)); fi
    if [ "$mistakes" -ge {_TRIES} ]; then
        echo "gemma2: given up, since {_TRIES} tries failed; the last one with exit code $code."
        exit "$code"
    fi
    echo "gemma2: failed with exit code $code; begins again in {_PAUSE} s."
    sleep {_PAUSE}
done
"""


def _fetch(remote: str) -> list[str]:
    """Fetches the job, and installs what it requires beside the image's own Python, which is too old."""
    return [
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


def _mount(settings: TpuVmSettings) -> Sequence[str]:
    """Mounts once, on a folder that is there; a part of --workdir may be where, so `mountpoint` could not tell."""
    if settings.mount is None:
        return []
    return [
        f"if [ ! -e {_MOUNTED} ]; then",
        f"    mkdir -p {shlex.quote(settings.workdir)}",
        # By a bash of its own: in `install && mount`, a failure of the former would not end this script.
        f"    bash -ec {shlex.quote(settings.mount)}",
        f"    touch {_MOUNTED}",
        "fi",
    ]
