"""The private parts of submitit that this package uses."""

import shlex
import sys
from typing import Any

# The module that a SLURM job starts. submitit has no public name for it; without it, `gemma2 launch slurm --dry-run`
# could not show the command that the job runs. Submitted jobs get the command from submitit itself.
JOB_MODULE = "submitit.core._submit"


def sbatch_text(folder: str, values: dict[str, Any]) -> str:
    """The text of a job's sbatch file.

    Args:
        folder: folder of the job's logs.
        values: settings by submitit's names, without the prefix `slurm_`.
    """
    # submitit's public executors create this text only when they submit it. Without the function,
    # `gemma2 launch slurm --dry-run` could not show it; submitting does not need it.
    from submitit.slurm.slurm import _make_sbatch_string

    command = shlex.join([sys.executable, "-u", "-m", JOB_MODULE, folder])
    names = {"timeout_min": "time", "name": "job_name", "tasks_per_node": "ntasks_per_node"}
    renamed = {names.get(name, name): value for name, value in values.items()}
    return _make_sbatch_string(command=command, folder=folder, **renamed)
