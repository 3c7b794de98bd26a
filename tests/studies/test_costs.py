"""Speed and cache sizes in the report of a study."""

import json
from pathlib import Path

import pytest

from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.cache.manifest import (
    FORMAT,
    CacheFile,
    CacheManifest,
    DataOrder,
    write_cache_manifest,
)
from gemma2_jax.distill.cache.records import LogGrid
from gemma2_jax.studies.config import StudyConfig, StudyRun
from gemma2_jax.studies.costs import RunCost, costs_by_run, costs_table

STUDY = StudyConfig(
    "Which?",
    {
        "teacher": StudyRun("a"),
        "plain": StudyRun("b"),
        "taught": StudyRun("c", teacher="teacher", cache=True),
    },
    seeds=(0, 5),
)


def write_metrics(folder: str, *speeds: float) -> None:
    rows = [{"step": 1, "split": "train", "tokens_per_second": speed} for speed in speeds]
    Path(folder).mkdir(parents=True)
    text = "".join(json.dumps(row) + "\n" for row in [*rows, {"step": 1, "split": "validation"}])
    Path(folder, "metrics.jsonl").write_text(text)


def write_cache(folder: str, size: int) -> None:
    """A cache of 10 rows of 8 tokens."""
    Path(folder).mkdir(parents=True)
    Path(folder, "signals").write_bytes(bytes(size))
    signals = CacheFile("signals", size, "", process=0, rows=10, largest=2)
    order = DataOrder("", "", 0.1, 0, seq_len=8, batch_size=2, process_count=1)
    grid = LogGrid(-1.0, 0.0, 8)
    manifest = CacheManifest(FORMAT, order, "", "", "float32", 9, EncodingConfig(), grid, (signals,))
    write_cache_manifest(Path(folder), manifest)


@pytest.fixture
def runs(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cached = ["objective=distillation", "distill=cached", "distill.teacher=out/teacher"]
    runs = {
        name: toy(name, *([*cached, f"distill.cache=caches/{name}"] if name.startswith("taught") else []))
        for name in STUDY.trained_runs()
    }
    for name, config in runs.items():
        write_metrics(config.output, *((10, 3000, 5000) if name.endswith("-5") else (1000, 2000)))
    write_cache("caches/taught-0", 400)
    write_cache("caches/taught-5", 560)
    return runs


def test_speeds_and_caches_over_the_seeds(runs):
    costs = costs_by_run(STUDY, runs, {"cache taught-0": 3.0, "cache taught-5": 5.0, "train plain-0": 9.0})
    assert costs == {"teacher": RunCost(1500), "plain": RunCost(2000), "taught": RunCost(2000, 4.0, 6.0)}
    table = costs_table(costs)
    assert table.columns == ["run", "tokens/s in training", "writing the cache", "bytes per token"]
    assert table.rows == [
        ("teacher", "1,500", "–", "–"),
        ("plain", "2,000", "–", "–"),
        ("taught", "2,000", "4 s", "6.0"),
    ]


def test_empty_columns_are_left_out():
    table = costs_table({"plain": RunCost(1500)})
    assert (table.columns, table.rows) == (["run", "tokens/s in training"], [("plain", "1,500")])
