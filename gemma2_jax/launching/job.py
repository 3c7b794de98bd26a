"""What all engines have in common: a job, the script that each of its hosts runs, and the commands that submit it."""

import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text

SCRIPT = "job.sh"


@dataclass(frozen=True)
class Job:
    """A pinned run.

    Attributes:
        name: unique among other code and configurations.
        folder: where it is pinned on this machine.
    """

    name: str
    folder: Path


@dataclass(frozen=True)
class Submission:
    """What is done to submit a job.

    Attributes:
        files: that are written first, by path.
        commands: that are then run, in order.
    """

    commands: Sequence[Sequence[str]]
    files: Mapping[Path, str] = field(default_factory=dict)

    def told(self) -> str:
        """All of it, for a person to read."""
        parts = [f"# {path}\n{text}" for path, text in self.files.items()]
        return "\n".join([*parts, *(shlex.join(command) for command in self.commands)])

    def carry_out(self) -> None:
        """Writes the files and runs the commands.

        Raises:
            UserError: one of them fails.
        """
        for path, text in self.files.items():
            write_text(path, text)
        for command in self.commands:
            code = subprocess.run(command, check=False).returncode
            if code:
                raise UserError(
                    f"`{shlex.join(command)}` failed with exit code {code}; its own words are above."
                )


def training_script(
    code: str,
    config: str,
    folder: str,
    prepare: Sequence[str] = (),
    hosts: Sequence[str] = (),
    python: str = "python3",
) -> str:
    """The bash script that each host runs.

    Args:
        code: folder of the pinned code there; config: the pinned config.yaml.
        folder: that all hosts see, in which relative paths of the configuration begin.
        prepare: lines before.
        hosts: keys that tell a process its place, as bash reads them.
        python: that has what the code requires.
    """
    train = [
        shlex.quote(python),
        "-m",
        "gemma2_jax.cli.main",
        "train",
        "--config",
        shlex.quote(config),
        *hosts,
    ]
    lines = [
        "#!/bin/bash",
        "set -euo pipefail",
        *prepare,
        f"mkdir -p {shlex.quote(folder)}",
        f"cd {shlex.quote(folder)}",
        f"export PYTHONPATH={shlex.quote(code)}",
        "exec " + " ".join(train),
    ]
    return "\n".join(lines) + "\n"


def need_tool(tool: str, purpose: str, install: str) -> None:
    """Raises UserError if a program is not on this machine."""
    if shutil.which(tool) is None:
        raise UserError(f"{tool} is not installed, which {purpose}; {install}, or look first with --dry-run.")
