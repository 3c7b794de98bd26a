"""Why another program failed: the line of its output that says so."""

import re

# What git, gcloud, xpk, sbatch and Python put in front of the line that counts.
_MARK = re.compile(
    r"(fatal|\w*: ?fatal|\w*: ?error|error|ERROR|\[XPK\] ?Error|\w+(Error|Exception))\b[:)]? ?.*"
)


def meaningful_line(said: str) -> str:
    """Returns the first line that is marked as an error, without the usage text or advice around it; else all lines.

    On one line, and without a full stop.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    marked = next((line for line in lines if _MARK.match(line)), None)
    return (" ".join(lines) if marked is None else marked).rstrip(".")
