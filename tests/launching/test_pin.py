"""A job runs the code and the configuration at the time of its launch."""

import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2_jax.config import UserError, load_config
from gemma2_jax.launching.pin import find_checkout, job_name, pin, refusal, write_pinned
from gemma2_jax.run import RunConfig


def git(checkout: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(checkout), *identity, *arguments], capture_output=True, check=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "-q")
    (folder / ".gitignore").write_text("runs/\n")
    (folder / "code.py").write_text("one")
    (folder / "removed.py").write_text("one")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "one")
    return folder


def test_what_is_committed(checkout: Path, toy_run: RunConfig, tmp_path: Path) -> None:
    assert refusal(checkout, tmp_path) is None
    pinned = pin(toy_run, checkout, tmp_path)
    assert (pinned.commit, pinned.changed) == (git(checkout, "rev-parse", "HEAD"), False)
    assert pinned.tree == git(checkout, "rev-parse", "HEAD^{tree}")
    (checkout / "code.py").write_text("two")  # after the launch
    folder = tmp_path / "job"
    for _ in range(2):  # launched again, it is the same
        write_pinned(folder, pinned, toy_run, checkout)
    assert (folder / "code" / "code.py").read_text() == "one"
    with tarfile.open(folder / "code.tar.gz") as tar:
        assert set(tar.getnames()) == {"code", "code/.gitignore", "code/code.py", "code/removed.py"}
    assert load_config(RunConfig, folder / "config.yaml") == toy_run
    assert {path.name for path in folder.iterdir()} == {"code", "code.tar.gz", "config.yaml", "pin.json"}


def test_uncommitted_changes_are_refused_or_pinned(
    checkout: Path, toy_run: RunConfig, tmp_path: Path
) -> None:
    (checkout / "code.py").write_text("two")
    (checkout / "removed.py").unlink()
    (checkout / "staged.py").write_text("staged")
    git(checkout, "add", "staged.py")
    (checkout / "configs").mkdir()
    (checkout / "configs" / "new [1].yaml").write_text("new")
    (checkout / "runs").mkdir()
    (checkout / "runs" / "weights").write_text("ignored")
    refused = refusal(checkout, tmp_path / "launches")
    assert refused is not None
    assert "has uncommitted changes (code.py, …); commit them" in refused
    before = git(checkout, "status", "--porcelain")
    pinned = pin(toy_run, checkout, tmp_path / "launches")
    assert pinned.changed
    write_pinned(tmp_path / "job", pinned, toy_run, checkout)
    code = tmp_path / "job" / "code"
    assert {path.name: path.read_text() for path in code.rglob("*") if path.is_file()} == {
        ".gitignore": "runs/\n",
        "code.py": "two",
        "staged.py": "staged",
        "new [1].yaml": "new",
    }
    assert git(checkout, "status", "--porcelain") == before


def test_files_outside_the_code_folders_are_not_pinned(
    checkout: Path, toy_run: RunConfig, tmp_path: Path
) -> None:
    """Neither data next to the code nor pinned jobs, in whatever folder, are part of the code."""
    (checkout / "weights.bin").write_text("large")
    launches = checkout / "experiments" / "jobs"
    write_pinned(launches / "toy", pin(toy_run, checkout, launches), toy_run, checkout)
    assert refusal(checkout, launches) is None
    assert pin(toy_run, checkout, launches).tree == git(checkout, "rev-parse", "HEAD^{tree}")
    (checkout / "code.py").write_text("two")
    (launches.parent / "mine.yaml").write_text("new")
    pinned = pin(toy_run, checkout, launches)
    write_pinned(tmp_path / "job", pinned, toy_run, checkout)
    code = tmp_path / "job" / "code"
    assert {path.name for path in code.rglob("*") if path.is_file()} == {
        ".gitignore",
        "code.py",
        "mine.yaml",
        "removed.py",
    }


def test_a_dry_run_leaves_nothing_in_the_repository(
    checkout: Path, toy_run: RunConfig, tmp_path: Path
) -> None:
    (checkout / "code.py").write_text("two")
    (checkout / "configs").mkdir()
    (checkout / "configs" / "new.yaml").write_text("new")
    before = sorted((checkout / ".git" / "objects").rglob("*"))
    dry = pin(toy_run, checkout, tmp_path, dry_run=True)
    assert sorted((checkout / ".git" / "objects").rglob("*")) == before
    assert pin(toy_run, checkout, tmp_path) == dry


def test_other_code_or_configuration_has_another_name(
    checkout: Path, toy_run: RunConfig, tmp_path: Path
) -> None:
    first = pin(toy_run, checkout, tmp_path)
    other = pin(replace(toy_run, seed=1), checkout, tmp_path)
    (checkout / "code.py").write_text("two")
    changed = pin(toy_run, checkout, tmp_path)
    assert len({first.identity, other.identity, changed.identity}) == 3
    assert job_name("Toy run, 2B!", first) == f"toy-run-2b-{first.identity}"
    assert job_name("27b", first) == f"run-27b-{first.identity}"
    assert len(job_name("x" * 80, first)) == 40


def test_a_package_outside_a_checkout_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gemma2_jax.__file__", str(tmp_path / "gemma2_jax" / "__init__.py"))
    with pytest.raises(UserError, match="which is not a git checkout, so its code cannot be pinned"):
        find_checkout()


def test_a_checkout_that_git_does_not_trust_is_reported_in_gits_words(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`git diff` would print its usage text there, since it does not consider the folder a repository."""
    monkeypatch.setattr("gemma2_jax.__file__", str(checkout / "gemma2_jax" / "__init__.py"))
    assert find_checkout() == checkout
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    with pytest.raises(UserError) as caught:
        find_checkout()
    assert str(caught.value) == (
        f"git rev-parse failed in {checkout}: fatal: detected dubious ownership in repository at '{checkout}'; if you "
        f"trust it: git config --global --add safe.directory {checkout}."
    )


def test_a_broken_checkout_is_reported_in_gits_words(
    checkout: Path, toy_run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (checkout / ".git" / "HEAD").write_text("nonsense")
    monkeypatch.setattr("gemma2_jax.__file__", str(checkout / "gemma2_jax" / "__init__.py"))
    with pytest.raises(UserError, match=r"^git rev-parse failed in [^\n]*: fatal: [^\n]*\.$"):
        find_checkout()
