"""Writers, perplexity and throughput."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from gemma2_jax.config import UserError
from gemma2_jax.training import throughput
from gemma2_jax.training.metrics import MetricsConfig, open_writers, perplexity, read_metrics
from gemma2_jax.training.trackers.tracker import TrackedRun


def test_json_lines_continue_after_the_last_checkpoint(tmp_path: Path) -> None:
    config = MetricsConfig(tensorboard=False, wandb_project=None)
    (writer,) = open_writers(config, TrackedRun(tmp_path, "toy", {}))
    for step in (1, 2, 3):
        writer.write(step, "train", {"loss": float(step)})
    writer.close()
    (writer,) = open_writers(config, TrackedRun(tmp_path, "toy", {}, last_step=2))
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
