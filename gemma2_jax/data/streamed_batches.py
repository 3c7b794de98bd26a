"""Batches put together from several streams of documents, of which a process reads those that its rows come from."""

from collections.abc import Callable, Mapping
from typing import Any

import grain
import numpy as np

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.packing import Row


class StreamedBatches(grain.DatasetIterator):
    """A process's rows of every batch: `count` blocks of as many rows, block i always of stream i.

    Which rows make a batch so depends on the number of streams, and not on that of the processes. The state holds that
    of each stream that is read here; it can be set to the states of all streams together.

    Args:
        open_stream: gives the iterator of one stream, each item a block (`Row`s, stacked).
        count: of streams.
        batch_size: B, a multiple of `count`.
        mine: the rows of this process.
    """

    def __init__(
        self, open_stream: Callable[[int], grain.DatasetIterator], count: int, batch_size: int, mine: slice
    ) -> None:
        size = batch_size // count
        self._streams = {
            number: open_stream(number) for number in range(mine.start // size, -(-mine.stop // size))
        }
        first = min(self._streams) * size
        self._within = slice(mine.start - first, mine.stop - first)
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


def to_batch(rows: Row, mine: slice) -> Batch:
    """Those of stacked rows [B, T] that are a process's own."""
    own: dict[str, Any] = {name: values[mine] for name, values in rows.items()}
    return Batch(**own, loss_mask=(own["segment_ids"] > 0).astype(np.float32))
