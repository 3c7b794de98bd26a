"""SLURM, through submitit: one process a node, which has all of its devices.

submitit asks for the job to be queued again before its time is over, or when it is preempted; the run then goes on
from its newest checkpoint. The job has the environment that it is submitted from, as SLURM's own jobs do.
"""

import importlib.util
import signal
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.launching.job import SCRIPT, Job, import_from, need_tool, script_of, training_lines
from gemma2_jax.launching.pin import CODE, CONFIG
from gemma2_jax.launching.reasons import meaningful_line
from gemma2_jax.launching.settings import SlurmSettings
from gemma2_jax.launching.submitit_private import sbatch_text

if TYPE_CHECKING:
    import submitit.helpers


class Training:
    """What submitit runs on each node: the script, again after it was stopped."""

    def __init__(self, script: str) -> None:
        self.script = script

    def __call__(self) -> None:
        # No signal before it is known whom to stop: the training would go on alone.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        release = partial(signal.pthread_sigmask, signal.SIG_SETMASK, held)
        try:
            process = subprocess.Popen(["bash", self.script], preexec_fn=release)
        except BaseException:
            release()
            raise
        try:
            release()
            code = process.wait()
        except BaseException:  # submitit stops this process alone
            process.terminate()
            process.wait()
            raise
        if code:
            raise RuntimeError(f"{self.script} ended with exit code {code}")

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """submitit's hook: what to queue when the job is about to be stopped."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_tools(settings: SlurmSettings) -> None:
    _need_submitit()
    if not settings.local:
        for tool in ("sbatch", "srun"):
            need_tool(tool, "submits jobs", "launch from a login node of the cluster, try it with --local")


def script(settings: SlurmSettings, job: Job) -> str:
    """The script of each node."""
    folder = job.folder.absolute()
    train = training_lines(str(folder / CODE), str(folder / CONFIG), settings.workdir, python=sys.executable)
    # SLURM's signal before the end is for submitit, and goes to all processes; it would end the training at once.
    return script_of(["trap '' USR2", *train])


def told(settings: SlurmSettings, job: Job) -> str:
    """The node's script, and the file that sbatch gets from submitit, for a person to read."""
    _need_submitit()
    values = {name.removeprefix("slurm_"): value for name, value in _parameters(settings, job).items()}
    parts = [f"# {job.folder / SCRIPT}\n{script(settings, job)}"]
    return "\n".join(parts if settings.local else [*parts, sbatch_text(_logs(job), values)])


def submit(settings: SlurmSettings, job: Job) -> str:
    """Writes the script and submits the job; a local one is waited for. Returns what came of it, in a sentence.

    Raises:
        UserError: SLURM refuses it, or a local job fails.
    """
    import submitit
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

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
    except (FailedSubmissionError, UncompletedJobError, OSError) as error:
        raise UserError(f"SLURM refuses the job: {meaningful_line(str(error))}.") from None
    words = f"its output goes to {submitted.paths.folder}"
    if not settings.local:
        return f"{job.name} is job {submitted.job_id}; {words}."
    try:
        submitted.result()
    except UncompletedJobError:  # or the one that it failed, which is one of these
        raise UserError(f"{job.name} failed{_reason(submitted)}; {words}.") from None
    except BaseException:  # it would go on by itself
        submitted.cancel()
        submitted.wait()
        raise
    return f"{job.name} is done; {words}."


def _reason(submitted: Any) -> str:
    """The last sentence of the job's about itself, if it had one."""
    said = (submitted.stderr() or "").splitlines()
    sentences = [line.removeprefix("gemma2: ") for line in said if line.startswith("gemma2: ")]
    return f": {sentences[-1].rstrip('.')}" if sentences else ""


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
    # The process of submitit's that starts the script is of the pinned code, too.
    values["slurm_setup"] = [import_from(str(job.folder.absolute() / CODE))]
    for name in ("partition", "account", "qos", "constraint"):
        if getattr(settings, name) is not None:
            values[f"slurm_{name}"] = getattr(settings, name)
    return values


def _logs(job: Job) -> str:
    return str(job.folder.absolute() / "logs" / "%j")


def _need_submitit() -> None:
    if importlib.util.find_spec("submitit") is None:
        raise UserError(
            "submitit, which submits jobs to SLURM, is not installed: pip install -e '.[slurm]' in the checkout."
        )
