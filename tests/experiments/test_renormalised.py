"""The biased cache for the second study: the content of the copy, and the message if there is nothing to copy."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import grain
import numpy as np
import pytest

from gemma2_jax.data.shards import RecordWriter
from gemma2_jax.distill.cache.encoding import EncodingConfig, Entries
from gemma2_jax.distill.cache.manifest import (
    FORMAT,
    CacheFile,
    CacheManifest,
    DataOrder,
    verify_cache,
    write_cache_manifest,
)
from gemma2_jax.distill.cache.records import LogGrid, Packer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "experiments" / "teacher_source" / "renormalised.py"
ENCODING, GRID, NUM_TOKENS = EncodingConfig("top_k", 2), LogGrid(-8.0, 0.0, 12), 9
PROBABILITIES = np.array([[0.5, 0.25], [0.3, 0.1], [0.8, 0.2]])  # of a row of three tokens


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("renormalised", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def packer() -> Packer:
    return Packer(ENCODING, GRID, NUM_TOKENS, len(PROBABILITIES))


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """One row, whose tokens have a tail, but for the last."""
    folder = tmp_path / "with_tail"
    folder.mkdir()
    ids = np.array([[1, 4], [0, 8], [2, 3]], np.int32)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.maximum(1 - PROBABILITIES.sum(-1), 0)).astype(np.float32)
    entries = Entries(ids, np.log(PROBABILITIES).astype(np.float32), log_tail)
    writer = RecordWriter(folder / "signals", ",uncompressed")
    writer.write(packer().pack(entries, 77).record)
    written = writer.finish()
    order = DataOrder("", "", 0.1, 0, seq_len=len(ids), batch_size=1, process_count=1)
    signals = CacheFile(written.file, written.size, written.sha256, process=0, rows=1, largest=2)
    write_cache_manifest(
        folder, CacheManifest(FORMAT, order, "", "", "float32", NUM_TOKENS, ENCODING, GRID, (signals,))
    )
    return folder


@pytest.mark.thorough
def test_the_copy_has_no_tail_and_sums_to_1(script: ModuleType, cache: Path, tmp_path: Path) -> None:
    target = tmp_path / "without"
    script.renormalise(cache, target)
    assert verify_cache(target) == 1
    records = grain.sources.ArrayRecordDataSource([str(target / "signals")])
    assert len(records) == 1
    sparse, checksums = packer().unpack([records[0]], 2)
    assert checksums == [77]  # it still belongs to its row of the data
    assert sparse.ids[0].tolist() == [[1, 4], [0, 8], [2, 3]]
    assert not sparse.tail.any()
    expected = PROBABILITIES / PROBABILITIES.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(sparse.log_weights[0]), expected, rtol=2 * GRID.step)


@pytest.mark.thorough
def test_without_the_study_it_names_the_command_to_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, str(SCRIPT)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 1
    assert ran.stderr == (
        "renormalised.py: runs/teacher_source/caches/top_k_with_tail-0 holds no teacher cache to copy; run the study "
        "first: `gemma2 run teacher_source` with the same key=value.\n"
    )
    assert list(tmp_path.iterdir()) == []
