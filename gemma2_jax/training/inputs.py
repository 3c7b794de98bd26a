"""What a training step is fed: batches on the mesh, and a teacher, who reads them or has read them before."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled

from gemma2_jax.config import UserError
from gemma2_jax.data.batch import Batch
from gemma2_jax.data.config import DataConfig
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.reader import cached_batches, check_cache
from gemma2_jax.distill.cache.writer import CacheTask
from gemma2_jax.distill.fingerprint import fingerprint
from gemma2_jax.distill.matching import of_teacher_for_all
from gemma2_jax.distill.teacher import load_teacher, open_teacher
from gemma2_jax.kernels.lm_head import SparseTargets
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.schedule import ScheduleConfig
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import batch_sharding, on_mesh
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.start import as_prepared
from gemma2_jax.training.step import Taught, build_reading
from gemma2_jax.training.taught_by import TaughtBy


def cache_task(config: RunConfig) -> CacheTask:
    """What has to be written for a run that trains from a cache.

    Raises:
        UserError: it does not say where, or what to keep.
    """
    config, distill = as_prepared(config), config.distill
    if distill.cache is None or distill.encoding is None:
        raise UserError(
            "distill.cache and distill.encoding must be set to write a teacher's cache; distill=cached sets the latter."
        )
    return CacheTask(
        folder=distill.cache,
        encoding=distill.encoding,
        distill=distill,
        model=config.model,
        compute=config.compute,
        data=config.data,
        tokenizer=config.tokenizer,
        mesh=config.mesh,
        layout=config.layout,
        steps=config.training.steps,
        block_tokens=config.objective.block_tokens,
        grace_seconds=config.checkpoint.grace_seconds,
    )


class Inputs:
    """The endless inputs of one run, or of several that share them.

    Args:
        configs: of the runs, which have the same data and, if anybody, the same to teach them. For more than one, the
            teacher reads a batch before their steps, once, and as a whole: each may cut it into microbatches of its
            own (training.accumulation). A batch of own samples (distill.on_policy) needs a reading of its own.

    Attributes:
        teacher: that a step asks; None without one, or where a cache stands in for it.
        judge: the teacher that validations compare a run with, beside a cache too; None without one.
        taught_by: tells who teaches from another, wherever it lies; None without one.
        batches: the iterator on the host, whose state belongs into a checkpoint.
        share: which part of each batch's rows this process feeds, of how many.

    Raises:
        UserError: data, teacher or cache do not fit the configuration.
    """

    def __init__(self, configs: Sequence[RunConfig], tokenizer: Tokenizer, mesh: Mesh) -> None:
        config = configs[0]  # in all that is asked of it here, any of them
        self._data, self._mesh = config.data, mesh
        self._entries: int | None = None  # K of a cache
        self.teacher: Gemma2 | None = None
        self.judge: Gemma2 | None = None
        self.taught_by: TaughtBy | None = None
        self.batches: grain.DatasetIterator
        distill, data = config.distill, config.data
        self.share = share = feeding_share(mesh)
        if distill.cache is None:
            self.batches = train_batches(data, *share)
        else:
            temperature = config.objective.temperature
            assert not isinstance(temperature, ScheduleConfig)  # as RunConfig has it
            manifest = check_cache(
                distill.cache,
                data,
                config.training.steps,
                share[1],
                temperature,
                distill.teacher,
                distill.encoding,
                # Without a teacher there is none that would have it.
                None if distill.teacher is None else distill.dtype,
            )
            self._entries = manifest.largest
            self.taught_by = TaughtBy(manifest.teacher, manifest.encoding, manifest.dtype)
            self.batches = cached_batches(data, distill.cache, *share)
        if distill.teacher is not None:
            for other in configs[1:]:  # each may match other layers
                open_teacher(other.distill, other.model, tokenizer)
            self.judge = load_teacher(distill, config.model, tokenizer, mesh)
        if distill.cache is None and self.judge is not None:
            self.teacher = self.judge
            self.taught_by = TaughtBy(fingerprint(self.judge))
        self._read: Compiled | None = None
        if self.teacher is not None and len(configs) > 1:
            capture = of_teacher_for_all(each.distill.match for each in configs)
            reading = build_reading(config.compute, distill, capture)
            self._read = reading.lower(self.teacher, abstract_batch(data, mesh)).compile()

    def __next__(self) -> tuple[Batch, Callable[[], Taught]]:
        """The next batch, and what has been said about it, for who asks.

        The teacher reads it for the first who does: at a step that all take on samples of their own, nobody.
        """
        rows = next(self.batches)
        if self._entries is not None:
            cached: tuple[Batch, SparseTargets] = on_mesh(rows, self._mesh)
            batch, entries = cached
            return batch, lambda: entries
        batch = on_mesh(rows, self._mesh)
        return batch, cache(lambda: self.read(batch))

    def read(self, batch: Batch) -> Taught:
        """What the teacher says about a batch, if it is to read it before the steps; else None."""
        return None if self._read is None else self._read(self.teacher, batch)

    def abstract(self) -> tuple[Batch, Taught]:
        """Shapes, dtypes and shardings of a batch, and of what is said about it."""
        taught: Any = None
        if self._entries is not None:
            taught = abstract_entries(self._data, self._mesh, self._entries)
        elif self._read is not None:
            taught = self._read.out_info
        return abstract_batch(self._data, self._mesh), taught


def abstract_batch(data: DataConfig, mesh: Mesh) -> Batch:
    """Shapes, dtypes and shardings of a batch."""
    ids = _rows(data, mesh, jnp.int32)
    return Batch(ids, ids, ids, ids, _rows(data, mesh, jnp.float32))


def abstract_entries(data: DataConfig, mesh: Mesh, entries: int) -> SparseTargets:
    """Shapes, dtypes and shardings of what a cache with at most `entries` a token says about a batch."""
    return SparseTargets(
        _rows(data, mesh, jnp.int32, entries),
        _rows(data, mesh, jnp.float32, entries),
        _rows(data, mesh, jnp.float32),
    )


def _rows(data: DataConfig, mesh: Mesh, dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
    """[B, T, ...]."""
    shape = (data.batch_size, data.seq_len, *more)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
