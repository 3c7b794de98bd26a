"""Shards to batches, with Grain: deterministic, one share for each process, resumable in the middle."""

from functools import partial
from pathlib import Path

import grain
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.packing import PackedRows, Row
from gemma2_jax.data.shards import Manifest, Shard, read_manifest

# Reading ahead by threads, so that a slow disk is waited for in parallel.
_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)


def train_batches(data: DataConfig, process_index: int = 0, process_count: int = 1) -> grain.DatasetIterator:
    """Returns an endless iterator of `Batch` (numpy arrays, B / process_count rows) over the training split.

    Every document comes once in each epoch, in an order drawn from `data.seed` and the epoch. A process gets its rows
    of batches that are the same for any number of processes, and so are the iterator's states: each packs all rows,
    and keeps its own. `get_state()` is small and can go through JSON; after `set_state` the batches go on exactly
    where they were.

    Raises:
        UserError: the data is not prepared, or `batch_size` is no multiple of `process_count`.
    """
    mine = _rows_of_process(data, process_index, process_count)
    manifest = read_manifest(data.folder)
    documents = _documents(data, manifest, manifest.train_shards)
    shuffled = documents.shuffle(seed=data.seed).repeat()  # every epoch is shuffled anew
    packed = PackedRows(shuffled.to_iter_dataset(_READING), data.seq_len)
    return iter(packed.batch(data.batch_size).map(partial(_to_batch, mine=mine)))


def validation_batches(data: DataConfig, process_index: int = 0, process_count: int = 1) -> grain.IterDataset:
    """Returns the batches of the validation split, every document once, in a fixed order; iterate it at will.

    Every process gets its rows of the same global batches, so that all of them see the same number; the last
    batch is filled up with padding.

    Raises:
        UserError: as `train_batches`, or if nothing was held out.
    """
    mine = _rows_of_process(data, process_index, process_count)
    manifest = read_manifest(data.folder)
    if not manifest.validation_shards:
        raise UserError(
            f"data.folder {data.folder} has no validation documents; prepare another one with "
            "data.validation_fraction above 0."
        )
    documents = _documents(data, manifest, manifest.validation_shards)
    packed = PackedRows(documents.to_iter_dataset(_READING), data.seq_len)
    fill = partial(grain.experimental.batch_and_pad, batch_size=data.batch_size)
    return packed.batch(data.batch_size, batch_fn=fill).map(partial(_to_batch, mine=mine))


def _rows_of_process(data: DataConfig, process_index: int, process_count: int) -> slice:
    if not 0 <= process_index < process_count:
        raise UserError(f"There is no process {process_index} of {process_count}.")
    if data.batch_size % process_count:
        raise UserError(
            f"data.batch_size is {data.batch_size}; it must be a multiple of the number of processes ({process_count})."
        )
    rows = data.batch_size // process_count
    return slice(process_index * rows, (process_index + 1) * rows)


def _documents(data: DataConfig, manifest: Manifest, shards: tuple[Shard, ...]) -> grain.MapDataset:
    source = grain.sources.ArrayRecordDataSource([str(Path(data.folder) / shard.file) for shard in shards])
    return grain.MapDataset.source(source).map(partial(np.frombuffer, dtype=manifest.dtype))


def _to_batch(rows: Row, mine: slice) -> Batch:
    rows = {name: values[mine] for name, values in rows.items()}
    return Batch(**rows, loss_mask=(rows["segment_ids"] > 0).astype(np.float32))
