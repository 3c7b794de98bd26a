"""The private names of submitit that `launching/submitit_private.py` uses."""

from pathlib import Path

import pytest

from gemma2_jax.launching.submitit_private import JOB_MODULE
from tests.private_names import private

pytest.importorskip("submitit")

NOT_SHOWN = (
    "`gemma2 launch slurm --dry-run` cannot show the file that sbatch gets; see launching/submitit_private.py"
)


def test_the_text_for_sbatch() -> None:
    names = [
        "command", "folder", "job_name", "time", "nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "setup",
        "partition", "account", "qos", "constraint",
    ]  # fmt: skip
    private("submitit", "submitit.slurm.slurm:_make_sbatch_string", NOT_SHOWN, names)


def test_the_module_that_a_job_starts(tmp_path: Path) -> None:
    private("submitit", f"{JOB_MODULE}:submitit_main", NOT_SHOWN, [])
    from submitit.local.local import (
        LocalExecutor,  # which needs no srun, and starts jobs as the one for SLURM does
    )

    command = LocalExecutor(tmp_path)._submitit_command_str
    assert f"-m {JOB_MODULE}" in command, f"submitit's jobs run {command}: {NOT_SHOWN}"
