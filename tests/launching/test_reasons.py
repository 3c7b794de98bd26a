"""The line of a program's output that names the error."""

import pytest

from gemma2_jax.launching.reasons import error_line

GIT = """\
fatal: detected dubious ownership in repository at '/x'
To add an exception for this directory, call:

\tgit config --global --add safe.directory /x
"""
USAGE = """\
error: Could not access 'HEAD'
usage: git diff --no-index [<options>] <path> <path>

    -p, --patch           generate patch
"""
GCLOUD = """\
Create request issued for: [toy]
ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: no access.
To search the help text of gcloud commands, run: gcloud help
"""
PYTHON = """\
Traceback (most recent call last):
  File "x.py", line 1, in <module>
ValueError: no such cluster
"""


@pytest.mark.parametrize(
    ("output", "line"),
    [
        (GIT, "fatal: detected dubious ownership in repository at '/x'"),
        (USAGE, "error: Could not access 'HEAD'"),
        (GCLOUD, "ERROR: (gcloud.compute.tpus.queued-resources.create) PERMISSION_DENIED: no access"),
        ("sbatch: warning: x\nsbatch: error: invalid partition\n", "sbatch: error: invalid partition"),
        (PYTHON, "ValueError: no such cluster"),
        ("one\n\nthe last.\n\n", "one the last"),
        ("", ""),
    ],
)
def test_the_error_line(output: str, line: str) -> None:
    assert error_line(output) == line
