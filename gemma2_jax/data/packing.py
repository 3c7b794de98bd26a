"""Packs documents into rows of fixed length, as a Grain transformation whose state survives JSON.

Grain has such a transformation (ConcatThenSplitIterDataset), but in 0.2.18 its state does not survive the JSON that
checkpoints are written in: tuples come back as lists, and if a row ends exactly where a document ends, the next
document is lost on resumption.
"""

from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

Row = dict[str, np.ndarray]  # tokens, targets, positions, segment_ids: int32 [T]; loss_mask: float32 [T]


def empty_row(seq_len: int) -> Row:
    """Returns a row of T padding tokens."""
    row: Row = {
        name: np.zeros(seq_len, np.int32) for name in ("tokens", "targets", "positions", "segment_ids")
    }
    return row | {"loss_mask": np.zeros(seq_len, np.float32)}


def place_segment(row: Row, segment: int, start: int, ids: np.ndarray, loss: np.ndarray | float) -> None:
    """Writes a segment into a row.

    Args:
        segment: number of the segment, from 1.
        start: index of its first token.
        ids: [n + 1], the tokens of the segment and one that is only a target.
        loss: [n], the weight of each target in the loss, or one weight for all.
    """
    place = slice(start, start + len(ids) - 1)
    row["tokens"][place] = ids[:-1]
    row["targets"][place] = ids[1:]
    row["positions"][place] = np.arange(len(ids) - 1)
    row["segment_ids"][place] = segment
    row["loss_mask"][place] = loss


class PackedRows(grain.IterDataset):
    """Rows of `seq_len` tokens, filled with the documents of `parent` one after another.

    Tokens (all but the last of a document) and targets (all but the first) are taken from each document before it is
    packed. So no target belongs to another document, and none is lost where a document is cut: the remainder
    continues in the next row, as a new segment with positions from 0. Only the last row of a finite parent is padded,
    with zeros. Every target carries loss.

    Args:
        parent: dataset of documents, arrays of at least two token ids.
        seq_len: T.
    """

    def __init__(self, parent: grain.IterDataset, seq_len: int) -> None:
        super().__init__(parent)
        self._seq_len = seq_len

    def __iter__(self) -> "_PackedRowsIterator":
        return _PackedRowsIterator(self._parent.__iter__(), self._seq_len)


class _PackedRowsIterator(grain.DatasetIterator):
    """Its state is the parent's state before the current document, and the tokens of that document already used."""

    def __init__(self, parent: grain.DatasetIterator, seq_len: int) -> None:
        super().__init__(parent)
        self._seq_len = seq_len
        self._document: np.ndarray | None = None
        self._before = parent.get_state()
        self._used = 0

    def __next__(self) -> Row:
        row = empty_row(self._seq_len)
        for segment, (start, piece) in enumerate(self._pieces(), 1):
            place_segment(row, segment, start, piece, loss=1.0)
        if not row["segment_ids"][0]:
            raise StopIteration
        return row

    def get_state(self) -> dict[str, Any]:
        if self._document is None:
            return {"parent": self._parent.get_state(), "used": 0}
        return {"parent": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._document = None
        if state["used"]:
            self._take_document()
            self._used = state["used"]

    def _pieces(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the pieces that fill one row: where each starts, and its tokens plus the one that is only a target."""
        filled = 0
        while filled < self._seq_len:
            if self._document is None and not self._take_document():
                return
            document = self._document
            assert document is not None
            count = min(self._seq_len - filled, len(document) - 1 - self._used)
            yield filled, document[self._used : self._used + count + 1]
            filled += count
            self._used += count
            if self._used == len(document) - 1:
                self._document = None

    def _take_document(self) -> bool:
        self._before = self._parent.get_state()
        self._document = next(self._parent, None)
        self._used = 0
        return self._document is not None
