"""SLURM, through submitit: one process a node, which has all of its devices.

submitit asks for the job to be queued again before its time is over, or when it is preempted; the run then goes on
from its newest checkpoint. The job has the environment that it is submitted from, as SLURM's own jobs do.
"""

import importlib.util
import shlex
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.launching.job import SCRIPT, Job, need_tool, training_script
from gemma2_jax.launching.pin import CODE, CONFIG

if TYPE_CHECKING:
    import submitit.helpers


@dataclass(frozen=True)
class SlurmSettings:
    """Where a job runs.

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
        for name in ("nodes", "minutes"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; it must be at least 1.")
        if self.local and self.nodes > 1:
            raise UserError(f"--local runs on this machine alone, and --nodes is {self.nodes}.")


class Training:
    """What submitit runs on each node: the script, again after it was stopped."""

    def __init__(self, script: str) -> None:
        self.script = script

    def __call__(self) -> str:
        from submitit.helpers import CommandFunction

        return str(CommandFunction(["bash", self.script])())

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """submitit's hook: what to queue when the job is about to be stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_tools(settings: SlurmSettings) -> None:
    _need_submitit()
    if not settings.local:
        need_tool("srun", "submits jobs", "launch from a login node of the cluster, try it with --local")


def script(settings: SlurmSettings, job: Job) -> str:
    """The script of each node."""
    folder = job.folder.absolute()
    return training_script(str(folder / CODE), str(folder / CONFIG), settings.workdir, python=sys.executable)


def told(settings: SlurmSettings, job: Job) -> str:
    """The node's script, and the file that sbatch gets from submitit, for a person to read."""
    _need_submitit()
    from submitit.slurm.slurm import _make_sbatch_string

    command = shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(_logs(job))])
    values = {name.removeprefix("slurm_"): value for name, value in _parameters(settings, job).items()}
    names = {"timeout_min": "time", "name": "job_name", "tasks_per_node": "ntasks_per_node"}
    sbatch = _make_sbatch_string(
        command=command, folder=_logs(job), **{names.get(name, name): value for name, value in values.items()}
    )
    parts = [f"# {job.folder / SCRIPT}\n{script(settings, job)}"]
    return "\n".join(parts if settings.local else [*parts, sbatch])


def submit(settings: SlurmSettings, job: Job) -> str:
    """Writes the script and submits the job; a local one is waited for. Returns what came of it, in a sentence.

    Raises:
        UserError: SLURM refuses it, or a local job fails.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    path = job.folder.absolute() / SCRIPT
    write_text(path, script(settings, job))
    executor = submitit.AutoExecutor(
        folder=_logs(job),
        cluster="local" if settings.local else "slurm",
        slurm_max_num_timeout=settings.restarts,
    )
    executor.update_parameters(**_parameters(settings, job))
    try:
        submitted = executor.submit(Training(str(path)))
    except FailedSubmissionError as error:
        raise UserError(f"SLURM refuses the job: {' '.join(str(error).split())}") from None
    words = f"what it says goes to {submitted.paths.folder}"
    if not settings.local:
        return f"{job.name} is job {submitted.job_id}; {words}."
    try:
        submitted.result()
    except FailedJobError:
        raise UserError(f"{job.name} failed; {words}.") from None
    return f"{job.name} is done; {words}."


def _parameters(settings: SlurmSettings, job: Job) -> dict[str, Any]:
    """submitit's names and values."""
    values: dict[str, Any] = {
        "name": job.name,
        "nodes": settings.nodes,
        "tasks_per_node": 1,
        "timeout_min": settings.minutes,
    }
    if settings.gpus_per_node:
        values["gpus_per_node"] = settings.gpus_per_node
    if settings.cpus_per_task is not None:
        values["cpus_per_task"] = settings.cpus_per_task
    for name in ("partition", "account", "qos", "constraint"):
        if getattr(settings, name) is not None:
            values[f"slurm_{name}"] = getattr(settings, name)
    return values


def _logs(job: Job) -> str:
    return str(job.folder.absolute() / "logs" / "%j")


def _need_submitit() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise UserError(
            "submitit is not installed, which submits jobs to SLURM: pip install 'gemma2_jax[slurm]'."
        )
