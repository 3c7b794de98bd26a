"""Jobs for SLURM, through submitit: one process per node, with all of the node's devices.

submitit queues the job again before its time limit or when it is preempted; the run then resumes from its newest
checkpoint. As is usual with SLURM, the job inherits the environment that it is submitted from.
"""

import importlib.util
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.launching.job import SCRIPT, Job, bash_script, import_from, require_tool, training_lines
from gemma2_jax.launching.pin import CODE, CONFIG
from gemma2_jax.launching.reasons import error_line
from gemma2_jax.launching.settings import SlurmSettings
from gemma2_jax.launching.submitit_private import sbatch_text

if TYPE_CHECKING:
    import submitit.helpers


class Training:
    """Callable that submitit runs on each node: runs the script, and is queued again when the job is stopped."""

    def __init__(self, script: str) -> None:
        self.script = script

    def __call__(self) -> None:
        # Block signals until `process` is set: a signal before that would leave the training running.
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
        except BaseException:  # submitit stops this process only
            process.terminate()
            process.wait()
            raise
        if code:
            raise RuntimeError(f"{self.script} ended with exit code {code}")

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Returns the job to queue when this one is about to be stopped; submitit calls it."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def check_tools(settings: SlurmSettings) -> None:
    _need_submitit()
    if not settings.local:
        for tool in ("sbatch", "srun"):
            require_tool(tool, "submits jobs", "launch from a login node of the cluster, try it with --local")


def script(settings: SlurmSettings, job: Job) -> str:
    """Returns the script that each node runs."""
    folder = job.folder.absolute()
    train = training_lines(
        str(folder / CODE), str(folder / CONFIG), settings.workdir, python=sys.executable, sweep=job.sweep
    )
    # SLURM sends the signal meant for submitit to all processes; without this trap, it would end the training at once.
    return bash_script(["trap '' USR2", *train])


def preview(settings: SlurmSettings, job: Job) -> str:
    """Returns the node's script and the file that submitit passes to sbatch, for --dry-run."""
    _need_submitit()
    values = {name.removeprefix("slurm_"): value for name, value in _parameters(settings, job).items()}
    if settings.workers > 1:
        values["map_count"] = settings.workers
    parts = [f"# {job.folder / SCRIPT}\n{script(settings, job)}"]
    return "\n".join(parts if settings.local else [*parts, sbatch_text(_logs(job), values)])


def submit(settings: SlurmSettings, job: Job) -> str:
    """Writes the script, submits the jobs, and returns a sentence about the result; waits for local jobs to end.

    Raises:
        UserError: SLURM rejects the job, or a local job fails.
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
        with executor.batch() if settings.workers > 1 else nullcontext():  # a batch becomes an array
            jobs = [executor.submit(Training(str(path))) for _ in range(settings.workers)]
        submitted = jobs[0]
        where = f"its output is in {submitted.paths.folder}"
    except (FailedSubmissionError, UncompletedJobError, OSError) as error:
        raise UserError(f"SLURM rejected the job: {error_line(str(error))}.") from None
    if not settings.local:
        number = submitted.job_id if settings.workers == 1 else submitted.job_id.split("_")[0]
        many = "" if settings.workers == 1 else f", an array of {settings.workers}"
        return f"{job.name} was submitted as job {number}{many}; {where}."
    try:
        for submitted in jobs:
            submitted.result()
    except UncompletedJobError:  # or its subclass FailedJobError
        where = f"its output is in {submitted.paths.folder}"
        raise UserError(f"{job.name} failed{_reason(submitted)}; {where}.") from None
    except BaseException:  # the jobs would keep running
        for each in jobs:
            each.cancel()
        for each in jobs:
            each.wait()
        raise
    return f"{job.name} is done; {where}."


def _reason(submitted: Any) -> str:
    """Returns the last `gemma2: …` message in the job's output, if there is one."""
    lines = (submitted.stderr() or "").splitlines()
    sentences = [line.removeprefix("gemma2: ") for line in lines if line.startswith("gemma2: ")]
    return f": {sentences[-1].rstrip('.')}" if sentences else ""


def _parameters(settings: SlurmSettings, job: Job) -> dict[str, Any]:
    """Returns the job's parameters under submitit's names."""
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
    # submitit's process that starts the script imports the pinned code, too.
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
