"""Batches assembled from several streams of documents; each process reads only the streams of its own rows."""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.packing import Row


class StreamedBatches(grain.DatasetIterator):
    """Iterates over one process's rows of every batch. A batch is `count` equal blocks of rows; stream i fills block i.

    The rows of a batch thus depend on the number of streams, not on the number of processes. The state maps each
    stream that this process reads to its state; `set_state` also accepts the states of all streams.

    Args:
        open_stream: returns the iterator of one stream, whose items are blocks (stacked `Row`s).
        count: number of streams.
        batch_size: B, a multiple of `count`.
        own_rows: rows of this process in a batch.
    """

    def __init__(
        self,
        open_stream: Callable[[int], grain.DatasetIterator],
        count: int,
        batch_size: int,
        own_rows: slice,
    ) -> None:
        size = batch_size // count
        self._streams = {
            number: open_stream(number) for number in range(own_rows.start // size, -(-own_rows.stop // size))
        }
        first = min(self._streams) * size
        self._within = slice(own_rows.start - first, own_rows.stop - first)
        super().__init__(tuple(self._streams.values()))

    def __next__(self) -> Batch:
        blocks = [next(stream) for stream in self._streams.values()]
        rows = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        return to_batch(rows, self._within)

    def get_state(self) -> dict[str, Any]:
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for number, stream in self._streams.items():
            stream.set_state(state[str(number)])


def to_batch(rows: Row, own_rows: slice) -> Batch:
    """Returns a process's own part of stacked rows [B, T] as a `Batch`."""
    own: dict[str, Any] = {name: values[own_rows] for name, values in rows.items()}
    return Batch(**own)
