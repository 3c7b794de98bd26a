"""When one process of a job fails, all processes end, and process 0 prints the reason in one sentence."""

import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2_jax.config import save_config
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.mesh import MeshConfig
from tests.multihost.job import GEMMA2, run_job

FAILING = [str(Path(__file__).parent / "failing.py")]


@pytest.fixture(scope="module")
def command(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("ending")
    save_config(replace(toy_run, output=str(folder / "run"), mesh=MeshConfig(data=2)), folder / "toy.yaml")
    return ["train", "--config", str(folder / "toy.yaml")]


@pytest.mark.thorough
def test_one_that_fails_in_the_middle(command: list[str]) -> None:
    first, second = run_job([[*GEMMA2, *command], [*FAILING, "refuse", *command]])
    assert (first.code, second.code) == (1, 1)
    assert first.errors.splitlines()[-1] == "gemma2: process 1: this host's disk is gone."
    assert "Traceback" not in first.errors
    assert (second.output, second.errors) == ("", "")


@pytest.mark.thorough
def test_one_that_is_stopped(command: list[str], tmp_path: Path) -> None:
    """All save the same step and exit with its exit code, so that the launcher knows that it may restart them."""
    command = [*command, f"output={tmp_path}/run"]
    first, second = run_job([[*GEMMA2, *command], [*FAILING, "SIGTERM", *command]])
    assert (first.code, second.code) == (128 + signal.SIGTERM,) * 2
    saved = r"gemma2: (process 1: )?stopped; the same command resumes from step 2 of .*/run\."
    assert re.fullmatch(saved, first.errors.splitlines()[-1])
    assert "Traceback" not in first.errors
    assert (second.output, second.errors) == ("", "")


@pytest.mark.thorough
def test_one_that_fails_while_another_ignores_sigint(command: list[str]) -> None:
    """As what the background of a script starts does."""
    ignoring = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    code = f"{ignoring}; from gemma2_jax.cli.main import main; raise SystemExit(main())"
    first, second = run_job([["-c", code, *command], [*FAILING, "refuse", *command]])
    assert (first.code, second.code) == (1, 1)
    assert first.errors.splitlines()[-1] == "gemma2: process 1: this host's disk is gone."
    assert "Traceback" not in first.errors


@pytest.mark.thorough
def test_one_that_is_killed(command: list[str]) -> None:
    first, second = run_job([[*GEMMA2, *command], [*FAILING, "SIGKILL", *command]])
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    assert first.errors.splitlines()[-1] == "gemma2: process 1 is gone: killed, or the host is down."
    assert "Traceback" not in first.errors


@pytest.mark.thorough
@pytest.mark.parametrize("frozen", [0, 1])
def test_one_that_is_suspended(command: list[str], frozen: int) -> None:
    """Its connections stay open; the test shortens the timeouts. Process 1 reports process 0, which cannot."""
    impatient = "from gemma2_jax.processes import ending, links; links.SILENCE = 5; ending._UNWIND = 2"
    waiting = ["-c", f"{impatient}; from gemma2_jax.cli.main import main; raise SystemExit(main())", *command]
    commands = [waiting, waiting]
    commands[frozen] = [*FAILING, "SIGSTOP", *command]
    ended = run_job(commands, frozen=frozen)
    other = ended[1 - frozen]
    assert other.code == 1
    assert other.errors.splitlines()[-1] == (
        f"gemma2: process {frozen} has not answered for 5 s: suspended (SIGSTOP), or the host hangs."
    )
    assert "Traceback" not in other.errors


@pytest.mark.thorough
def test_one_that_was_started_otherwise(command: list[str]) -> None:
    first, second = run_job([[*GEMMA2, *command], [*GEMMA2, *command, "seed=1"]])
    assert (first.code, second.code) == (1, 1)
    assert first.errors == (
        "gemma2: process 1: toy: seed is 0 in process 0 and 1 in process 1; all processes must be started by the same "
        "command, and see the same files.\n"
    )
    assert (second.output, second.errors) == ("", "")


@pytest.mark.thorough
def test_an_error_of_all_processes_is_printed_once(command: list[str], tmp_path: Path) -> None:
    first, second = run_job([[*GEMMA2, *command, "data.batch_size=5", f"output={tmp_path}/run"]] * 2)
    assert (first.code, second.code) == (1, 1)
    assert first.errors.startswith(
        "gemma2: data.batch_size / training.accumulation is 5 rows, which mesh.replica"
    )
    assert first.errors.count("\n") == 1
    assert second.errors == ""
