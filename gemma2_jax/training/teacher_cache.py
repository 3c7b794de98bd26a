"""Writes a teacher's cache: one forward pass of the teacher over the rows that a student will train on."""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gemma2_jax import stops
from gemma2_jax.config import UserError, to_dict, usable
from gemma2_jax.data.pipeline import tokenizer_of, train_batches
from gemma2_jax.data.shards import RecordWriter, record_file_size
from gemma2_jax.data.tokenizer import Tokenizer
from gemma2_jax.distill.cache.encoding import EncodingConfig, Entries, check_encoding, encode_batch
from gemma2_jax.distill.cache.manifest import (
    FORMAT,
    CacheFile,
    CacheManifest,
    DataOrder,
    find_cache,
    refuse_other_dtype,
    refuse_other_encoding,
    refuse_other_order,
    refuse_other_teacher,
    write_cache_manifest,
)
from gemma2_jax.distill.cache.records import Packed, Packer, log_grid, row_checksums
from gemma2_jax.distill.rows import check_rows
from gemma2_jax.distill.teacher import as_teacher, load_teacher
from gemma2_jax.files import locked
from gemma2_jax.formats.identity import source_identity
from gemma2_jax.formats.load import check_readable, open_for
from gemma2_jax.machine import cores
from gemma2_jax.model.config import ComputeConfig
from gemma2_jax.model.transformer import Gemma2
from gemma2_jax.processes.agreed_stop import AgreedStop, stopping_together
from gemma2_jax.processes.hosts import HostsConfig, check_agreement, from_all, is_first, wait_for_all
from gemma2_jax.processes.sharing import check_shared
from gemma2_jax.run import RunConfig
from gemma2_jax.sharding.feeding import feeding_share
from gemma2_jax.sharding.layout import batch_sharding, laid_out, on_mesh
from gemma2_jax.sharding.mesh import build_mesh
from gemma2_jax.training.progress import duration

CHUNK_ROWS = 4096  # rows per chunk over all processes; each process writes one file per chunk
# Size and time are estimated from at least this many steps and tokens; fewer tokens would not give the average size of
# a record. The first step compiles and is not timed.
_ESTIMATED_STEPS, _ESTIMATED_TOKENS = 4, 8192


def check_cache_settings(config: RunConfig) -> str:
    """Checks that a configuration sets the keys that writing a cache needs, and returns distill.cache.

    Raises:
        UserError: distill.cache or distill.encoding is null.
    """
    if config.distill.cache is None or config.distill.encoding is None:
        raise UserError(
            "distill.cache and distill.encoding must be set to write a teacher's cache; write distill=cached to set "
            "distill.encoding."
        )
    return config.distill.cache


def check_teacher(config: RunConfig) -> None:
    """Raises UserError if distill.teacher is null or unreadable. Call it before data is prepared."""
    check_readable("distill.teacher", _teacher_path(config), config.tokenizer.path)


def _teacher_path(config: RunConfig) -> str:
    if config.distill.teacher is None:
        raise UserError("distill.teacher is null; it must be a checkpoint of the teacher.")
    return config.distill.teacher


def _folder(config: RunConfig) -> str:
    assert config.distill.cache is not None  # checked by `check_cache_settings`
    return config.distill.cache


def _encoding(config: RunConfig) -> EncodingConfig:
    assert config.distill.encoding is not None  # checked by `check_cache_settings`
    return config.distill.encoding


def write_cache(config: RunConfig, estimate_only: bool = False) -> CacheManifest:
    """Writes the teacher targets for all steps of a run into distill.cache; returns at once if they are complete.

    First prints an estimate of size and time, from a few steps, to standard error. A cache that was interrupted, or
    written for fewer steps, is resumed after its last file and ends with the same rows as without the interruption.
    Every process of a job writes the files of its own rows into the shared folder.

    Args:
        estimate_only: print the estimate and write nothing.

    Returns:
        The manifest; with `estimate_only`, that of the rows that exist.

    Raises:
        UserError: the folder holds a cache for other data, teacher or settings, or is being written; the teacher
            has another tokenizer, or its logits are NaN; the batch does not fit the mesh; the disk is full.
    """
    check_cache_settings(config)
    config = replace(config, hosts=HostsConfig())  # the processes do not affect the cache's content
    mesh = build_mesh(config.mesh)
    with jax.set_mesh(mesh), laid_out(config.layout), ExitStack() as stack:
        check_rows(config.data.batch_size, config.data.seq_len, mesh, "data.batch_size")
        _, shares = feeding_share(mesh)
        if shares != jax.process_count():
            raise UserError(
                f"mesh divides a batch's rows into {shares} parts for {jax.process_count()} processes, but each "
                "process needs its own rows to write a cache; choose mesh.tensor x mesh.sequence so that it divides "
                "the number of devices per process."
            )
        manifest = _manifest(config)
        check_agreement({**to_dict(config), **_shared_inputs(config, manifest)})
        if is_complete(config, manifest):
            return manifest
        stack.enter_context(stops.resuming(lambda: "" if estimate_only else _resume_message(config)))
        if not estimate_only:
            if is_first():
                _lock(config, manifest, stack)
            check_shared([("distill.cache", _folder(config))])
        return _CacheWriter(config, manifest, mesh, stack).run(estimate_only)


