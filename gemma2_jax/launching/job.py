"""What all engines have in common: a job, the script that each of its hosts runs, and the commands that submit it."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from gemma2_jax.config import UserError
from gemma2_jax.files import write_text
from gemma2_jax.run import RunConfig

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
            try:
                code = subprocess.run(command, check=False).returncode
            except OSError as error:
                raise UserError(f"{command[0]} cannot be run: {error.strerror}.") from None
            if code:
                raise UserError(f"`{shlex.join(command)}` failed with exit code {code}; its output is above.")


def training_lines(
    code: str,
    config: str,
    folder: str,
    hosts: Sequence[str] = (),
    python: str = "python3",
) -> list[str]:
    """The lines of bash that train on each host, under `set -euo pipefail`.

    Args:
        code: folder of the pinned code there; config: the pinned config.yaml.
        folder: that all hosts see, in which relative paths of the configuration begin.
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
    return [
        f"mkdir -p {shlex.quote(folder)}",
        f"cd {shlex.quote(folder)}",
        import_from(code),
        "exec " + " ".join(train),
    ]


def import_from(code: str) -> str:
    """The line of bash by which Python finds a package in the folder `code` before anywhere else.

    By itself, Python looks into the working directory first, which may be a checkout that has changed since.
    """
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}"


def script_of(lines: Sequence[str]) -> str:
    """A bash script that ends at the first line that fails."""
    return "\n".join(["#!/bin/bash", "set -euo pipefail", *lines]) + "\n"


def check_config(config: RunConfig, slices: int = 1) -> None:
    """Raises UserError for a configuration that would fail on the hosts, which cost money by then.

    Args:
        slices: of TPUs, whose network `mesh.replica` alone may span.
    """
    usual = type(config.hosts)()
    for item in fields(usual):
        value = getattr(config.hosts, item.name)
        if item.name != "timeout" and value != getattr(usual, item.name):
            raise UserError(
                f"hosts.{item.name} is {value}, but a launched run's processes find one another through the engine; "
                "leave out all keys of hosts but hosts.timeout."
            )
    replica = config.mesh.replica
    if replica != -1 and replica % slices:
        raise UserError(
            f"mesh.replica is {replica} and --slices {slices}; mesh.replica must be a multiple of the slices, since "
            f"only gradients should cross the network between them: set mesh.replica={slices}."
        )


def check_launch_folder(folder: Path) -> None:
    """Raises UserError if nothing can be written into `folder`, which need not be there yet."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"--folder is {folder}, and {there} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise UserError(f"--folder is {folder}, and {there} cannot be written to; name another folder.")


def need_tool(tool: str, purpose: str, install: str) -> None:
    """Raises UserError if a program is not on this machine."""
    if shutil.which(tool) is None:
        raise UserError(
            f"{tool}, which {purpose}, is not installed; {install}, or use --dry-run, which works without it."
        )
