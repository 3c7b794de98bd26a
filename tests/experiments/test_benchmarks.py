"""The benchmarks run, at the smallest size, and print every row of their tables."""

import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.formats.native import write_run
from gemma2_jax.machine import cores
from gemma2_jax.run import RunConfig
from tests.model.models import vivid

ROOT = Path(__file__).parents[2]


def lines(script: str, *arguments: str) -> list[str]:
    """Runs a benchmark as a user does; returns the rows of its table."""
    # As on a plain machine: one device, not the eight of the tests.
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "experiments" / "benchmarks" / script), *arguments]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    table = ran.stdout.splitlines()
    header = next(number for number, line in enumerate(table) if line.startswith((" ", "| ---")))
    return table[header + 1 :]


def rows(script: str, *arguments: str) -> dict[str, float]:
    """Runs a benchmark; returns its rows' first figures by their labels."""
    matches = [re.fullmatch(r"(\S.*?) {2,}([\d,]+)\b.*", line) for line in lines(script, *arguments)]
    return {match[1]: float(match[2].replace(",", "")) for match in matches if match}


@pytest.mark.thorough
def test_data_throughput(corpus: Path):
    figures = rows(
        "data_throughput.py",
        *("--repetitions=1", "--copies=1", f"--source={corpus}", "--vocab-size=400", "--fed-tokens=1000"),
    )
    assert list(figures) == [
        *(f"tokenising, workers: {count}" for count in sorted({1, cores()})),
        "feeding, B x T: 16 x 128",
        "feeding, B x T: 32 x 1024",
    ]
    assert min(figures.values()) > 0


@pytest.mark.slow
def test_import_memory():
    """An eighth is the least size at which the largest tensor, 147 MB, is more than what compiling takes."""
    beyond = {
        label: float(figure.removesuffix("x"))
        for label, _, _, figure, _ in map(str.split, lines("import_memory.py", "--shrink=8"))
    }
    assert list(beyond) == ["bfloat16", "float32"]
    assert max(beyond.values()) < 2  # a whole second copy would be 3


@pytest.mark.slow
def test_merge_memory():
    peaks = {
        label: float(figure) for label, figure, _ in map(str.split, lines("merge_memory.py", "--shrink=8"))
    }
    assert list(peaks) == ["linear", "slerp", "ties"]
    assert max(peaks.values()) < 2


@pytest.mark.slow
def test_gguf_packing():
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    table = [line.split() for line in lines("gguf_packing.py", "--shrink=64", "--rows=128", "--rounds=1")]
    errors = {row[0]: float(row[2].removesuffix("%")) for row in table[:4]}
    assert errors["q4_k"] < 7.3 < errors["q4_0"]
    assert errors["q6_k"] < 1.85 < errors["q5_k"]
    assert [row[0] for row in table[6:]] == ["q6_k", "q4_k_m"]
    assert max(float(row[1]) for row in table[6:]) < 2


@pytest.mark.slow
def test_gguf_quality(toy_run: RunConfig, tokenizer_config: TokenizerConfig, corpus: Path, tmp_path: Path):
    pytest.importorskip("gguf", reason="needs the extra `gguf`")
    write_run(tmp_path / "run", toy_run.model, vivid(toy_run.model).params(), Path(tokenizer_config.path))
    table = lines("gguf_quality.py", str(tmp_path / "run"), f"--text={corpus}", f"--calibrate={corpus}")
    kl = {line[:20].strip(): float(line.split()[-2]) for line in table}
    assert len(kl) == 9
    assert kl["float16"] < kl["q8_0"] < kl["q4_0"]


@pytest.mark.slow
def test_loss_memory():
    figures = rows(
        "loss_memory.py",
        *("--tokens=512", "--vocabulary=2048", "--widths", "128", "256", "--blocks", "128"),
        *(
            "--cpu-tokens=256",
            "--cpu-vocabulary=4096",
            "--cpu-widths",
            "64",
            "96",
            "--cpu-block=64",
            "--rounds=1",
        ),
    )
    times = ["forward_kl", "cross_entropy"]
    compiled = [f"{name}, {side}" for name in times for side in ("block of 128", "dense")]
    assert list(figures) == [*(compiled if importlib.util.find_spec("libtpu") else []), *times]
    assert min(figures[name] for name in times) > 0


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="compares with the extra `reference`: pip install -e '.[reference]'",
)
def test_step_vs_transformers():
    figures = rows(
        "step_vs_transformers.py",
        *("--rounds=1", "--steps=1", "--batch=1", "--length=32"),
    )
    assert list(figures) == ["training, tokens/s"]
    assert min(figures.values()) > 0


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers")),
    reason="compares with the extra `reference`: pip install -e '.[reference]'",
)
def test_gpu(tmp_path: Path):
    """At toy size on a CPU, where no kernel of tokamax runs."""
    lines("gpu.py", "--size=toy", "--minutes=19", f"--output={tmp_path / 'gpu.json'}")
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    portable = [
        f"{name} attention, {seen}, {dtype}"
        for seen in ("global", "window 100")
        for dtype in ("float32", "bfloat16")
        for name in ("blockwise", "looped")
    ]
    tokamax = [f"tokamax attention, {seen}, bfloat16" for seen in ("global", "window 100")]
    caches = ["attention to a cache, float32", "attention to a cache, bfloat16"]
    kernels = [
        *(*portable[:4], tokamax[0], *portable[4:], tokamax[1]),
        *(*caches, "LM head, cross-entropy and KL, float32"),
    ]
    generation = [
        f"{phase}, toy, weights in {weights}"
        for weights in ("bfloat16", "int8", "int4", "bfloat16")
        for phase in ("prefill", "decoding")
    ]
    steps = ["training step, toy", "training step, toy", "distillation step, toy from toy"]
    assert [row["name"] for row in found] == [*kernels, *steps, *generation]
    for row in found:
        if row["name"] in tokamax:
            assert "tokamax" in row["failure"]
        elif row["name"] in kernels:
            assert max(row["values"], row["gradients"] or 0.0) <= row["limit"]
        elif "failure" not in row:
            assert 0 < row["tokens_per_second"] < math.inf
        else:
            assert row["name"].startswith("decoding")
            assert "too short" in row["failure"]
    planned = [row["part"] for row in found if row.get("planned_bytes")]
    assert planned == ["train", "distil"]


