"""Reads batches from shards with Grain: deterministic, one share per process, resumable at any batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grain
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.packing import PackedRows
from gemma2_jax.data.shards import Counts, DataManifest, Shard, read_data_manifest
from gemma2_jax.data.streamed_batches import StreamedBatches, to_batch
from gemma2_jax.data.tokenizer import Tokenizer

# Several threads read ahead, so that waits for a slow disk overlap.
_READING = grain.ReadOptions(num_threads=4, prefetch_buffer_size=64)


def tokenizer_of(data: DataConfig, tokenizer: TokenizerConfig) -> Tokenizer:
    """Returns the tokenizer at `tokenizer.path`. Raises UserError if the data was prepared with another one."""
    found, manifest = Tokenizer.load(tokenizer.path), read_data_manifest(data.folder)
    if manifest.tokenizer != found.fingerprint:
        raise UserError(
            f"data.folder {data.folder} was prepared with tokenizer {manifest.tokenizer[:12]}, but tokenizer.path "
            f"{tokenizer.path} is {found.fingerprint[:12]}; prepare the data again in another folder."
        )
    return found


def train_batches(data: DataConfig, share: int = 0, shares: int = 1) -> grain.DatasetIterator:
    """Returns an endless iterator of `Batch` (NumPy arrays, B / shares rows) over the training split.

    Every epoch (of each stream, if there are several) contains every document once, in an order drawn from
    `data.seed` and the epoch. The rows packed from the documents are then shuffled, `data.shuffle_buffer` at a time.
    A process gets part `share` of the rows of each global batch, which does not depend on `shares`. `get_state()` is
    small and survives JSON; after `set_state` with the merged states of all processes, the batches continue exactly
    where they stopped, on any number of processes.

    Raises:
        UserError: the data is not prepared; `batch_size` is not a multiple of `shares`; or there are fewer
            documents than streams.
    """
    own_rows = _rows_of_share(data, share, shares)
    manifest = read_data_manifest(data.folder)
    if manifest.train.documents < data.streams:
        raise UserError(
            f"data.folder {data.folder} has {manifest.train.documents} documents to train on, "
            f"fewer than data.streams ({data.streams}); lower data.streams, or prepare more documents."
        )
    documents = _documents(data, manifest, manifest.train_shards)
    if data.streams == 1:
        rows = _packed(data, documents, manifest.train)
        return iter(rows.batch(data.batch_size).map(partial(to_batch, own_rows=own_rows)))

    def open_stream(number: int) -> grain.DatasetIterator:
        own = documents[number :: data.streams]  # divided before it is shuffled: the same in every epoch
        return iter(_packed(data, own, manifest.train).batch(data.batch_size // data.streams))

    return StreamedBatches(open_stream, data.streams, data.batch_size, own_rows)


def validation_batches(
    data: DataConfig, share: int = 0, shares: int = 1, limit: int | None = None
) -> grain.IterDataset:
    """Returns the batches of the validation split: every document once, in a fixed order, iterable repeatedly.

    Every process gets its rows of the same global batches, so that all have the same number of batches; the last
    batch is padded.

    Args:
        limit: maximum number of batches. A larger split is sampled: documents from the whole split, the same ones
            each time, independent of `data.seed`.

    Raises:
        UserError: as `train_batches`, or no document was held out.
    """
    own_rows = _rows_of_share(data, share, shares)
    manifest = read_data_manifest(data.folder)
    if not manifest.validation_shards:
        raise UserError(
            f"data.folder {data.folder} has no validation documents; prepare another folder with "
            "data.validation_fraction above 0."
        )
    documents = _documents(data, manifest, manifest.validation_shards)
    held_out = manifest.validation
    rows = -(-(held_out.tokens - held_out.documents) // data.seq_len)
    bounded = limit is not None and rows > limit * data.batch_size
    if bounded:
        documents = documents.shuffle(seed=0)
    packed = PackedRows(documents.to_iter_dataset(_READING), data.seq_len)
    fill = partial(grain.experimental.batch_and_pad, batch_size=data.batch_size)
    batches = packed.batch(data.batch_size, batch_fn=fill).map(partial(to_batch, own_rows=own_rows))
    return grain.experimental.LimitIterDataset(batches, limit) if bounded else batches


def _packed(data: DataConfig, documents: grain.MapDataset, counts: Counts) -> grain.IterDataset:
    """Returns the endless rows of one stream of documents; `counts` covers all streams together."""
    shuffled = documents.shuffle(seed=data.seed).repeat()  # every epoch has its own order
    rows = PackedRows(shuffled.to_iter_dataset(_READING), data.seq_len)
    # The streams share the buffer, so that it spans the same number of batches for any number of streams. A window
    # longer than an epoch would repeat some documents before others have appeared.
    epoch = (counts.tokens - counts.documents) // data.seq_len
    window = min(-(-data.shuffle_buffer // data.streams), epoch // data.streams)
    if window <= 1:
        return rows
    # Grain adds the number of the window to the seed and requires the sum to be below 2**32.
    return grain.experimental.WindowShuffleIterDataset(rows, window_size=window, seed=data.seed % 2**31)


def _rows_of_share(data: DataConfig, share: int, shares: int) -> slice:
    if not 0 <= share < shares:
        raise UserError(f"share is {share}; it must be at least 0 and below shares ({shares}).")
    if data.batch_size % shares:
        raise UserError(
            f"data.batch_size is {data.batch_size}; it must be a multiple of {shares}, the number of process shares."
        )
    rows = data.batch_size // shares
    return slice(share * rows, (share + 1) * rows)


def _documents(data: DataConfig, manifest: DataManifest, shards: tuple[Shard, ...]) -> grain.MapDataset:
    source = _Records(Path(data.folder), shards)
    return grain.MapDataset.source(source).map(partial(np.frombuffer, dtype=manifest.dtype))


class _Records:
    """Random access to the records of shards. Raises UserError if a record is damaged."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        self._folder = folder
        with self._damage_as_user_error():
            self._source = grain.sources.ArrayRecordDataSource([str(folder / shard.file) for shard in shards])

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> bytes:
        with self._damage_as_user_error():
            record: bytes = self._source[index]
            return record

    @contextmanager
    def _damage_as_user_error(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError:  # ArrayRecord's checksum
            raise UserError(
                f"A shard of data.folder {self._folder} is damaged; `gemma2 data verify` names it."
            ) from None
