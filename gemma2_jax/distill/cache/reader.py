"""Reads a cache alongside the data that it was made for: batches with teacher targets."""

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
from gemma2_jax.formats.identity import source_identity
from gemma2_jax.formats.load import open_source
from gemma2_jax.objectives.targets import SparseTargets

# One thread decodes ahead of training. A second one would mostly wait for Python's global interpreter lock.
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
    """Checks that a cache is what a run needs, and returns its manifest.

    Args:
        cache: folder of the cache.
        data: data configuration of the run.
        steps: number of steps of the run, whose rows the cache must hold.
        process_count: number of parts that the training processes divide each batch into.
        temperature: temperature of the run's objective, which must be that of the cache; None accepts any.
        teacher: checkpoint of the required teacher; None accepts any.
        encoding: required encoding; None accepts any.
        dtype: required dtype of the teacher; None accepts any.

    Raises:
        UserError: the cache was made for other data, tokenizer, order, teacher or settings, or holds too few rows.
    """
    manifest = read_cache(cache)
    refuse_other_order(cache, manifest, DataOrder.of(data, process_count))
    if encoding is not None:
        refuse_other_encoding(cache, manifest, encoding)
    if dtype is not None:
        refuse_other_dtype(cache, manifest, dtype)
    if temperature is not None and manifest.encoding.temperature != temperature:
        raise UserError(
            f"distill.cache {cache} was made at temperature {manifest.encoding.temperature}, but objective.temperature "
            f"is {temperature}; both must be the same."
        )
    if manifest.rows < steps * data.batch_size:
        raise UserError(
            f"distill.cache {cache} holds {manifest.rows} rows, but training.steps ({steps}) times data.batch_size "
            f"({data.batch_size}) needs {steps * data.batch_size}; run `gemma2 teacher-cache` to add the others."
        )
    if teacher is not None:
        refuse_other_teacher(cache, manifest, source_identity(open_source(teacher)), teacher)
    return manifest


def cached_batches(data: DataConfig, cache: str, share: int = 0, shares: int = 1) -> "CachedBatches":
    """`train_batches` with teacher targets in each batch; ends at the end of the cache. See `check_cache`.

    Raises:
        UserError: as `train_batches` and `check_cache`; during iteration, if a row differs from the cached one.
    """
    manifest = check_cache(cache, data, steps=0, process_count=shares)
    steps = grain.MapDataset.source(_Steps(cache, manifest, share))
    batches = train_batches(data, share, shares)
    return CachedBatches(batches, iter(steps.to_iter_dataset(_READING)), cache)


class CachedBatches(grain.DatasetIterator):
    """Yields this process's part of each `Batch`, as NumPy arrays, with its `teacher_targets`.

    Its state combines those of the data and the cache.

    Attributes:
        batches: the iterator over the data alone, which advances together with this one.
    """

    def __init__(self, batches: grain.DatasetIterator, targets: grain.DatasetIterator, cache: str) -> None:
        super().__init__((batches, targets))
        self.batches, self._targets, self._cache = batches, targets, cache

    def __next__(self) -> Batch:
        sparse, checksums = next(self._targets)
        batch = next(self.batches)
        if checksums != row_checksums(batch):
            raise UserError(
                f"distill.cache {self._cache} holds other rows than data.folder, although its manifest matches; delete "
                "it and run `gemma2 teacher-cache`."
            )
        return replace(batch, extra={"teacher_targets": sparse})

    def get_state(self) -> dict[str, Any]:
        return {"data": self.batches.get_state(), "cache": self._targets.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self.batches.set_state(state["data"])
        self._targets.set_state(state["cache"])


class _Steps:
    """Random access to a process's teacher targets, one item per step: (SparseTargets, checksums of its rows)."""

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
