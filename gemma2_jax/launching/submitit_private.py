"""What this package uses of submitit's private names."""

import shlex
import sys
from typing import Any

# The module that a SLURM job starts. submitit gives no public name for it; without it, `gemma2 launch slurm --dry-run`
# would show another command than the job runs. Jobs themselves get the command from submitit.
JOB_MODULE = "submitit.core._submit"


def sbatch_text(folder: str, values: dict[str, Any]) -> str:
    """The file that sbatch gets for a job.

    Args:
        folder: of the job's logs; values: by submitit's names, without `slurm_` before them.
    """
    # submitit's public executors make this text only while they submit it. Without the function,
    # `gemma2 launch slurm --dry-run` cannot show what SLURM would get; submitting does not need it.
    from submitit.slurm.slurm import _make_sbatch_string

    command = shlex.join([sys.executable, "-u", "-m", JOB_MODULE, folder])
    names = {"timeout_min": "time", "name": "job_name", "tasks_per_node": "ntasks_per_node"}
    renamed = {names.get(name, name): value for name, value in values.items()}
    return _make_sbatch_string(command=command, folder=folder, **renamed)
