"""The whole slice at toy size, through the command line: corpus to report, skipped when done, resumed when killed."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma2_jax.cli.main import main
from gemma2_jax.training.metrics import read_metrics

RUNS = ("teacher", "scratch", "distilled")
TOY = [
    "model=toy",
    "data.folder=data",
    "data.seq_len=32",
    "data.batch_size=8",
    "data.workers=1",
    "tokenizer.vocab_size=400",
    "training.steps=12",
    "training.log_every=2",
    "training.eval_every=6",
    "checkpoint.every=2",
    "optimizer.warmup_steps=2",
    "teacher.model.d_model=64",
]


@pytest.fixture(scope="module")
def command(corpus: Path) -> list[str]:
    return ["run", "quickstart", *TOY, f"data.source={corpus}"]


@pytest.fixture(scope="module")
def study(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a study that ran without interruption."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(command) == 0
    return folder


def losses(folder: Path, run: str) -> list[tuple[int, str, float]]:
    rows = read_metrics(folder / "runs" / "quickstart" / run)
    return [(row["step"], row["split"], row["cross_entropy"]) for row in rows]


@pytest.mark.thorough
def test_everything_is_there(study: Path) -> None:
    folder = study / "runs" / "quickstart"
    results = json.loads((folder / "results.json").read_text())["runs"]
    assert list(results) == list(RUNS)
    assert (
        results["scratch"]["parameters"]
        == results["distilled"]["parameters"]
        < results["teacher"]["parameters"]
    )
    assert all(results[run]["tokens_seen"] == 12 * 8 * 32 for run in RUNS)
    assert results["teacher"]["agreement"] is None
    assert 0 < results["distilled"]["agreement"] <= 1
    report = (folder / "report.md").read_text()
    assert all(f"| {run} |" in report for run in RUNS)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert losses(study, "distilled")[0][2] != losses(study, "scratch")[0][2]


@pytest.mark.thorough
def test_the_page_of_the_study(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study)
    assert main(["report", "runs/quickstart", "--csv", "runs.csv"]) == 0
    assert capsys.readouterr() == ("report of 3 runs in runs/quickstart/report.html and runs.csv\n", "")
    with Path("runs.csv").open() as file:
        rows = {row["run"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(RUNS)
    # The online teacher's forward pass counts too.
    assert float(rows["distilled"]["training_flops"]) > float(rows["scratch"]["training_flops"]) > 0
    assert all(float(row["training_seconds"]) > 0 for row in rows.values())
    page = Path("runs/quickstart/report.html").read_text()
    assert "No folder records the machine" not in page
    assert page.count('class="card ') == 2 * len(RUNS)  # two prompts
    assert main(["watch"]) == 0
    assert capsys.readouterr().out.count("finished") == len(RUNS)


@pytest.mark.thorough
def test_a_second_time_everything_is_skipped(
    study: Path, command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study)
    before = {run: losses(study, run) for run in RUNS}
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.count("already done, skipped") == 2 * len(RUNS)
    assert "already prepared, skipped" in printed
    assert {run: losses(study, run) for run in RUNS} == before


@pytest.mark.thorough
def test_generate_from_the_study(
    study: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study)
    arguments = [
        "--checkpoint",
        "runs/quickstart/distilled",
        "--prompt",
        "the teacher",
        "--max-new-tokens",
        "8",
    ]
    assert main(["generate", *arguments, "--temperature", "0"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("the teacher")
    assert len(printed) > len("the teacher\n")


@pytest.mark.thorough
def test_a_study_killed_half_way_resumes(study: Path, command: list[str], tmp_path: Path) -> None:
    """A study is killed in its second run; the same command then ends with exactly the same losses."""
    process = [sys.executable, "-m", "gemma2_jax.cli.main", *command]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    rows = tmp_path / "runs" / "quickstart" / "scratch" / "metrics.jsonl"
    with subprocess.Popen(
        process, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        for _ in range(2400):
            if (rows.exists() and rows.read_text().count("\n") >= 3) or running.poll() is not None:
                break
            time.sleep(0.05)
        running.send_signal(signal.SIGKILL)
        assert running.wait() == -signal.SIGKILL, running.stderr.read() if running.stderr else ""
    finished = subprocess.run(
        process, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert "already done, skipped" in finished.stdout
    assert {run: losses(tmp_path, run) for run in RUNS} == {run: losses(study, run) for run in RUNS}