def _shared_inputs(config: RunConfig, manifest: CacheManifest) -> dict[str, Any]:
    """Everything on disk that must be the same for all processes, so that their files form one cache."""
    data = {
        f"{name} of data.folder {config.data.folder}": getattr(manifest.order, name)
        for name in ("documents", "tokenizer")
    }
    weights = f"the weights of distill.teacher {config.distill.teacher}"
    return {"distill.cache's rows": manifest.rows, weights: manifest.teacher, **data}


def _lock(config: RunConfig, manifest: CacheManifest, stack: ExitStack) -> None:
    """Locks the cache against other writers until the stack is closed."""
    try:
        with usable("distill.cache", _folder(config)):
            stack.enter_context(locked(_folder(config), wait=False))
    except BlockingIOError:
        raise UserError(
            f"distill.cache {_folder(config)} is being written by another process; wait for it."
        ) from None
    found = find_cache(_folder(config))
    if found is not None and found != manifest:
        raise UserError(
            f"distill.cache {_folder(config)} was changed by another process in the meantime; run the same command "
            "again to resume it."
        )


def _resume_message(config: RunConfig) -> str:
    """Describes what the same command does after a stop."""
    found = find_cache(_folder(config))
    if found is None:
        return f"nothing of {_folder(config)} is written yet; the same command starts from the beginning"
    return f"{found.rows:,} rows of {_folder(config)} are written; the same command resumes after them"


def is_complete(config: RunConfig, manifest: CacheManifest) -> bool:
    """Whether a cache has the rows of all steps."""
    return len(manifest.files) > 0 and manifest.rows >= config.training.steps * config.data.batch_size


def _manifest(config: RunConfig) -> CacheManifest:
    """The manifest of the cache in the folder, checked against the configuration; an empty one if there is none."""
    tokenizer = tokenizer_of(config.data, config.tokenizer)
    order = DataOrder.of(config.data, jax.process_count())
    teacher = _teacher_path(config)
    source = open_for(tokenizer, teacher, "distill.teacher")
    check_encoding(_encoding(config), source.config)
    identity = source_identity(source)
    found = find_cache(_folder(config))
    if found is None:
        return CacheManifest(
            format=FORMAT,
            order=order,
            teacher=identity,
            teacher_path=teacher,
            dtype=config.distill.dtype,
            num_tokens=source.config.num_tokens,
            encoding=_encoding(config),
            grid=log_grid(_encoding(config), source.config),
            files=(),
        )
    refuse_other_order(_folder(config), found, order)
    refuse_other_teacher(_folder(config), found, identity, teacher)
    refuse_other_encoding(_folder(config), found, _encoding(config))
    refuse_other_dtype(_folder(config), found, config.distill.dtype)
    return found


