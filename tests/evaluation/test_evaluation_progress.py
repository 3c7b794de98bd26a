"""The lines that an evaluation writes to a log."""

from collections.abc import Iterator

import numpy as np
import pytest

from gemma2_jax.data.batch import Batch
from gemma2_jax.evaluation import evaluation_progress
from gemma2_jax.evaluation.evaluation_progress import EvaluationProgress


def test_a_log_gets_speed_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two parts; a batch of 2 x 30 tokens each minute after the first, each an eighth of the first part."""
    now = 0.0
    monkeypatch.setattr(evaluation_progress.time, "monotonic", lambda: now)
    ids = np.ones((2, 30), np.int32)
    batch = Batch(ids, ids, ids, ids, np.ones((2, 30), np.float32))
    progress = EvaluationProgress(2, show=True)

    def batches() -> Iterator[Batch]:
        nonlocal now
        for number in range(1, 5):
            progress.read(number / 8)
            yield batch
            now += 60

    with progress:
        progress.doing("evaluating a on b")
        assert list(progress.counted(batches(), shares=2)) == [batch] * 4
    assert capsys.readouterr().err.splitlines() == [
        "gemma2: evaluating a on b …",
        "12%  0 tokens/s  14 min 00 s left",
        "19%  1 tokens/s  13 min 00 s left",
        "25%  1 tokens/s  12 min 00 s left",
    ]