@pytest.mark.thorough
def test_gpu_reports_parts_that_do_not_end_or_fail(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "benchmarks"))
    gpu = importlib.import_module("gpu")
    stopped = {"part": "kernels", "name": "kernels", "failure": "stopped after 0 s, its share of the time"}
    assert gpu.run_part("kernels", "toy", 0.1) == [stopped]
    (failed,) = gpu.run_part("kernels", "unknown", 60)
    assert failed["failure"] == "its process ended with 1: KeyError: 'unknown'"


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "gguf")),
    reason="compares with the extras `reference` and `gguf`: pip install -e '.[reference,gguf]'",
)
def test_decoding():
    figures = rows("decoding.py", "--rounds=1", "--new-tokens=4")
    llama = ["llama.cpp F32", "llama.cpp Q8_0"] if importlib.util.find_spec("llama_cpp") else []
    assert list(figures) == ["gemma2_jax", "transformers", *llama]
    assert min(figures.values()) > 0


@pytest.mark.slow
def test_asha_vs_grid(data: DataConfig, tokenizer_config: TokenizerConfig, tmp_path: Path):
    keys = [
        *("data=files", f"data.source={data.source}", f"data.folder={data.folder}", "data.workers=1"),
        *("data.batch_size=4", "data.seq_len=16", "data.validation_fraction=0.2", "training.eval_batches=1"),
        *(f"data.shard_characters={data.shard_characters}", "tokenizer.vocab_size=400"),
        f"tokenizer.path={tokenizer_config.path}",
    ]
    table = lines("asha_vs_grid.py", f"--output={tmp_path}", "--rates=1", "--steps=9", *keys)
    assert [line[:18].strip() for line in table] == ["seed 0, grid", "seed 0, with rungs"]
    tokens = [int(line.split()[-2].replace(",", "")) for line in table]
    # Four trials are trained to step 1, two of them to step 2, and one to the end.
    assert tokens == [4 * 9 * 64, (4 + 2 + 7) * 64]


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("torch", "transformers", "lm_eval")),
    reason="compares with the extras `eval` and `reference`: pip install -e '.[eval,reference]'",
)
def test_harness_vs_hf():
    figures = rows("harness_vs_hf.py", "--rounds=1", "--questions=2", "--texts=2", "--vocab-size=600")
    assert list(figures) == ["answers, requests/s", "letters, requests/s", "texts, requests/s"]


@pytest.mark.slow
def test_train_together():
    figures = rows("train_together.py", "--teacher=small_1m", "--student=toy", "--batch=2", "--rounds=1")
    assert list(figures) == ["together", "one by one", "without a teacher"]
    assert min(figures.values()) > 0


@pytest.mark.slow
def test_teacher_cache(corpus: Path):
    figures = rows(
        "teacher_cache.py",
        *(
            "--repetitions=1",
            "--vocab-size=300",
            "--tokens=8",
            "--steps=10",
            "--cached-steps=1",
            "--fed-tokens=1",
            "--trained-steps=2",
        ),
        *(f"--source={corpus}", "--trained-vocab-size=400"),
    )
    assert list(figures)[:2] == ["sampled, N = 12", "sampled, N = 50"]
    batches = ["batches, B x T: 16 x 128", "batches, B x T: 32 x 1024"]
    assert list(figures)[-4:] == [*batches, "training, text", "training, cached"]
    assert min(figures.values()) > 0


@pytest.mark.slow
def test_step_plans():
    toy = ("model=toy", "tokenizer.vocab_size=512", "mesh=cpu_1", "data.seq_len=64", "data.batch_size=2")
    table = lines("step_plans.py", "--only", "pretrain_2b", "--topology=cpu:1", "--set", *toy)
    assert [line.split(" | ")[:4] for line in table] == [["| pretrain_2b", "cpu:1", "1", "yes"]]
