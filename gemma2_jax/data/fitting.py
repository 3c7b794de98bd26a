"""Packs whole conversations into rows of fixed length, as a Grain transformation whose state survives JSON.

Best-fit decreasing: the conversations of a window are placed from the longest to the shortest, each into the row with
the least room that still holds it. No conversation is continued in another row, as documents are in packing.py.
"""

import bisect
from collections.abc import Sequence
from typing import Any

import grain

from gemma2_jax.config import UserError
from gemma2_jax.data.masks import MaskedTokens
from gemma2_jax.data.packing import Row, empty_row, place_segment


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Places items into bins by best-fit decreasing.

    Args:
        sizes: sizes of the items, from 1 to `capacity`.

    Returns:
        The items of each bin in increasing order; bins in the order of their largest items. So if the order of the
        items is random, so are the order of the bins and the order within each.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # room left and bin number of each bin that is not full, sorted
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        found = bisect.bisect_left(rooms, (sizes[item], -1))
        if found == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room, number = rooms.pop(found)
        bins[number].append(item)
        if room > sizes[item]:
            bisect.insort(rooms, (room - sizes[item], number))
    return [sorted(items) for items in sorted(bins, key=lambda items: items[0])]


class FittedRows(grain.IterDataset):
    """Rows of `seq_len` tokens, filled with whole conversations of `parent`; the rest of a row is padding, zeros.

    Conversations without any loss within `seq_len` targets are left out.

    Args:
        parent: dataset of `MaskedTokens` of at least two tokens.
        seq_len: T.
        window: number of conversations that are packed together, at most those of an epoch: a longer window would
            repeat some conversations before others have appeared.
        epoch: number of conversations in an epoch of the parent, which may be endless.
        drop: whether a conversation of more than T + 1 tokens is left out instead of truncated.
    """

    def __init__(self, parent: grain.IterDataset, seq_len: int, window: int, epoch: int, drop: bool) -> None:
        super().__init__(parent)
        self._arguments = seq_len, min(window, epoch), epoch, drop

    def __iter__(self) -> "_FittedRowsIterator":
        return _FittedRowsIterator(self._parent.__iter__(), *self._arguments)


class _FittedRowsIterator(grain.DatasetIterator):
    """Its state is the parent's state before the current window, and the number of rows of that window already used."""

    def __init__(
        self, parent: grain.DatasetIterator, seq_len: int, window: int, epoch: int, drop: bool
    ) -> None:
        super().__init__(parent)
        self._seq_len, self._window, self._epoch, self._drop = seq_len, window, epoch, drop
        self._before = parent.get_state()
        self._rows: list[list[MaskedTokens]] = []
        self._used = 0

    def __next__(self) -> Row:
        without_row = 0
        while self._used == len(self._rows):
            if without_row > self._epoch:
                raise UserError(
                    f"None of the {self._epoch:,} conversations of a stream has loss within data.seq_len "
                    f"({self._seq_len}) tokens; raise data.seq_len, or lower data.streams."
                )
            without_row += self._take_window()
        row = empty_row(self._seq_len)
        start = 0
        for segment, (ids, loss) in enumerate(self._rows[self._used], 1):
            place_segment(row, segment, start, ids, loss[1:])
            start += len(ids) - 1
        self._used += 1
        return row

    def get_state(self) -> dict[str, Any]:
        if self._used == len(self._rows):
            return {"parent": self._parent.get_state(), "used": 0}
        return {"parent": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._rows, self._used = [], 0
        if state["used"]:
            self._take_window()
            self._used = state["used"]

    def _take_window(self) -> int:
        """Packs the next window and returns its number of conversations. Raises StopIteration at the end."""
        self._before = self._parent.get_state()
        taken, kept = 0, []
        while taken < self._window and (conversation := next(self._parent, None)) is not None:
            taken += 1
            if self._drop and len(conversation.ids) > self._seq_len + 1:
                continue
            cut = MaskedTokens(*(values[: self._seq_len + 1] for values in conversation))
            if cut.loss.any():
                kept.append(cut)
        if not taken:
            raise StopIteration
        bins = best_fit([len(each.ids) - 1 for each in kept], self._seq_len)
        self._rows, self._used = [[kept[item] for item in items] for items in bins], 0
        return taken
