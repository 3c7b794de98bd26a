"""A cache beside the data that it was made for: batches with the teacher's targets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import grain

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.distill.cache.encoding import EncodingConfig
from gemma2_jax.distill.cache.manifest import (
    CacheManifest,
    DataOrder,
    read_cache,
    refuse_other_dtype,
    refuse_other_encoding,
    refuse_other_order,
    refuse_other_teacher,
)
from gemma2_jax.distill.cache.records import Packer, broken_record, row_checksums
from gemma2_jax.distill.teacher_identity import source_identity
from gemma2_jax.formats.load import open_source
from gemma2_jax.objectives.targets import SparseTargets

# Decoded by a thread while the step before is trained on. A second one would wait for Python's lock most of the time.
_READING = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


def check_cache(
    cache: str,
    data: DataConfig,
    steps: int,
    process_count: int = 1,
    temperature: float | None = None,
    teacher: str | None = None,
    encoding: EncodingConfig | None = None,
    dtype: str | None = None,
) -> CacheManifest:
    """The manifest of a cache, after it was found to be what a run needs.

    Args:
        cache: its folder.
        data: of the run.
        steps: of the run: all of its rows must be there.
        process_count: parts that the processes which train feed.
        temperature: of the run's objective, which the cache has to be made at; None accepts any.
        teacher: the checkpoint that it should have been made of; None accepts any.
        encoding: the settings that it should have been made with; None accepts any.
        dtype: that the teacher should have been computed in; None accepts any.

    Raises:
        UserError: it was made for other data, tokenizer, order, teacher or settings, or holds too few rows.
    """
    manifest = read_cache(cache)
    refuse_other_order(cache, manifest, DataOrder.of(data, process_count))
    if encoding is not None:
        refuse_other_encoding(cache, manifest, encoding)
    if dtype is not None:
        refuse_other_dtype(cache, manifest, dtype)
    if temperature is not None and manifest.encoding.temperature != temperature:
        raise UserError(
            f"distill.cache {cache} was made at temperature {manifest.encoding.temperature}, and objective.temperature "
            f"is {temperature}; both must be the same."
        )
    if manifest.rows < steps * data.batch_size:
        raise UserError(
            f"distill.cache {cache} holds {manifest.rows} rows, and training.steps ({steps}) times data.batch_size "
            f"({data.batch_size}) needs {steps * data.batch_size}; add the others by `gemma2 teacher-cache`."
        )
    if teacher is not None:
        refuse_other_teacher(cache, manifest, source_identity(open_source(teacher)), teacher)
    return manifest


def cached_batches(data: DataConfig, cache: str, share: int = 0, shares: int = 1) -> "CachedBatches":
    """`train_batches`, each with the teacher's targets; ends where the cache does. See `check_cache`.

    Raises:
        UserError: as `train_batches` and `check_cache`; later, if a row is not the one that was cached.
    """
    manifest = check_cache(cache, data, steps=0, process_count=shares)
    steps = grain.MapDataset.source(_Steps(cache, manifest, share))
    batches = train_batches(data, share, shares)
    return CachedBatches(batches, iter(steps.to_iter_dataset(_READING)), cache)


class CachedBatches(grain.DatasetIterator):
    """Yields `Batch` of NumPy arrays with `teacher_targets` of its rows in this process; its state is that of both.

    Attributes:
        batches: the iterator without the cache, which moves with this one.
    """

    def __init__(self, batches: grain.DatasetIterator, signals: grain.DatasetIterator, cache: str) -> None:
        super().__init__((batches, signals))
        self.batches, self._signals, self._cache = batches, signals, cache

    def __next__(self) -> Batch:
        sparse, checksums = next(self._signals)
        batch = next(self.batches)
        if checksums != row_checksums(batch):
            raise UserError(
                f"distill.cache {self._cache} holds other rows than data.folder gives now, although its manifest "
                "matches; delete it and run `gemma2 teacher-cache`."
            )
        return replace(batch, extra={"teacher_targets": sparse})

    def get_state(self) -> dict[str, Any]:
        return {"data": self.batches.get_state(), "cache": self._signals.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.batches.set_state(state["data"])
        self._signals.set_state(state["cache"])


class _Steps:
    """Random access to a process's signals, one item a step: (SparseTargets, checksums of its rows)."""

    def __init__(self, cache: str, manifest: CacheManifest, process: int) -> None:
        order = manifest.order
        self._rows = order.batch_size // order.process_count
        self._packer = Packer(manifest.encoding, manifest.grid, manifest.num_tokens, order.seq_len)
        self._largest = manifest.largest
        files = [str(Path(cache) / file.file) for file in manifest.files if file.process == process]
        self._records = grain.sources.ArrayRecordDataSource(files)

    def __len__(self) -> int:
        return len(self._records) // self._rows

    def __getitem__(self, step: int) -> tuple[SparseTargets, list[int]]:
        rows = range(step * self._rows, (step + 1) * self._rows)
        try:
            records = self._records.__getitems__(rows)
        except RuntimeError:  # ArrayRecord's checksum
            raise broken_record() from None
        return self._packer.unpack(records, self._largest)
