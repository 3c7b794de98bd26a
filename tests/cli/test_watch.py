"""The command watch."""

import os
from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.files import locked
from gemma2_jax.reports import watch
from tests.reports.conftest import WriteRun, plain_config, write_run

__all__ = ["plain_config", "write_run"]


def test_a_table_is_printed_once(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("runs/done[1]")
    write_run("runs/on", steps=20)
    for folder in (tmp_path / "runs").iterdir():
        os.utime(folder / "metrics.jsonl", (1, 1))
    os.utime(tmp_path / "runs/on/metrics.jsonl")
    with locked(tmp_path / "runs/on", wait=False):
        assert main(["watch", "--once", str(tmp_path / "runs")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[0] == ["run", "state", "step", "loss", "validation", "tokens/s", "time", "left"]
    assert lines[2] == ["on", "running", "20/40", "4.0000", "4.0000", "64", "40", "s"]
    assert lines[3] == ["done[1]", "finished", "40/40", "4.0000", "4.0000", "–", "–"]


def test_the_default_folder_is_runs(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run("runs/one")
    assert main(["watch"]) == 0  # not a terminal
    assert "finished" in capsys.readouterr().out


def test_folders_without_runs_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "--once", str(tmp_path)]) == 1
    assert f"there is no run in {tmp_path}, nor in the folders below." in capsys.readouterr().err
    assert main(["watch", str(tmp_path / "missing")]) == 1
    assert "missing is not a folder; accepted: run folders" in capsys.readouterr().err


def test_ctrl_c_ends_it(
    write_run: WriteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run("runs/one")
    monkeypatch.setattr("rich.console.Console.is_terminal", True)

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch.time, "sleep", interrupt)
    assert main(["watch", str(tmp_path / "runs")]) == 130
    output = capsys.readouterr()
    assert "finished" in output.out
    assert output.err.endswith("gemma2: stopped.\n")


def test_a_long_table_is_cut(write_run: WriteRun, tmp_path: Path) -> None:
    for number in range(5):
        write_run(f"runs/{number}")
    shown = watch.table(watch.look([str(tmp_path / "runs")]), 3)
    assert shown.row_count == 4
