"""The files that a glob matches, and messages about the others."""

import errno
import glob
import os
from pathlib import Path
from typing import Any

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.data.globs import match_files


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.txt", "b.md", ".hidden.txt", "x/c.txt", "x/y/d.txt", "x/.git/e.txt", "z [1]/f[2].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


PATTERNS = [
    "*.txt", "**", "**/*.txt", "x/**", "**/*", "*/*.txt", "./x/*", "[ab].*", "?.md", ".*.txt", "x/**/d.txt",
    "../*/a.txt", "**/y/*", "x//c.txt",
]  # fmt: skip


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_mean_what_they_do_to_python(tree: Path, pattern: str, absolute: bool):
    if absolute:
        pattern = f"{tree}/{pattern}"
    expected = {Path(name) for name in glob.glob(pattern, recursive=True) if Path(name).is_file()}
    assert match_files([pattern]) == (sorted(expected), [])
    assert expected


@pytest.mark.parametrize("pattern", ["z [1]/f[2].txt", "z [1]/*.txt", "**/f[2].txt"])
def test_a_name_that_is_there_as_written_is_no_pattern(tree: Path, pattern: str):
    assert match_files([pattern]) == ([Path("z [1]/f[2].txt")], [])


def test_links_that_lead_nowhere_are_matches(tree: Path):
    (tree / "lost.txt").symlink_to(".git/annex/objects/key")
    (tree / "circle.txt").symlink_to("circle.txt")
    (tree / "found.txt").symlink_to("a.txt")
    files, others = match_files(["*.txt"])
    assert files == [Path("a.txt"), Path("found.txt")]
    assert [other.place for other in others] == ["circle.txt", "lost.txt"]
    assert {other.problem for other in others} == {"a broken link"}
    assert str(others[1]).endswith(
        "(it links to .git/annex/objects/key); fetch or restore that file, or remove the link"
    )
    with pytest.raises(UserError, match=r"^lost\.txt: a broken link"):
        match_files(["lost.txt"])


def test_a_link_upwards_is_not_walked_in_circles(tree: Path):
    (tree / "x" / "up").symlink_to("..")
    assert match_files(["**/a.txt"]) == ([Path("a.txt")], [])


def test_folders_and_pipes_named_like_files_are_matches(tree: Path):
    (tree / "out.parquet").mkdir()
    os.mkfifo(tree / "pipe.txt")
    files, others = match_files(["*"])
    assert files == [Path("a.txt"), Path("b.md")]
    assert [str(other) for other in others] == [
        "out.parquet: a folder named like a file; write out.parquet/*.parquet for its files",
        "pipe.txt: neither a file nor a folder; remove it from data.source",
    ]


@pytest.mark.parametrize("pattern", ["**/*.txt", "x/*.txt"])
def test_an_unreadable_folder_is_reported(tree: Path, pattern: str, monkeypatch: pytest.MonkeyPatch):
    real = os.scandir

    def scandir(path: str) -> Any:
        if Path(path).name == "x":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"^x cannot be read: Permission denied\.$"):
        match_files([pattern])


@pytest.mark.parametrize("pattern", ["none.txt", "none/*.txt", "a.txt/*", "x" * 5000, "none/**/*.txt"])
def test_a_pattern_without_matches_is_reported(tree: Path, pattern: str):
    with pytest.raises(UserError, match="matches no file; accepted: python-docs, or globs"):
        match_files(["a.txt", pattern])
