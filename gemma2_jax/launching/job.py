"""Shared parts of all engines: a job, the script that each of its hosts runs, and the commands that submit it."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from gemma2_jax.config import UserError, check_place
from gemma2_jax.files import write_text
from gemma2_jax.messages import written
from gemma2_jax.run import RunConfig

SCRIPT = "job.sh"


@dataclass(frozen=True)
class SweepArguments:
    """What a launched sweep is pinned by, beside the code: the arguments of `gemma2 sweep`."""

    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Job:
    """A pinned run, or a pinned sweep.

    Attributes:
        name: name of the job, different for any other code or configuration.
        folder: folder of the pinned code and configuration on this machine.
        sweep: arguments of `gemma2 sweep`, of which the job is a worker; None for a single run.
    """

    name: str
    folder: Path
    sweep: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Submission:
    """The steps that submit a job.

    Attributes:
        commands: commands to run, in order, after the files are written.
        files: text of the files to write first, by path.
    """

    commands: Sequence[Sequence[str]]
    files: Mapping[Path, str] = field(default_factory=dict)

    def preview(self) -> str:
        """Returns all files and commands as text, for --dry-run."""
        parts = [f"# {path}\n{text}" for path, text in self.files.items()]
        return "\n".join([*parts, *(shlex.join(command) for command in self.commands)])

    def execute(self) -> None:
        """Writes the files and runs the commands.

        Raises:
            UserError: a command fails.
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
    sweep: Sequence[str] | None = None,
) -> list[str]:
    """Returns the lines of bash that train on each host, under `set -euo pipefail`.

    Args:
        code: folder of the pinned code on the host.
        config: path of the pinned config.yaml on the host.
        folder: folder that all hosts see; the configuration's relative paths start there.
        hosts: `hosts.*` overrides for this process, in bash syntax.
        python: Python interpreter that has the code's requirements installed.
        sweep: arguments of `gemma2 sweep`, instead of the training of `config`.
    """
    verb = (
        ["train", "--config", shlex.quote(config)] if sweep is None else ["sweep", *map(shlex.quote, sweep)]
    )
    train = [shlex.quote(python), "-m", "gemma2_jax.cli.main", *verb, *hosts]
    return [
        f"mkdir -p {shlex.quote(folder)}",
        f"cd {shlex.quote(folder)}",
        import_from(code),
        "exec " + " ".join(train),
    ]


def import_from(code: str) -> str:
    """Returns the line of bash that makes Python import packages from the folder `code` first.

    By default, Python looks in the working directory first, which may be a checkout that has changed since the launch.
    """
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(code)}${{PYTHONPATH:+:$PYTHONPATH}}"


def bash_script(lines: Sequence[str]) -> str:
    """Returns a bash script that stops at the first line that fails."""
    return "\n".join(["#!/bin/bash", "set -euo pipefail", *lines]) + "\n"


def check_config(config: RunConfig, slices: int = 1) -> None:
    """Raises UserError for a configuration that would fail on the hosts, where failures cost money.

    Args:
        slices: number of TPU slices; only mesh.replica may span the network between them.
    """
    usual = type(config.hosts)()
    for item in fields(usual):
        value = getattr(config.hosts, item.name)
        if item.name != "timeout" and value != getattr(usual, item.name):
            raise UserError(
                f"hosts.{item.name} is {written(value)}, but the processes of a launched run find each other through "
                "the engine; remove all keys of hosts except hosts.timeout."
            )
    replica = config.mesh.replica
    if replica != -1 and replica % slices:
        raise UserError(
            f"mesh.replica is {replica} and --slices is {slices}; mesh.replica must be a multiple of --slices, since "
            f"only gradients should cross the network between slices: set mesh.replica={slices}."
        )


def check_launch_folder(folder: Path) -> None:
    """Raises UserError if `folder`, which need not exist yet, cannot be written to."""
    check_place("--folder", folder)
    if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--folder is {folder}, which is not writable; name another folder.")


def require_tool(tool: str, purpose: str, install: str) -> None:
    """Raises UserError if a program is not installed on this machine."""
    if shutil.which(tool) is None:
        raise UserError(
            f"{tool}, which {purpose}, is not installed; {install}, or use --dry-run, which does not need it."
        )
