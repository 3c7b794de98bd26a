"""Which files of two processes are taken for the same."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from gemma2_jax.config import UserError
from gemma2_jax.files import LOCK
from gemma2_jax.processes import hosts, sharing
from gemma2_jax.processes.sharing import check_same_files, check_shared

Beside = Callable[[Path], None]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose content is read."""
    found: list[Path] = []
    sha256 = sharing._sha256

    def noted(path: Path) -> str:
        found.append(path)
        return sha256(path)

    monkeypatch.setattr(sharing, "_sha256", noted)
    return found


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Beside:
    """Makes this process 1 beside a process 0 that reads another file."""

    def beside(path: Path) -> None:
        def from_first(value: dict[str, Any]) -> dict[str, Any]:
            if "teacher" in value:
                return {"teacher": sharing._of_disk([path])}
            return {key: sharing._of_content([path]) for key in value}

        for module in (hosts, sharing):
            monkeypatch.setattr(module, "from_first", from_first)
        monkeypatch.setattr(sharing, "from_all", lambda value: [[], value])
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)

    return beside


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(bytes(1000))
    return path


def test_one_file_is_not_read(weights: Path, beside: Beside, read: list[Path]) -> None:
    beside(weights)
    check_same_files({"teacher": [weights]})
    assert read == []


def test_a_copy_is_the_same(weights: Path, tmp_path: Path, beside: Beside, read: list[Path]) -> None:
    beside(weights)
    (tmp_path / "copies").mkdir()
    copy = Path(shutil.copy(weights, tmp_path / "copies"))
    check_same_files({"teacher": [copy]})
    assert copy in read


def test_another_file_of_the_same_size_and_time(weights: Path, tmp_path: Path, beside: Beside) -> None:
    beside(weights)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "weights"
    other.write_bytes(bytes(999) + b"1")
    os.utime(other, ns=(weights.stat().st_atime_ns, weights.stat().st_mtime_ns))
    with pytest.raises(UserError, match=r"^the content of teacher is \w+ in process 0 and \w+ in process 1;"):
        check_same_files({"teacher": [other]})


@pytest.mark.parametrize("mark", ["other", None])
def test_a_folder_that_is_not_that_of_process_0(
    mark: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(sharing, "from_first", lambda value: "mark")
    monkeypatch.setattr(sharing, "wait_for_all", lambda name: None)
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    (Path("run") / LOCK).write_text("mark")
    check_shared([("output", "run")])
    if mark is None:
        (Path("run") / LOCK).unlink()
    else:
        (Path("run") / LOCK).write_text(mark)
    with pytest.raises(UserError) as error:
        check_shared([("output", "run")])
    assert str(error.value) == (
        f"output is run, but process 1 finds a different folder there ({tmp_path}/run) than process 0; it must be on a "
        "disk that all processes share."
    )
