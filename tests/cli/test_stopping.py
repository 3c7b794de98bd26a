"""Signals to real processes in every phase of a command: 128 + N, one true sentence, no traceback and no crash."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from gemma2_jax.checkpoints.store import CheckpointConfig, latest_step
from gemma2_jax.config import save_config
from gemma2_jax.distill.cache.manifest import read_cache
from gemma2_jax.run import RunConfig
from tests.multihost.job import environment
from tests.test_end_to_end import TOY

SCRIPT = str(Path(__file__).parent / "stopping.py")
SWEEP = [
    "sweep", "model=toy", "optimizer.learning_rate=1e-3,2e-3", "training.steps=2", "optimizer.warmup_steps=1",
    "tokenizer.vocab_size=400", "tokenizer.path=toy.model", "data.folder=data", "data.seq_len=32",
    "data.batch_size=8", "data.workers=2",
]  # fmt: skip


def stopped_in(
    place: str,
    command: Sequence[str],
    folder: Path,
    number: signal.Signals = signal.SIGTERM,
    wait: bool = True,
    group: bool = False,
) -> str:
    """Starts `gemma2 COMMAND` in `folder`, and sends the signal when it is at `place`; the last line that it prints.

    Args:
        wait: whether it waits there for the signal.
        group: sends it to all processes of the command, as a terminal does.
    """
    with subprocess.Popen(
        [sys.executable, SCRIPT, place, *command],
        cwd=folder,
        env=environment(1) | {"WAIT": str(int(wait))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        clock = threading.Timer(240, process.kill)
        clock.start()
        before = []
        for line in process.stderr:
            before.append(line)
            if line == "here\n":
                break
        else:
            pytest.fail(f"it does not come there: {before}")
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        errors = process.stderr.read()
        code = process.wait()
        clock.cancel()
    assert code == 128 + number, (code, before, errors)
    assert "Traceback" not in errors
    assert "Error" not in errors
    return errors.splitlines()[-1].removeprefix("gemma2: stopped; ")


@pytest.fixture(scope="module")
def run(toy_run: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with toy.yaml, the configuration of a run in runs/toy."""
    folder = tmp_path_factory.mktemp("stopping")
    config = replace(
        toy_run,
        output="runs/toy",
        training=replace(toy_run.training, steps=400, log_every=2, eval_every=2),
        checkpoint=CheckpointConfig(every=4, keep=2),
    )
    save_config(config, folder / "toy.yaml")
    return folder


@pytest.mark.thorough
def test_a_sweep_that_trains_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """SentencePiece reads the documents from C++, which turns our exception into another type."""
    command = [*SWEEP, f"data.source={corpus}", "data.folder=data"]
    last = stopped_in("gemma2_jax.data.prepare:chance:20", command, tmp_path)
    assert last == "nothing of data is prepared yet, and the same command starts from the beginning."
    # Only the sweep's journal is left, in which no combination counts as failed, and empty files for locks.
    left = {path.name: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert "failed" not in left.pop("journal.jsonl")
    assert set(left.values()) == {""}


def test_data_that_several_processes_tokenise(corpus: Path, tmp_path: Path) -> None:
    command = [
        "data", "prepare", "data=files", f"data.source={corpus}", "data.folder=data", "tokenizer.path=toy.model",
        "tokenizer.vocab_size=400", "data.workers=2", "data.shard_characters=10000",
    ]  # fmt: skip
    place = "gemma2_jax.data.prepare:write_data_manifest:1"
    last = stopped_in(place, command, tmp_path, signal.SIGINT, group=True)
    assert last == "nothing of data is prepared yet, and the same command starts from the beginning."
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.thorough
def test_phases_of_a_run(run: Path) -> None:
    """Several stops in a row: each time, the run resumes from where the previous stop left it."""
    command = ["train", "--config", "toy.yaml"]
    nothing = "no step is saved yet; the same command starts from the beginning."
    assert stopped_in("jax.stages:Lowered.compile:1", command, run, wait=False) == nothing
    assert not (run / "runs").exists()
    last = stopped_in("gemma2_jax.training.trainer:Trainer._take_step:1", command, run, signal.SIGINT)
    assert last == "the same command resumes from step 1 of runs/toy."
    last = stopped_in("gemma2_jax.training.trainer:sum_over:1", command, run)
    assert last == "the same command resumes from step 2 of runs/toy."
    last = stopped_in(
        "gemma2_jax.checkpoints.store:CheckpointStore.save:1", command, run, signal.SIGINT, wait=False
    )
    step = latest_step(run / "runs" / "toy")
    assert step is not None
    assert step >= 4
    assert last == f"the same command resumes from step {step} of runs/toy."


@pytest.mark.slow
def test_a_stage_of_a_study(corpus: Path, tmp_path: Path) -> None:
    command = ["run", "quickstart", *TOY, f"data.source={corpus}"]
    last = stopped_in("gemma2_jax.training.trainer:Trainer._take_step:1", command, tmp_path)
    assert last == "the same command resumes from step 1 of runs/quickstart/teacher."
    assert not (tmp_path / "runs" / "quickstart" / "scratch").exists()


@pytest.mark.slow
@pytest.mark.parametrize("estimate", [True, False])
def test_a_cache(tmp_path: Path, estimate: bool, corpus: Path) -> None:
    shared = [key for key in TOY if not key.startswith(("teacher.", "training.steps"))]
    shared.append(f"data.source={corpus}")
    done = subprocess.run(
        [sys.executable, "-m", "gemma2_jax.cli.main", "train", *shared, "training.steps=2", "output=teacher"],
        cwd=tmp_path,
        env=environment(1),
        check=False,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    command = [
        "teacher-cache", *shared, "objective=distillation", "distill=cached", "distill.teacher=teacher",
        "distill.cache=cache", "training.steps=40",
    ]  # fmt: skip
    if estimate:
        last = stopped_in(
            "gemma2_jax.distill.cache.records:Packer.pack:1", [*command, "--estimate"], tmp_path
        )
        assert last == "gemma2: stopped."
        assert not (tmp_path / "cache").exists()
    else:
        last = stopped_in("gemma2_jax.data.shards:RecordWriter.write:1", command, tmp_path)
        assert last == "8 rows of cache are written; the same command resumes after them."
        assert read_cache(tmp_path / "cache").rows == 8
