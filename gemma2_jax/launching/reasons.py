"""Error messages of other programs, extracted from their output."""

import re

# How git, gcloud, xpk, sbatch and Python mark the line of an error.
_MARK = re.compile(
    r"(fatal|\w*: ?fatal|\w*: ?error|error|ERROR|\[XPK\] ?Error|\w+(Error|Exception))\b[:)]? ?.*"
)


def error_line(output: str) -> str:
    """Returns the first line that is marked as an error; without such a line, all lines joined into one.

    The result does not end in a full stop.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    marked = next((line for line in lines if _MARK.match(line)), None)
    return (" ".join(lines) if marked is None else marked).rstrip(".")
