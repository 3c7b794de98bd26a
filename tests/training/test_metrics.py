"""Writers, perplexity and throughput."""

import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboardX.proto import event_pb2

from gemma2_jax.config import UserError
from gemma2_jax.training import throughput
from gemma2_jax.training.metrics import MetricsConfig, open_writers, perplexity, read_metrics


def test_json_lines_continue_after_the_last_checkpoint(tmp_path: Path) -> None:
    config = MetricsConfig(tensorboard=False, wandb_project=None)
    (writer,) = open_writers(config, tmp_path, 0, {})
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": float(step)})
    writer.close()
    (writer,) = open_writers(config, tmp_path, 2, {})
    writer.write(3, "train", {"loss": 30.0})
    writer.close()
    assert [(row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_rows_of_older_versions_have_the_names_of_today(tmp_path: Path) -> None:
    old = [
        {"step": 1, "split": "train", "loss": 2.5, "cross_entropy": 3.0, "tokens": 64},
        {"step": 1, "split": "validation", "loss": 3.5, "cross_entropy": 3.5, "tokens": 20},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    now = [
        {"step": 1, "split": "train", "loss": 2.5, "cross_entropy": 3.0, "tokens_seen": 64},
        {"step": 1, "split": "validation", "cross_entropy": 3.5, "targets": 20},
    ]
    assert read_metrics(tmp_path) == now


def test_tensorboard_events(tmp_path: Path) -> None:
    writers = open_writers(MetricsConfig(tensorboard=True, wandb_project=None), tmp_path, 0, {})
    for writer in writers:
        writer.write(7, "validation", {"perplexity": 12.5})
        writer.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    values = [value for event in _events(path) for value in event.summary.value if event.step == 7]
    assert [(value.tag, value.simple_value) for value in values] == [("validation/perplexity", 12.5)]


def _events(path: Path) -> Any:
    """The records of an event file: length, its checksum, content, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield event_pb2.Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_wandb_is_logged_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    run = SimpleNamespace(
        log=lambda row, step: logged.append((step, row)), finish=lambda: logged.append("finished")
    )
    settings: dict[str, Any] = {}

    def init(**given: Any) -> Any:
        settings.update(given)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    writers = open_writers(MetricsConfig(tensorboard=False, wandb_project="study"), tmp_path, 0, {"seed": 1})
    for writer in writers:
        writer.write(1, "train", {"loss": 2.0})
        writer.close()
    assert logged == [(1, {"train/loss": 2.0}), "finished"]
    assert settings["project"] == "study"
    assert settings["resume"] == "allow"
    assert settings["config"] == {"seed": 1}


def test_wandb_is_logged_to_by_several_runs_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uses a fake wandb that ends the previous run, as wandb does unless `reinit` requests a concurrent one."""
    runs: list[Any] = []

    def init(*, name: str, reinit: str = "finish_previous", **_: Any) -> Any:
        if reinit != "create_new":
            for run in runs:
                run.rows = None
        run = SimpleNamespace(name=name, rows=[], finish=lambda: None)
        run.log = lambda row, step: run.rows.append((step, row))
        runs.append(run)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = MetricsConfig(tensorboard=False, wandb_project="study")
    for name in ("wide", "deep"):
        (tmp_path / name).mkdir()
    both = [open_writers(config, tmp_path / name, 0, {}) for name in ("wide", "deep")]
    for loss, writers in enumerate(both):
        for writer in writers:
            writer.write(1, "train", {"loss": float(loss)})
            writer.close()
    logged = {run.name: run.rows for run in runs}
    assert logged == {"wide": [(1, {"train/loss": 0.0})], "deep": [(1, {"train/loss": 1.0})]}


def test_wandb_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"install the extra gemma2_jax\[wandb\]"):
        open_writers(MetricsConfig(tensorboard=False, wandb_project="study"), tmp_path, 0, {})


def test_no_metrics_yet(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has not been trained yet"):
        read_metrics(tmp_path)


def test_perplexity() -> None:
    assert perplexity(2.0) == pytest.approx(7.389056)
    assert perplexity(1e4) == float("inf")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("TPU v5 lite", 197e12), ("TPU v5", 459e12), ("NVIDIA H100 80GB HBM3", 989e12), ("Abacus", None)],
)
def test_peak_flops_by_name(kind: str, expected: float | None) -> None:
    assert throughput.peak_flops(SimpleNamespace(platform="other", device_kind=kind)) == expected


def test_peak_flops_of_a_cpu_is_measured_and_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert throughput.measure_matmul_flops(size=64, repetitions=1) > 0
    monkeypatch.setattr(throughput, "measure_matmul_flops", lambda: 8.0)
    device = SimpleNamespace(platform="cpu", device_kind="cpu")
    assert throughput.peak_flops(device) == 1.0  # eight devices share the processor


def test_a_stopwatch_counts_only_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now[0])
    watch = throughput.Stopwatch()
    for running, standing in ((2.0, 100.0), (3.0, 100.0)):
        watch.start()
        now[0] += running / 2
        watch.start()  # of the next step, dispatched while this one runs
        now[0] += running / 2
        watch.stop()
        now[0] += standing
    assert watch.take() == 5.0
    assert watch.take() == 0.0
