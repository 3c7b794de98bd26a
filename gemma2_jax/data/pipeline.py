"""Reads batches from shards with Grain: deterministic, one share per process, resumable at any batch."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import grain
import numpy as np

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import DataConfig, TokenizerConfig
from gemma2_jax.data.fitting import FittedRows
from gemma2_jax.data.masks import from_record
from gemma2_jax.data.mixture import components
from gemma2_jax.data.packing import PackedRows
from gemma2_jax.data.prepared_settings import refuse_other_conversations, refuse_unusable_conversations
from gemma2_jax.data.shards import DataManifest, Shard, read_data_manifest
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
    Conversations are packed whole, `data.packing_window` at a time, and too long ones handled as `data.too_long` says.
    A process gets part `share` of the rows of each global batch, which does not depend on `shares`. `get_state()` is
    small and survives JSON; after `set_state` with the merged states of all processes, the batches continue exactly
    where they stopped, on any number of processes.

    Raises:
        UserError: the data is not prepared, or with other settings of conversations; `batch_size` is not a multiple
            of `shares`; there are fewer documents than streams; or no terminator of a conversation carries loss.
    """
    own_rows = _rows_of_share(data, share, shares)
    streams = [_streams(part) for part, _ in components(data)]
    weights = [weight for _, weight in components(data)]

    def open_stream(number: int) -> grain.IterDataset:
        rows = [stream(number) for stream in streams]
        return rows[0] if len(rows) == 1 else grain.IterDataset.mix(rows, weights)

    if data.streams == 1:
        return iter(open_stream(0).batch(data.batch_size).map(partial(to_batch, own_rows=own_rows)))
    size = data.batch_size // data.streams
    return StreamedBatches(
        lambda number: iter(open_stream(number).batch(size)), data.streams, data.batch_size, own_rows
    )


def _streams(data: DataConfig) -> Callable[[int], grain.IterDataset]:
    """Returns the function from a stream's number to its endless rows; `data` is no mixture."""
    manifest = _manifest(data)
    if manifest.train.documents < data.streams:
        raise UserError(
            f"data.folder {data.folder} has {manifest.train.documents} documents to train on, "
            f"fewer than data.streams ({data.streams}); lower data.streams, or prepare more documents."
        )
    documents = _documents(data, manifest, manifest.train_shards)
    if data.streams == 1:
        return lambda number: _shuffled_rows(data, manifest, documents)
    # Divided before it is shuffled: the same in every epoch.
    return lambda number: _shuffled_rows(data, manifest, documents[number :: data.streams])


def validation_batches(
    data: DataConfig, share: int = 0, shares: int = 1, limit: int | None = None
) -> Iterable[Batch]:
    """Returns the batches of the validation split: every document once, in a fixed order, iterable repeatedly.

    Those of a mixture follow one another, and `limit` is divided among its sources by weight.

    Every process gets its rows of the same global batches, so that all have the same number of batches; the last
    batch is padded.

    Args:
        limit: maximum number of batches. A larger split is sampled: documents from the whole split, the same ones
            each time, independent of `data.seed`.

    Raises:
        UserError: as `train_batches`, or no document was held out.
    """
    if data.mixture:
        return _Chained(list(_mixed_validation(data, share, shares, limit)))
    own_rows = _rows_of_share(data, share, shares)
    manifest = _manifest(data)
    documents = stored_documents(data, "validation")
    held_out = manifest.validation
    rows = -(-(held_out.tokens - held_out.documents) // data.seq_len)
    if manifest.conversations is not None:
        rows = held_out.documents  # at most; how many depends on how they fit
    bounded = limit is not None and rows > limit * data.batch_size
    if bounded:
        documents = documents.shuffle(seed=0)
    packed = _rows(data, manifest, documents, len(documents))
    fill = partial(grain.experimental.batch_and_pad, batch_size=data.batch_size)
    batches = packed.batch(data.batch_size, batch_fn=fill).map(partial(to_batch, own_rows=own_rows))
    return grain.experimental.LimitIterDataset(batches, limit) if bounded else batches


def stored_documents(data: DataConfig, split: Literal["train", "validation"]) -> grain.MapDataset:
    """Returns the documents of a split in the order of the source: token ids or, of conversations, `MaskedTokens`.

    Args:
        data: no mixture; `components` returns the parts of one.

    Raises:
        UserError: the data is not prepared, or no document was held out.
    """
    manifest = _manifest(data)
    if split == "train":
        return _documents(data, manifest, manifest.train_shards)
    if not manifest.validation_shards:
        raise UserError(
            f"data.folder {data.folder} has no validation documents; prepare another folder with "
            "data.validation_fraction above 0."
        )
    return _documents(data, manifest, manifest.validation_shards)


class _Chained:
    """The batches of several iterables, one after another, iterable repeatedly."""

    def __init__(self, parts: Sequence[Iterable[Batch]]) -> None:
        self._parts = parts

    def __iter__(self) -> Iterator[Batch]:
        return itertools.chain.from_iterable(self._parts)


def _mixed_validation(
    data: DataConfig, share: int, shares: int, limit: int | None
) -> Iterator[Iterable[Batch]]:
    parts = components(data)
    total = sum(weight for _, weight in parts)
    for part, weight in parts:
        own = None if limit is None else max(1, round(limit * weight / total))
        yield validation_batches(part, share, shares, own)


def _manifest(data: DataConfig) -> DataManifest:
    manifest = read_data_manifest(data.folder)
    refuse_other_conversations(manifest, data)
    refuse_unusable_conversations(manifest, data)
    return manifest


def _rows(
    data: DataConfig, manifest: DataManifest, documents: grain.MapDataset, epoch: int
) -> grain.IterDataset:
    """Returns the rows of documents, of which `epoch` are one epoch."""
    examples = documents.to_iter_dataset(_READING)
    if manifest.conversations is None:
        return PackedRows(examples, data.seq_len)
    return FittedRows(examples, data.seq_len, data.packing_window, epoch, drop=data.too_long == "drop")


def _shuffled_rows(
    data: DataConfig, manifest: DataManifest, documents: grain.MapDataset
) -> grain.IterDataset:
    """Returns the endless rows of one stream of the training documents."""
    shuffled = documents.shuffle(seed=data.seed).repeat()  # every epoch has its own order
    rows = _rows(data, manifest, shuffled, len(documents))
    # The streams share the buffer, so that it spans the same number of batches for any number of streams. A window
    # longer than an epoch would repeat some documents before others have appeared.
    counts = manifest.train
    epoch = (
        (counts.tokens - counts.documents) // data.seq_len
        if manifest.conversations is None
        else manifest.train_lengths.rows(data.seq_len)
    )
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
    """Returns documents: token ids or, of conversations, `MaskedTokens`."""
    source = _Records(Path(data.folder), shards)
    decode = np.frombuffer if manifest.conversations is None else from_record
    return grain.MapDataset.source(source).map(partial(decode, dtype=manifest.dtype))


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
