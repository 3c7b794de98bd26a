"""Pinning: the exact code and the whole configuration of a job, fixed when it is launched.

LAUNCH/code/          the code
      /code.tar.gz    the same as an archive
      /config.yaml    every key and value of the run, or the arguments of a sweep
      /pin.json       the commit, and whether the code differs from it
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import gemma2_jax
from gemma2_jax.config import UserError, to_yaml
from gemma2_jax.files import replacing, write_bytes, write_text
from gemma2_jax.launching.job import SweepArguments
from gemma2_jax.launching.reasons import error_line
from gemma2_jax.run import RunConfig

CODE, ARCHIVE, CONFIG, PIN = "code", "code.tar.gz", "config.yaml", "pin.json"
_CODE_FOLDERS = ("gemma2_jax", "configs", "experiments")  # the folders of the checkout that a run uses
_NAME_LENGTH = 40  # the longest name that all engines accept


@dataclass(frozen=True)
class Pin:
    """The code and configuration that a job runs.

    Attributes:
        commit: hash of the commit that was checked out.
        tree: git's hash of the exact content of the code.
        changed: whether the code differs from the commit.
        config: SHA-256 of config.yaml.
    """

    commit: str
    tree: str
    changed: bool
    config: str

    @property
    def identity(self) -> str:
        """Short hash that differs for any other code or configuration."""
        return hashlib.sha256(f"{self.tree} {self.config}".encode()).hexdigest()[:8]


def find_checkout() -> Path:
    """Returns the git checkout that this package runs from.

    Raises:
        UserError: the package does not run from a checkout, git is not installed, or git rejects the checkout.
    """
    folder = Path(gemma2_jax.__file__).resolve().parent.parent
    if shutil.which("git") is None:
        raise UserError(
            "git, which pins the code of a job, is not installed; install it with `apt install git`."
        )
    if not (folder / ".git").exists():
        raise UserError(
            f"gemma2_jax runs from {folder}, which is not a git checkout, so its code cannot be pinned; launch from a "
            "checkout in which you ran `pip install -e .`."
        )
    # If git rejects the checkout, this command names the reason; `git diff` would print its usage text instead.
    _git(folder, "rev-parse", "--git-dir")
    return folder


def refusal(checkout: Path, launches: Path) -> str | None:
    """Returns why the code in `checkout` can be pinned only with --allow-changes; None if it is all committed.

    Args:
        launches: folder of pinned jobs, which are not part of the code.
    """
    changed = [*_changed(checkout), *_new_code(checkout, launches)]
    if not changed:
        return None
    return (
        f"{checkout} has uncommitted changes ({changed[0]}{', …' if changed[1:] else ''}); commit them, or pass "
        "--allow-changes to launch the files with these changes."
    )


def pin(config: RunConfig | SweepArguments, checkout: Path, launches: Path, dry_run: bool = False) -> Pin:
    """Pins the code in `checkout`, uncommitted changes included, and the configuration.

    Args:
        launches: folder of pinned jobs, which are not part of the code.
        dry_run: whether to write no objects to the repository.
    """
    new = _new_code(checkout, launches)
    changed = bool(new or _changed(checkout))
    commit = _git(checkout, "rev-parse", "HEAD").strip()
    committed = _git(checkout, "rev-parse", "HEAD^{tree}").strip()
    tree = _tree_of_files(checkout, new, dry_run) if changed else committed
    text = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    return Pin(commit, tree, changed, text)


def write_pinned(folder: Path, pinned: Pin, config: RunConfig | SweepArguments, checkout: Path) -> None:
    """Writes code and configuration into `folder`. Existing files from an earlier launch have the same content."""
    archive = _git_bytes(checkout, "archive", "--format=tar.gz", f"--prefix={CODE}/", pinned.tree)
    write_bytes(folder / ARCHIVE, archive)
    if not (folder / CODE).exists():
        with replacing(folder / CODE) as temporary, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(temporary.parent / f"{temporary.name}.d", filter="data")
            os.replace(temporary.parent / f"{temporary.name}.d" / CODE, temporary)
            (temporary.parent / f"{temporary.name}.d").rmdir()
    write_text(folder / CONFIG, to_yaml(config))
    write_text(folder / PIN, json.dumps(asdict(pinned), indent=1) + "\n")


def job_name(name: str, pinned: Pin) -> str:
    """Returns a run's name in the characters that engines accept (a-z, 0-9, -), followed by the pin's identity."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}".strip("-")
    return f"{plain[: _NAME_LENGTH - 9].rstrip('-')}-{pinned.identity}"


def _changed(checkout: Path) -> list[str]:
    """Returns the tracked files that differ from the last commit."""
    return _names(_git(checkout, "diff", "--name-only", "-z", "HEAD"))


def _new_code(checkout: Path, launches: Path) -> list[str]:
    """Returns the untracked files in the code folders. Untracked files elsewhere, such as data, are not pinned."""
    found = _names(_git(checkout, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE_FOLDERS))
    return [name for name in found if not _is_pinned(checkout / name, launches.resolve())]


def _is_pinned(path: Path, launches: Path) -> bool:
    """Whether the file belongs to a job that was pinned earlier."""
    return path.is_relative_to(launches) and (launches / path.relative_to(launches).parts[0] / PIN).exists()


def _names(listed: str) -> list[str]:
    return [name for name in listed.split("\0") if name]


def _tree_of_files(checkout: Path, new: Sequence[str], dry_run: bool) -> str:
    """Returns git's tree hash of the tracked files in the working tree and the new ones, without changing the index."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        # copy2 keeps the index's time, by which git notices files that changed in the same instant.
        shutil.copy2(_git_path(checkout, "index"), index)
        variables = {"GIT_INDEX_FILE": str(index), "GIT_LITERAL_PATHSPECS": "1"}
        if dry_run:
            (Path(folder) / "objects").mkdir()
            variables["GIT_OBJECT_DIRECTORY"] = str(Path(folder) / "objects")
            variables["GIT_ALTERNATE_OBJECT_DIRECTORIES"] = str(_git_path(checkout, "objects"))
        _git(checkout, "add", "--update", **variables)
        if new:
            _git(checkout, "add", "--", *new, **variables)
        return _git(checkout, "write-tree", **variables).strip()


def _git_path(checkout: Path, name: str) -> Path:
    return checkout / _git(checkout, "rev-parse", "--git-path", name).rstrip("\n")


def _git(checkout: Path, *arguments: str, **variables: str) -> str:
    return _git_bytes(checkout, *arguments, **variables).decode()


def _git_bytes(checkout: Path, *arguments: str, **variables: str) -> bytes:
    done = subprocess.run(
        ["git", "-C", str(checkout), *arguments],
        capture_output=True,
        env={**os.environ, "LC_ALL": "C", **variables},  # messages in English
        check=False,
    )
    if done.returncode:
        output = done.stderr.decode(errors="replace")
        reason = error_line(output) or f"exit code {done.returncode}"
        allow = next((line.strip() for line in output.splitlines() if "safe.directory" in line), None)
        remedy = "" if allow is None else f"; if you trust it: {allow}"
        raise UserError(f"git {arguments[0]} failed in {checkout}: {reason}{remedy}.")
    return done.stdout
