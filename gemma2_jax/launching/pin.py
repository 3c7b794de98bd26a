"""What a job is made of, fixed when it is launched: the exact tree of the code, and the whole configuration.

LAUNCH/code/          the tree, unpacked;  LAUNCH/code.tar.gz: as an archive
      /config.yaml    every key and value of the run
      /pin.json       the commit, and whether anything was changed since
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
from gemma2_jax.launching.reasons import meaningful_line
from gemma2_jax.run import RunConfig

CODE, ARCHIVE, CONFIG, PIN = "code", "code.tar.gz", "config.yaml", "pin.json"
_CODE_FOLDERS = ("gemma2_jax", "configs", "experiments")  # what a run reads of the checkout
_NAME_LENGTH = 40  # the longest that all engines take


@dataclass(frozen=True)
class Pin:
    """Which code and configuration a job runs.

    Attributes:
        commit: that the code was at; tree: git's name for its exact content.
        changed: whether the content is another than the commit's.
        config: SHA-256 of config.yaml.
    """

    commit: str
    tree: str
    changed: bool
    config: str

    @property
    def identity(self) -> str:
        """Short, and another one for any other code or configuration."""
        return hashlib.sha256(f"{self.tree} {self.config}".encode()).hexdigest()[:8]


def find_checkout() -> Path:
    """The git checkout that this package runs from.

    Raises:
        UserError: it runs from somewhere else, or there is no git.
    """
    folder = Path(gemma2_jax.__file__).resolve().parent.parent
    if shutil.which("git") is None:
        raise UserError("git, which pins the code of a job, is not installed: apt install git.")
    if not (folder / ".git").exists():
        raise UserError(
            f"gemma2_jax runs from {folder}, which is no git checkout, so its code cannot be pinned; launch from a "
            "checkout (pip install -e .)."
        )
    _git(
        folder, "rev-parse", "--git-dir"
    )  # what git has against the checkout is told by this, and not by a diff
    return folder


def refusal(checkout: Path, launches: Path) -> str | None:
    """Why the code in `checkout` cannot be pinned unless changes are allowed, if so.

    Args:
        launches: where pinned jobs are kept, which is no part of the code.
    """
    changed = [*_changed(checkout), *_new_code(checkout, launches)]
    if not changed:
        return None
    return (
        f"{checkout} has changes that are not committed ({changed[0]}{', …' if changed[1:] else ''}); commit them, or "
        "pass --allow-changes to launch the files as they are."
    )


def pin(config: RunConfig, checkout: Path, launches: Path, dry_run: bool = False) -> Pin:
    """Fixes the code in `checkout`, changes included, and the configuration.

    Args:
        launches: where pinned jobs are kept, which is no part of the code.
        dry_run: leave nothing in the repository.
    """
    new = _new_code(checkout, launches)
    changed = bool(new or _changed(checkout))
    commit = _git(checkout, "rev-parse", "HEAD").strip()
    committed = _git(checkout, "rev-parse", "HEAD^{tree}").strip()
    tree = _tree_of_files(checkout, new, dry_run) if changed else committed
    text = hashlib.sha256(to_yaml(config).encode()).hexdigest()
    return Pin(commit, tree, changed, text)


def write_pinned(folder: Path, pinned: Pin, config: RunConfig, checkout: Path) -> None:
    """Writes code and configuration into `folder`; what is there already is the same."""
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
    """A run's name as engines take it (a-z, 0-9, -), with the identity of what it runs."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not plain[:1].isalpha():
        plain = f"run-{plain}".strip("-")
    return f"{plain[: _NAME_LENGTH - 9].rstrip('-')}-{pinned.identity}"


def _changed(checkout: Path) -> list[str]:
    """Files that git knows and that are not as in the last commit."""
    return _names(_git(checkout, "diff", "--name-only", "-z", "HEAD"))


def _new_code(checkout: Path, launches: Path) -> list[str]:
    """Files that a run reads and git does not know; others, such as data and notes, lie around and stay there."""
    found = _names(_git(checkout, "ls-files", "--others", "--exclude-standard", "-z", "--", *_CODE_FOLDERS))
    return [name for name in found if not _is_pinned(checkout / name, launches.resolve())]


def _is_pinned(path: Path, launches: Path) -> bool:
    """Whether the file belongs to a job pinned before."""
    return path.is_relative_to(launches) and (launches / path.relative_to(launches).parts[0] / PIN).exists()


def _names(listed: str) -> list[str]:
    return [name for name in listed.split("\0") if name]


def _tree_of_files(checkout: Path, new: Sequence[str], dry_run: bool) -> str:
    """Git's name for the files that it knows, as they lie, and the new ones; neither they nor the index are touched."""
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        # With its time: a file that changed in the same instant counts as changed by that.
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
        env={**os.environ, "LC_ALL": "C", **variables},  # its messages in English
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace")
        reason = meaningful_line(said) or f"exit code {done.returncode}"
        allow = next((line.strip() for line in said.splitlines() if "safe.directory" in line), None)
        remedy = "" if allow is None else f"; if you trust it: {allow}"
        raise UserError(f"git {arguments[0]} failed in {checkout}: {reason}{remedy}.")
    return done.stdout
