"""Windows: which tokens they score with which context, and that packing them into batches loses none."""

from collections import Counter

import numpy as np
import pytest

from gemma2_jax.data.batch import Batch
from gemma2_jax.evaluation.windows import Window, batches_of, windows_of

BOS = 2
SIZES = [(n, C, s) for n in (1, 2, 7, 8, 9, 31, 40) for C, s in ((2, 1), (8, 1), (8, 3), (8, 8), (64, 5))]


def document(n: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(100, 100 + n), np.ones(n, bool)


def scored(window: Window) -> list[int]:
    return [int(token) for token in window.ids[1:][window.scored]]


@pytest.mark.parametrize(("n", "context", "stride"), SIZES)
def test_each_token_is_scored_once_after_enough_others(n: int, context: int, stride: int) -> None:
    windows = list(windows_of(*document(n), BOS, context, stride))
    assert [token for window in windows for token in scored(window)] == list(range(100, 100 + n))
    for number, window in enumerate(windows):
        assert 1 <= len(window.scored) == len(window.ids) - 1 <= context
        assert window.ids[0] == BOS
        first = int(np.argmax(window.scored))  # tokens of the document before the first that is scored
        assert first == (0 if number == 0 else context - stride)
        np.testing.assert_array_equal(np.diff(window.ids[1:]), 1)  # consecutive tokens of the document


def test_a_stride_of_the_context_gives_windows_that_do_not_overlap() -> None:
    windows = list(windows_of(*document(20), BOS, 8, 8))
    assert [len(window.scored) for window in windows] == [8, 8, 4]
    assert all(window.scored.all() for window in windows)
    assert [int(window.ids[1]) for window in windows] == [100, 108, 116]


def test_only_tokens_to_be_scored_are() -> None:
    ids, mask = document(20)
    mask[:] = False
    mask[[3, 17]] = True
    windows = list(windows_of(ids, mask, BOS, 6, 6))
    assert [scored(window) for window in windows] == [[103], [117]]  # the one between scores nothing


def segments(batches: list[Batch]) -> Counter[tuple[object, ...]]:
    """Each segment's inputs, targets, positions and mask, with how often it occurs."""
    found: Counter[tuple[object, ...]] = Counter()
    for batch in batches:
        for row in range(len(batch.tokens)):
            for segment in range(1, batch.segment_ids[row].max() + 1):
                place = batch.segment_ids[row] == segment
                parts = (batch.tokens, batch.targets, batch.positions, batch.loss_mask)
                found[tuple(tuple(part[row][place].tolist()) for part in parts)] += 1
        assert not batch.loss_mask[batch.segment_ids == 0].any()
    return found


def test_packing_keeps_every_window_and_shares_make_the_whole_batch() -> None:
    draw = np.random.default_rng(0)
    windows = [
        window
        for n in draw.integers(1, 60, 90)
        for window in windows_of(draw.integers(3, 90, n), np.ones(n, bool), BOS, 16, 6)
    ]
    expected = Counter(
        (
            tuple(window.ids[:-1].tolist()),
            tuple(window.ids[1:].tolist()),
            tuple(range(len(window.scored))),
            tuple(window.scored.astype(float).tolist()),
        )
        for window in windows
    )
    whole = list(batches_of(windows, 16, 4))
    assert all(batch.tokens.shape == (4, 16) for batch in whole)
    assert segments(whole) == expected
    halves = [list(batches_of(windows, 16, 4, share, 2)) for share in range(2)]
    for batch, *parts in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(batch.tokens, np.concatenate([part.tokens for part in parts]))
