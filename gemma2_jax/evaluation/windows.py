"""Cuts documents into windows whose tokens are scored, and packs the windows into batches.

A document of n tokens t_0 … t_(n-1), without bos and eos, with a context of C and a stride of s <= C: window k has the
inputs bos, t_(ks) … t_(ks+C-2) and the targets t_(ks) … t_(ks+C-1). The first window scores all of its targets, each
later one only its last s, which are those that no earlier window scored. So each token is scored exactly once. With
s = C the windows do not overlap; with s < C at least C - s tokens of the document precede each scored token of a later
window.

Each window begins with exactly one bos token, without which Gemma's predictions are poor.

Short windows share a row, as segments that do not attend to each other; that changes the scores only by rounding.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.fitting import best_fit
from gemma2_jax.data.packing import Row, empty_row, place_segment
from gemma2_jax.data.streamed_batches import to_batch

DOCUMENT, SLIDING, PACKED = "document", "sliding", "packed"
KINDS = (DOCUMENT, SLIDING, PACKED)

_BATCHES_TOGETHER = (
    4  # batches whose windows are packed together; more leave less padding and need more memory
)


class Window(NamedTuple):
    """A part of a document, as one segment of a row.

    Attributes:
        ids: int [n + 1]; bos, then the n targets.
        scored: bool [n], whether each target is scored.
    """

    ids: np.ndarray
    scored: np.ndarray


def windows_of(ids: np.ndarray, scored: np.ndarray, bos: int, context: int, stride: int) -> Iterator[Window]:
    """Yields the windows of one document that score something.

    Args:
        ids: int [n], the document without bos and eos.
        scored: bool [n], whether each of its tokens is to be scored.
        context: number of inputs of a window, bos included; stride: number of tokens between two windows.
    """
    start = done = 0
    while done < len(ids):
        end = min(start + context, len(ids))
        new = scored[start:end].copy()
        new[: done - start] = False
        if new.any():
            yield Window(np.concatenate([[bos], ids[start:end]]), new)
        start, done = start + stride, end


def batches_of(
    windows: Iterable[Window], context: int, batch_size: int, share: int = 0, shares: int = 1
) -> Iterator[Batch]:
    """Yields batches with all windows, each once; the last batch is padded.

    Args:
        context: T, tokens in a row; no window has more targets.
        batch_size: B, rows of a batch over all processes, a multiple of `shares`; a process gets part `share`.
    """
    own = slice(share * batch_size // shares, (share + 1) * batch_size // shares)
    rows: list[Row] = []
    for row in _rows(windows, context, _BATCHES_TOGETHER * batch_size * context):
        rows.append(row)
        if len(rows) == batch_size:
            yield _stacked(rows, own)
            rows = []
    if rows:
        yield _stacked(rows + [empty_row(context)] * (batch_size - len(rows)), own)


def _rows(windows: Iterable[Window], context: int, tokens_together: int) -> Iterator[Row]:
    together: list[Window] = []
    tokens = 0
    for window in windows:
        together.append(window)
        tokens += len(window.scored)
        if tokens >= tokens_together:
            yield from _fitted(together, context)
            together, tokens = [], 0
    yield from _fitted(together, context)


def _fitted(windows: list[Window], context: int) -> Iterator[Row]:
    for items in best_fit([len(window.scored) for window in windows], context):
        row, start = empty_row(context), 0
        for segment, item in enumerate(items, 1):
            ids, scored = windows[item]
            place_segment(row, segment, start, ids, scored)
            start += len(scored)
        yield row


def _stacked(rows: list[Row], own: slice) -> Batch:
    return to_batch({name: np.stack([row[name] for row in rows]) for name in rows[0]}, own)