class _CacheWriter:
    """Computes and writes the missing rows of a cache."""

    def __init__(self, config: RunConfig, manifest: CacheManifest, mesh: Mesh, stack: ExitStack) -> None:
        self._config, self._manifest, self._mesh = config, manifest, mesh
        self._first_step = manifest.rows // config.data.batch_size
        self._packer = Packer(manifest.encoding, manifest.grid, manifest.num_tokens, config.data.seq_len)
        self._pool = stack.enter_context(ThreadPoolExecutor(cores()))
        self._console = Console(stderr=True, quiet=not is_first())
        self._progress = stack.enter_context(
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("rows"),
                TimeRemainingColumn(),
                console=self._console,
                disable=not self._console.is_terminal,
                transient=True,
            )
        )

    def run(self, estimate_only: bool) -> CacheManifest:
        config = self._config
        per_chunk = self._steps_per_chunk()
        steps = self._estimated(self._packed())
        head = next(steps)  # compiles; a stop before this point has nothing to save
        if estimate_only:
            return self._manifest
        steps = itertools.chain([head], steps)
        bar = self._progress.add_task("teacher", total=config.training.steps * config.data.batch_size)
        with stopping_together(config.checkpoint.grace_seconds, self._print_line) as stop:
            for first in range(self._first_step, config.training.steps, per_chunk):
                count = min(per_chunk, config.training.steps - first)
                self._write_chunk(itertools.islice(steps, count), stop)
                self._progress.update(bar, completed=self._manifest.rows)
                if stop.is_due():
                    stops.check()
        wait_for_all("cache")  # until process 0 has written the manifest
        self._print_line(
            f"{_folder(config)}: {self._manifest.rows:,} rows of {config.data.seq_len:,} tokens, "
            f"{_bytes(self._manifest.size)} in {len(self._manifest.files)} files"
        )
        return self._manifest

    def _steps_per_chunk(self) -> int:
        return max(1, CHUNK_ROWS // self._config.data.batch_size)

    def _write_chunk(self, steps: Iterator[list[Packed]], stop: AgreedStop) -> None:
        """Writes one file per process, then the manifest that lists them; a stop makes the files shorter."""
        folder, (share, _) = Path(_folder(self._config)), feeding_share(self._mesh)
        number = len(self._manifest.files) // jax.process_count()
        writer = RecordWriter(folder / f"signals-{number:05d}-{share:03d}.arrayrecord", ",uncompressed")
        rows = largest = 0
        try:
            for step in steps:
                for packed in step:
                    writer.write(packed.record)
                    rows += 1
                    largest = max(largest, packed.largest)
                if stop.is_due():
                    break
            file = writer.finish()
        except BaseException:
            writer.abandon()
            raise
        own = CacheFile(file.file, file.size, file.sha256, share, rows, largest)
        files = [CacheFile(**values) for values in from_all(asdict(own))]
        self._manifest = replace(self._manifest, files=(*self._manifest.files, *files))
        if is_first():
            write_cache_manifest(folder, self._manifest)

    def _estimated(self, steps: Iterator[list[Packed]]) -> Iterator[list[Packed]]:
        """Yields the steps unchanged, after printing the size and time of all of them, estimated from the first few."""
        tokens = self._config.data.batch_size * self._config.data.seq_len
        head = list(itertools.islice(steps, 1))
        begun = time.perf_counter()
        head += itertools.islice(steps, max(_ESTIMATED_STEPS, -(-_ESTIMATED_TOKENS // tokens)) - 1)
        seconds = time.perf_counter() - begun
        left = self._config.training.steps - self._first_step
        records = [packed.record for step in head for packed in step]
        record = sum(map(len, records)) / len(records)
        content = record * left * self._config.data.batch_size
        size = self._size_of_files(left, record)
        sized = (
            f"{_folder(self._config)}: {left * self._config.data.batch_size:,} rows to go, about {_bytes(size)} "
            f"({content / left / tokens:.1f} bytes a token; {_bytes(size - content)} are headers and padding of files)"
        )
        timed = len(head) - 1  # without the first step, whose time includes compilation
        each = seconds / max(1, timed)
        time_left = f" and {duration(each * left)} ({tokens / each:,.0f} tokens/s)" if timed else ""
        self._print_line(sized + time_left)
        yield from head
        yield from steps

    def _size_of_files(self, steps: int, record: float) -> int:
        """Size in bytes of the files of all processes for `steps` steps, with records of `record` bytes on average."""
        own_rows = self._config.data.batch_size // jax.process_count()
        chunk = self._steps_per_chunk()
        rows = [min(chunk, steps - first) * own_rows for first in range(0, steps, chunk)]
        return sum(record_file_size(each, round(each * record)) for each in rows) * jax.process_count()

    def _packed(self) -> Iterator[list[Packed]]:
        """Yields the records of each step's rows, packed by threads while the devices compute the next step."""
        for entries, checksums in self._encoded():
            rows = [
                jax.tree.map(lambda values, row=row: values[row], entries) for row in range(len(checksums))
            ]
            yield list(self._pool.map(self._packer.pack, rows, checksums))

    def _encoded(self) -> Iterator[tuple[Entries, list[int]]]:
        """Yields the entries and row checksums of each step, one step behind the devices."""
        config = self._config
        share, shares = feeding_share(self._mesh)
        tokenizer = Tokenizer.load(config.tokenizer.path)
        teacher = load_teacher(config.distill, config.model, tokenizer, self._mesh)
        compute = replace(config.compute, dtype=config.distill.dtype)
        encode = self._encoder(compute)
        own = config.data.batch_size // shares
        ahead: tuple[Any, list[int]] | None = None
        batches = itertools.islice(train_batches(config.data, share, shares), config.training.steps)
        for step, batch in enumerate(batches):
            if step < self._first_step:  # in the cache already; the iterator has to pass it, as in a run
                continue
            first = step * config.data.batch_size + share * own
            rows = np.arange(first, first + own, dtype=np.uint32)
            entries = encode(teacher, *on_mesh((batch, rows), self._mesh))
            if ahead is not None:
                yield jax.tree.map(_local_rows, ahead[0]), ahead[1]
            ahead = entries, row_checksums(batch)
        if ahead is not None:
            yield jax.tree.map(_local_rows, ahead[0]), ahead[1]

    def _encoder(self, compute: ComputeConfig) -> Any:
        def encode(teacher: Gemma2, *arguments: Any) -> Entries:
            with as_teacher(self._config.distill):
                return encode_batch(
                    _encoding(self._config), teacher, compute, self._config.objective.block_tokens, *arguments
                )

        return jax.jit(encode, out_shardings=batch_sharding(self._mesh))

    def _print_line(self, text: str) -> None:
        self._progress.console.print(text, soft_wrap=True, highlight=False)


def _local_rows(values: jax.Array) -> np.ndarray:
    """This process's rows of an array that is sharded along its first axis only."""
    parts = {shard.index[0].start or 0: shard.data for shard in values.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _bytes(size: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"
