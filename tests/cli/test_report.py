"""The command report."""

import webbrowser
from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from tests.reports.conftest import WriteRun, plain_config, study, sweep, write_run

__all__ = ["plain_config", "study", "sweep", "write_run"]


def test_two_runs_become_a_page_in_the_browser(
    write_run: WriteRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run("runs/a")
    write_run("runs/b", 3.0)
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", opened.append)
    assert main(["report", "runs/a", "runs/b", "--open"]) == 0
    assert opened == [(tmp_path / "runs/report.html").as_uri()]
    assert capsys.readouterr().out == "report of 2 runs in runs/report.html\n"
    assert "<title>a and b</title>" in (tmp_path / "runs/report.html").read_text()


def test_without_a_browser_the_page_is_named(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    assert main(["report", str(study), "--open"]) == 0
    assert f"no browser was found; open {study / 'report.html'} in one." in capsys.readouterr().err


def test_csv_and_markdown_are_written_too(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv, markdown = tmp_path / "out/runs.csv", tmp_path / "out/report.md"
    page = tmp_path / "page.html"
    assert (
        main(["report", str(study), "--output", str(page), "--csv", str(csv), "--markdown", str(markdown)])
        == 0
    )
    assert capsys.readouterr().out == f"report of 10 runs in {page} and {csv} and {markdown}\n"
    assert csv.read_text().startswith("run,group,folder,")
    assert markdown.read_text().startswith("# Which")
    assert not (study / "report.html").exists()


def test_notes_are_printed(write_run: WriteRun, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run("run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("broken\n")
    assert main(["report", str(folder)]) == 0
    assert "line 7, is not a row of metrics; it is left out." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--output", "report.txt"], "--output is report.txt; accepted: a file that ends in .html or .htm."),
        (["--csv", "runs"], "--csv is runs; accepted: a file that ends in .csv."),
        (["--markdown", "a.html"], "--markdown is a.html; accepted: a file that ends in .md."),
        (["missing"], "missing does not exist; accepted: run folders"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    study: Path, options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(study), *options]) == 1
    assert sentence in capsys.readouterr().err
    assert not (study / "report.html").exists()


def test_a_folder_that_cannot_hold_the_page(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (study / "file").write_text("")
    assert main(["report", str(study), "--output", str(study / "file/page.html")]) == 1
    assert "--output is " in capsys.readouterr().err
