"""What a training step is fed: batches on the mesh, and a teacher, who reads them or has read them before."""

from typing import Any

import grain
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gemma2_jax.data.batch import Batch
from gemma2_jax.data.pipeline import train_batches
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.reader import cached_batches, check_cache
from gemma2_jax.distill.teacher import load_teacher
from gemma2_jax.kernels.lm_head import SparseTargets
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.objectives.schedule import ScheduleConfig
from gemma2_jax.sharding.layout import batch_sharding, on_mesh
from gemma2_jax.training.config import RunConfig
from gemma2_jax.training.step import Taught


class Inputs:
    """The endless inputs of one run.

    Attributes:
        teacher: that reads each batch within the step; None without one, or where a cache stands in for it.
        batches: the iterator on the host, whose state belongs into a checkpoint.

    Raises:
        UserError: data, teacher or cache do not fit the configuration.
    """

    def __init__(self, config: RunConfig, tokenizer: Tokenizer, mesh: Mesh) -> None:
        self._mesh = mesh
        self._entries: int | None = None  # K of a cache
        self.teacher: Gemma2 | None = None
        self.batches: grain.DatasetIterator
        distill, data = config.distill, config.data
        share = jax.process_index(), jax.process_count()
        if distill.cache is None:
            if distill.teacher is not None:
                self.teacher = load_teacher(distill, config.model, tokenizer, mesh)
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
            )
            self._entries = manifest.largest
            self.batches = cached_batches(data, distill.cache, *share)
        self._shape = (data.batch_size, data.seq_len)

    def __next__(self) -> tuple[Batch, Taught]:
        """The next batch, and what a cache holds about it."""
        rows = next(self.batches)
        batch, taught = (rows, None) if self._entries is None else rows
        return on_mesh((batch, taught), self._mesh)

    def abstract(self) -> tuple[Batch, Taught]:
        """Shapes, dtypes and shardings of what `next` gives."""
        sharding = batch_sharding(self._mesh)

        def rows(dtype: Any, *more: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((*self._shape, *more), dtype, sharding=sharding)

        ids = rows(jnp.int32)
        batch = Batch(ids, ids, ids, ids, rows(jnp.float32))
        if self._entries is None:
            return batch, None
        K = self._entries
        targets: Any = rows(jnp.int32, K), rows(jnp.float32, K), rows(jnp.float32)
        return batch, SparseTargets(*targets)
