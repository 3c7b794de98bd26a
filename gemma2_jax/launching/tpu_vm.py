"""Jobs for Cloud TPU VMs, through gcloud's queued resources: each VM's start-up script fetches and runs the pinned job.

The script starts over when it fails or its VM restarts, and the run resumes from its newest checkpoint. The job uses
the credentials of the VMs' service account and nothing from this machine's environment. Flags as in
https://cloud.google.com/sdk/gcloud/reference/compute/tpus/queued-resources/create.
"""

import shlex
from collections.abc import Sequence

from gemma2_jax.launching.job import SCRIPT, Job, Submission, require_tool, training_lines
from gemma2_jax.launching.pin import ARCHIVE, CONFIG
from gemma2_jax.launching.settings import TpuVmSettings

# VMs of one pod start minutes apart, and the others wait while a VM is repaired.
HOSTS_TIMEOUT = 1800  # seconds
_LOCAL = "/opt/gemma2"  # on each VM
_MOUNTED = "/run/gemma2-mounted"  # a marker file that a restart removes, like the mounts themselves
# Tries that may end with exit code 1 or 2: usually these mean a user's mistake, but a lost network can cause them too.
_TRIES = 5
_PAUSE = 30  # seconds between tries


def check_tools() -> None:
    require_tool("gcloud", "requests TPU VMs", "see https://cloud.google.com/sdk/docs/install")


def submission(settings: TpuVmSettings, job: Job) -> Submission:
    """Returns the VMs' script and two gcloud command lines: one uploads the job, one requests the VMs."""
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
    """Escapes text as one item of a list that gcloud would split at commas; see `gcloud topic escaping`."""
    if "," not in text:
        return text
    delimiter = next(sign for sign in ":;|@~!%" if sign not in text)
    return f"^{delimiter}^{text}"


def delete_command(settings: TpuVmSettings, job: Job) -> str:
    """Returns the command that deletes the VMs, which otherwise stay (and cost money) after the run."""
    project = [] if settings.project is None else [f"--project={settings.project}"]
    command = [
        *("gcloud", "compute", "tpus", "queued-resources", "delete", job.name),
        f"--zone={settings.zone}",
        *project,
        "--force",
    ]
    return shlex.join(command)


def _script(settings: TpuVmSettings, remote: str) -> str:
    """Returns the start-up script. A VM runs it once per start, so the script itself loops over its tries."""
    train = training_lines(
        f"{_LOCAL}/code", f"{_LOCAL}/{CONFIG}", settings.workdir, python=f"{_LOCAL}/venv/bin/python"
    )
    tried = "\n".join(f"        {line}" for line in [*_fetch(remote), *_mount(settings), *train])
    # bash ignores `set -e` in the condition of an `if` or `||`, so the subshell sets it and stands alone.
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
        echo "gemma2: gave up after {_TRIES} failed tries; the last one ended with exit code $code."
        exit "$code"
    fi
    echo "gemma2: failed with exit code $code; starts again in {_PAUSE} s."
    sleep {_PAUSE}
done
"""


def _fetch(remote: str) -> list[str]:
    """Returns lines that fetch the job and install its requirements for a newer Python than the image's."""
    return [
        "export HOME=/root",  # start-up scripts have no HOME
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
    """Returns lines that create --workdir and run the mount command once per start of the VM.

    A marker file records the mount: the mount point may be a parent of --workdir, so `mountpoint` cannot detect it.
    """
    if settings.mount is None:
        return []
    return [
        f"if [ ! -e {_MOUNTED} ]; then",
        f"    mkdir -p {shlex.quote(settings.workdir)}",
        # In a separate bash with -e: in `install && mount`, a failed install would not stop this script.
        f"    bash -ec {shlex.quote(settings.mount)}",
        f"    touch {_MOUNTED}",
        "fi",
    ]
